"""The view of ``watch`` on a terminal: coloured lines that scroll, above a status line that stays.

The status line is redrawn with each batch of lines and a few times a second between them, never from a thread of its
own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Final, cast

from rich.console import Console
from rich.live import Live
from rich.text import Text

from sowatch.cli._lines import pieces_of
from sowatch.model.events import Event, LibraryEvent, Ready

if TYPE_CHECKING:
    from sowatch.cli._options import StatsLike
    from sowatch.cli._out import Out

__all__ = ["LiveView", "terminal_console"]

_LOOKS: Final = {
    "load": "green",
    "unload": "red",
    "activate": "bold cyan",
    "deactivate": "cyan",
    "ready": "bold",
    "name": "bold",
    "dim": "dim",
    "path": "",
    "warn": "bold yellow",
}
#: Shortest time over which a rate is taken.
_RATE_S: Final = 1.0


def terminal_console(out: Out) -> Console:
    """A rich console that writes through ``out`` and takes names literally."""
    return Console(
        file=cast("IO[str]", out),
        markup=False,
        emoji=False,
        highlight=False,
        soft_wrap=True,
        # rich knows NO_COLOR; where it is set, bold and dim remain.
        no_color=bool(os.environ.get("NO_COLOR")),
        # The size is the terminal's: LINES and COLUMNS were exported at some time, and it may be another one by now.
        _environ={name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")},
    )


class LiveView:
    """Shows events as lines and keeps the count of everything at the bottom.

    Args:
        out: the terminal.
        stats: reads the watcher's counters.
        with_rule: name each event's rule.
        fold_snapshot: say how many mappings the snapshot found instead of showing each, and leave out what
            only ends because the watch does.
    """

    tick_s = 0.25

    def __init__(self, out: Out, *, stats: Callable[[], StatsLike], with_rule: bool, fold_snapshot: bool) -> None:
        self._out = out
        self._stats = stats
        self._with_rule = with_rule
        self._folds = fold_snapshot
        self._is_ready = False
        self._console = terminal_console(out)
        self._lines: list[Text] = []
        self._guarantee = ""
        self._rate = 0.0
        self._rate_from = (time.monotonic(), 0)
        self._live = Live(
            Text("starting"),
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        if not self._console.is_dumb_terminal:
            self._live.start()
            out.flush()

    def show(self, event: Event, seq: int) -> None:  # noqa: ARG002  (people do not count lines)
        """Keep the event's line for the next `flush`."""
        if isinstance(event, Ready):
            self._lines.append(self._text(event))
            self._lines.extend(Text(f"{'':13}limit: {limit}", "dim") for limit in event.limits)
            if self._folds and event.mappings:
                self._lines.append(Text(f"{'':13}what is mapped already is not shown here; see `sowatch list`", "dim"))
            self._is_ready = True
            self._guarantee = f"{event.strategy}, {event.guarantee}"
        elif not self._is_folded(event):
            self._lines.append(self._text(event))

    def _is_folded(self, event: Event) -> bool:
        """Whether it only shows that the watch began or ended with this file."""
        if not self._folds or not isinstance(event, LibraryEvent):
            return False
        return not self._is_ready or (event.event == "deactivate" and event.cause == "stop")

    def flush(self) -> None:
        """Show what was kept, and the counters as they are now."""
        self._update(refresh=not self._lines)
        if self._lines:
            # With a live display, printing redraws it, too.
            self._console.print(Text("\n").join(self._lines))
            self._lines.clear()
        self._out.flush()

    def idle(self) -> None:
        """Nothing happened for a tick: redraw the counters."""
        self._update(refresh=True)
        self._out.flush()

    def close(self) -> None:
        """Take the status line away and give the cursor back."""
        self._live.stop()
        self._out.flush()

    def _text(self, event: Event) -> Text:
        pieces = pieces_of(event, with_rule=self._with_rule)
        return Text.assemble(*((text, _LOOKS.get(look, "")) for text, look in pieces))

    def _update(self, *, refresh: bool) -> None:
        self._live.update(self._status(), refresh=refresh)

    def _status(self) -> Text:
        if not self._is_ready:
            return Text("starting: loading programs and taking the snapshot", "dim", no_wrap=True, overflow="ellipsis")
        stats = self._stats()
        now = time.monotonic()
        since, events_then = self._rate_from
        if now - since >= _RATE_S:
            self._rate = (stats.events - events_then) / (now - since)
            self._rate_from = (now, stats.events)
        lost = stats.lost_kernel + stats.lost_queue
        return Text.assemble(
            (f"{stats.processes}", "bold"),
            " process  " if stats.processes == 1 else " processes  ",
            (f"{stats.libraries}", "bold"),
            " library  " if stats.libraries == 1 else " libraries  ",
            (f"{self._rate:.1f}", "bold"),
            " events/s  ",
            (f"{lost}", _LOOKS["warn"] if lost else "bold"),
            " lost  ",
            (f"{self._guarantee}  Ctrl-C ends", "dim"),
            no_wrap=True,
            overflow="ellipsis",
        )
