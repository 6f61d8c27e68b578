"""A model of a machine that ``programs/watch.bpf.c`` looks at, small enough to try everything on it.

Calls take several steps, and anything may come between two of them; there are claims, the dirty bit, verdicts,
settled processes, readings that take their time, and a ring that may be full. It leaves out what nobody can follow
yet (see docs/decisions): processes that shared an address space before anybody looked, or whose parent was not
followed when they began to. And its programs are well behaved in one point: none maps over or unmaps what another
thread's mmap has not returned yet.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

from sowatch.bpf.records import FLAG_AGAIN, FLAG_ASK, FLAG_MPROTECT, FLAG_NEEDS_RESCAN, FLAG_SHARED_VM
from sowatch.model.stats import Losses
from sowatch.sources.base import Report, TrackedEntry
from sowatch.sources.scan_rows import group
from sowatch.sources.unread import UnreadProcesses
from support.records import PAGE, File, Proc

__all__ = ["CALLS", "PIDS", "RULE", "Kernel"]

#: What a rule has to say to want `WANTED`.
RULE = "libssl|libcrypto"
SSL, CRYPTO = File("/lib/libssl.so", 100), File("/lib/libcrypto.so", 101)
LIBC, LIBM = File("/lib/libc.so", 102), File("/lib/libm.so", 103)
FILES = (SSL, CRYPTO, SSL, LIBC, LIBM)
WANTED = {SSL, CRYPTO}
PAGES = 12
PIDS = range(10, 16)
#: What a task can do, and how often.
CALLS = [
    *["mmap"] * 3,
    *["munmap", "fork"] * 2,
    *["thread"] * 4,
    *["mmap_fixed", "mprotect_off", "mprotect_on", "mremap", "vfork", "exec", "exit", "thread_exit"],
]


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

    def put(self, file, pages):
        for page in pages:
            self.hidden.pop(page, None)
            self.pages[page] = file

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
        self.is_vfork = False  # its parent's thread waits for it
        self.is_spawning = False  # made by vfork, and about to exec
        self.is_new = False  # its fork was not told yet
        self.is_in_exec = False

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
        self.needs_rescan = self.introduced = self.shares_vm = False
        self.pages = set()

    @property
    def activity(self):
        """What brought it here; 0 if nothing of it is wanted. No two programs of a process have one in common."""
        count = self.done << 4 | self.under_way
        return count and self.image << 16 | count

    def copy(self, child):
        new = Entry(child)
        new.done, new.shares_vm, new.pages = 1, self.shares_vm, set(self.pages)
        return new

    def mark_needs_rescan(self):
        was, self.needs_rescan = self.needs_rescan, True
        return not was


class Kernel:
    """The machine, and the `EventSource` that looks at it.

    Args:
        clock: what its times must not be behind.
    """

    strategy, guarantee, hooks, limits, attempts = "core", "exact", "syscall", (), ()
    polls = record_limit = answer_clock = None

    def __init__(self, clock=int):
        self.unread = UnreadProcesses()
        self.clock = clock
        self.now = 0
        self.processes = {}
        self.entries = {}
        self.verdicts = {}
        self.ring = []
        self.report = Report.NOTHING
        self.lost = 0
        self.is_full = False
        self.has_shared = False
        #: Called wherever something may happen while a reading is made.
        self.between = lambda: None

        for pid in PIDS[:2]:
            process = self.processes[pid] = Process(pid, pid, Mm())
            process.new_task()
        self.forks = max(PIDS)

    def tick_ns(self):
        self.now = max(self.now + 1, self.clock())
        return self.now

    # ---- what the programs do -----------------------------------------------------------------

    def send(self, record, *, is_vital=False):
        if self.is_full and not is_vital:
            self.lost += 1
            return False
        self.ring.append(record)
        return True

    def words(self, process, entry=None):
        """The writer of a process's records; ``entry`` is what `activity` is taken from."""
        process.words.activity = entry.activity if entry else 0
        return process.words

    def find(self, pid):
        entry = self.entries.get(pid)
        return entry if entry and entry.activity else None

    def entry_of(self, process):
        return self.entries.setdefault(process.pid, Entry(process))

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

    def send_needs_rescan(self, process, entry):
        if entry and entry.mark_needs_rescan():
            self.send(process.words.needs_rescan(t=self.tick_ns()))

    def introduce(self, process, entry):
        if not entry.introduced:
            entry.introduced = self.send(self.words(process, entry).intro(t=self.tick_ns()))

    def report_mapping(self, process, file, pages, *, is_single_user, flags=0):
        if self.verdicts.get(file.key) is None:
            flags |= FLAG_ASK
        entry = self.entry_of(process)
        entry.pages |= set(pages)
        self.introduce(process, entry)
        if not is_single_user and entry.mark_needs_rescan():
            flags |= FLAG_NEEDS_RESCAN
        words = self.words(process, entry)
        words.activity += (1 << 4) - 1  # as it will be once this record is sent
        record = words.map(file, pages[0] * PAGE, (pages[-1] + 1) * PAGE, t=self.tick_ns(), flags=flags)
        yield  # the path is walked
        self.send(record)
        entry.done += 1
        entry.under_way -= 1
        if not is_single_user:
            self.send_needs_rescan(process, entry)

    def report_gone(self, process, pages, *, is_single_user, has_threads):
        entry = self.find(process.pid)
        if has_threads:
            self.send_needs_rescan(process, entry)
            return
        flags = FLAG_NEEDS_RESCAN if not is_single_user and entry and entry.mark_needs_rescan() else 0
        self.send(process.words.range(pages[0] * PAGE, (pages[-1] + 1) * PAGE, t=self.tick_ns(), flags=flags))

    # ---- system calls; each yield is a moment in which anything may happen ----------------------

    def mmap(self, process, file, at, count, *, is_fixed):
        mm, has_threads = process.mm, len(process.tasks) > 1
        is_single_user = mm.users == 1
        maps = self.verdicts.get(file.key) is not False
        if maps:
            self.entry_of(process).under_way += 1
        pages = range(at, at + count)
        is_fixed = is_fixed and not any(mm.in_flight[page] for page in pages)
        unmaps = is_fixed and self.matters(process, pages)
        if is_fixed:
            mm.in_flight.update(pages)
        if maps or unmaps:
            yield
        if not is_fixed:
            start = mm.hole(count)
            if start is None:
                self.entry_of(process).under_way -= maps
                return
            pages = range(start, start + count)
            mm.in_flight.update(pages)
        mm.put(file, pages)
        if maps or unmaps:
            yield
        if unmaps:
            self.report_gone(process, pages, is_single_user=is_single_user, has_threads=has_threads)
        if maps:
            yield from self.report_mapping(process, file, pages, is_single_user=is_single_user)
        mm.in_flight.subtract(pages)

    def munmap(self, process, at, count, *, only_hides=False, moves=False):
        mm, pages, has_threads = process.mm, range(at, at + count), len(process.tasks) > 1
        if any(mm.in_flight[page] for page in pages):
            return
        is_single_user = mm.users == 1
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
        self.report_gone(process, pages, is_single_user=is_single_user, has_threads=has_threads or moves)

    def mprotect_exec(self, process, at, *, is_busy):
        mm = process.mm
        is_single_user = mm.users == 1
        if at not in mm.hidden or mm.in_flight[at]:
            return
        mm.in_flight[at] += 1
        entry = self.entry_of(process)
        entry.under_way += 1
        yield
        mm.pages[at] = mm.hidden.pop(at)
        yield
        mm.in_flight[at] -= 1
        file, first, end = next(vma for vma in mm.vmas() if vma[1] <= at < vma[2])
        if is_busy and not is_single_user:  # bpf_find_vma found the lock taken
            self.send_needs_rescan(process, entry)
            entry.done += 1
            entry.under_way -= 1
        elif self.verdicts.get(file.key) is False:
            entry.under_way -= 1
        else:
            yield from self.report_mapping(
                process, file, range(first, end), is_single_user=is_single_user, flags=FLAG_MPROTECT
            )

    def fork(self, task, *, is_shared, is_vfork):
        parent = task.process
        free = [pid for pid in PIDS if pid not in self.processes]
        if not free:
            return
        self.forks += 1
        self.has_shared |= is_shared
        mm = parent.mm
        child = Process(free[0], self.forks, mm if is_shared else mm.copy(), parent.words.exec_id)
        is_single_user = mm.users == 1
        first = child.new_task()
        first.waits_for = first  # not before its parent has told of it
        child.is_new = True
        self.processes[child.pid] = child
        if is_vfork or not is_shared:
            yield
        entry = self.find(parent.pid)
        flags = FLAG_SHARED_VM if is_shared else 0 if is_single_user else FLAG_NEEDS_RESCAN
        if entry or self.report & Report.PROCESSES:
            inherited = None
            if entry:
                inherited = self.entries[child.pid] = entry.copy(child)
                inherited.needs_rescan = bool(flags & FLAG_NEEDS_RESCAN)
                if is_shared:
                    entry.shares_vm = inherited.shares_vm = True
            has_exe = bool(entry and entry.introduced)
            self.words(child, inherited)
            record = parent.words.fork(child.words, t=self.tick_ns(), flags=flags, with_exe=not has_exe)
            # Nothing else tells who shares a space, so that one cannot be repaired.
            is_sent = self.send(record, is_vital=is_shared and not is_vfork)
            if inherited:
                inherited.introduced = is_sent
        first.waits_for = None
        child.is_new = False
        if is_shared and is_vfork:
            child.is_vfork = child.is_spawning = True
            task.waits_for = child

    def exec(self, task):
        process = task.process
        process.is_in_exec = True
        self.leave_space(process, [one for one in process.tasks if one is not task])
        yield
        process.mm.users -= 1
        process.mm = Mm()
        process.mm.users = 1
        process.is_vfork = process.is_spawning = False
        process.words.exec_id += 1
        yield
        if self.find(process.pid) or self.report & Report.PROCESSES:
            process.words.exec_id -= 1
            self.send(process.words.exec(t=self.tick_ns()))
        self.entries.pop(process.pid, None)
        yield
        process.is_in_exec = False

    def exit(self, task, *, is_reported_twice):
        process = task.process
        self.leave_space(process, [one for one in process.tasks if one is not task])
        process.is_live = False
        for _ in range(1 + is_reported_twice):
            yield
            if self.find(process.pid) or self.report & Report.PROCESSES:
                self.send(process.words.exit(t=self.tick_ns()))
            self.entries.pop(process.pid, None)
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
        if process.is_spawning and what != "exit":
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
            return self.exit(task, is_reported_twice=b % 4 == 0)
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
        """What is mapped: {(pid, start): {inode: pages}}, without children on their way to exec."""
        found = {}
        for process in self.processes.values():
            files = {}
            for page, file in process.mm.pages.items():
                if file in WANTED:
                    files.setdefault(file.inode, set()).add(page)
            if files and process.is_live and not process.is_spawning:
                found[process.pid, process.words.start_ns] = files
        return found

    # ---- the EventSource ----------------------------------------------------------------------

    def fileno(self):
        return -1

    def drain(self):
        taken, self.ring = self.ring, []
        return taken

    def scan_all(self, meanwhile=None):
        found = []
        rows = []
        for pid in PIDS:
            self.between()
            rows += self.visit(pid)
            if meanwhile is None:
                found += self.drain()
            else:
                meanwhile()
        self.between()
        return group(rows), found

    def scan_process(self, pid, meanwhile=lambda: None):
        begin_ns = self.tick_ns()
        report = self.report
        self.report |= Report.SCANS
        self.between()
        scans = group(self.visit(pid))
        self.between()
        meanwhile()
        self.report = report
        for scan in scans:
            scan.begin_ns = min(begin_ns, scan.begin_ns)
            return scan
        return None

    def visit(self, pid):
        process = self.processes.get(pid)
        if process is None or not process.is_live or process.is_vfork or process.is_new:
            return []
        if process.is_in_exec:
            return [process.words.visit(t=self.tick_ns(), flags=FLAG_AGAIN)]
        rows = []
        mm, entry, words = process.mm, self.find(pid), process.words
        if entry:
            entry.needs_rescan = False
        if entry or self.report & Report.SCANS:
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
                        del self.entries[pid]
                        break
                self.words(process, entry)
                if not entry.introduced:
                    rows.append(words.intro(t=self.tick_ns()))
                entry.pages |= set(range(first, end))
                flags = FLAG_ASK if verdict is None else 0
                rows.append(words.map(file, first * PAGE, end * PAGE, t=self.tick_ns(), flags=flags))
                entry.introduced = True
            if vmas:  # the buffer may be full: the lock is given up, and taken again behind this vma
                self.between()
                vmas = mm.vmas(end)
        return rows

    def answer(self, places, *, is_wanted):
        self.verdicts.update(dict.fromkeys(places, is_wanted))

    def tracked(self, pid):
        entry = self.entries.get(pid)
        if entry is None:
            return None
        return TrackedEntry(
            entry.start_ns, 0, entry.needs_rescan, entry.introduced, entry.shares_vm, entry.activity, ()
        )

    def untrack(self, pid, start_ns, activity):
        self.between()
        entry = self.entries.get(pid)
        if entry is None or entry.start_ns != start_ns:
            return False
        entry.introduced = entry.needs_rescan = False
        if entry.under_way or entry.shares_vm or entry.activity != activity:
            return False
        entry.done = 0
        return True

    @property
    def reports(self):
        return SimpleNamespace(set=self.set_report)

    def set_report(self, report):
        self.report = report

    def new_epoch(self):
        self.verdicts.clear()

    def losses(self):
        return Losses(ring=self.lost)

    def close(self):
        pass
