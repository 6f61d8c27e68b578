"""The options that commands share, and the seam to the watcher behind them."""

from __future__ import annotations

from argparse import SUPPRESS, Namespace
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Final, Protocol, cast

from msgspec import Struct

from sowatch.linux.proc import Miss, ProcFs
from sowatch.model.config import Config
from sowatch.model.errors import SowatchError, UsageError
from sowatch.model.literals import HOOKS, KINDS, STRATEGIES
from sowatch.model.rules import Rule, RuleSet

if TYPE_CHECKING:
    from sowatch.cli._parser import Parser
    from sowatch.model.events import Event, Library, Process, Ready
    from sowatch.model.literals import Kind, StreamKinds

__all__ = [
    "DEFAULT_SOCKET",
    "MappedLike",
    "OpenWatcher",
    "Selection",
    "SubscriptionLike",
    "WatcherLike",
    "add_common",
    "add_cri_socket",
    "add_format",
    "add_kinds",
    "add_patterns",
    "add_proc_root",
    "add_selection",
    "add_strategy",
    "config_of",
    "kinds_of",
    "open_watcher",
    "output_format",
    "selection_of",
    "wants_json",
]

#: What `--kind` is by default.
_LIBRARY: Final[tuple[Kind, ...]] = ("library",)

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
    @property
    def cause(self) -> str | None: ...
    @property
    def time_ns(self) -> int: ...


class StatsLike(Protocol):
    """The numbers that the status line shows."""

    @property
    def processes(self) -> int: ...
    @property
    def libraries(self) -> int: ...
    @property
    def events(self) -> int: ...
    @property
    def loads(self) -> int: ...
    @property
    def unloads(self) -> int: ...
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
    def subscribe(self, *, events: StreamKinds, control: bool = True) -> SubscriptionLike: ...
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
    #: What changes after the snapshot is not asked for.
    is_scan: bool = False
    #: And all that descend from ``pids``.
    follow: bool = False

    @property
    def is_selective(self) -> bool:
        """Whether it asks for less than every library of every process."""
        return bool(self.pids) or self.container is not None or any(rule.pattern for rule in self.rules)


OpenWatcher = Callable[[Selection], WatcherLike]


def open_watcher(selection: Selection) -> WatcherLike:
    """The real watcher for a selection, not started yet, though its programs are loaded from now on."""
    from sowatch.cli._front import front_pid
    from sowatch.sources.select import Opening, open_scan, open_source

    opening = Opening(open_scan if selection.is_scan else open_source, selection.config)
    try:
        # Meanwhile.
        from sowatch.watcher.watcher import Watcher

        front = front_pid()
        return Watcher(
            *selection.rules,
            config=selection.config,
            pids=selection.pids,
            follow=selection.follow,
            container=selection.container,
            exclude_self=selection.exclude_self,
            exclude_pids=() if front is None else (front,),
            snapshot=selection.snapshot,
            open_source=opening,
        )
    except BaseException:
        opening.close()
        raise


def add_format(parser: Parser, formats: Sequence[str] = FORMATS) -> None:
    """Add ``--json`` and ``--format``."""
    others = [one for one in formats if one not in ("text", "table")]
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument(
        "--format",
        metavar="FORMAT",
        help=f"{', '.join(others)}, or for people text or table, which mean the same. Default: text, also into a pipe",
    )


def add_kinds(parser: Parser, *, default: str) -> None:
    """Add ``--kind``; ``default`` is what `kinds_of` takes without it, in words."""
    parser.add_argument(
        "--kind",
        action="append",
        metavar="KIND",
        help=f"{', '.join(KINDS)} or all; with commas, or repeated. Default: {default}",
    )


def kinds_of(args: Namespace, *, default: Collection[Kind] = _LIBRARY) -> Collection[Kind]:
    """The kinds of ``--kind``; a wrong one is left for `Rule` to refuse."""
    given = [one.strip() for word in args.kind or () for one in word.split(",")]
    return KINDS if "all" in given else cast("list[Kind]", given) or default


def add_selection(parser: Parser) -> None:
    """Add ``--pid`` and ``--container``."""
    from sowatch.cli._parser import pids

    parser.add_argument(
        "--pid",
        type=pids,
        action="extend",
        default=[],
        metavar="PID",
        help="only this process; with commas, or repeated, any of them",
    )
    parser.add_argument("--container", metavar="ID", help="only the container whose id begins with ID")


def add_common(
    parser: Parser,
    *,
    default_kind: str = "library",
    with_own_process: bool = True,
    has_baseline: bool = False,
    formats: Sequence[str] = FORMATS,
) -> None:
    """Add what ``watch``, ``list``, ``top`` and ``audit`` have in common.

    Args:
        parser: gets them.
        default_kind: what ``--kind`` is without being given, in words.
        with_own_process: sowatch's own process is shown unless ``--exclude-self``; else only with ``--include-self``.
        has_baseline: it makes sense not to report what is mapped already.
        formats: what ``--format`` takes.
    """
    from sowatch.cli._parser import seconds

    add_patterns(parser)
    add_format(parser, formats)
    add_strategy(parser)
    add_selection(parser)
    add_kinds(parser, default=default_kind)
    parser.add_argument(
        "--no-snapshot",
        action="store_true",
        help="do not report what is mapped already" if has_baseline else SUPPRESS,
    )
    parser.add_argument("--duration", type=seconds, metavar="SECONDS", help="end after this time, counted from `ready`")
    add_proc_root(parser)
    add_cri_socket(parser)
    parser.set_defaults(exclude_self=not with_own_process)
    parser.add_argument(
        "--exclude-self",
        action="store_true",
        help="leave out sowatch's own process" if with_own_process else SUPPRESS,
    )
    if not with_own_process:
        parser.add_argument(
            "--include-self", dest="exclude_self", action="store_false", help="show sowatch's own process, too"
        )


def add_patterns(parser: Parser) -> None:
    """Add the patterns, which stand for themselves."""
    parser.add_argument(
        "patterns",
        nargs="*",
        metavar="PATTERN",
        help="Python regular expression, searched in the path as the process sees it; of several, any. "
        "Default: every file of the kinds asked for",
    )


def add_proc_root(parser: Parser) -> None:
    """Add ``--proc-root``."""
    parser.add_argument(
        "--proc-root", default="/proc", metavar="DIR", help="where the host's proc is mounted. Default: /proc"
    )


def add_cri_socket(parser: Parser) -> None:
    """Add ``--cri-socket``."""
    parser.add_argument(
        "--cri-socket",
        metavar="PATH",
        help="of the container runtime that the kubelet uses, for names of pods: /run/containerd/containerd.sock",
    )


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


def output_format(args: Namespace, formats: Sequence[str] = FORMATS) -> str:
    """How to print: ``text`` unless something else was asked for; ``table`` is the same.

    Raises:
        UsageError: an unknown format, or two that contradict each other.
    """
    chosen: str | None = args.format
    if chosen is not None and chosen not in formats:
        raise UsageError(f"unknown format {chosen!r}. Use one of: {', '.join(formats)}.")
    if args.json and chosen not in (None, "json"):
        raise UsageError(f"--json and --format {chosen} contradict each other. Give one of them.")
    if args.json:
        return "json"
    return "text" if chosen in (None, "table") else chosen


def wants_json(args: Namespace) -> bool:
    """Whether to print JSON, which has to be asked for.

    Raises:
        UsageError: an unknown format, or two that contradict each other.
    """
    return output_format(args) == "json"


def config_of(args: Namespace) -> Config:
    """The configuration that the command line asks for.

    Raises:
        ConfigError: an unknown strategy, or unknown hooks.
    """
    cri_socket = getattr(args, "cri_socket", None)
    return Config(strategy=args.strategy, hooks=args.hooks, proc_root=args.proc_root, cri_socket=cri_socket)


def selection_of(args: Namespace, *, default_kinds: Collection[Kind] = _LIBRARY) -> Selection:
    """What to watch.

    Args:
        args: the command line.
        default_kinds: without ``--kind``.

    Raises:
        UsageError: a pattern, kind, strategy, container or proc root that cannot be.
        SowatchError: a process of ``--pid`` does not exist.
    """
    kinds = kinds_of(args, default=default_kinds)
    patterns: list[str | None] = list(dict.fromkeys(pattern for pattern in args.patterns if pattern))
    if len(patterns) < len(set(args.patterns)):
        patterns = [None]  # the empty expression is found in every path
    rules = tuple(Rule(pattern, kind=kinds) for pattern in patterns or [None])
    RuleSet(rules)
    if args.container is not None and not args.container:
        raise UsageError("--container needs at least one character of the container's id.")
    config = config_of(args)
    if getattr(args, "agent", None) is None:  # an agent knows which processes there are
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
