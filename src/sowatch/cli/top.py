"""Libraries and who shares them, live, in the terminal.

Arrows and page keys move the cursor; Enter shows who has the library, or what the process has, Escape
goes back. tab changes between libraries and processes, s and S choose the column to sort by, r turns
the order around, / filters libraries and processes (Enter keeps, Escape drops it), q ends. SINCE is how
long the process has been running; of a library, the oldest one that has it, or since it was loaded.
Where stdout is no terminal, or one that cannot move its cursor (TERM=dumb), one table is printed, as
with --once; --json prints the same as objects.

Examples:
  sowatch top                      everything that is mapped
  sowatch top libssl --by process  processes that have some libssl
  sowatch top --once | head        the biggest sharers
  sowatch top --agent              the map of the running agent, without root
"""

# Heavy modules (the watcher, rich) are imported only where they are used.

from __future__ import annotations

import errno
import os
from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, cast

from sowatch.cli._agent import add_agent, refuse_own_watch
from sowatch.cli._options import OpenWatcher, add_common, open_watcher, selection_of, wants_json
from sowatch.cli._out import Out, PipeClosed
from sowatch.cli._parser import Parser
from sowatch.cli._stop import Stopper
from sowatch.cli._table import write_table
from sowatch.cli._top import VIEWS, State, cells, head, rows_of
from sowatch.cli.watch import warn_of_fallback
from sowatch.linux.proc import ProcFs
from sowatch.model import wire
from sowatch.model.encoding import dumps
from sowatch.model.errors import UsageError
from sowatch.model.lines import SCHEMA, library_line, process_line

if TYPE_CHECKING:
    from sowatch.cli._agent_scan import AgentStale
    from sowatch.cli._agent_watch import AgentWatch
    from sowatch.cli._options import Selection, WatcherLike
    from sowatch.inventory.inventory import Inventory, InventoryView, LibraryRow, ProcessRow, Watched

_ORDERS: Final = ("library", "process")


def configure(parser: Parser) -> None:
    """Add the command's options."""
    add_common(parser, with_own_process=False)
    add_agent(parser)
    parser.add_argument("--by", default="library", metavar="WHAT", help="library or process. Default: library")
    parser.add_argument("--once", action="store_true", help="print one table and end")


def run(args: Namespace, *, out: Out, warn: Callable[[str], None], open_watcher: OpenWatcher = open_watcher) -> int:
    """Show what is mapped until the end is asked for; returns the exit code."""
    if args.by not in _ORDERS:
        raise UsageError(f"unknown --by {args.by!r}. Use one of: {', '.join(_ORDERS)}.")
    if args.no_snapshot:
        raise UsageError("--no-snapshot leaves `sowatch top` nothing to show. Use it with `sowatch watch`.")
    as_json = wants_json(args)
    selection = selection_of(args)
    from sowatch.inventory.inventory import Inventory

    if args.agent is None:
        watcher, stale = open_watcher(selection), None
    else:
        watcher, stale = _agent_watch(args, selection)
    state = State(view="libraries" if args.by == "library" else "processes")
    inventory = Inventory(cast("Watched", watcher), proc=ProcFs(selection.config.proc_root), stale=stale)
    with Stopper(watcher.stop) as stopper:
        try:
            warn_of_fallback(watcher.start(), warn)
            if as_json or args.once or not _is_screen(out):
                if args.duration is not None:
                    watcher.wait(args.duration)
                _print_once(inventory, state, out, as_json=as_json)
                return 0
            from sowatch.cli._screen import show

            if args.duration is not None:
                stopper.stop_after(args.duration)
            with inventory:
                show(inventory, state, out, is_over=lambda: watcher.wait(0))
            if args.agent is not None:
                cast("AgentWatch", watcher).check()
        except PipeClosed:
            out.discard()
        except OSError as error:
            if error.errno != errno.EIO:  # the terminal went while it was drawn to
                raise
            out.discard()
        finally:
            watcher.stop()
    return 0


def _agent_watch(args: Namespace, selection: Selection) -> tuple[WatcherLike, AgentStale]:
    """The stream of an agent in the place of a watcher, and what it says of files in that of the disk."""
    refuse_own_watch(args)
    from sowatch.cli._agent_scan import AgentStale
    from sowatch.cli._agent_watch import AgentWatch
    from sowatch.cli._client import Agent

    agent = Agent(args.agent)
    return AgentWatch(agent, selection), AgentStale(agent, selection)


def _is_screen(out: Out) -> bool:
    """Whether a table can be drawn over the one before."""
    return out.is_terminal and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


def _print_once(inventory: Inventory, state: State, out: Out, *, as_json: bool) -> None:
    inventory.compare()
    view = inventory.look()
    rows = rows_of(view, state)
    if as_json:
        for seq, row in enumerate(rows, 1):
            out.write(dumps(_line(view, row, seq)) + "\n")
        out.flush()
        return
    numbers = [at for at, column in enumerate(VIEWS[state.view]) if column.is_number]
    write_table(out, head(state.view), [cells(row, state.view) for row in rows], right=numbers)


def _line(inventory: InventoryView, row: LibraryRow | ProcessRow, seq: int) -> wire.LibraryRow | wire.ProcessRow:
    from sowatch.inventory.inventory import ProcessRow

    if isinstance(row, ProcessRow):
        return wire.ProcessRow(
            SCHEMA,
            "process",
            seq,
            process_line(row.process),
            row.libraries,
            row.stale_libraries,
            row.unknown_libraries,
            row.libraries,
        )
    return wire.LibraryRow(
        SCHEMA,
        "library",
        seq,
        library_line(row.library),
        sorted(inventory.processes[number].process.pid for number in row.holders),
        list(row.containers),
        row.staleness,
        row.stale_reason,
    )
