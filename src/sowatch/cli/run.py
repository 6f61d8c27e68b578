"""Starts a command, and watches it and all that it starts.

The command waits until the watch is ready, so nothing of it is missed, from its first exec on. It has
the terminal, stdin, stdout and stderr of sowatch, and gets the signals that sowatch gets; what sowatch
says comes on stdout, too, unless -o names a file for it. sowatch ends when the command does, with its
exit status (128 and the number of the signal that ended it; 127 or 126 if it cannot be run); what it
has left running is watched no longer.

Examples:
  sowatch run -- curl -s https://example.com -o /dev/null
  sowatch run 'ssl|crypto' -- make test          who in this build uses TLS?
  sowatch run --json -o loads.jsonl -- ./server  lines of sowatch apart from those of the server
"""

# Heavy modules (the watcher) are imported only where they are used.

from __future__ import annotations

import os
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Final

from msgspec.structs import replace

from sowatch.cli._child import CommandError, HeldCommand
from sowatch.cli._feed import Feed
from sowatch.cli._front import end_now
from sowatch.cli._options import (
    OpenWatcher,
    add_format,
    add_kinds,
    add_patterns,
    add_proc_root,
    add_strategy,
    open_watcher,
    selection_of,
    wants_json,
)
from sowatch.cli._out import Out, PipeClosed
from sowatch.cli._parser import Parser
from sowatch.cli.watch import add_events, events_of
from sowatch.model.errors import SowatchError, UsageError

#: How long the last lines wait for a reader that does not read.
_LAST_WORDS_S: Final = 2.0
#: An output to which nothing was written for so long after the command has ended, though there is more, hangs.
_STUCK_S: Final = 3.0


def configure(parser: Parser) -> None:
    """Add the command's options."""
    add_patterns(parser)
    add_format(parser)
    add_strategy(parser)
    add_kinds(parser, default="library")
    add_events(parser)
    parser.add_argument("-o", "--output", metavar="FILE", help="write the lines of sowatch there, not to stdout")
    add_proc_root(parser)
    parser.set_defaults(pid=[], container=None, exclude_self=False, no_snapshot=True)
    parser.take_command("COMMAND [ARGUMENT ...]")


def run(args: Namespace, *, out: Out, warn: Callable[[str], None], open_watcher: OpenWatcher = open_watcher) -> int:
    """Run the command to its end; returns its exit status.

    Raises:
        SowatchError: it cannot be watched, or cannot be run.
    """
    as_json = wants_json(args)
    if not args.command:
        raise UsageError("no command given. Put it after two dashes: sowatch run -- COMMAND [ARGUMENT ...].")
    is_over = threading.Event()
    try:
        return _run(args, out, warn, open_watcher, is_over, as_json=as_json)
    finally:
        is_over.set()


def _run(
    args: Namespace,
    out: Out,
    warn: Callable[[str], None],
    open_watcher: OpenWatcher,
    is_over: threading.Event,
    *,
    as_json: bool,
) -> int:
    selection = selection_of(args)
    with _output(args.output, out) as lines, HeldCommand(args.command) as command:
        # Without a snapshot: what the child has mapped before its exec is ours.
        watcher = open_watcher(replace(selection, pids=frozenset({command.pid}), follow=True))
        feed = Feed(watcher, lines, warn, lambda _: command.release())

        def on_end() -> None:
            lines.finish_within(_LAST_WORDS_S)
            feed.stop()
            _end_if_stuck(lines, command, warn, is_over)

        from sowatch.cli._views import JsonView, TextView

        command.begin(on_end)
        view = JsonView(lines) if as_json else TextView(lines, with_rule=len(selection.rules) > 1)
        try:
            feed.show(view, events_of(args, as_json=as_json))
            code = feed.exit_code()  # it says what was lost
            if command.is_held:
                return code
        except PipeClosed:
            lines.discard()
            command.release()  # that nobody reads what it loads is no reason for it to end
        except SowatchError as error:
            if command.is_held:
                raise
            warn(str(error))
            lines.discard()
        finally:
            feed.stop()
        return command.wait()


def _end_if_stuck(lines: Out, command: HeldCommand, warn: Callable[[str], None], is_over: threading.Event) -> None:
    """Ends this process if the main thread hangs in a write or a close; else returns when that is done."""
    seen = -1
    while not is_over.wait(_STUCK_S):
        if lines.written_bytes != seen:
            seen = lines.written_bytes
            continue
        warn("the file system of its output does not answer: the last lines were not written.")
        try:
            code = command.wait()
        except CommandError as error:
            warn(str(error))
            code = error.exit_code
        end_now(code)


def _open(path: str) -> int:
    """A descriptor for writing. It is opened on a thread of its own, as it may never be: then a signal ends us."""
    opened: Future[int] = Future()

    def work() -> None:
        try:
            opened.set_result(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666))
        except OSError as error:
            opened.set_exception(error)

    thread = threading.Thread(target=work, name="sowatch-output", daemon=True)
    thread.start()
    fd = opened.result()
    thread.join()
    return fd


@contextmanager
def _output(path: str | None, out: Out) -> Iterator[Out]:
    if path is None:
        yield out
        return
    try:
        fd = _open(path)
    except OSError as error:
        raise SowatchError(f"cannot write to {path}: {error.strerror}. Give -o a file that can be written.") from error
    try:
        yield Out(fd)
    finally:
        os.close(fd)
