"""Man pages and completions, from the parser of the command. `scripts/manual` writes them to share/.

  python tools/manual.py [DIRECTORY [VERSION]]      default: share, and the version of this checkout

argparse-manpage writes the pages, one for `sowatch` and one for each command; shtab the completions for bash, zsh and
fish. Nothing in them is written by hand: a new option is in all of them.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import shtab
from argparse_manpage.manpage import Manpage

from sowatch import __version__
from sowatch.cli._fleet_ask import KINDS as TARGET_KINDS
from sowatch.cli._main import COMMANDS, command_parser, main_parser
from sowatch.cli._parser import Parser
from sowatch.cli._trace_views import GROUPS
from sowatch.cli.fleet import ACTIONS
from sowatch.model.literals import EVENT_KINDS, HOOKS, KINDS, STRATEGIES

__all__ = ["COMPLETIONS", "completions", "man_pages", "tree", "write"]

#: Where each shell searches for what packages bring, below PREFIX/share.
COMPLETIONS: Final = {
    "bash": "bash-completion/completions/sowatch",
    "zsh": "zsh/site-functions/_sowatch",
    "fish": "fish/vendor_completions.d/sowatch.fish",
}
#: What the help names in words only, because it takes several with commas, or explains a wrong one itself.
_WORDS: Final[dict[str, tuple[str, ...]]] = {
    "--strategy": tuple(STRATEGIES),
    "--hooks": tuple(HOOKS),
    "--kind": (*KINDS, "all"),
    "--events": tuple(EVENT_KINDS),
    "--side": ("client", "server"),
}
_BY: Final = {"list": ("library", "process", "unit", "container"), "top": ("library", "process"), "trace": GROUPS}
_FILES: Final = ("FILE", "PATH", "SOCKET", "PID|PATH")
_ROOT: Final = Path(__file__).resolve().parents[1]
#: These parts of a description are sections of a page.
_SECTIONS: Final = {"Examples": "examples", "Exit codes": "exit status", "exit codes": "exit status"}
#: A line of text that roff would take for a request; those that argparse-manpage writes are .TH, .B and the like.
_TAKEN_FOR_REQUEST: Final = re.compile(r"'|\.(?!(?:[A-Z]{1,2}|nf|fi)\b)")
_HEADING: Final = re.compile(rf"^({'|'.join(_SECTIONS)}):[ \n]", re.MULTILINE)


def man_pages(version: str = __version__) -> dict[str, str]:
    """The text of each page by its file name, `sowatch.1` first."""
    summary = "which process has which shared library mapped, live"
    pages = {"sowatch.1": _page("sowatch", summary, main_parser(), version)}
    for name, summary in COMMANDS.items():
        pages[f"sowatch-{name}.1"] = _page(f"sowatch-{name}", summary.rstrip("."), command_parser(name)[1], version)
    return pages


def _page(name: str, summary: str, parser: Parser, version: str) -> str:
    sections = _split(parser.description or "")
    for heading, text in _split(parser.epilog or "").items():
        sections[heading] = sections.get(heading, "") + text
    # NAME has the first line already.
    parser.description = sections.pop("").strip().removeprefix(summary).lstrip(".\n")
    parser.epilog = None
    data = {"project_name": "sowatch", "version": version, "manual_title": "sowatch manual"}
    page = Manpage(parser, data)
    page.prog = name
    page.description = summary
    for heading, text in sections.items():
        page.add_section(heading, "=", _verbatim(text) if heading == "examples" else _text(text))
    others = ["sowatch", *(f"sowatch-{other}" for other in COMMANDS)]
    page.add_section("see also", "=", ",\n".join(rf"\fB{_text(other)}\fR(1)" for other in others if other != name))
    return "\n".join(_lines(str(page)))


def _split(text: str) -> dict[str, str]:
    """The parts of a description by the section that they belong to; "" has what comes before the first heading."""
    first, *rest = _HEADING.split(text)
    parts = {"": first}
    for heading, part in zip(rest[::2], rest[1::2], strict=True):
        parts[_SECTIONS[heading]] = part.strip("\n")
    return parts


def _text(text: str) -> str:
    return text.replace("\\", "\\\\").replace("-", "\\-")


def _verbatim(text: str) -> str:
    return f".nf\n{_text(text)}\n.fi"


def _lines(page: str) -> Iterator[str]:
    """The lines of a page: what is indented stays as it is, and no text is taken for a request of roff."""
    is_kept = False
    for line in page.split("\n"):
        if line.startswith("  ") != is_kept and not line.startswith((".nf", ".fi")):
            is_kept = not is_kept
            yield ".nf" if is_kept else ".fi"
        yield rf"\&{line}" if _TAKEN_FOR_REQUEST.match(line) else line


def completions() -> dict[str, str]:
    """The text for each shell of `COMPLETIONS`."""
    return {shell: shtab.complete(_whole_parser(), shell=shell, root_prefix="sowatch") for shell in COMPLETIONS}


def _whole_parser() -> argparse.ArgumentParser:
    """One parser with all commands, which no command needs at run time."""
    whole = main_parser()
    commands = whole.add_subparsers(metavar="COMMAND", parser_class=argparse.ArgumentParser)
    for name, summary in COMMANDS.items():
        parser: Any = command_parser(name)[1]
        parser.description = summary
        commands.add_parser(name, help=summary, add_help=False)
        commands.choices[name] = parser
        commands._name_parser_map[name] = parser  # noqa: SLF001
        for action in parser._actions:  # noqa: SLF001
            words = _words(name, action)
            if words:
                action.choices = words
            elif action.metavar in _FILES:
                action.complete = shtab.FILE
            elif action.metavar == "DIR":
                action.complete = shtab.DIRECTORY
    return whole


def _words(command: str, action: argparse.Action) -> tuple[str, ...]:
    if command == "fleet" and action.metavar == "ACTION":
        return tuple(ACTIONS)
    if command == "fleet" and action.metavar == "KIND":
        return TARGET_KINDS
    for option in action.option_strings:
        if option == "--by":
            return tuple(_BY[command])
        if option in _WORDS:
            return _WORDS[option]
    return ()


def tree(version: str = __version__) -> dict[str, str]:
    """The text of every file by its path below PREFIX/share."""
    pages = {f"man/man1/{name}": text for name, text in man_pages(version).items()}
    return pages | {COMPLETIONS[shell]: text for shell, text in completions().items()}


def write(directory: Path, version: str = __version__) -> None:
    """Writes the files of `tree` below a directory."""
    for name, text in tree(version).items():
        place = directory / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    # The usage of argparse is as wide as the terminal.
    os.environ["COLUMNS"] = "80"
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else _ROOT / "share", *sys.argv[2:3])
