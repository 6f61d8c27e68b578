"""`Reconciler`: keeps the map true. Takes records in, reads the processes in doubt, repairs losses.

Everything here happens on the engine's thread: it runs no user code, reads no file but ``/proc``, waits for nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Final

from sowatch.bpf.records import Record
from sowatch.engine.address_space import Change, Mapping, ProcessState
from sowatch.engine.effects import LIVE, Causes, Effects
from sowatch.engine.file_inspector import Inspector
from sowatch.engine.merge import merge
from sowatch.engine.publisher import Publisher
from sowatch.engine.rate_limit import AdaptiveRateLimit
from sowatch.engine.rescan_schedule import RescanSchedule
from sowatch.engine.scan_records import ScanRecords
from sowatch.engine.table import MappingTable
from sowatch.linux.liveness import has_ended
from sowatch.linux.pid_namespaces import own_pid
from sowatch.linux.proc import ProcFs
from sowatch.model.config import Config
from sowatch.model.events import Event, Lost, Repaired
from sowatch.model.identity import ProcessId
from sowatch.model.rules import Rule, RuleSet
from sowatch.model.stats import Losses
from sowatch.sources.base import EventSource, ProcessScan, Report
from sowatch.sources.unread import ScanTimeout

__all__ = ["Reconciler"]

#: More owed readings than this are one reading of all.
MANY_RESCANS: Final = 64
#: So long after its last reading nobody need know how often a process was read.
PACE_MEMORY_S: Final = 10
#: A repair that found losses going on is tried again after this, then after twice that, up to the second.
FIRST_REPAIR_S: Final = 0.1
SLOWEST_REPAIR_S: Final = 5.0
#: After a reading of all for the sake of shared address spaces so many times its CPU time without one.
SHARERS_REST: Final = 20
#: Records of two CPUs may stand in the ring in another order than their times by some microseconds.
SLACK_NS: Final = 1_000_000
#: A CLONE_VM child that is still there after this is not on its way to exec.
VFORK_PATIENCE_NS: Final = 500_000_000
#: An answer waits no longer for what floods.
SETTLING_S: Final = 0.5
#: What waits for the facts of files is looked after this often.
FACTS_TURN_S: Final = 0.02
#: A call that was under way when the rules changed has mapped its file after this.
RULES_SECOND_LOOK_S: Final = 1.0

REPAIR: Final = Causes("repair", "repair")
RULES: Final = Causes("snapshot", "rules")
SNAPSHOT: Final = Causes("snapshot", "repair")


class Reconciler:
    """Keeps one tracker's map as one source has it, and hands its changes to one publisher.

    Its figures may be read by any thread; everything else is for the engine's, which calls `take_snapshot` first, then
    again and again `drain` and `do_what_is_due`, `tick` about once a second, and `finish` last.

    Args:
        silent_baseline: take the start-up snapshot without telling of it.

    Attributes:
        losses: what the source has lost, by where, as far as it was told.
        lost: all of them together; ``throttled`` of those were of processes that said too much.
        is_repaired: whether each of them is made up for; ``repairs`` says how often that was done.
        records: how many `drain` took; those that came while a reading was made are not among them.
        rereads: readings of single processes.
        own_pid: ours, as the source counts.
    """

    def __init__(
        self,
        source: EventSource,
        table: MappingTable,
        publisher: Publisher,
        rules: RuleSet,
        config: Config,
        *,
        silent_baseline: bool,
    ) -> None:
        self._source = source
        self._table = table
        self._publisher = publisher
        self._proc = ProcFs(config.proc_root)
        self._guard = AdaptiveRateLimit(source.record_limit, config.max_records_s)
        self._silent = silent_baseline
        self._base = _base_report(rules)
        self._schedule = RescanSchedule()
        self._schedule.held = source.unread
        self._repair_at: float | None = None
        self._repair_wait_s = FIRST_REPAIR_S
        self._sharers_at = 0.0
        self._ttl_s = config.ignore_ttl_s
        self._names_at = time.monotonic() + self._ttl_s
        self._rules_again_at: float | None = None
        self._can_read_one = True
        self._has_scanned_all = True
        #: What the table has asked for and is still to be carried out; but for the two that come next.
        self._effects = Effects()
        self._needs_full_scan = False
        #: Processes that were reported to be throttled since their losses were counted last.
        self._newly_throttled: set[int] = set()
        #: Throttled processes that are to be read before their losses are repaired, and since when.
        self._throttled: set[int] = set()
        self._throttled_since = 0.0
        #: Processes that a repair could not scan although they are there: in vfork or within their exit.
        self._unscanned: set[int] = set()
        #: Ours, as the source counts; 0 where its processes do not include us.
        self.own_pid = own_pid(self._proc) or 0
        self.losses = Losses()
        self.lost = 0
        self.throttled = 0
        self.is_repaired = True
        self.repairs = 0
        self.records = 0
        self.rereads = 0

    def detect_own_identity(self) -> None:
        """Our own root, to tell which processes see the paths that we see; and our real pid."""
        own = self.own_pid
        try:
            scan = self._source.scan_process(own) if own else None
        except ScanTimeout:
            scan = None
        if scan is None:
            return
        self.own_pid = scan.tgid
        # If the kernel's numbers are not those of /proc, it would look up the wrong process.
        self._can_read_one = scan.tgid == own
        if scan.maps:
            self._publisher.own_view_id = scan.maps.first().view

    # ---- the thread's round -------------------------------------------------------------------

    def take_snapshot(self, make_ready: Callable[[int, float], Event]) -> None:
        """Fills the map with what is there.

        Args:
            make_ready: called with the number of processes and the seconds that it took, once that was told.
        """
        begun = time.monotonic()
        self._report(Report.PROCESSES | Report.RANGES)
        early = self._source.drain()
        scans, meanwhile = self._scan_all()
        records = [*early, *meanwhile, *self._drain_all()]
        self._note(merge(self._table, scans, records, SNAPSHOT, is_start=True))
        self._mark_unread(SNAPSHOT)
        self._report(Report.NOTHING)
        changes = self._carry_out()
        found = [change for change in changes if change.cause == "snapshot"]
        seconds = time.monotonic() - begun
        (self._publisher.take_silently if self._silent else self._publisher.publish)(found)
        self._publisher.announce(lambda: make_ready(len(scans), seconds), holds=True)
        self._publisher.publish([change for change in changes if change.cause != "snapshot"])
        self._check_losses()

    def _report(self, more: Report) -> None:
        """Has the source report this beyond what it always does."""
        if self._source.reports is not None:
            self._source.reports.set(self._base | more)

    def drain(self) -> None:
        """Takes one batch: the loop comes back at once if there is more, and nothing else starves."""
        self._take(self._source.drain())

    def _take(self, records: list[Record]) -> None:
        self._note(self._table.apply(*records))
        self.records += len(records)
        self._flush()

    def next_work_at(self, next_tick: float) -> float:
        """When there is something to do even if the kernel says nothing."""
        times = [next_tick, *self._schedule.times()]
        if self._publisher.is_waiting:
            times.append(time.monotonic() + FACTS_TURN_S)
        times += [when for when in (self._repair_at, self._rules_again_at) if when is not None]
        if self._needs_full_scan:
            times.append(self._sharers_at)
        return min(times)

    def do_what_is_due(self, now: float) -> None:
        """Readings and repairs whose time has come."""
        if self._source.unread:
            self._take_readable()
        if self._publisher.is_waiting:
            self._publisher.flush(now)
        if self._table.compat:
            for pid in self._schedule.take_compat(self._table.compat, now):
                self._table.await_rescan(pid)
        if self._table.needs_rescan or self._schedule.due or self._throttled:
            self._reread()
        self._repair_if_due()
        if self._rules_again_at is not None and now >= self._rules_again_at:
            self._rules_again_at = None
            self._read_for_rules()
        if self._needs_full_scan and now >= self._sharers_at:
            self._scan_for_sharers()

    def tick(self) -> None:
        """Looks for losses, and lets old things go."""
        if self._source.answer_clock is not None:
            self._source.answer_clock.tick()
        now_ns = time.monotonic_ns()
        waiting = self._source.drain()
        self._guard.adapt(now_ns - waiting[0].t_ns if waiting else 0)
        self._take(waiting)
        if not self.is_repaired and self._repair_at is None and not (self._throttled or self._newly_throttled):
            self._repair_at = time.monotonic()  # whose loss it was has not been said for a second
        self._check_losses()
        if not self.is_repaired:
            self._note_throttled()
        self._publisher.flush(time.monotonic())
        self._publisher.subscribers.catch_up()
        self._look_at_recovered()
        for child in self._table.unannounced(time.monotonic_ns() - VFORK_PATIENCE_NS):
            self._table.await_rescan(child.id.pid, Causes("fork", "munmap"))
        for pid in self._unscanned:
            self._table.await_rescan(pid, REPAIR)
        self._schedule.forget(time.monotonic() - PACE_MEMORY_S)
        if time.monotonic() >= self._names_at:
            # What was ignored may be wanted by the name that it has now, in processes that mapped it before, too.
            self._names_at = time.monotonic() + self._ttl_s
            self._needs_full_scan = True

    @property
    def is_resting(self) -> bool:
        """Whether a full scan is owed that has to wait, so that scans do not take all the time there is."""
        return self._needs_full_scan and time.monotonic() < self._sharers_at

    def sync(self) -> None:
        """Drains, and makes every reading that is owed, 32-bit processes' too; a few times at most.

        Losses that no tick has seen yet are told and repaired, so that what is asked is asked of a right map.
        In a flood there is always more to read: after `SETTLING_S` what is left is left to its turn.
        """
        begun = time.monotonic()
        for pid in self._table.compat:
            self._table.await_rescan(pid)
        if self._source.polls is not None:
            self._source.polls.ask()
        self._check_losses()
        self._repair_if_due()
        for _ in range(10):
            self.drain()
            if self._needs_full_scan and time.monotonic() >= self._sharers_at:
                self._scan_for_sharers()
            is_flood = len(self._table.needs_rescan) > MANY_RESCANS
            if not self._schedule.expedite(self._table.needs_rescan, begun):
                return
            self._reread()
            if is_flood or time.monotonic() >= begun + SETTLING_S:
                return

    def finish(self) -> None:
        """Takes in what is still on its way, and tells everything."""
        self.drain()
        self._check_losses()
        if not self.is_repaired:
            self._repair()
        self._publisher.flush_all()

    def _drain_all(self) -> list[Record]:
        # No longer than needed: in a flood the ring is never empty.
        until_ns = time.monotonic_ns() + SLACK_NS
        records: list[Record] = []
        while more := self._source.drain():
            records += more
            if more[-1].t_ns > until_ns:
                break
        return records

    def _note(self, effects: Effects) -> None:
        """Takes what the table asks for; `_flush` carries it out."""
        self._needs_full_scan |= effects.has_untracked_sharers
        self._newly_throttled |= effects.throttled
        self._effects += effects

    def _carry_out(self) -> list[Change]:
        """Sends answers to the kernel, and gives the changes that are to be published."""
        effects, self._effects = self._effects, Effects()
        if effects.verdicts:
            wanted, ignored = effects.answers()
            self._source.answer(wanted, is_wanted=True)
            self._source.answer(ignored, is_wanted=False)
        changes = effects.changes
        for pid, start_ns, activity in dict.fromkeys(effects.untrack):
            if self._table.is_idle(pid) and self._source.untrack(pid, start_ns, activity):
                changes += self._table.untracked(pid, start_ns).changes
        return changes

    def _flush(self) -> None:
        if changes := self._carry_out():
            self._publisher.publish(changes)

    # ---- other rules --------------------------------------------------------------------------

    def set_rules(
        self, rules: RuleSet, inspector: Inspector | None, take_over: Callable[[], None], done: Callable[[], None]
    ) -> None:
        """Watches by other rules from now on.

        Args:
            rules: the new ones.
            inspector: reads files for them.
            take_over: called when the last event of the old rules was published.
            done: called when everything that is mapped was published by the new ones.
        """
        self._flush()
        self._publisher.change_rules(rules, inspector, take_over)
        self._table.set_rules(rules)
        self._base = _base_report(rules)
        # In this order: whatever the kernel drops by an old answer is there to be read.
        self._source.new_epoch()
        self._read_for_rules()
        self._publisher.look_again(self._mapped(lambda *_: True), only_held=self._silent)
        self._publisher.after_all(done)
        self._rules_again_at = time.monotonic() + RULES_SECOND_LOOK_S

    def look_again(self, pid: int, rule: Rule) -> None:
        """Reads a process, and tells of what the rule wants and it was not told to have."""
        self._table.await_rescan(pid)
        self.sync()
        found = self._mapped(lambda process, one: process.id.pid == pid and rule.matches_path(one.name.path))
        self._publisher.look_again(found)

    def _look_at_recovered(self) -> None:
        """Files that could not be read because their file system hung: what they say is told now."""
        inspector = self._publisher.inspector
        files = inspector.take_recovered() if inspector is not None else ()
        if files:
            self._publisher.recheck(self._mapped(lambda _, one: one.name.file_id in files), only_held=self._silent)

    def _mapped(self, is_meant: Callable[[ProcessState, Mapping], bool]) -> list[Change]:
        """What is mapped now, as if it were loaded now."""
        now_ns = time.monotonic_ns()
        return [
            Change(True, RULES.load, now_ns, process.record(), process.kind_of(one), *one.where)
            for process, one in self._table.mappings()
            if is_meant(process, one)
        ]

    def _read_for_rules(self) -> None:
        since_ns = time.monotonic_ns()
        self._forget_vanished(self._read_everything(RULES), since_ns)
        changes = self._carry_out()
        if self._silent:
            # What was mapped before is not news, whatever the rules are.
            self._publisher.take_silently([one for one in changes if one.cause == RULES.load])
            changes = [one for one in changes if one.cause != RULES.load]
        self._publisher.publish(changes)

    # ---- readings -----------------------------------------------------------------------------

    def _reread(self) -> None:
        """Reads the processes in doubt, each as soon as its pace allows."""
        due = self._schedule.take(self._table.needs_rescan, time.monotonic())
        self._table.begin_rescans(due)
        if not due:
            if self._throttled:
                self._unthrottle(())  # some may have ended before they were read
            return
        self._scan(due)
        if self._throttled:
            self._unthrottle(due)
        self._flush()

    def _scan(self, due: dict[int, Causes]) -> None:
        """Reads these processes; one that is not there any more is forgotten, whatever became of its exit record."""
        self._report(Report.RANGES | Report.VISITS)
        concerned = ScanRecords(pid for one in due for pid in (one, *self._table.sharers_of(one)))
        take_others = partial(concerned.take_others, self._source.drain, self._apply_others)
        scans, records = self._read(due, take_others)
        missing = due.keys() - {scan.tgid for scan in scans}
        # Before the ring is drained: whose end is seen here has its exit record in the ring, or lost it.
        gone = [pid for pid in missing if self._has_ended(pid, is_lossy=due[pid] is REPAIR)]
        self._apply_others(concerned.keep_back([*records, *self._drain_all()]))
        self._report(Report.NOTHING)
        self.rereads += len(due)
        self._note(merge(self._table, scans, concerned.take(), LIVE, own_causes=due, between=take_others))
        self._note(self._table.apply(*concerned.take()))
        for pid in gone:
            self._note(self._table.forget_pid(pid, "repair", time.monotonic_ns()))
        self._unscanned.difference_update(due)
        self._unscanned.update(pid for pid in missing - set(gone) if due[pid] is REPAIR)

    def _apply_others(self, records: list[Record]) -> None:
        """Takes what processes do that are not scanned now, and publishes it at once if nothing waits before it."""
        effects = self._table.apply(*records)
        if not self._effects.changes:
            self._publisher.publish(effects.changes)
            effects.changes = []
        self._note(effects)

    def _has_ended(self, pid: int, *, is_lossy: bool) -> bool:
        """Whether the process known by this pid has ended; if its exit record may be lost, whether it is about to."""
        start_ns = self._table.start_of(pid)
        return start_ns is not None and has_ended(self._proc, ProcessId(pid, start_ns), is_lossy=is_lossy)

    def _read(self, due: dict[int, Causes], take_others: Callable[[], None]) -> tuple[list[ProcessScan], list[Record]]:
        if len(due) > MANY_RESCANS or not self._can_read_one:
            scans, meanwhile = self._scan_all()
            for pid in due.keys() & set(self._source.unread):
                self._table.await_rescan(pid, due[pid])
            return [scan for scan in scans if scan.tgid in due], list(meanwhile)
        found = []
        for pid, causes in due.items():
            begun_s = self._cpu_s()
            try:
                scan = self._source.scan_process(pid, take_others)
            except ScanTimeout:
                self._table.await_rescan(pid, causes)
            else:
                # Taking it over costs about as much again.
                self._schedule.rest(pid, 2 * (self._cpu_s() - begun_s))
                if scan is not None:
                    found.append(scan)
        return found, []

    def _scan_all(self) -> tuple[list[ProcessScan], list[Record]]:
        """Whoever can be read, and what was drained meanwhile."""
        self._has_scanned_all = False
        try:
            found = self._source.scan_all()
        except ScanTimeout:
            return [], []
        self._has_scanned_all = True
        return found

    def _mark_unread(self, causes: Causes) -> None:
        """Whoever hangs is read as soon as it can be."""
        for pid in self._source.unread:
            if pid:
                self._table.await_rescan(pid, causes)

    def _take_readable(self) -> None:
        """Reads those that do not hang any more."""
        for pid in self._source.unread.take_readable():
            self._table.await_rescan(pid, REPAIR, replaces=True)
            self._schedule.due[pid] = 0.0

    def _read_everything(self, causes: Causes) -> set[int]:
        """Takes over a reading of all, with the records that came meanwhile; the tgids that were read."""
        self._report(Report.PROCESSES | Report.RANGES | Report.VISITS)
        early = self._source.drain()
        scans, meanwhile = self._scan_all()
        records = [*early, *meanwhile, *self._drain_all()]
        self._report(Report.NOTHING)
        self._table.begin_rescans(scan.tgid for scan in scans)
        self._note(merge(self._table, scans, records, causes))
        self._mark_unread(causes)
        return {scan.tgid for scan in scans}

    def _scan_for_sharers(self) -> None:
        """Finds who shares an address space, by a reading of all."""
        begun_s = self._cpu_s()
        self._needs_full_scan = False
        self._read_everything(LIVE)
        self._flush()
        self._sharers_at = time.monotonic() + SHARERS_REST * (self._cpu_s() - begun_s)

    def _cpu_s(self) -> float:
        """CPU seconds that this thread and the helpers that scan have taken."""
        return time.thread_time() + self._source.unread.cpu_s

    def _forget_vanished(self, scanned: set[int], since_ns: int) -> None:
        """After it every process of the map that was known before ``since_ns`` was scanned, or is forgotten."""
        late: dict[int, Causes] = {}
        # Those that were never reported first: or they would get the files of a parent that has ended, too.
        for process in sorted(self._table.processes(), key=lambda one: one.is_announced):
            pid = process.id.pid
            if pid in scanned:
                self._let_go_if_untracked(process)
            elif process.seen_ns >= since_ns:
                continue
            elif self._has_ended(pid, is_lossy=True):
                self._note(self._table.forget(process, "repair", since_ns))
            elif pid in self._source.unread:
                self._table.await_rescan(pid, REPAIR, replaces=True)
            else:
                late[pid] = REPAIR
        if late:
            self._table.begin_rescans(late)
            self._scan(late)

    def _let_go_if_untracked(self, process: ProcessState) -> None:
        """One that has nothing, and whose exec record was lost: the kernel side will not report its exit either."""
        pid, space = process.id.pid, process.space
        if space.files or len(space.sharers) > 1 or pid in self._table.needs_rescan:
            return
        tracked = self._source.tracked(pid)
        if tracked is not None and tracked.start_ns == process.id.start_ns and tracked.activity:
            return
        self._source.untrack(pid, process.id.start_ns, 0)
        self._note(self._table.untracked(pid, process.id.start_ns))

    # ---- losses and repairs -------------------------------------------------------------------

    def _check_losses(self) -> None:
        before, self.losses = self.losses, self._source.losses()
        if throttled := self.losses.throttled - before.throttled:
            self._throttle(throttled)
        unresolved = self.losses.unresolved - before.unresolved
        if others := sum(self.losses) - sum(before) - throttled - unresolved:
            self._lose(others)
            if self._repair_at is None:
                self._repair_at = time.monotonic()
        if unresolved:
            self._lose(unresolved)
            self._make_up_for_unresolved()

    def _make_up_for_unresolved(self) -> None:
        """Mappings whose file could not be found out: what is left of their processes is in doubt already."""
        if self._repair_at is not None or self._throttled:
            return
        begun = time.monotonic()
        self._schedule.expedite(self._table.needs_rescan)
        self._reread()
        self._has_repaired((), time.monotonic() - begun)

    def _lose(self, count: int) -> None:
        self.lost += count
        self.is_repaired = False
        self._publisher.announce(lambda: Lost(time.time_ns(), count, "kernel"))

    def _throttle(self, count: int) -> None:
        """Processes that said too much: a reading of each repairs what the kernel dropped of it."""
        self._lose(count)
        self.throttled += count
        self._note_throttled()

    def _note_throttled(self) -> None:
        """Those that have told so by now are to be read; what was lost of them is told before."""
        if not self._throttled:
            self._throttled_since = time.monotonic()
        self._throttled |= self._newly_throttled
        self._newly_throttled.clear()
        for pid in self._throttled:
            self._table.await_rescan(pid, REPAIR, replaces=True)

    def _unthrottle(self, was_read: Collection[int]) -> None:
        """Readings of these processes were taken over, their changes are still to be flushed."""
        owed = self._table.needs_rescan
        # Whoever hangs is named as not read, and the others do not wait for it.
        self._throttled = {
            pid for pid in self._throttled if pid in owed and pid not in was_read and pid not in self._source.unread
        }
        if self._throttled or self._repair_at is not None:
            return
        found = [change for change in self._effects.changes if change.cause == "repair"]
        self._has_repaired(found, time.monotonic() - self._throttled_since)

    def _has_repaired(self, found: Collection[Change], seconds: float) -> None:
        loads = sum(change.is_load for change in found)
        self._flush()
        self.repairs += 1
        self.is_repaired = True
        self._publisher.announce(lambda: Repaired(time.time_ns(), loads, len(found) - loads, seconds))

    def _repair_if_due(self) -> None:
        if self._repair_at is not None and time.monotonic() >= self._repair_at:
            self._repair()

    def _repair(self) -> None:
        """Compares the map with what is there. Done when nothing was lost while it ran; else again."""
        begun = time.monotonic()
        self._check_losses()
        self._repair_at = None
        before = self.losses
        since_ns = time.monotonic_ns()
        self._forget_vanished(self._read_everything(REPAIR), since_ns)
        found = [change for change in self._effects.changes if change.cause == "repair"]
        after = self._source.losses()
        # What is dropped of a process that floods is made up for by readings of that process alone.
        stood_still = after._replace(throttled=0, unresolved=0) == before._replace(throttled=0, unresolved=0)
        if stood_still and self._has_scanned_all:
            self._repair_wait_s = FIRST_REPAIR_S
            self._throttled.clear()
            self._has_repaired(found, time.monotonic() - begun)
            return
        self._flush()
        self._check_losses()
        self._repair_at = time.monotonic() + self._repair_wait_s
        self._repair_wait_s = min(SLOWEST_REPAIR_S, 2 * self._repair_wait_s)


def _base_report(rules: RuleSet) -> Report:
    """What is reported all the time."""
    return Report.IMAGES if rules.wants_images else Report.NOTHING
