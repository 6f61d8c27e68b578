"""The thread that sends metrics away every few seconds. Imports nothing of the package."""

from __future__ import annotations

import logging
import threading
from types import TracebackType
from typing import Final, Protocol, Self

__all__ = ["MetricsExporter", "Pusher"]

LOG = logging.getLogger("sowatch.telemetry")

#: How long `Pusher.close` waits for a delivery that is under way, and for the last one.
_CLOSE_S: Final = 5.0
#: How long it waits once more after it has made the exporter give up.
_GRACE_S: Final = 0.2


class MetricsExporter(Protocol):
    """What can send metrics: `StatsdExporter`, `OtlpMetricsExporter`."""

    @property
    def name(self) -> str:
        """What its metrics call it."""

    def push(self) -> None:
        """Sends the metrics as they are now; raises if that failed. One thread calls it."""

    def close(self) -> None:
        """Gives back what it holds, and ends a `push` that waits. Safe to call again, from any thread."""


class Pusher:
    """Calls ``exporter.push`` every ``interval_s`` seconds, and once more at the end. A context manager.

    A delivery that fails is counted, logged once until the next one succeeds, and never raised. The
    pusher owns the exporter and closes it.

    Attributes:
        pushes: deliveries that succeeded.
        errors: deliveries that failed.
        last_error: why the last one failed; None if it did not.
    """

    def __init__(self, exporter: MetricsExporter, *, interval_s: float = 10.0) -> None:
        self.name = exporter.name
        self.pushes = 0
        self.errors = 0
        self.last_error: str | None = None
        self._exporter = exporter
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"sowatch-push-{self.name}", daemon=True)

    def start(self) -> None:
        """Starts the thread; the first delivery is made at once."""
        self._thread.start()

    def close(self, timeout_s: float = _CLOSE_S) -> None:
        """Makes a last delivery and ends the thread; returns after about ``timeout_s`` at the latest."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._close_exporter()
            self._thread.join(_GRACE_S)
        if self._thread.is_alive():
            LOG.warning("the exporter %s did not finish within %.1f s and was abandoned", self.name, timeout_s)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        try:
            while True:
                is_last = self._stop.is_set()
                self._push()
                if is_last:
                    return
                self._stop.wait(self._interval_s)
        finally:
            self._close_exporter()

    def _push(self) -> None:
        try:
            self._exporter.push()
        except Exception as error:  # noqa: BLE001 - whatever a library raises: counted, logged, tried again
            self.errors += 1
            if self.last_error is None:
                LOG.warning("metrics could not be sent by %s: %s; it is tried again", self.name, error)
            self.last_error = str(error)
        else:
            self.pushes += 1
            self.last_error = None

    def _close_exporter(self) -> None:
        try:
            self._exporter.close()
        except Exception:
            LOG.exception("the exporter %s could not be closed", self.name)
