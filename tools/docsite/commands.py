"""The reference of the command, made of its parsers."""

from __future__ import annotations

import argparse
from inspect import cleandoc

from docsite.prose import escaped, paragraphs
from sowatch.cli._main import COMMANDS, command_parser
from sowatch.cli._parser import Parser

__all__ = ["markdown"]


def markdown(_: str) -> str:
    """A section for each command: what it does, its usage, its arguments and options."""
    return "\n".join(_command(name) for name in COMMANDS)


def _command(name: str) -> str:
    _, parser = command_parser(name)
    usage = parser.format_usage().removeprefix("usage: ").rstrip()
    made = [f"## sowatch {name}", paragraphs(cleandoc(parser.description or "")), f"```text\n{usage}\n```"]
    made.append(f"```{{program}} sowatch {name}\n```")
    for group in parser._action_groups:  # noqa: SLF001  (argparse has no other way to list them)
        actions = [one for one in group._group_actions if one.help != argparse.SUPPRESS]  # noqa: SLF001
        if not actions:
            continue
        made.append(f"**{escaped((group.title or '').capitalize())}**")
        made += [_option(parser, one) for one in actions]
    return "\n\n".join(made) + "\n"


def _option(parser: Parser, action: argparse.Action) -> str:
    """One argument with its help, as a directive that gives it an anchor."""
    formatter = parser._get_formatter()  # noqa: SLF001
    help_text = formatter._expand_help(action) if action.help else ""  # noqa: SLF001
    if action.option_strings:
        value = "" if action.nargs == 0 else " " + _value(formatter, action)
        names = ", ".join(f"{name}{value}" for name in action.option_strings)
    else:
        names = _value(formatter, action)
    return f"````{{option}} {names}\n{escaped(help_text)}\n````"


def _value(formatter: argparse.HelpFormatter, action: argparse.Action) -> str:
    default = formatter._get_default_metavar_for_optional(action)  # noqa: SLF001
    if not action.option_strings:
        default = formatter._get_default_metavar_for_positional(action)  # noqa: SLF001
    return formatter._format_args(action, default)  # noqa: SLF001
