"""Command lines into values: argparse, but every mistake is one `UsageError`.

argparse and not click: it is in the standard library and costs 10 ms of start-up where click costs 30, and ``sowatch
--help`` has to answer at once.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn

from sowatch.model.errors import UsageError

__all__ = ["Parser", "TextAsked", "did_you_mean", "event_list", "pid", "pids", "seconds"]

_LONGEST_S = 10 * 365 * 86_400.0


class TextAsked(Exception):
    """``--help`` or ``--version``: print the text, which is the answer, and end with 0."""


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` that raises instead of printing and exiting."""

    def __init__(
        self, *, prog: str, description: str | None, epilog: str | None = None, usage: str | None = None
    ) -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            epilog=epilog,
            formatter_class=_Formatter,
            allow_abbrev=False,
            add_help=False,
        )
        self._takes_command = False
        self.add_argument("-h", "--help", action=_Text, default=self.format_help, help="show this text and end")

    def add_text_option(self, *names: str, text: Callable[[], str], help: str) -> None:  # noqa: A002
        """Add an option that only shows a text."""
        self.add_argument(*names, action=_Text, default=text, help=help)

    def take_command(self, metavar: str) -> None:
        """What comes after ``--`` is a command of somebody else, in ``args.command``."""
        self._takes_command = True
        self.usage = f"{self.format_usage().removeprefix('usage: ').rstrip()} -- {metavar}"

    def parse_words(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse, with options and patterns in any order; after ``--`` come only patterns, or a command.

        Raises:
            UsageError: a word that does not belong there.
            TextAsked: ``--help`` is among them.
        """
        end = words.index("--") if "--" in words else len(words)
        args = self.parse_intermixed_args(list(words[:end]))
        rest = list(words[end + 1 :])
        if self._takes_command:
            args.command = rest
            return args
        if rest and not hasattr(args, "patterns"):
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        if rest:
            args.patterns = [*args.patterns, *rest]
        return args

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            UsageError: always.
        """
        _, is_unknown, words = message.partition("unrecognized arguments: ")
        hint = did_you_mean(words.split()[0].partition("=")[0], self._option_string_actions) if is_unknown else ""
        raise UsageError(f"{message}.{hint} See `{self.prog} --help`.")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)


class _Text(argparse.Action):
    """Raises `TextAsked` with what ``default`` returns."""

    def __init__(
        self,
        option_strings: Sequence[str],
        dest: str,
        default: Callable[[], str],
        help: str | None = None,  # noqa: A002
    ) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)
        self._text = default

    def __call__(self, *_: Any) -> NoReturn:
        """The option was given.

        Raises:
            TextAsked: always.
        """
        raise TextAsked(self._text())


def did_you_mean(word: str, known: Collection[str]) -> str:
    """A sentence with the known word that is nearest to one that is unknown, after a blank; empty if none is near."""
    from difflib import get_close_matches

    nearest = get_close_matches(word, known, n=1)
    return f" Did you mean {nearest[0]}?" if nearest else ""


def pid(text: str) -> int:
    """A process id from the command line."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= 1 << 22:  # PID_MAX_LIMIT of 64-bit kernels, include/linux/threads.h
        raise argparse.ArgumentTypeError(f"{text!r} is not a process id")
    return value


def pids(text: str) -> list[int]:
    """Process ids from the command line, with commas."""
    return [pid(one.strip()) for one in text.split(",")]


def seconds(text: str) -> float:
    """A duration in seconds from the command line."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= _LONGEST_S:  # false for nan, too
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to ten years")
    return value


def event_list(known: Sequence[str]) -> Any:
    """The type of ``--events``: names from ``known``, comma-separated."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown event {name!r} (known: {', '.join(known)})")
        return names

    return parse
