"""Live feed of loads and unloads.

First what is mapped already (cause `snapshot`), then `ready`, then every change as it happens, on
the whole host and in all its containers. On a terminal it scrolls in colour. SIGINT, SIGTERM, SIGHUP
or --duration end it with `stopped`. Text has loads and unloads; activations, which say once for each
file that a first process has it or no process any more, are in --json, and in text with --events.

Examples:
  sowatch watch                                  every shared library
  sowatch watch 'libssl|libgnutls'               who uses TLS
  sowatch watch --pid 1234 --events load         what one process still loads
  sowatch watch --pid 1234 --follow              and whatever it starts
  sowatch watch --agent                          the events of the running agent, without root
  sowatch watch --json libcuda | jq .process     for programs
"""

# What takes long to import (the watcher, JSON, rich) is imported where it is used: programs are loaded meanwhile.

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from sowatch.cli._agent import add_agent, refuse_own_watch
from sowatch.cli._feed import Feed, warn_of_fallback
from sowatch.cli._options import (
    OpenWatcher,
    Selection,
    WatcherLike,
    add_common,
    open_watcher,
    selection_of,
    wants_json,
)
from sowatch.cli._out import Out, PipeClosed
from sowatch.cli._parser import Parser, event_list
from sowatch.cli._stop import Stopper
from sowatch.model.errors import UsageError
from sowatch.model.literals import EVENT_KINDS, EventKind

if TYPE_CHECKING:
    from sowatch.cli._views import View

__all__ = ["add_events", "configure", "events_of", "run", "warn_of_fallback"]

#: How long the last lines wait for a reader that does not read.
_LAST_WORDS_S: Final = 2.0
#: Of text: an activation says of a file what the load beside it says of a process.
_TEXT_EVENTS: Final = ("load", "unload")


def configure(parser: Parser) -> None:
    """Add the command's options."""
    add_common(parser, has_baseline=True)
    add_agent(parser)
    add_events(parser)
    parser.add_argument("--follow", action="store_true", help="with --pid: and all that these processes start")


def add_events(parser: Parser) -> None:
    """Add ``--events``, see `events_of`."""
    parser.add_argument(
        "--events",
        type=event_list(EVENT_KINDS),
        metavar="LIST",
        help=f"comma-separated: {','.join(EVENT_KINDS)}. Default: all with --json, else {','.join(_TEXT_EVENTS)}. "
        "Control events are always sent",
    )


def events_of(args: Namespace, *, as_json: bool) -> tuple[EventKind, ...]:
    """Which events to show."""
    if args.events is not None:
        return tuple(args.events)
    return EVENT_KINDS if as_json else _TEXT_EVENTS


def run(args: Namespace, *, out: Out, warn: Callable[[str], None], open_watcher: OpenWatcher = open_watcher) -> int:
    """Watch until the end is asked for; returns the exit code."""
    as_json = wants_json(args)
    if args.follow and not args.pid:
        raise UsageError("--follow needs --pid. To start a command and follow it: sowatch run -- COMMAND.")
    selection = replace(selection_of(args), follow=args.follow)
    feeds: list[Feed] = []

    def on_ready(_: object) -> None:
        if args.duration is not None:
            stopper.stop_after(args.duration)

    def stop() -> None:
        out.finish_within(_LAST_WORDS_S)
        for feed in feeds:
            feed.stop()

    with Stopper(stop) as stopper:
        watcher = open_watcher(selection) if args.agent is None else _agent_watch(args, selection)
        feed = Feed(watcher, out, warn, on_ready)
        feeds.append(feed)
        if stopper.is_asked:
            feed.stop()
        try:
            view = _view_of(out, selection, watcher, as_json=as_json)
            feed.show(view, events_of(args, as_json=as_json))
        except PipeClosed:
            out.discard()
            return 0
        finally:
            feed.stop()
    return feed.exit_code()


def _agent_watch(args: Namespace, selection: Selection) -> WatcherLike:
    refuse_own_watch(args)
    if args.follow:
        raise UsageError(
            "--follow is for a watch of its own: an agent does not follow processes. Leave it out, or --agent."
        )
    from sowatch.cli._agent_watch import AgentWatch
    from sowatch.cli._client import Agent

    return AgentWatch(Agent(args.agent), selection)


def _view_of(out: Out, selection: Selection, watcher: WatcherLike, *, as_json: bool) -> View:
    from sowatch.cli._views import JsonView, TextView

    if as_json:
        return JsonView(out)
    with_rule = len(selection.rules) > 1
    if not out.is_terminal:
        return TextView(out, with_rule=with_rule)
    from sowatch.cli._live import LiveView

    return LiveView(out, stats=lambda: watcher.stats, with_rule=with_rule, fold_snapshot=not selection.is_selective)
