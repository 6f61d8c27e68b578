"""How ``watch`` shows its events: `JsonView`, `TextView`, and in ``_live`` the one for terminals."""

from __future__ import annotations

from typing import Final, Protocol

from sowatch.cli._lines import pieces_of, plain
from sowatch.cli._out import Out
from sowatch.model.encoding import dumps_lines
from sowatch.model.events import Event
from sowatch.model.lines import line_of
from sowatch.model.wire import EventLine

__all__ = ["JsonView", "TextView", "View"]

#: How often a view that has nothing to draw looks whether its reader is still there.
_TICK_S: Final = 0.5


class View(Protocol):
    """How events are shown. ``tick_s`` is how long it can go without being asked to draw."""

    @property
    def tick_s(self) -> float: ...
    def show(self, event: Event, seq: int) -> None: ...
    def flush(self) -> None: ...
    def idle(self) -> None: ...
    def close(self) -> None: ...


class JsonView:
    """One JSON object a line."""

    tick_s = _TICK_S

    def __init__(self, out: Out) -> None:
        self._out = out
        self._lines: list[EventLine] = []

    def show(self, event: Event, seq: int) -> None:
        """Keep the line for the next `flush`."""
        self._lines.append(line_of(event, seq))

    def flush(self) -> None:
        """Write the lines."""
        if self._lines:
            self._out.write(dumps_lines(self._lines))
            self._lines.clear()
        self._out.flush()

    def idle(self) -> None:
        """Nothing to draw."""

    def close(self) -> None:
        """Nothing to take away."""


class TextView:
    """One line of plain text an event, for pipes and files."""

    tick_s = _TICK_S

    def __init__(self, out: Out, *, with_rule: bool) -> None:
        self._out = out
        self._with_rule = with_rule

    def show(self, event: Event, seq: int) -> None:  # noqa: ARG002  (people do not count lines)
        """Keep the line for the next `flush`."""
        self._out.write(plain(pieces_of(event, with_rule=self._with_rule)) + "\n")

    def flush(self) -> None:
        """Write the lines."""
        self._out.flush()

    def idle(self) -> None:
        """Nothing to draw."""

    def close(self) -> None:
        """Nothing to take away."""
