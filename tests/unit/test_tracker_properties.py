"""The tracker against a kernel: random processes do random things, and the map has to follow.

`Kernel` is a model of ``programs/watch.bpf.c`` on a small machine: calls that take several steps,
each of which anything may come between; claims, the dirty bit, verdicts, settled processes,
readings that take their time, and a ring that may be full. Programs in it are well-behaved in one
point: nobody maps over or unmaps what another thread's mmap has not returned yet.
"""

from __future__ import annotations

import time
from collections import Counter
from types import SimpleNamespace

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from sowatch.bpf.records import FLAG_ASK, FLAG_DIRTY, FLAG_MPROTECT, FLAG_SHARED_VM
from sowatch.config import Config
from sowatch.engine import Engine
from sowatch.events import LibraryEvent
from sowatch.inspector import FileFacts
from sowatch.publisher import Publisher, Selection
from sowatch.registry import FileRegistry
from sowatch.rules import Rule, RuleSet
from sowatch.sources import Losses, Report, group
from sowatch.tracker import Causes, Tracker
from support.records import PAGE, File, Proc

RULES = RuleSet([Rule("libssl|libcrypto")])
SSL, CRYPTO = File("/lib/libssl.so", 100), File("/lib/libcrypto.so", 101)
LIBC, LIBM = File("/lib/libc.so", 102), File("/lib/libm.so", 103)
FILES = (SSL, CRYPTO, SSL, LIBC, LIBM)
WANTED = {SSL, CRYPTO}
PAGES = 12
PIDS = range(10, 16)


class Mm:
    """An address space: the executable pages, those made unexecutable, and how many tasks use it."""

    def __init__(self):
        self.pages = {}
        self.hidden = {}
        self.in_flight = Counter()
        self.users = 0

    def copy(self):
        new = Mm()
        new.pages, new.hidden = dict(self.pages), dict(self.hidden)
        return new

    def vmas(self, after=0):
        """(file, first, end), neighbouring pages of one file together."""
        found = []
        for page in sorted(self.pages):
            if page < after:
                continue
            if found and found[-1][0] is self.pages[page] and found[-1][2] == page:
                found[-1][2] = page + 1
            else:
                found.append([self.pages[page], page, page + 1])
        return found

    def hole(self, count):
        taken = set(self.pages) | set(self.hidden) | set(+self.in_flight)
        starts = (at for at in range(1, PAGES) if not taken & set(range(at, at + count)))
        return next(starts, None)


class Task:
    def __init__(self, process):
        self.process = process
        self.call = None
        self.waits_for = None  # the vfork child that has its space


class Process:
    def __init__(self, pid, ticks, mm, exec_id=1):
        self.words = Proc(pid, ticks, exec_id=exec_id)
        self.mm = mm
        self.tasks = []
        self.is_live = True
        self.is_vfork = False

    @property
    def pid(self):
        return self.words.pid

    def new_task(self):
        self.tasks.append(Task(self))
        self.mm.users += 1
        return self.tasks[-1]


class Entry:
    """struct process of state.bpf.h."""

    def __init__(self, process):
        self.start_ns = process.words.start_ns
        self.image = process.words.exec_id
        self.done = self.under_way = 0
        self.dirty = self.introduced = self.shares_vm = False
        self.pages = set()

    @property
    def touches(self):
        """What brought it here; 0 if nothing of it is wanted. No two programs of a process have one in common."""
        count = self.done << 4 | self.under_way
        return count and self.image << 16 | count

    def copy(self, child):
        new = Entry(child)
        new.done, new.shares_vm, new.pages = 1, self.shares_vm, set(self.pages)
        return new

    def mark_dirty(self):
        was, self.dirty = self.dirty, True
        return not was


class Kernel:
    """The machine, and the `EventSource` that looks at it."""

    strategy, guarantee, hooks, limits, attempts = "core", "exact", "syscall", (), ()

    def __init__(self):
        self.now = 0
        self.forks = 0
        self.processes = {}
        self.followed = {}
        self.verdicts = {}
        self.ring = []
        self.report = Report.NOTHING
        self.lost = 0
        self.is_full = False
        #: Called wherever something may happen while a reading is made.
        self.between = lambda: None

    def tick_ns(self):
        self.now += 1
        return self.now

    # ---- what the programs do -----------------------------------------------------------------

    def send(self, record, *, is_vital=False):
        if self.is_full and not is_vital:
            self.lost += 1
            return False
        self.ring.append(record)
        return True

    def words(self, process, entry=None):
        """The writer of a process's records; ``entry`` is what `touches` is taken from."""
        process.words.touches = entry.touches if entry else 0
        return process.words

    def find(self, pid):
        entry = self.followed.get(pid)
        return entry if entry and entry.touches else None

    def entry_of(self, process):
        return self.followed.setdefault(process.pid, Entry(process))

    def touch(self, process):
        entry = self.entry_of(process)
        entry.done += 1
        return entry

    def matters(self, process, pages):
        if self.report & Report.RANGES:
            return True
        entry = self.find(process.pid)
        if entry is None:
            return False
        if entry.shares_vm:
            if process.mm.users > 1:
                return True
            entry.shares_vm = False
        return bool(entry.pages & set(pages))

    def send_dirty(self, process, entry):
        if entry and entry.mark_dirty():
            self.send(process.words.dirty(t=self.tick_ns()))

    def introduce(self, process, entry):
        if not entry.introduced:
            entry.introduced = self.send(self.words(process, entry).intro(t=self.tick_ns()))

    def report_mapping(self, process, file, pages, *, is_touched, is_alone, flags=0):
        if self.verdicts.get(file.key) is None:
            flags |= FLAG_ASK
        entry = self.touch(process)
        entry.under_way -= is_touched
        entry.pages |= set(pages)
        self.introduce(process, entry)
        if not is_alone and entry.mark_dirty():
            flags |= FLAG_DIRTY
        words = self.words(process, entry)
        record = words.map(file, pages[0] * PAGE, (pages[-1] + 1) * PAGE, t=self.tick_ns(), flags=flags)
        yield  # the path is walked
        self.send(record)
        if not is_alone:
            self.send_dirty(process, entry)

    # ---- system calls; each yield is a moment in which anything may happen ----------------------

    def mmap(self, process, file, at, count, *, is_fixed):
        mm = process.mm
        is_alone = mm.users == 1
        maps = self.verdicts.get(file.key) is not False
        if maps:
            self.entry_of(process).under_way += 1
        pages = range(at, at + count)
        if is_fixed and any(mm.in_flight[page] for page in pages):
            is_fixed = False
        unmaps = is_fixed and self.matters(process, pages)
        if is_fixed:
            mm.in_flight.update(pages)
        if maps or unmaps:
            yield
        if not is_fixed:
            start = mm.hole(count)
            if start is None:
                if maps:
                    self.entry_of(process).under_way -= 1
                return
            pages = range(start, start + count)
            mm.in_flight.update(pages)
        for page in pages:
            mm.hidden.pop(page, None)
            mm.pages[page] = file
        if maps or unmaps:
            yield
        if unmaps and is_alone:
            self.send(process.words.range(pages[0] * PAGE, (pages[-1] + 1) * PAGE, t=self.tick_ns()))
        elif unmaps:
            self.send_dirty(process, self.find(process.pid))
        if maps:
            yield from self.report_mapping(process, file, pages, is_touched=True, is_alone=is_alone)
        mm.in_flight.subtract(pages)

    def munmap(self, process, at, count, *, only_hides=False, moves=False):
        mm, pages = process.mm, range(at, at + count)
        if any(mm.in_flight[page] for page in pages):
            return
        is_alone = mm.users == 1
        is_noted = self.matters(process, pages)
        mm.in_flight.update(pages)
        if is_noted:
            yield
        taken = {page: mm.pages.pop(page) for page in pages if page in mm.pages}
        if only_hides:
            mm.hidden.update(taken)
        mm.in_flight.subtract(pages)
        if moves and taken:
            start = mm.hole(count)
            shift = 0 if start is None else start - at
            mm.pages.update({page + shift: file for page, file in taken.items()})
        if not is_noted:
            return
        yield
        if is_alone and not moves:
            self.send(process.words.range(at * PAGE, (at + count) * PAGE, t=self.tick_ns()))
        else:
            self.send_dirty(process, self.find(process.pid))

    def mprotect_exec(self, process, at, *, is_busy):
        mm = process.mm
        is_alone = mm.users == 1
        if at not in mm.hidden or mm.in_flight[at]:
            return
        mm.in_flight[at] += 1
        yield
        mm.pages[at] = mm.hidden.pop(at)
        yield
        mm.in_flight[at] -= 1
        if is_busy and not is_alone:  # bpf_find_vma found the lock taken
            self.send_dirty(process, self.touch(process))
            return
        file, first, end = next(vma for vma in mm.vmas() if vma[1] <= at < vma[2])
        if self.verdicts.get(file.key) is not False:
            pages = range(first, end)
            yield from self.report_mapping(
                process, file, pages, is_touched=False, is_alone=is_alone, flags=FLAG_MPROTECT
            )

    def fork(self, task, *, is_shared, is_vfork):
        parent = task.process
        free = [pid for pid in PIDS if pid not in self.processes]
        if not free:
            return
        self.forks += 1
        mm = parent.mm
        child = Process(free[0], self.forks, mm if is_shared else mm.copy(), parent.words.exec_id)
        is_alone = mm.users == 1
        first = child.new_task()
        first.waits_for = first  # not before its parent has told of it
        self.processes[child.pid] = child
        yield
        entry = self.find(parent.pid)
        flags = FLAG_SHARED_VM if is_shared else 0 if is_alone else FLAG_DIRTY
        if entry or self.report & Report.PROCESSES:
            inherited = None
            if entry:
                inherited = self.followed[child.pid] = entry.copy(child)
                inherited.dirty = bool(flags & FLAG_DIRTY)
                if is_shared:
                    entry.shares_vm = inherited.shares_vm = True
            has_exe = bool(entry and entry.introduced)
            self.words(child, inherited)
            record = parent.words.fork(child.words, t=self.tick_ns(), flags=flags, with_exe=not has_exe)
            yield
            # Nothing else tells who shares a space, so that one cannot be repaired.
            is_sent = self.send(record, is_vital=is_shared and not is_vfork)
            if inherited:
                inherited.introduced = is_sent
        first.waits_for = None
        if is_shared and is_vfork:
            child.is_vfork = True
            task.waits_for = child

    def exec(self, task):
        process = task.process
        self.leave_space(process, [one for one in process.tasks if one is not task])
        process.mm.users -= 1
        process.mm = Mm()
        process.mm.users = 1
        process.is_vfork = False
        process.words.exec_id += 1
        yield
        if self.find(process.pid) or self.report & Report.PROCESSES:
            process.words.exec_id -= 1
            self.send(process.words.exec(t=self.tick_ns()))
        self.followed.pop(process.pid, None)

    def exit(self, task, *, is_told_twice):
        process = task.process
        self.leave_space(process, [one for one in process.tasks if one is not task])
        process.is_live = False
        for _ in range(1 + is_told_twice):
            yield
            if self.find(process.pid) or self.report & Report.PROCESSES:
                self.send(process.words.exit(t=self.tick_ns()))
            self.followed.pop(process.pid, None)
        yield
        process.mm.users -= 1
        process.is_vfork = False
        process.tasks.clear()
        del self.processes[process.pid]

    def leave_space(self, process, tasks):
        """Threads end; what they were in the middle of is finished first, as the kernel does."""
        for task in tasks:
            self.finish(task)
            if isinstance(task.waits_for, Process):
                task.waits_for.is_vfork = False  # nobody waits for it any more
            if task in process.tasks:
                process.tasks.remove(task)
                process.mm.users -= 1

    # ---- who does what ------------------------------------------------------------------------

    def tasks(self):
        return [task for process in self.processes.values() for task in process.tasks]

    def act(self, who, what, a, b):
        """One step of one task: of the call it is in, or into a new one."""
        tasks = self.tasks()
        if not tasks:
            return
        task = tasks[who % len(tasks)]
        if isinstance(task.waits_for, Process) and not task.waits_for.is_vfork:
            task.waits_for = None
        if task.call is None and task.waits_for is None:
            task.call = self.begin(task, what, a, b)
        self.advance(task)

    def begin(self, task, what, a, b):
        process, at, count = task.process, 1 + a % (PAGES - 4), 1 + b % 4
        if process.is_vfork and what != "exit":
            what = "exec"
        if what == "clone_vm" and not self.find(process.pid):
            return None
        if what in ("mmap", "mmap_fixed"):
            return self.mmap(process, FILES[a % len(FILES)], 1 + b % 8, 1 + a % 3, is_fixed=what == "mmap_fixed")
        if what in ("munmap", "mprotect_off", "mremap"):
            return self.munmap(process, at, count, only_hides=what == "mprotect_off", moves=what == "mremap")
        if what == "mprotect_on":
            hidden = sorted(process.mm.hidden)
            return self.mprotect_exec(process, hidden[a % len(hidden)], is_busy=b % 2) if hidden else None
        if what in ("fork", "clone_vm", "vfork"):
            return self.fork(task, is_shared=what != "fork", is_vfork=what == "vfork")
        if what == "exec":
            return self.exec(task)
        if what == "exit":
            return self.exit(task, is_told_twice=b % 4 == 0)
        if what == "thread":
            process.new_task()
        elif len(process.tasks) > 1:  # thread_exit
            process.tasks.remove(task)
            process.mm.users -= 1
        return None

    def advance(self, task):
        if task.call is not None:
            try:
                next(task.call)
            except StopIteration:
                task.call = None

    def finish(self, task):
        while task.call is not None:
            self.advance(task)

    def finish_all(self):
        for task in self.tasks():
            self.finish(task)

    def truth(self):
        """What is mapped: {(pid, start): {inode: pages}}, without vfork children."""
        found = {}
        for process in self.processes.values():
            files = {}
            for page, file in process.mm.pages.items():
                if file in WANTED:
                    files.setdefault(file.inode, set()).add(page)
            if files and process.is_live and not process.is_vfork:
                found[process.pid, process.words.start_ns] = files
        return found

    # ---- the EventSource ----------------------------------------------------------------------

    def fileno(self):
        return -1

    def drain(self):
        taken, self.ring = self.ring, []
        return taken

    def read_all(self):
        meanwhile = []
        rows = []
        for pid in PIDS:
            self.between()
            rows += self.visit(pid)
            meanwhile += self.drain()
        self.between()
        return group(rows), meanwhile

    def read_process(self, pid):
        begin_ns = self.tick_ns()
        report = self.report
        self.report |= Report.VISITS
        self.between()
        readings = group(self.visit(pid))
        self.report = report
        for reading in readings:
            reading.begin_ns = min(begin_ns, reading.begin_ns)
            return reading
        return None

    def visit(self, pid):
        process = self.processes.get(pid)
        if process is None or not process.is_live or process.is_vfork:
            return []
        rows = []
        mm, entry, words = process.mm, self.find(pid), process.words
        if entry:
            entry.dirty = False
        if entry or self.report & Report.VISITS:
            self.words(process, entry)
            rows.append(words.visit(t=self.tick_ns()))
        vmas = mm.vmas()
        while vmas:
            file, first, end = vmas.pop(0)
            verdict = self.verdicts.get(file.key)
            if verdict is not False:
                entry = self.find(pid)
                if entry is None:
                    entry = self.touch(process)
                    if not process.is_live:
                        del self.followed[pid]
                        break
                self.words(process, entry)
                if not entry.introduced:
                    rows.append(words.intro(t=self.tick_ns()))
                entry.pages |= set(range(first, end))
                flags = FLAG_ASK if verdict is None else 0
                rows.append(words.map(file, first * PAGE, end * PAGE, t=self.tick_ns(), flags=flags))
                entry.introduced = True
            if len(vmas) == 1:  # the buffer is full: the lock is given up, and taken again behind this vma
                self.between()
                vmas = mm.vmas(end)
        return rows

    def answer(self, keys, *, is_wanted):
        self.verdicts.update(dict.fromkeys(keys, is_wanted))

    def settle(self, pid, start_ns, touches):
        entry = self.followed.get(pid)
        if entry is None or entry.start_ns != start_ns:
            return False
        entry.introduced = entry.dirty = False
        if entry.under_way or entry.shares_vm or entry.touches != touches:
            return False
        entry.done = 0
        return True

    def set_report(self, report):
        self.report = report

    def new_epoch(self):
        self.verdicts.clear()

    def losses(self):
        return Losses(ring=self.lost)

    def tick(self):
        pass

    def close(self):
        pass


# ---- who reads ------------------------------------------------------------------------------------


class Owner:
    """What the engine does with a tracker, in its plainest form."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.tracker = Tracker(RULES)
        self.seen_losses = 0

    def take_changes(self):
        return self.tracker.take_changes()

    def flush(self):
        wanted, ignored = self.tracker.take_answers()
        self.kernel.answer(wanted, is_wanted=True)
        self.kernel.answer(ignored, is_wanted=False)
        for idle in self.tracker.take_idle():
            if self.kernel.settle(*idle):
                self.tracker.settled(*idle[:2])

    def drain(self):
        for record in self.kernel.drain():
            self.tracker.apply(record)
        self.flush()

    def start(self):
        self.read_everything(Causes("snapshot", "repair"), is_start=True)

    def reread(self):
        due = dict(self.tracker.dirty)
        self.tracker.dirty.clear()
        self.kernel.set_report(Report.RANGES)
        found = [self.kernel.read_process(pid) for pid in due]
        records = self.kernel.drain()
        self.kernel.set_report(Report.NOTHING)
        again = self.tracker.merge([one for one in found if one], records, Causes("mmap", "munmap"), own_causes=due)
        for pid in again:
            self.tracker.dirty.setdefault(pid, due.get(pid, Causes("mmap", "munmap")))
        self.flush()

    def repair(self):
        self.seen_losses = self.kernel.lost
        self.read_everything(Causes("repair", "repair"))

    def read_everything(self, causes, *, is_start=False):
        since_ns = self.kernel.tick_ns()
        self.kernel.set_report(Report.PROCESSES | Report.RANGES)
        early = self.kernel.drain()
        readings, meanwhile = self.kernel.read_all()
        records = [*early, *meanwhile, *self.kernel.drain()]
        self.kernel.set_report(Report.NOTHING)
        visited = {reading.tgid for reading in readings}
        for pid in visited:
            self.tracker.dirty.pop(pid, None)
        for pid in self.tracker.merge(readings, records, causes, is_start=is_start):
            self.tracker.dirty.setdefault(pid, causes)
        for process in () if is_start else self.tracker.processes():
            if process.id.pid not in visited and process.seen_ns < since_ns:
                self.look_for(process, since_ns)
        self.flush()

    def look_for(self, process, since_ns):
        there = self.kernel.processes.get(process.id.pid)
        if there is None or not there.is_live or there.words.start_ns != process.id.start_ns:
            self.tracker.forget(process, "repair", since_ns)
        elif process.is_announced:
            self.tracker.dirty.setdefault(process.id.pid, Causes("repair", "repair"))

    def ask_for_the_silent(self):
        for child in self.tracker.unannounced(before_ns=1 << 63):
            self.tracker.dirty.setdefault(child.id.pid, Causes("fork", "munmap"))


calls = st.tuples(
    st.integers(0, 11),
    st.sampled_from(
        "mmap mmap mmap mmap_fixed munmap munmap mprotect_off mprotect_on mremap fork fork clone_vm vfork exec exit "
        "thread thread thread_exit".split()
    ),
    st.integers(0, 11),
    st.integers(0, 11),
)
scripts = st.lists(calls, max_size=14)


class Machine(RuleBasedStateMachine):
    """Random calls by random tasks, with draining, readings and losses anywhere between."""

    owner_type = Owner

    def __init__(self):
        super().__init__()
        self.kernel = Kernel()
        self.loaded = {}
        for pid in list(PIDS)[:2]:
            process = self.kernel.processes[pid] = Process(pid, pid, Mm())
            process.new_task()
        self.kernel.forks = max(PIDS)

    @initialize(before=scripts, meanwhile=scripts)
    def start(self, before, meanwhile):
        for call in before:
            self.kernel.act(*call)
        # Nobody has listened yet, and nothing is followed yet.
        self.kernel.finish_all()
        self.kernel.ring.clear()
        self.kernel.followed.clear()
        self.owner = self.owner_type(self.kernel)
        self.during(meanwhile, self.owner.start)

    @rule(call=calls)
    def act(self, call):
        self.kernel.act(*call)

    @rule(which=st.integers(0, 11))
    def finish_one(self, which):
        tasks = self.kernel.tasks()
        if tasks:
            self.kernel.finish(tasks[which % len(tasks)])

    @rule()
    def drain(self):
        self.owner.drain()
        self.check()

    @precondition(lambda self: self.owner.tracker.dirty)
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
            for _ in range(2):
                if script:
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
            assert change.process.uid is not None or self.kernel.lost, f"{change} of nobody"
            if change.is_load:
                self.loaded[key] = change
            else:
                del self.loaded[key]
        tracked = {(process.id, mapping.name.file_id.inode) for process, mapping in self.owner.tracker.mappings()}
        assert set(self.loaded) == tracked

    def teardown(self):
        self.kernel.is_full = False
        self.kernel.finish_all()
        self.owner.drain()
        has_asked = False
        for _ in range(30):
            if self.kernel.lost != self.owner.seen_losses:
                self.owner.repair()
            elif not has_asked:
                self.owner.ask_for_the_silent()
                has_asked = True
            elif self.owner.tracker.dirty:
                self.owner.reread()
            else:
                break
        assert not self.owner.tracker.dirty
        self.check()
        assert self.the_map() == self.kernel.truth()

    def the_map(self):
        found = {}
        for process, mapping in self.owner.tracker.mappings():
            there = self.kernel.processes.get(process.id.pid)
            if there and there.is_vfork:
                continue  # silent, unless a reading met it between its fork and the record of it
            pages = {page for start, end in mapping.ranges for page in range(start // PAGE, end // PAGE)}
            found.setdefault(tuple(process.id), {})[mapping.name.file_id.inode] = pages
        return found


TestTracker = Machine.TestCase
TestTracker.settings = settings(
    max_examples=150,
    stateful_step_count=30,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
    report_multiple_bugs=False,
)
