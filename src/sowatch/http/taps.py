"""`HttpTap`: probes on TLS libraries, wherever they are or will be loaded, and the flows that pass them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import TracebackType
from typing import Self

from sowatch.http.capture import CAPTURE_BYTES, Activity, Capture, HttpFlow, family_rules
from sowatch.http.flows import FlowTable
from sowatch.model.config import Config
from sowatch.model.events import Library, Ready
from sowatch.model.identity import ProcessId
from sowatch.uprobes.records import AttacherStats, Failure
from sowatch.watcher.watcher import Watcher

__all__ = ["CAPTURE_BYTES", "HttpFlow", "HttpTap"]


class HttpTap:
    """Reports HTTP flows that pass TLS libraries; a context manager.

    Args:
        on_flow: called with each flow once it is over, on the tap's own thread; it must not block.
        pids: flows of these processes only.
        container: flows of processes only whose container's id begins with this.
        pattern: a regular expression that paths of TLS libraries have to match; None: all of them.
        config: of the watch.
        capture_bytes: of each call, at most `CAPTURE_BYTES`; what is longer is counted.
        linger_s: see `sowatch.uprobes.attacher.Attacher`.
        keeps_query: paths keep what stands behind ``?``; see docs/privacy.md.
        headers: names of header fields that flows keep; see there, too.

    Raises:
        UsageError: ``capture_bytes`` is out of range, a header that is never kept, or a pattern that is none.

    >>> with HttpTap(lambda found: print(found.flow.method, found.flow.path)):  # doctest: +SKIP
    ...     time.sleep(10)
    """

    def __init__(
        self,
        on_flow: Callable[[HttpFlow], None],
        *,
        pids: Collection[int] = (),
        container: str | None = None,
        pattern: str | None = None,
        config: Config = Config(),  # noqa: B008 - frozen
        capture_bytes: int = CAPTURE_BYTES,
        linger_s: float = 5.0,
        keeps_query: bool = False,
        headers: Collection[str] = (),
    ) -> None:
        self._capture = capture = Capture(
            on_flow,
            # What it cannot go on after ends the watch, which is seen, and not the flows alone.
            on_failure=self._end_watch,
            is_filtered=bool(pids) or container is not None,
            capture_bytes=capture_bytes,
            linger_s=linger_s,
            keeps_query=keeps_query,
            headers=headers,
        )
        rules = family_rules(
            pattern,
            on_activate=capture.attacher.attach,
            on_deactivate=capture.attacher.detach,
            on_load=capture.note,
            on_unload=capture.note,
        )
        self.watcher = Watcher(*rules, config=config, pids=frozenset(pids), container=container)

    # ---- life ---------------------------------------------------------------------------------

    def start(self) -> Ready:
        """Loads the programs and starts the watch; libraries that are mapped already are attached soon after."""
        try:
            self._capture.start()
            return self.watcher.start()
        except BaseException:
            self.close()
            raise

    def finish(self) -> None:
        """See `sowatch.http.capture.Capture.finish`."""
        self._capture.finish()

    def close(self) -> None:
        """Ends the watch, hands out what is under way as incomplete, and detaches everything. Safe to call again."""
        self._capture.finish()
        self.watcher.stop()
        self._capture.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _end_watch(self) -> None:
        self.watcher.stop()

    # ---- what is there ---------------------------------------------------------------------------

    @property
    def table(self) -> FlowTable:
        """What decodes; of the thread of the tap."""
        return self._capture.table

    @property
    def callback_failures(self) -> int:
        """How often ``on_flow`` raised."""
        return self._capture.callback_failures

    @property
    def sees_sockets(self) -> bool:
        """Whether this kernel shows which socket a call used (6.3+); without it descriptors of system calls do."""
        return self._capture.sees_sockets

    @property
    def attached(self) -> AttacherStats:
        """How the probes are."""
        return self._capture.attacher.stats

    @property
    def failures(self) -> list[Failure]:
        """The files that could not be attached, and why; that a library lacks some of the exports is none."""
        found = self._capture.failures
        found += [
            Failure(Library(blocked.sample_path, blocked.id), "*", blocked.reason, is_permanent=True)
            for blocked in self.watcher.registry.blocked()
        ]
        return list({one.library.id: one for one in found}.values())

    def activity(self, process: ProcessId) -> Activity | None:
        """See `sowatch.http.capture.Capture.activity`."""
        return self._capture.activity(process)

    def stats(self) -> dict[str, int]:
        """See `sowatch.http.capture.Capture.stats`."""
        return self._capture.stats()
