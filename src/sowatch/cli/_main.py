"""From the words of a command line to an exit code.

The commands are imported one at a time, and what they need only when they run.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from sowatch import __version__
from sowatch.cli._out import Out, PipeClosed, reserve_standard_fds
from sowatch.cli._parser import Parser, TextAsked, did_you_mean
from sowatch.cli._stop import hold_signals, obey_interrupts
from sowatch.model.errors import SowatchError, UsageError

__all__ = ["COMMANDS", "command_parser", "main", "main_parser"]

#: The commands, with the first line of each one's help: `sowatch --help` imports none of them.
COMMANDS: Final = {
    "watch": "Live feed of loads and unloads.",
    "run": "Starts a command, and watches it and all that it starts.",
    "list": "Which process has which library mapped, now.",
    "top": "Libraries and who shares them, live, in the terminal.",
    "trace": "Count and time calls of library functions, wherever that library is or will be loaded.",
    "http": "HTTP requests and responses as they pass TLS libraries.",
    "audit": "Compares the mapping table with an independent scan of /proc.",
    "sbom": "What is really loaded, as a bill of materials: CycloneDX or SPDX 3.",
    "explain": "Why a process or a file is, or is not, covered.",
    "fleet": "Many hosts: who still maps a build, asked of a store that agents send to.",
    "serve": "The agent: watches the host and answers over HTTP, until SIGTERM or SIGINT.",
    "debug": "Queries or commands a running agent, over its unix socket.",
    "schema": "The JSON Schema of what --json prints.",
    "doctor": "What this kernel and this user can do, which strategy is used and why, known kernel risks.",
}

#: Commands that end, or end when they are asked to, whatever file system hangs. The agent has a supervisor.
_BEHIND_FRONT: Final = ("watch", "run", "list", "top", "sbom", "explain", "audit", "trace")

#: Commands that go on until they are to end, and then have something to say.
_STOPPED: Final = ("watch", "run", "top", "trace", "http", "serve")

#: Objects that come to be before Python looks for cycles among them, 700 by itself: what is imported stays, so each
#: look at it is in vain, and they were 6 % of the CPU time until `ready`.
_OBJECTS_BEFORE_COLLECTION: Final = 50_000

#: As a shell reports the end by SIGINT: 128 and the signal's number.
_INTERRUPTED: Final = 130
_INTERRUPTED_TEXT: Final = "interrupted before it was done."

_DESCRIPTION: Final = "Which process has which shared library mapped, on the whole host and its containers, live."
_EXIT_CODES: Final = """\
exit codes: 0 done; 1 could not do it, or a loss stayed unrepaired; 2 wrong usage; 3 not permitted;
130 interrupted before it was done
SOWATCH_TRACEBACK=1 in the environment adds the Python traceback to an error"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after the program's name. Default: those of this process.

    Returns:
        The exit code: 0 done, 1 could not do it, 2 wrong usage, 3 not permitted, 130 interrupted before it was done.
    """
    if argv is not None:
        return _run(argv)
    try:
        return _run_process(sys.argv[1:])
    except KeyboardInterrupt:
        return _INTERRUPTED  # before there was any work, or once more on the way out


def _run_process(words: Sequence[str]) -> int:
    gc.set_threshold(_OBJECTS_BEFORE_COLLECTION, *gc.get_threshold()[1:])
    try:
        reserve_standard_fds()  # before anything is opened that would take their place
    except SowatchError as error:
        _say(str(error), error)
        return error.exit_code
    name = words[0] if words else ""
    if name == "watch":
        hold_signals()
    if _runs_behind_front(words):
        from sowatch.cli._front import run_behind_front

        # A command that `run` has started says itself what a signal means to it.
        return run_behind_front(lambda: _run_until_interrupted(words), is_patient=name == "run")
    return _run_until_interrupted(words)


def _run_until_interrupted(words: Sequence[str]) -> int:
    """The exit code, a second after Ctrl-C at the latest unless the command ends by a `Stopper`."""
    if words and (words[0] in _STOPPED or (words[0] == "fleet" and "receive" in words)):
        return _run(words)
    from sowatch.cli._front import end_now

    def end() -> None:
        _warn(_INTERRUPTED_TEXT)
        end_now(_INTERRUPTED)

    with obey_interrupts(end):
        return _run(words)


def _runs_behind_front(words: Sequence[str]) -> bool:
    """Whether a process of its own does the work, so that nobody waits for a file system that hangs.

    Not that of ``top`` on a terminal, which stops and continues itself.
    """
    if not words or words[0] not in _BEHIND_FRONT:
        return False
    return words[0] != "top" or "--once" in words or "--json" in words or not os.isatty(1)


def _run(words: Sequence[str]) -> int:
    """The exit code; every error has become a line on stderr."""
    try:
        reserve_standard_fds()
        out = Out()
        try:
            return _dispatch(list(words), out)
        except TextAsked as asked:
            out.write(str(asked))
            out.flush()
            return 0
    except PipeClosed:
        return 0
    except SowatchError as error:
        _say(str(error), error)
        return error.exit_code
    except KeyboardInterrupt as error:
        _say(_INTERRUPTED_TEXT, error)
        return _INTERRUPTED
    except Exception as error:  # noqa: BLE001  (the last one to catch it)
        _say(
            f"internal error: {type(error).__name__}: {error}. Please report it with the output of "
            "`sowatch doctor` and of this command under SOWATCH_TRACEBACK=1.",
            error,
        )
        # Of a check 1 is an answer.
        return 3 if words[:1] == ["list"] and "--check" in words else 1


def _dispatch(argv: Sequence[str], out: Out) -> int:
    if not argv:
        raise UsageError(f"no command given. Use one of: {', '.join(COMMANDS)}; or see `sowatch --help`.")
    if argv[0] == "help":
        argv = [*argv[1:2], "--help"]
    name, rest = argv[0], argv[1:]
    if name.startswith("-"):
        main_parser().parse_args([name])
        raise UsageError(f"{name} needs a command before it. See `sowatch --help`.")
    if name not in COMMANDS:
        raise UsageError(
            f"unknown command {name!r}.{did_you_mean(name, COMMANDS)} Use one of: {', '.join(COMMANDS)}; "
            "or see `sowatch --help`."
        )
    command, parser = command_parser(name)
    args = parser.parse_words(rest)
    _show_log_records()
    return int(command.run(args, out=out, warn=_warn))


def main_parser() -> Parser:
    """What understands the options of `sowatch` itself; its commands are only named."""
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    parser = Parser(
        prog="sowatch",
        description=f"{_DESCRIPTION}\n\ncommands:\n{lines}\n\n`sowatch COMMAND --help` shows more of each.",
        epilog=_EXIT_CODES,
        usage="sowatch COMMAND [ARGUMENT...]",
    )
    parser.add_text_option("-V", "--version", text=lambda: f"sowatch {__version__}\n", help="show the version and end")
    return parser


def command_parser(name: str) -> tuple[Any, Parser]:
    """The module of a command, and what understands its arguments."""
    command = importlib.import_module(f"sowatch.cli.{name}")
    parser = Parser(prog=f"sowatch {name}", description=command.__doc__)
    command.configure(parser)
    return command, parser


def _warn(message: str) -> None:
    """One line on stderr. Nobody there to read it is no reason to stop."""
    from sowatch.model.escape import one_line

    text = f"sowatch: {one_line(message)}\n"
    with suppress(OSError):
        os.write(2, text.encode(getattr(sys.stderr, "encoding", None) or "utf-8", "backslashreplace"))


def _show_log_records() -> None:
    """From now on warnings that the package logs are lines like those of `_warn`, unless logging is configured."""
    import logging

    class Shown(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error = record.exc_info[1] if record.exc_info else None
            _warn(record.getMessage() + ("" if error is None else f": {type(error).__name__}: {error}"))

    logging.lastResort = Shown(logging.WARNING)


def _say(message: str, error: BaseException) -> None:
    _warn(message)
    if os.environ.get("SOWATCH_TRACEBACK") == "1":
        import traceback

        with suppress(OSError):
            os.write(2, "".join(traceback.format_exception(error)).encode("utf-8", "backslashreplace"))
