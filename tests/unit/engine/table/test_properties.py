"""The table against a kernel: random processes do random things, and the table has to agree."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from sowatch.engine.activation import FileRegistry
from sowatch.engine.effects import Causes
from sowatch.engine.file_inspector import FileFacts
from sowatch.engine.loop import Engine
from sowatch.engine.publisher import Publisher, Selection
from sowatch.engine.rule_change import RuleChange
from sowatch.engine.table import MappingTable
from sowatch.linux.proc import Miss
from sowatch.model.config import Config
from sowatch.model.events import LibraryEvent
from sowatch.model.rules import Rule, RuleSet
from sowatch.sources import scan_rows
from sowatch.sources.base import Report
from support.model_kernel import CALLS, PIDS, RULE, Kernel
from support.records import PAGE
from support.tracking import KeptEffects

RULES = RuleSet([Rule(RULE)])


@pytest.fixture(scope="module", autouse=True)
def smallest_slices():
    """Whatever may come between two slices of a merge does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_rows, "SLICE", 1)
        yield


class Owner:
    """What the engine does with a tracker, in its plainest form."""

    clock = int
    table_type = KeptEffects

    def __init__(self, kernel):
        self.kernel = kernel
        self.table = self.table_type(RULES)
        self.seen_losses = 0

    def take_changes(self):
        return self.table.take_changes()

    def flush(self):
        wanted, ignored = self.table.take_answers()
        self.kernel.answer(wanted, is_wanted=True)
        self.kernel.answer(ignored, is_wanted=False)
        for idle in self.table.take_idle():
            if self.kernel.untrack(*idle):
                self.table.untracked(*idle[:2])

    def drain(self):
        for record in self.kernel.drain():
            self.table.apply(record)
        self.flush()

    def start(self):
        self.read_everything(Causes("snapshot", "repair"), is_start=True)

    def reread(self):
        due = dict(self.table.needs_rescan)
        self.table.begin_rescans(due)
        self.kernel.set_report(Report.RANGES)
        found = [self.kernel.scan_process(pid) for pid in due]
        missing = due.keys() - {one.tgid for one in found if one}
        gone = [pid for pid in missing if not self.is_there(self.table.get(pid))]
        records = self.kernel.drain()
        self.kernel.set_report(Report.NOTHING)
        self.table.merge([one for one in found if one], records, Causes("mmap", "munmap"), own_causes=due)
        for pid in gone:
            self.table.forget_pid(pid, "repair", self.kernel.now)
        self.flush()

    def repair(self):
        self.seen_losses = self.kernel.lost
        self.read_everything(Causes("repair", "repair"))

    def read_everything(self, causes, *, is_start=False):
        since_ns = self.kernel.tick_ns()
        self.kernel.set_report(Report.PROCESSES | Report.RANGES)
        early = self.kernel.drain()
        scans, meanwhile = self.kernel.scan_all()
        records = [*early, *meanwhile, *self.kernel.drain()]
        self.kernel.set_report(Report.NOTHING)
        scanned = {scan.tgid for scan in scans}
        self.table.begin_rescans(scanned)
        self.table.merge(scans, records, causes, is_start=is_start)
        for process in () if is_start else self.table.processes():
            if process.id.pid not in scanned and process.seen_ns < since_ns:
                self.look_for(process, since_ns)
        self.flush()

    def is_there(self, process):
        there = process and self.kernel.processes.get(process.id.pid)
        return there is not None and there.is_live and there.words.start_ns == process.id.start_ns

    def look_for(self, process, since_ns):
        if not self.is_there(process):
            self.table.forget(process, "repair", since_ns)
        else:
            self.table.await_rescan(process.id.pid, Causes("repair", "repair"))

    def close(self):
        pass

    def ask_for_the_silent(self):
        for child in self.table.unannounced(before_ns=1 << 63):
            self.table.await_rescan(child.id.pid, Causes("fork", "munmap"))


class Facts:
    """An inspector that knows every file."""

    def known(self, file_id):
        return FileFacts(is_elf=True)

    def take_finished(self):
        return []


class EngineOwner(Owner):
    """The engine's keeper itself, without its thread; what it publishes stands for the tracker's changes."""

    clock = time.monotonic_ns
    table_type = MappingTable
    #: Of the ``/proc`` that it stands for: there is none.
    root = "/nonexistent"

    def __init__(self, kernel):
        super().__init__(kernel)
        registry = FileRegistry(is_alive=lambda process: True)
        publisher = Publisher(RULES, registry, Selection(), proc_root="/proc")
        publisher.in_force = RuleChange(RULES, Facts())
        self.events = publisher.subscribers.subscribe(control=True, limit=1 << 20, limit_bytes=1 << 30)
        self.engine = Engine(kernel, self.table, publisher, RULES, Config(), silent_baseline=False)
        self.engine._proc = self
        self.reconciler = self.engine.reconciler
        self.reconciler._proc = self
        self.active = {}

    @property
    def seen_losses(self):
        return self.reconciler.losses.ring if self.reconciler.is_repaired else None

    @seen_losses.setter
    def seen_losses(self, count):
        pass

    def boot_id(self):
        return None

    def stat(self, pid):
        """The keeper's look at ``/proc``."""
        there = self.kernel.processes.get(pid)
        if there is None:
            return Miss.GONE
        return SimpleNamespace(
            pid=pid, start_ns=there.words.start_ns, threads=1, is_dead=not there.is_live, state="SZ"[not there.is_live]
        )

    def take_changes(self):
        active = self.active
        while (event := self.events.get(0)) is not None:
            if not isinstance(event, LibraryEvent):
                continue
            key = event.rule, event.library.id
            if event.event in ("activate", "deactivate"):
                assert (event.event == "activate") != (active.get(key, 0) > 0), f"{event} twice"
                active[key] = int(event.event == "activate")
                continue
            assert active.get(key), f"{event} of a file that is not active"
            name = SimpleNamespace(file_id=event.library.id)
            yield SimpleNamespace(is_load=event.event == "load", process=event.process, name=name)

    def drain(self):
        self.reconciler.drain()

    def start(self):
        self.reconciler.take_snapshot(self.engine._make_ready)

    def reread(self):
        self.reconciler._schedule.expedite(self.table.needs_rescan)
        self.reconciler._reread()

    def repair(self):
        self.reconciler._check_losses()
        self.reconciler._repair()

    def close(self):
        self.engine.stop()


calls = st.tuples(st.integers(0, 11), st.sampled_from(CALLS), st.integers(0, 11), st.integers(0, 11))
scripts = st.lists(calls, min_size=4, max_size=24)


def ghosts(owner):
    """Processes of the map, announced or not, that are not alive."""
    there = {(one.words.pid, one.words.start_ns) for one in owner.kernel.processes.values() if one.is_live}
    return [one.id for one in owner.table.processes() if tuple(one.id) not in there]


class Machine(RuleBasedStateMachine):
    """Random calls by random tasks, with draining, readings and losses anywhere between."""

    owner_type = Owner

    def __init__(self):
        super().__init__()
        self.kernel = Kernel(self.owner_type.clock)
        self.loaded = {}

    @initialize(before=scripts, meanwhile=scripts)
    def start(self, before, meanwhile):
        for call in before:
            if call[1] != "clone_vm":
                self.kernel.act(*call)
        # Nobody has listened yet, and nothing is followed yet.
        self.kernel.finish_all()
        self.kernel.ring.clear()
        self.kernel.entries.clear()
        self.owner = self.owner_type(self.kernel)
        self.during(meanwhile, self.owner.start)

    @rule(script=scripts)
    def act(self, script):
        for call in script:
            self.kernel.act(*call)

    @rule(which=st.integers(0, 11))
    def finish_one(self, which):
        tasks = self.kernel.tasks()
        if tasks:
            self.kernel.finish(tasks[which % len(tasks)])

    @rule(meanwhile=scripts)
    def drain(self, meanwhile):
        self.during(meanwhile, self.owner.drain)

    @precondition(lambda self: self.owner.table.needs_rescan)
    @rule(meanwhile=scripts)
    def reread(self, meanwhile):
        self.during(meanwhile, self.owner.reread)

    @rule(meanwhile=scripts)
    def repair(self, meanwhile):
        self.during(meanwhile, self.owner.repair)

    @rule(is_full=st.booleans())
    def fill_the_ring(self, is_full):
        self.kernel.is_full = is_full

    def during(self, script, work):
        script = list(script)

        def between():
            # Several steps, so that a whole call may fit into the middle of a visit.
            for _ in range(min(len(script), 1 + len(script) % 5)):
                self.kernel.act(*script.pop(0))

        self.kernel.between = between
        work()
        self.kernel.between = lambda: None
        self.check()

    def check(self):
        """Loads and unloads alternate, and each says who."""
        for change in self.owner.take_changes():
            key = change.process.id, change.name.file_id.inode
            assert change.is_load != (key in self.loaded), f"{change} twice"
            # Who shares a space may be told of for what another one does, before it says a word itself.
            is_excused = self.kernel.lost or self.kernel.has_shared
            assert change.process.uid is not None or is_excused, f"{change} of nobody"
            if change.is_load:
                self.loaded[key] = change
            else:
                del self.loaded[key]
        tracked = {(process.id, mapping.name.file_id.inode) for process, mapping in self.owner.table.mappings()}
        assert set(self.loaded) == tracked

    def teardown(self):
        self.kernel.is_full = False
        self.kernel.finish_all()
        try:
            self.untrack()
        finally:
            self.owner.close()

    def untrack(self):
        """Once every reading that is owed was made, the map is what is there."""
        self.owner.drain()
        has_asked = False
        for _ in range(30):
            if self.kernel.lost != self.owner.seen_losses:
                self.owner.repair()
            elif not has_asked:
                self.owner.ask_for_the_silent()
                has_asked = True
            elif self.owner.table.needs_rescan:
                self.owner.reread()
            else:
                break
        assert not self.owner.table.needs_rescan
        self.check()
        assert self.the_map() == self.kernel.truth()
        self.check_ghosts()

    def check_ghosts(self):
        assert ghosts(self.owner) == []

    def the_map(self):
        found = {}
        for process, mapping in self.owner.table.mappings():
            there = self.kernel.processes.get(process.id.pid)
            if there and there.is_spawning:
                continue  # silent, unless a reading met it between its fork and the record of it
            pages = {page for start, end in mapping.ranges for page in range(start // PAGE, end // PAGE)}
            found.setdefault(tuple(process.id), {})[mapping.name.file_id.inode] = pages
        return found


class EngineMachine(Machine):
    """The same with the real engine, publisher and registry around the tracker."""

    owner_type = EngineOwner


#: What a parent and its children of vfork do, and whether the ring is full while they do it.
spawns = st.lists(
    st.tuples(
        st.sampled_from(["vfork", "exec", "exit", "mmap", "parent mmap", "parent exit", "drain", "silence"]),
        st.booleans(),
    ),
    min_size=3,
    max_size=14,
)


@settings(max_examples=300, derandomize=True, deadline=None, phases=(Phase.generate, Phase.shrink))
@given(script=spawns)
def test_after_a_repair_whoever_is_in_the_map_is_alive_whichever_records_were_lost(script):
    kernel = Kernel(EngineOwner.clock)
    parent = kernel.processes[PIDS[0]]

    def do(process, what):
        task = process.tasks[0] if process.tasks else None
        # A parent waits for its child's exec or end.
        if task is not None and not (isinstance(task.waits_for, type(process)) and task.waits_for.is_vfork):
            task.call = kernel.begin(task, what, 0, 0)
            kernel.finish(task)

    do(parent, "mmap")
    kernel.ring.clear()
    kernel.entries.clear()
    owner = EngineOwner(kernel)
    try:
        owner.start()
        do(parent, "vfork")
        for what, is_lost in script:
            kernel.is_full = is_lost
            children = [one for pid, one in kernel.processes.items() if pid not in PIDS[:2]]
            if what == "drain":
                owner.drain()
            elif what == "silence":
                owner.ask_for_the_silent()
                owner.reread()
            elif what == "vfork":
                do(parent, what)
            elif what.startswith("parent"):
                do(parent, what.removeprefix("parent "))
            elif children:
                do(children[-1], what)
        kernel.is_full = False
        owner.drain()
        owner.repair()
        assert owner.reconciler.is_repaired
        assert ghosts(owner) == []
        do(parent, "exit")
        owner.drain()
        assert ghosts(owner) == []
        sharers = {process.id.pid for process, _ in owner.table.mappings()}
        assert sharers <= {pid for pid, _ in kernel.truth()} | {
            one.pid for one in kernel.processes.values() if one.is_spawning
        }
    finally:
        owner.close()


def budget(examples):
    """The same examples each time; a failure is made small, but not explained, which takes minutes."""
    return settings(
        max_examples=examples,
        stateful_step_count=30,
        derandomize=True,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )


TestMappingTable = Machine.TestCase
TestMappingTable.settings = budget(200)
TestEngine = EngineMachine.TestCase
TestEngine.settings = budget(100)
