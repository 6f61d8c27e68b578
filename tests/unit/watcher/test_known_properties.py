"""Which processes were told of, against a world that forks, execs, exits and loses events at random."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sowatch.model.events import Process
from sowatch.model.identity import TICK_NS, ProcessId
from sowatch.model.process_events import ProcessEvent
from sowatch.watcher.known import KnownProcesses, Seen

PIDS = range(1, 6)


class World(RuleBasedStateMachine):
    """A kernel whose ring may drop events, a queue that may be full, and repairs now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = itertools.count(1)
        #: pid -> (start tick, which image): what is true.
        self.alive: dict[int, tuple[int, int]] = {}
        self.images = itertools.count(1)
        self.ring: list[ProcessEvent] = []
        self.is_damaged = False
        self.known = KnownProcesses()
        self.reported: list[tuple[str, int, int]] = []
        #: Image that the subscribers believe in, by process.
        self.believed: dict[tuple[int, int], int | None] = {}
        self.image_of_event: dict[int, int] = {}

    # What really happens.

    def happens(self, kind: str, pid: int, *, is_lost: bool) -> None:
        tick, image = self.alive[pid]
        t_ns = next(self.clock)
        self.image_of_event[t_ns] = image
        if is_lost:
            self.is_damaged = True
        else:
            self.ring.append(ProcessEvent(kind, Process(pid, tick * TICK_NS), None, t_ns))

    @rule(pid=st.sampled_from(PIDS), parent=st.sampled_from(PIDS), is_lost=st.booleans())
    def fork(self, pid: int, parent: int, is_lost: bool) -> None:
        if pid in self.alive:
            return
        image = self.alive[parent][1] if parent in self.alive else next(self.images)
        self.alive[pid] = (next(self.clock), image)
        self.happens("fork", pid, is_lost=is_lost)

    @rule(pid=st.sampled_from(PIDS), is_lost=st.booleans())
    def exec(self, pid: int, is_lost: bool) -> None:
        if pid in self.alive:
            self.alive[pid] = (self.alive[pid][0], next(self.images))
            self.happens("exec", pid, is_lost=is_lost)

    @rule(pid=st.sampled_from(PIDS), is_lost=st.booleans(), twice=st.booleans())
    def exit(self, pid: int, is_lost: bool, twice: bool) -> None:
        if pid in self.alive:
            self.happens("exit", pid, is_lost=is_lost)
            if twice:
                self.happens("exit", pid, is_lost=is_lost)
            del self.alive[pid]

    # What the monitor does.

    def emit(self, event: ProcessEvent, seen: Seen | None = None, *, is_full: bool = False) -> bool:
        if is_full:
            self.known.untold(event)
            self.is_damaged = True
            return False
        self.known.reported(event, seen)
        process = (event.process.pid, event.process.start_ns // TICK_NS)
        self.reported.append((event.kind, *process))
        # A fork from the kernel says that the child runs what its parent ran; one from a repair does not.
        if event.kind == "exec" or (event.kind == "fork" and event.cause == "event"):
            self.believed[process] = int(seen.image[0]) if seen else self.image_of_event[event.t_ns]
        return True

    @precondition(lambda self: self.ring)
    @rule(data=st.data())
    def drain(self, data: st.DataObject) -> None:
        for event in self.ring:
            for news in self.known.news(event):
                if not self.emit(news, is_full=data.draw(st.sampled_from([False, False, True]))):
                    break
        self.ring.clear()

    def look(self) -> dict[int, Seen]:
        return {
            pid: Seen(ProcessId(pid, tick * TICK_NS), 0, False, (str(image).encode(),), next(self.clock))
            for pid, (tick, image) in self.alive.items()
        }

    def emit_seen(self, seen: Seen, full: Callable[[], bool], *, is_new: bool) -> None:
        process = Process(*seen.id)
        fork, exec_ = (ProcessEvent(kind, process, None, seen.t_ns, "repair") for kind in ("fork", "exec"))
        if not is_new or self.emit(fork, seen, is_full=full()):
            self.emit(exec_, seen, is_full=full())

    @initialize(pids=st.sets(st.sampled_from(PIDS)), between=st.sets(st.sampled_from(PIDS)))
    def baseline(self, pids: set[int], between: set[int]) -> None:
        for pid in pids:
            self.alive[pid] = (next(self.clock), next(self.images))
        for pid in between & pids:
            self.exec(pid, is_lost=False)
        looked = self.look()
        for pid in between & pids:
            self.exit(pid, is_lost=False, twice=False)
        for seen in looked.values():
            assert self.known.add(Process(*seen.id), seen, is_reported=True)
            self.believed[seen.id.pid, seen.id.start_ns // TICK_NS] = int(seen.image[0])

    @rule(data=st.data(), pid=st.sampled_from(PIDS))
    def repair(self, data: st.DataObject, pid: int) -> None:
        began_ns = next(self.clock)
        looked = self.look()
        # Things go on between the look and the draining after it.
        for happen in data.draw(st.lists(st.sampled_from([self.exec, self.exit, self.fork]), max_size=2)):
            if happen == self.exit:
                self.exit(pid, is_lost=False, twice=False)
            elif happen == self.exec:
                self.exec(pid, is_lost=False)
            else:
                self.fork(pid, 1, is_lost=False)
        was_damaged, self.is_damaged = self.is_damaged, False
        before = len(self.reported)
        for event in self.ring:
            for news in self.known.news(event):
                if not self.emit(news, is_full=data.draw(st.sampled_from([False, False, True]))):
                    break
        self.ring.clear()
        exits, new, changed = self.known.compare(looked, began_ns)
        if not was_damaged and not self.is_damaged:
            assert (exits, new) == ([], []), self.reported[before:]

        def full() -> bool:
            return data.draw(st.sampled_from([False, False, False, True]))

        for event in exits:
            self.emit(event, is_full=full())
        for seen in new:
            self.emit_seen(seen, full, is_new=True)
        for seen in changed:
            self.emit_seen(seen, full, is_new=False)

    # What must hold.

    @invariant()
    def nothing_is_told_of_a_process_after_its_exit_and_no_fork_or_exit_twice(self) -> None:
        for process in {(pid, tick) for _, pid, tick in self.reported}:
            kinds = [kind for kind, *one in self.reported if tuple(one) == process]
            assert kinds.count("fork") <= 1
            assert "exit" not in kinds[:-1]

    @invariant()
    def everything_is_known_when_nothing_is_on_its_way(self) -> None:
        if self.ring or self.is_damaged:
            return
        assert len(self.known) == len(self.alive)
        assert {event.process.pid for event in self.known.scan()} == set(self.alive)
        gone = {(pid, tick) for kind, pid, tick in self.reported if kind == "exit"}
        for pid, (tick, image) in self.alive.items():
            assert (pid, tick) not in gone
            assert self.believed.get((pid, tick)) == image


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_process_that_ended_before_the_baseline_was_taken_note_of_is_not_brought_back() -> None:
    known = KnownProcesses()
    process = Process(1, TICK_NS)
    known.reported(ProcessEvent("exit", process, None, 5))

    assert not known.add(process, Seen(process.id, 0, False, (b"1",), 4), is_reported=True)
    assert len(known) == 0


def test_process_that_was_seen_before_its_pid_was_used_again_is_not_brought_back() -> None:
    known = KnownProcesses()
    old, new = ProcessId(1, TICK_NS), ProcessId(1, 2 * TICK_NS)
    # The look saw the old one; then its exit found the queue full, and the fork of the new one did not.
    known.reported(ProcessEvent("fork", Process(*new), None, 7))

    differences = known.compare({1: Seen(old, 0, False, (b"1",), 5)}, began_ns=4)

    assert differences == ([], [], [])
