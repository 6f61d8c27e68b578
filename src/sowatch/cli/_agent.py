"""``--agent``: a running agent is asked, where a command else watches on its own."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any, Final

from sowatch.cli._options import DEFAULT_SOCKET
from sowatch.cli._parser import Parser
from sowatch.model.errors import UsageError

# What reads an answer is imported where there is one: most watches ask no agent.
if TYPE_CHECKING:
    from sowatch.cli._client import Agent
    from sowatch.model import wire_explain

__all__ = ["add_agent", "explanation_of", "refuse_own_watch"]

#: What says how to watch, with its default: the agent watches already.
_OF_OWN_WATCH: Final = {"strategy": "auto", "hooks": "auto", "proc_root": "/proc", "cri_socket": None}


def add_agent(parser: Parser) -> None:
    """Add ``--agent``."""
    parser.add_argument(
        "--agent",
        nargs="?",
        const=DEFAULT_SOCKET,
        metavar="SOCKET",
        help="ask the agent that listens there, which needs no root: it answers by its own rules. "
        f"Default: {DEFAULT_SOCKET}",
    )


def refuse_own_watch(args: Namespace) -> None:
    """Refuse what says how to watch, next to ``--agent``.

    Raises:
        UsageError: there is such an option.
    """
    for name, default in _OF_OWN_WATCH.items():
        if getattr(args, name, default) != default:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} says how to watch, and the agent watches already. Leave it out, or --agent.")


def explanation_of(
    agent: Agent, found: Any
) -> wire_explain.ProcessReport | wire_explain.PathReport | wire_explain.RuleReport:
    """The agent's answer to ``/explain`` as the value that commands show.

    Raises:
        SowatchError: it is of another version.
    """
    from msgspec import convert

    from sowatch.model import wire_explain

    kinds: dict[str, Any] = {
        "process": wire_explain.ProcessReport,
        "path": wire_explain.PathReport,
        "rule": wire_explain.RuleReport,
    }
    report: wire_explain.ProcessReport | wire_explain.PathReport | wire_explain.RuleReport = agent.read_as(
        lambda: convert(found, kinds[found["target"]])
    )
    return report
