"""FileRegistry against a model that is too simple to be wrong."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sowatch.engine.activation import FileRegistry
from sowatch.model.config import Config
from sowatch.model.errors import EnvironmentFault, RegistryStopped
from sowatch.model.events import Library
from sowatch.model.identity import TICK_NS, FileId, ProcessId

FILES = [Library("/lib/1.so", FileId(8, 1, 1, generation)) for generation in (1, 2)]
# Two of them have one pid, and the third one's start is also given as the kernel knows it.
PROCESSES = [ProcessId(1, TICK_NS), ProcessId(1, 2 * TICK_NS), ProcessId(2, 3 * TICK_NS)]
SPELLINGS = [*PROCESSES, ProcessId(2, 3 * TICK_NS + 77)]
RULES = ["tls", "all"]
TTL_S = 100.0
MAX_BLOCKED = 3

files = st.sampled_from(FILES)
processes = st.sampled_from(SPELLINGS)
rules = st.sampled_from(RULES)
outcomes = st.sampled_from(["works", "works", "works", "fails", "environment"])

Key = tuple[str, FileId]


def same(process: ProcessId) -> ProcessId:
    return next(one for one in PROCESSES if one.same_tick(process))


class Switches:
    """What the callbacks did: on and off must alternate, and each call must be expected."""

    def __init__(self) -> None:
        self.on: set[Key] = set()
        self.calls: list[tuple[str, Key]] = []

    def activate(self, key: Key, outcome: str, file: Library) -> None:
        assert key[1] == file.id
        assert key not in self.on, "activated twice"
        self.on.add(key)
        self.calls.append(("on", key))
        if outcome == "fails":
            raise ValueError("bad file")
        if outcome == "environment":
            raise EnvironmentFault("not now")

    def deactivate(self, key: Key, file: Library) -> None:
        assert key[1] == file.id
        assert key in self.on, "deactivated what was not active"
        self.on.remove(key)
        self.calls.append(("off", key))

    def take(self) -> list[tuple[str, Key]]:
        calls, self.calls = self.calls, []
        return calls


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.registry = FileRegistry(
            Config(max_blocked=MAX_BLOCKED, block_ttl_s=TTL_S), clock=lambda: self.now_s, is_alive=lambda process: True
        )
        self.switches = Switches()
        self.holders: dict[Key, set[ProcessId]] = {}
        # Least recently refused first, with the time of the failure.
        self.blocked: dict[Key, float] = {}
        self.counts = dict.fromkeys(("registered", "unregistered", "already_registered", "hook_failed", "blocked"), 0)

    def is_blocked(self, key: Key) -> bool:
        since_s = self.blocked.get(key)
        if since_s is None or self.now_s >= since_s + TTL_S:
            return False
        self.blocked[key] = self.blocked.pop(key)
        return True

    def block(self, key: Key) -> None:
        self.blocked = {one: since_s for one, since_s in self.blocked.items() if self.now_s < since_s + TTL_S}
        self.blocked.pop(key, None)
        if len(self.blocked) == MAX_BLOCKED:
            del self.blocked[next(iter(self.blocked))]
        self.blocked[key] = self.now_s

    @rule(seconds=st.sampled_from([1.0, 60.0]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def blocklist_is_cleared(self) -> None:
        self.registry.clear_blocked()
        self.blocked.clear()

    @invariant()
    def files_and_processes_are_those_of_the_model(self) -> None:
        held = {key: holders for key, holders in self.holders.items() if holders}
        reported = {
            (file.rule, file.library.id): {same(one) for one in file.processes} for file in self.registry.files()
        }
        assert {key: holders for key, holders in reported.items() if holders} == held
        assert {same(one) for one in self.registry.processes()} == set().union(*held.values(), set())
        stats = self.registry.stats
        assert stats.total_pids == len(self.registry.processes())
        assert stats.total_files == len(reported)
        assert all(file.processes for file in self.registry.files() if file.state == "held")

    @invariant()
    def blocklist_is_that_of_the_model_and_looking_changes_nothing(self) -> None:
        blocked = [key for key, since_s in self.blocked.items() if self.now_s < since_s + TTL_S]
        assert [(one.rule, one.id) for one in self.registry.blocked()] == blocked

    @invariant()
    def counters_are_those_of_the_model(self) -> None:
        stats = self.registry.stats
        assert {name: getattr(stats, name) for name in self.counts} == self.counts
        assert min(getattr(stats, name) for name in stats.__slots__) >= 0

    def teardown(self) -> None:
        assert self.registry.clear() == ()
        assert self.switches.on == set()
        assert (self.registry.files(), self.registry.processes()) == ((), frozenset())
        stats = self.registry.stats
        assert stats.registered == stats.unregistered
        with pytest.raises(RegistryStopped):
            self.registry.acquire("tls", FILES[0], PROCESSES[0])


class CountingAheadOfCalling(Machine):
    """`acquire` and `release` in one place, `activate` and `deactivate` later, in the same order."""

    def __init__(self) -> None:
        super().__init__()
        self.due: deque[tuple[str, str, Library]] = deque()
        self.active: set[Key] = set()

    @rule(name=rules, file=files, process=processes)
    def acquire(self, name: str, file: Library, process: ProcessId) -> None:
        holders = self.holders.setdefault((name, file.id), set())
        is_first = not holders
        holders.add(same(process))
        assert self.registry.acquire(name, file, process) is is_first
        if is_first:
            self.due.append(("activate", name, file))
        else:
            self.counts["already_registered"] += 1

    @rule(name=rules, file=files, process=processes)
    def release(self, name: str, file: Library, process: ProcessId) -> None:
        holders = self.holders.get((name, file.id), set())
        is_last = holders == {same(process)}
        holders.discard(same(process))
        assert self.registry.release(name, file.id, process) is is_last
        if is_last:
            self.due.append(("deactivate", name, file))

    @precondition(lambda self: self.due)
    @rule(outcome=outcomes)
    def call_back(self, outcome: str) -> None:
        what, name, file = self.due.popleft()
        key = (name, file.id)
        if what == "deactivate":
            is_due = key in self.active
            self.active.discard(key)
            self.counts["unregistered"] += is_due
            assert self.registry.deactivate(name, file.id, lambda one: self.switches.deactivate(key, one)) is is_due
            assert self.switches.take() == [("off", key)] * is_due
            return
        is_refused = self.is_blocked(key)
        works = not is_refused and outcome == "works"
        done = self.registry.activate(
            name,
            file,
            lambda one: self.switches.activate(key, outcome, one),
            deactivate=lambda one: self.switches.deactivate(key, one),
        )
        assert done is works
        if is_refused:
            self.counts["blocked"] += 1
        elif works:
            self.active.add(key)
            self.counts["registered"] += 1
        elif outcome == "fails":
            self.block(key)
            self.counts["hook_failed"] += 1
        calls = [] if is_refused else [("on", key)] if works else [("on", key), ("off", key)]
        assert self.switches.take() == calls

    @invariant()
    def active_files_are_those_of_the_model(self) -> None:
        assert self.switches.on == self.active
        states = {(file.rule, file.library.id): file.state for file in self.registry.files()}
        assert {key for key, state in states.items() if state == "attached"} == self.active

    @invariant()
    def nothing_is_active_that_nobody_holds_once_all_is_called(self) -> None:
        if not self.due:
            assert self.active <= {key for key, holders in self.holders.items() if holders}


TestCountingAheadOfCalling = CountingAheadOfCalling.TestCase
TestCountingAheadOfCalling.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
