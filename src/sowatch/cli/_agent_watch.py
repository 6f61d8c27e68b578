"""The events of an agent, for `watch --agent` and `top --agent`, in the place of a watcher.

One thread reads the agent's stream, keeps what is mapped and hands events on. A stream that was cut off, as this reader
was too slow, is begun anew; what was missed then is sent with the cause `repair`, as by a watcher after a loss.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from sowatch.cli._agent_scan import Filter
from sowatch.cli._client import Agent, AgentStream
from sowatch.cli._options import Selection
from sowatch.model.errors import SowatchError
from sowatch.model.events import (
    Activate,
    Deactivate,
    Event,
    Head,
    Library,
    LibraryEvent,
    Load,
    Lost,
    Ready,
    Repaired,
    Stopped,
    Unload,
)
from sowatch.model.identity import FileId, ProcessId
from sowatch.model.lines import decode
from sowatch.model.stats import Mapped

__all__ = ["AgentStats", "AgentWatch"]

_ROUTE: Final = "/events?events=load,unload"
#: Events that wait for the command; then the agent waits, and at last cuts us off.
_MAX_WAITING: Final = 10_000
_END_S: Final = 2.0

_Key = tuple[ProcessId, FileId]


class AgentStats(Struct, frozen=True):
    """What was seen of an agent's stream, by the names of `sowatch.model.stats.Stats`."""

    processes: int = 0
    libraries: int = 0
    events: int = 0
    loads: int = 0
    unloads: int = 0
    lost_kernel: int = 0
    lost_queue: int = 0


class _Reader:
    """The events that one subscriber wants. `offer` on the thread of the stream, the rest on any."""

    def __init__(self, events: Collection[str]) -> None:
        self._events = frozenset(events)
        self._waiting: deque[Event] = deque()
        self._changed = threading.Condition()
        self._failure: SowatchError | None = None
        self._is_closed = False

    def offer(self, event: Event, *, is_last: bool = False) -> None:
        """Queues it if it is wanted; waits while too many are there, unless it is one of the last."""
        if isinstance(event, LibraryEvent) and event.event not in self._events:
            return
        with self._changed:
            self._changed.wait_for(lambda: is_last or self._is_closed or len(self._waiting) < _MAX_WAITING)
            self._waiting.append(event)
            self._changed.notify_all()

    def fail(self, failure: SowatchError) -> None:
        """What comes after the last event."""
        with self._changed:
            self._failure = failure
            self._changed.notify_all()

    def get(self, timeout_s: float) -> Event | None:
        """The next event, None if there is none in that time.

        Raises:
            SowatchError: there is none any more, as the stream has failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._failure is not None, timeout_s)
            if self._waiting:
                self._changed.notify_all()
                return self._waiting.popleft()
            if self._failure is not None:
                raise self._failure
            return None

    def close(self) -> None:
        """Lets the thread of the stream go on. Safe to call again."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


class AgentWatch:
    """What a command uses of `sowatch.watcher.watcher.Watcher`, by the stream of an agent.

    Activations are those of what is selected here: the first process that has a file of a rule, the last that had it.

    Args:
        agent: whose stream is read.
        selection: of the command line.
    """

    def __init__(self, agent: Agent, selection: Selection) -> None:
        self.agent = agent
        self._selection = selection
        self._filter: Filter | None = None
        self._rules: list[str] = []
        self._readers: list[_Reader] = []
        self._stream: AgentStream | None = None
        #: Guards what `snapshot`, `stats` and `stop` share with the thread of the stream.
        self._lock = threading.Lock()
        self._held: dict[_Key, Load] = {}
        #: How many processes have a file of a rule, and the file as the last load showed it.
        self._users: dict[tuple[str, FileId], tuple[int, Library]] = {}
        #: Not reported: there before a watch that leaves that out.
        self._silent: set[_Key] = set()
        self._found: dict[_Key, Load] = {}
        self._stats = AgentStats()
        self.ready: Ready | None = None
        self.is_repaired = True
        self._is_ready = threading.Event()
        self._has_ended = threading.Event()
        self._is_stopping = False
        self._failure: SowatchError | None = None
        self._thread = threading.Thread(target=self._run, name="sowatch-agent", daemon=True)

    @property
    def stats(self) -> AgentStats:
        """What was seen so far."""
        with self._lock:
            processes, libraries = len({key[0] for key in self._held}), len({key[1] for key in self._held})
            return replace(self._stats, processes=processes, libraries=libraries)

    def subscribe(self, *, events: Collection[str], control: bool = True) -> _Reader:  # noqa: ARG002 - always sent
        """Before `start`: the events that are reported from then on."""
        reader = _Reader(events)
        self._readers.append(reader)
        return reader

    def start(self) -> Ready:
        """Reads what is mapped; returns once that is done.

        Raises:
            SowatchError: the agent does not answer, or ends while it does.
        """
        self._rules = self.agent.ready()["rules"]
        self._filter = Filter(self.agent, self._selection)
        self._stream = self.agent.open(_ROUTE)
        self._thread.start()
        self._is_ready.wait()
        if self.ready is None:
            self.stop()
            raise self._failure or SowatchError("the watch was stopped before it was ready.")
        return self.ready

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until the stream has ended; whether it has."""
        return self._has_ended.wait(timeout_s)

    def snapshot(self, *, with_ranges: bool = True) -> Sequence[Mapped]:  # noqa: ARG002 - those of the load
        """What is mapped now, as it was loaded."""
        with self._lock:
            held = list(self._held.values())
        return [
            Mapped(one.process, one.library, one.rule, one.ranges, one.cause, one.time_ns, one.range_count)
            for one in held
        ]

    def check(self) -> None:
        """Raises what ended the stream, if it was not `stop`.

        Raises:
            SowatchError: the agent has ended, or hangs.
        """
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Ends the stream; `Stopped` is the last event. Safe to call again, from any thread."""
        with self._lock:
            is_first, self._is_stopping = not self._is_stopping, True
        if not is_first:
            self._has_ended.wait(_END_S)
            return
        if self._stream is not None:
            self._stream.close()
        if self._thread.is_alive():
            for reader in self._readers:
                reader.close()
            self._thread.join(_END_S)
        if self._failure is None and self.ready is not None:
            now_ns = time.time_ns()
            with self._lock:
                in_use = list(self._users.items())
            for (rule, _), (_, library) in in_use:
                self._emit(Deactivate(rule, library, "stop", None, now_ns), is_last=True)
            stats = self._stats
            lost = stats.lost_kernel + stats.lost_queue
            self._emit(Stopped(now_ns, stats.loads, stats.unloads, lost), is_last=True)
        self._is_ready.set()
        self._has_ended.set()

    # ---- the thread ---------------------------------------------------------------------------

    def _go_on_with(self, stream: AgentStream) -> bool:
        """Goes on with another stream; False: `stop` has closed the one before, and knows none of this one."""
        with self._lock:
            self._stream = stream
            return not self._is_stopping

    def _run(self) -> None:
        try:
            while self._follow() and not self._is_stopping:
                assert self._stream is not None
                self._stream.release()
                if not self._go_on_with(self.agent.open(_ROUTE)):
                    break
        except SowatchError as error:
            if not self._is_stopping:
                self._fail(error)
        finally:
            assert self._stream is not None
            self._stream.release()
            self._is_ready.set()

    def _fail(self, error: SowatchError) -> None:
        self._failure = error
        for reader in self._readers:
            reader.fail(error)
        self._has_ended.set()

    def _follow(self) -> bool:
        """Takes events until the stream ends; whether it was cut off, and has to be begun anew."""
        begun_s = time.monotonic()
        self._found = {}
        is_past, last = True, None
        for event in self._events():
            last = event
            if isinstance(event, Stopped):
                break
            if not is_past:
                self._take(event)
            elif isinstance(event, Load):
                self._note_past(event)
            elif isinstance(event, Ready):
                is_past = False
                self._take_past(event, time.monotonic() - begun_s)
        if isinstance(last, Lost) and last.where == "queue":
            return True
        if not self._is_stopping:
            self._fail(
                SowatchError(
                    f"the agent on {self.agent.path!r} has ended, and with it the watch. The lines so far are right. "
                    "See its log, and start it again with `sowatch serve`."
                )
            )
        return False

    def _events(self) -> Iterator[Event]:
        assert self._stream is not None
        for line in self._stream:
            name, _, value = line.partition(b": ")
            if name == b"data":
                event = self.agent.read_as(partial(decode, value))
                if not isinstance(event, Head):
                    yield event

    def _note_past(self, load: Load) -> None:
        """What is mapped already: reported at once the first time, compared with the map after a loss."""
        assert self._filter is not None
        if not self._filter.wants(load.process, load.library):
            return
        self._found[load.process.id, load.library.id] = load
        if self.ready is None:
            if not self._selection.snapshot:
                self._silent.add((load.process.id, load.library.id))
            self._load(load)

    def _take_past(self, ready: Ready, seconds: float) -> None:
        if self.ready is None:
            rules = ", ".join(self._rules)
            by_rules = f"the agent on {self.agent.path} answered, by its rules: {rules}"
            stats = self.stats
            self.ready = replace(
                ready,
                time_ns=time.time_ns(),
                limits=(*ready.limits, by_rules),
                processes=stats.processes,
                mappings=len(self._held),
                seconds=seconds,
            )
            self._emit(self.ready)
            self._is_ready.set()
            return
        gone = [load for key, load in self._held.items() if key not in self._found]
        new = [load for key, load in self._found.items() if key not in self._held]
        now_ns = time.time_ns()
        for load in gone:
            self._unload(Unload(load.rule, load.library, load.process, "repair", None, now_ns))
        for load in new:
            self._load(replace(load, cause="repair", t_ns=None))
        self.is_repaired = True
        self._emit(Repaired(now_ns, len(new), len(gone), seconds))

    def _take(self, event: Event) -> None:
        assert self._filter is not None
        if isinstance(event, Load):
            if self._filter.wants(event.process, event.library):
                self._load(event)
        elif isinstance(event, Unload):
            self._unload(event)
        elif isinstance(event, Lost):
            self.is_repaired = False
            name = "lost_queue" if event.where == "queue" else "lost_kernel"
            self._stats = replace(self._stats, **{name: getattr(self._stats, name) + event.count})
            self._emit(event)
        elif isinstance(event, Repaired):
            self.is_repaired = True
            self._emit(event)

    def _load(self, load: Load) -> None:
        key, file = (load.process.id, load.library.id), (load.rule, load.library.id)
        with self._lock:
            if key in self._held:
                return
            self._held[key] = load
            if key in self._silent:
                return
            users, _ = self._users.get(file, (0, load.library))
            self._users[file] = users + 1, load.library
        if not users:
            self._emit(
                Activate(load.rule, load.library, load.process, load.cause, load.t_ns, load.time_ns, load.ranges)
            )
        self._stats = replace(self._stats, loads=self._stats.loads + 1)
        self._emit(load)

    def _unload(self, unload: Unload) -> None:
        key = unload.process.id, unload.library.id
        with self._lock:
            load = self._held.pop(key, None)
            if load is None:
                return
            if key in self._silent:
                self._silent.discard(key)
                return
            file = load.rule, load.library.id
            users, library = self._users.pop(file)
            if users > 1:
                self._users[file] = users - 1, library
        self._stats = replace(self._stats, unloads=self._stats.unloads + 1)
        self._emit(unload)
        if users == 1:
            self._emit(Deactivate(load.rule, unload.library, None, unload.t_ns, unload.time_ns))

    def _emit(self, event: Event, *, is_last: bool = False) -> None:
        if isinstance(event, LibraryEvent):
            self._stats = replace(self._stats, events=self._stats.events + 1)
        for reader in self._readers:
            reader.offer(event, is_last=is_last)
