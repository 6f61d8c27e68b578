"""Count and time calls of library functions, wherever that library is or will be loaded.

A target is LIB:SYMBOL. LIB is a path, the stem of a soname (libz finds /usr/lib/.../libz.so.1, and
libz-3e69114b.so.1.2, as wheels name it), a prefix of a build id, or a regular expression for the path. SYMBOL
is a name, a pattern (SSL_*), a place in a function (f+0x10), or cpp:ns::f. Processes that run already and those
that start later are both counted. Times are taken in the kernel, by powers of two.

With types, write(int, str:64, size) -> ssize, each call is shown with its arguments and result. Types are char, short,
int, long, size, ssize, uint, ulong, ..., bool, hex, ptr, str:N, bytes:N; _ leaves an argument out.

Examples:
  sowatch trace libz:deflate libz:inflate           who compresses, and how long it takes
  sowatch trace 'libssl:SSL_*' --duration 10 --by library
  sowatch trace libssl:SSL_write --json --interval 5 | jq .calls
  sowatch trace 'libc:getenv(str) -> str' --pid 1234    each call
  sowatch trace libz:deflate --stacks 5             who calls it from where
  sowatch trace --list libz                         what could be traced
"""

# Heavy modules (the watcher, rich) are imported only where they are used.

from __future__ import annotations

import argparse
import logging
import os
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from sowatch.cli._options import add_format, add_kinds, add_selection, add_strategy, config_of, kinds_of, wants_json
from sowatch.cli._out import Out, PipeClosed
from sowatch.cli._parser import Parser, seconds
from sowatch.cli._stop import Stopper
from sowatch.cli._trace_views import GROUPS, Json, Table
from sowatch.cli.watch import warn_of_fallback
from sowatch.model.encoding import dumps
from sowatch.model.errors import SowatchError, UsageError
from sowatch.model.escape import one_line, visible
from sowatch.model.events import Library
from sowatch.model.identity import FileId
from sowatch.model.lines import SCHEMA, library_line
from sowatch.model.rules import Rule

if TYPE_CHECKING:
    from sowatch.linux.symbols import Symbol
    from sowatch.uprobes.trace import Trace

#: How often calls are taken that are shown one by one: the kernel can keep some 25,000.
_CALLS_S: Final = 0.05
#: After so long what is mapped already is attached.
_WAITING_S: Final = 2.0


def configure(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument("targets", nargs="*", metavar="LIB:SYMBOL", help="what to count; several may be given")
    add_format(parser)
    add_strategy(parser)
    parser.add_argument(
        "--duration", type=seconds, metavar="SECONDS", help="end after this time, counted from the start"
    )
    parser.add_argument(
        "--interval", type=seconds, default=1.0, metavar="SECONDS", help="how often figures are shown. Default: 1"
    )
    add_selection(parser)
    parser.add_argument(
        "--by", metavar="GROUP", default="process", help=f"a row for each {', '.join(GROUPS)}. Default: process"
    )
    parser.add_argument("--no-latency", action="store_true", help="count only: half the cost for each call")
    parser.add_argument(
        "--stacks", type=_number, default=0, metavar="N", help="show the N places that call each function most often"
    )
    add_kinds(parser, default="library and executable")
    parser.add_argument(
        "--list", metavar="LIB", help="show the functions that can be traced of a file, or of what is mapped, and end"
    )
    parser.add_argument(
        "--proc-root", default="/proc", metavar="DIR", help="where the host's proc is mounted. Default: /proc"
    )


def run(args: Namespace, *, out: Out, warn: Callable[[str], None]) -> int:
    """Trace until the end is asked for; returns the exit code."""
    if args.list is not None:
        return _list(args, out, warn)
    if not args.targets:
        raise UsageError("nothing to trace. Give a library and a function: sowatch trace libz:deflate.")
    if args.by not in GROUPS:
        raise UsageError(f"unknown group {args.by!r}. Use one of: {', '.join(GROUPS)}.")
    if args.interval < 0.1:
        raise UsageError("--interval is at least 0.1 seconds.")
    from sowatch.uprobes.trace import Trace, parse_target

    as_json = wants_json(args)
    targets = [parse_target(text) for text in args.targets]
    trace = Trace(
        targets,
        config=config_of(args),
        pids=args.pid,
        container=args.container,
        is_timed=not args.no_latency,
        has_stacks=args.stacks > 0,
        linger_s=max(5.0, 2 * args.interval),
        kinds=kinds_of(args, default=("library", "executable")),
    )
    is_timed = not args.no_latency or any(one.call_format and one.call_format.result for one in targets)
    shows_calls = any(one.call_format is not None for one in targets)
    show: Json | Table
    if as_json:
        show = Json(out, stacks=args.stacks)
    else:
        show = Table(out, args.by, is_timed=is_timed, stacks=args.stacks, is_live=out.is_terminal and not shows_calls)
    # What cannot be attached is part of the answer; the registry's log would say it once more.
    logging.getLogger("sowatch.registry").setLevel(logging.ERROR)
    is_over = threading.Event()
    code = 0
    with Stopper(is_over.set) as stopper:
        try:
            warn_of_fallback(trace.start(), warn)
            if args.duration is not None:
                stopper.stop_after(args.duration)
            waiting = _Waiting(trace, warn)
            figures_at = time.monotonic() + args.interval
            while not is_over.wait(_CALLS_S if shows_calls else args.interval) and not out.reader_is_gone():
                show.calls(trace.take_calls())
                if time.monotonic() >= figures_at - 0.01:
                    figures_at += args.interval
                    show.figures(trace, trace.take(), trace.failures())
                    waiting.look()
                if trace.watcher.wait(0):
                    warn("the watch ended before it was stopped. The figures so far are right.")
                    return 1
            # Before anything is detached: counts go with what is attached.
            show.calls(trace.take_calls(is_last=True))
            failures = trace.failures()
            show.end(trace, trace.take(is_last=True), failures)
            waiting.end()
            code = 1 if failures and not show.has_calls and not trace.attached else 0
        except PipeClosed:
            out.discard()
        finally:
            trace.close()
    return code


class _Waiting:
    """Says which libraries nobody has: once, when there was time to attach to those that are there."""

    def __init__(self, trace: Trace, warn: Callable[[str], None]) -> None:
        self._trace = trace
        self._warn = warn
        self._at = time.monotonic() + _WAITING_S
        self._is_reported = False

    def look(self) -> None:
        if not self._is_reported and time.monotonic() >= self._at:
            self._is_reported = True
            for library in self._trace.unmatched():
                self._warn(
                    f"no process has {one_line(repr(library))} mapped. It is traced as soon as one has; "
                    "see what is mapped: sowatch list."
                )

    def end(self) -> None:
        for library in [] if self._is_reported else self._trace.unmatched():
            self._warn(f"no process had {one_line(repr(library))} mapped: nothing of it was traced. See: sowatch list.")


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 1000):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 1000")
    return int(text)


def _list(args: Namespace, out: Out, warn: Callable[[str], None]) -> int:
    from sowatch.linux.symbols import SymbolError, list_functions, open_checked

    if args.targets:
        raise UsageError("--list takes a library only. Leave out the targets.")
    as_json = wants_json(args)
    # A path is a file as we see it; if there is none, one of those that processes see.
    missing: SowatchError | None = None
    if "/" in args.list and not any(sign in args.list for sign in "*?|[("):
        try:
            fd = open_checked(args.list)
        except SowatchError as error:
            missing = error
        else:
            try:
                _write_functions(out, Library(args.list, _identity(fd)), list_functions(fd), as_json=as_json)
            finally:
                os.close(fd)
            return 0
    found = _mapped_files(args)
    if not found:
        raise missing or SowatchError(
            f"no process has {args.list!r} mapped. Give the path of a file, or see what is mapped: sowatch list."
        )
    unread = 0
    try:
        for library, fd in found:
            try:
                functions = list_functions(fd)
            except SymbolError as error:
                unread += 1
                warn(f"{visible(library.path)} cannot be traced: {error.reason}.")
                continue
            if not as_json and len(found) > 1:
                out.write(f"{visible(library.path)} {library.build_id or ''}".rstrip() + ":\n")
            _write_functions(out, library, functions, as_json=as_json)
    finally:
        for _, fd in found:
            os.close(fd)
    return 1 if unread == len(found) else 0


def _mapped_files(args: Namespace) -> list[tuple[Library, int]]:
    """Each real file that LIB names, once, with a descriptor of it; as far as it can be had."""
    from sowatch.linux.mapped_file import open_mapped
    from sowatch.linux.proc import ProcFs
    from sowatch.uprobes.trace import library_matcher
    from sowatch.watcher.watcher import Watcher

    target = library_matcher(args.list)
    rule = Rule(target.pattern, kind=kinds_of(args, default=("library", "executable")))
    proc = ProcFs(args.proc_root)
    found: dict[FileId, tuple[Library, int]] = {}
    with Watcher(rule, config=config_of(args), pids=frozenset(args.pid), container=args.container) as watcher:
        for mapped in watcher.snapshot():
            library = mapped.library
            if library.id in found or not target.matches(library):
                continue
            fd = open_mapped(
                proc,
                mapped.process.pid,
                library.id,
                library.path,
                mapped.ranges,
                is_own_view=False,
                is_deleted=library.deleted,
                changed_ns=library.changed_ns,
            )
            if fd is not None:
                found[library.id] = library, fd
    return sorted(found.values(), key=lambda one: (one[0].path, one[0].id))


def _identity(fd: int) -> FileId:
    status = os.fstat(fd)
    return FileId(os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)


def _write_functions(out: Out, library: Library, functions: Sequence[Symbol], *, as_json: bool) -> None:
    for seq, one in enumerate(functions, 1):
        if as_json:
            line = {"schema": SCHEMA, "event": "function", "seq": seq, "symbol": one.name, "offset": one.offset}
            line["size"] = one.size
            out.write(dumps({**line, "library": library_line(library)}) + "\n")
        else:
            out.write(f"{visible(one.name)}\n")
    out.flush()
