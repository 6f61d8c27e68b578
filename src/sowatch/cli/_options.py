"""The options that commands share, and the seam to the watcher behind them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

from sowatch.linux.proc import Miss, ProcFs
from sowatch.model.config import Config
from sowatch.model.errors import SowatchError, UsageError
from sowatch.model.literals import HOOKS, KINDS, STRATEGIES
from sowatch.model.rules import Rule, RuleSet

if TYPE_CHECKING:
    from sowatch.cli._out import Out
    from sowatch.cli._parser import Parser
    from sowatch.model.events import Event, Library, Process, Ready

__all__ = [
    "DEFAULT_SOCKET",
    "MappedLike",
    "OpenWatcher",
    "Selection",
    "SubscriptionLike",
    "WatcherLike",
    "add_common",
    "add_format",
    "add_strategy",
    "config_of",
    "open_watcher",
    "selection_of",
    "wants_json",
]

FORMATS = ("json", "table", "text")
#: Of the agent, unless another is named.
DEFAULT_SOCKET = "/run/sowatch/sowatch.sock"


class MappedLike(Protocol):
    """One entry of `sowatch.watcher.watcher.Watcher.snapshot`."""

    @property
    def process(self) -> Process: ...
    @property
    def library(self) -> Library: ...
    @property
    def rule(self) -> str: ...
    @property
    def ranges(self) -> tuple[tuple[int, int], ...]: ...
    @property
    def range_count(self) -> int | None: ...


class StatsLike(Protocol):
    """The numbers that the status line shows."""

    @property
    def processes(self) -> int: ...
    @property
    def libraries(self) -> int: ...
    @property
    def events(self) -> int: ...
    @property
    def lost_kernel(self) -> int: ...
    @property
    def lost_queue(self) -> int: ...


class SubscriptionLike(Protocol):
    """What a command uses of `sowatch.watcher.watcher.Subscription`."""

    def get(self, timeout_s: float) -> Event | None: ...
    def close(self) -> None: ...


class WatcherLike(Protocol):
    """What a command uses of `sowatch.watcher.watcher.Watcher`; tests put their own in its place."""

    def start(self) -> Ready: ...
    def stop(self) -> None: ...
    def wait(self, timeout_s: float | None = None) -> bool: ...
    def subscribe(self, *, events: Collection[str], control: bool = True) -> SubscriptionLike: ...
    def snapshot(self) -> Sequence[MappedLike]: ...
    @property
    def stats(self) -> StatsLike: ...


class Selection(Struct, frozen=True):
    """What the command line asks to be watched, and how."""

    rules: tuple[Rule, ...]
    config: Config
    pids: frozenset[int]
    container: str | None
    exclude_self: bool
    snapshot: bool

    @property
    def is_selective(self) -> bool:
        """Whether it asks for less than every library of every process."""
        return bool(self.pids) or self.container is not None or any(rule.pattern for rule in self.rules)


OpenWatcher = Callable[[Selection], WatcherLike]


def open_watcher(selection: Selection) -> WatcherLike:
    """The real watcher for a selection, not started yet."""
    from sowatch.cli._front import front_pid
    from sowatch.watcher.watcher import Watcher

    front = front_pid()
    return Watcher(
        *selection.rules,
        config=selection.config,
        pids=selection.pids,
        container=selection.container,
        exclude_self=selection.exclude_self,
        exclude_pids=() if front is None else (front,),
        snapshot=selection.snapshot,
    )


def add_format(parser: Parser, *, default: str) -> None:
    """Add ``--json`` and ``--format``."""
    parser.add_argument("--json", action="store_true", help="the same as --format json")
    parser.add_argument(
        "--format",
        metavar="FORMAT",
        help=f"json, or for people text or table, which mean the same. Default: {default}",
    )


def add_common(parser: Parser) -> None:
    """Add what ``watch`` and ``list`` have in common."""
    from sowatch.cli._parser import pid, seconds

    parser.add_argument(
        "patterns",
        nargs="*",
        metavar="PATTERN",
        help="Python regular expression, searched in the path as the process sees it; of several, any. "
        "Default: every file of the kinds asked for",
    )
    add_format(parser, default="text on a terminal, else json")
    add_strategy(parser)
    parser.add_argument(
        "--pid", type=pid, action="append", default=[], metavar="PID", help="only this process; may be repeated"
    )
    parser.add_argument("--container", metavar="ID", help="only the container whose id begins with ID")
    parser.add_argument(
        "--kind",
        action="append",
        metavar="KIND",
        help=f"{', '.join(KINDS)}; may be repeated. Default: library",
    )
    parser.add_argument("--no-snapshot", action="store_true", help="do not report what is mapped already")
    parser.add_argument("--duration", type=seconds, metavar="SECONDS", help="end after this time, counted from `ready`")
    parser.add_argument(
        "--proc-root", default="/proc", metavar="DIR", help="where the host's proc is mounted. Default: /proc"
    )
    parser.add_argument("--exclude-self", action="store_true", help="leave out sowatch's own process")


def add_strategy(parser: Parser) -> None:
    """Add ``--strategy`` and ``--hooks``."""
    parser.add_argument(
        "--strategy",
        metavar="NAME",
        default="auto",
        help=f"how to watch: {', '.join(STRATEGIES)}. auto takes the best that works here",
    )
    parser.add_argument(
        "--hooks",
        metavar="NAME",
        default="auto",
        help=f"of the BPF strategies: {', '.join(HOOKS)}. auto takes the best that works here",
    )


def wants_json(args: Namespace, out: Out, *, when_piped: bool = True) -> bool:
    """Whether to print JSON: asked for, or not asked and nobody reads it (``when_piped``).

    Raises:
        UsageError: an unknown format, or two that contradict each other.
    """
    chosen: str | None = args.format
    if chosen is not None and chosen not in FORMATS:
        raise UsageError(f"unknown format {chosen!r}. Use one of: {', '.join(FORMATS)}.")
    if args.json and chosen not in (None, "json"):
        raise UsageError(f"--json and --format {chosen} contradict each other. Give one of them.")
    if chosen is None:
        return bool(args.json) or (when_piped and not out.is_terminal)
    return chosen == "json"


def config_of(args: Namespace) -> Config:
    """The configuration that the command line asks for.

    Raises:
        ConfigError: an unknown strategy, or unknown hooks.
    """
    return Config(strategy=args.strategy, hooks=args.hooks, proc_root=args.proc_root)


def selection_of(args: Namespace) -> Selection:
    """What to watch.

    Raises:
        UsageError: a pattern, kind, strategy, container or proc root that cannot be.
        SowatchError: a process of ``--pid`` does not exist.
    """
    kinds = args.kind or ["library"]
    patterns: list[str | None] = list(dict.fromkeys(pattern for pattern in args.patterns if pattern))
    if len(patterns) < len(set(args.patterns)):
        patterns = [None]  # the empty expression is found in every path
    rules = tuple(Rule(pattern, kind=kinds) for pattern in patterns or [None])
    RuleSet(rules)
    if args.container is not None and not args.container:
        raise UsageError("--container needs at least one character of the container's id.")
    config = config_of(args)
    _check_pids(ProcFs(config.proc_root), args.pid)
    return Selection(
        rules=rules,
        config=config,
        pids=frozenset(args.pid),
        container=args.container,
        exclude_self=args.exclude_self,
        snapshot=not args.no_snapshot,
    )


def _check_pids(proc: ProcFs, pids: Collection[int]) -> None:
    """Refuse ids nobody has; a watch of them would be silent for ever."""
    for pid in pids:
        status = proc.status(pid)
        if isinstance(status, Miss):
            raise SowatchError(f"there is no process {pid} in {proc.root}. Find the right one with `ps -e`.")
        if status.tgid != pid:
            raise UsageError(f"{pid} is a thread of process {status.tgid}. Give --pid {status.tgid}.")
