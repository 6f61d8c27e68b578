"""`Reconciler`: applies records to the mapping table, scans processes that need a rescan, repairs losses.

Everything here happens on the engine's thread: it runs no user code, reads no file but ``/proc``, and never blocks on
another thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from functools import partial
from itertools import chain
from typing import Final

from sowatch.bpf.records import Record
from sowatch.engine.address_space import Change, ProcessState
from sowatch.engine.effects import LIVE, Causes, Effects
from sowatch.engine.intake import Intake
from sowatch.engine.merge import MANY_CHANGES, merge
from sowatch.engine.publisher import Publisher
from sowatch.engine.rescan_schedule import RepairSchedule, RescanSchedule
from sowatch.engine.rule_change import RuleChange
from sowatch.engine.scan_records import ScanRecords
from sowatch.engine.scanner import LACK_REST_S, MANY_RESCANS, Scanner
from sowatch.engine.sharer_search import SHARERS_REST, SharerSearch
from sowatch.engine.table import MappingTable
from sowatch.linux.heap import give_back
from sowatch.linux.liveness import has_ended
from sowatch.linux.pid_namespaces import own_pid
from sowatch.linux.proc import Miss, ProcFs, ProcReadError
from sowatch.model.config import Config
from sowatch.model.errors import BpfError
from sowatch.model.events import Event, Lost, Repaired
from sowatch.model.identity import ProcessId
from sowatch.model.rules import Rule, RuleSet
from sowatch.model.stats import Losses
from sowatch.sources.base import EventSource, Report, base_report
from sowatch.sources.unread import ScanTimeout

__all__ = ["Reconciler"]

#: So long after its last scan the pace of a process is forgotten.
PACE_MEMORY_S: Final = 10
#: A CLONE_VM child that is still there after this is not on its way to exec.
VFORK_PATIENCE_NS: Final = 500_000_000
#: A query waits no longer than this in a flood of records.
SETTLING_S: Final = 0.5
#: How often changes that wait for a file's inspection are tried again.
FACTS_TURN_S: Final = 0.02
#: A system call that was under way when the rules changed has mapped its file after this.
RULES_SECOND_LOOK_S: Final = 1.0

REPAIR: Final = Causes("repair", "repair")
RULES: Final = Causes("snapshot", "rules")
SNAPSHOT: Final = Causes("snapshot", "repair")


class Reconciler:
    """Reconciles one mapping table with one source, and hands the changes to one publisher.

    Any thread may read its figures; all else belongs to the engine's thread, which calls `take_snapshot` first, then
    again and again `drain` and `do_what_is_due`, `tick` about once a second, and `finish` last.

    Args:
        silent_baseline: take the start-up snapshot without publishing it.

    Attributes:
        losses: what the source has lost, by where, as of the last check.
        lost: the sum of them; ``throttled`` of those were of processes over their limit of records.
        is_repaired: whether all of them are repaired; ``repairs`` counts how often that was done.
        intake: what is drained, at least once a second.
        records: how many `drain` took, without those that came during a scan.
        rereads: rescans of single processes.
        own_pid: ours, as the source counts; 0 where its processes do not include us.
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
        self.intake = Intake(source, config.max_records_s)
        self._silent = silent_baseline
        self._base = base_report(rules)
        self._schedule = RescanSchedule(source.unread)
        self._scanner = Scanner(source, table, self.intake, self._schedule)
        self._repairs = RepairSchedule()
        self._search = SharerSearch(source, table, self._proc)
        self._ttl_s = config.ignore_ttl_s
        self._names_at = time.monotonic() + self._ttl_s
        self._rules_again_at: float | None = None
        #: What the table has asked for and is still to be carried out, without the next two.
        self._effects = Effects()
        #: Changes are published together, as rules are changed; and a scan that rules have asked for has failed.
        self._holds_changes = self._owes_rules = False
        #: Processes that were reported as throttled since their losses were last counted.
        self._newly_throttled: set[int] = set()
        #: Throttled processes whose rescan repairs their losses, and since when.
        self._throttled: set[int] = set()
        self._throttled_since = 0.0
        #: Processes that a repair could not scan although they exist: in vfork or within their exit.
        self._unscanned: set[int] = set()
        self.own_pid = own_pid(self._proc) or 0
        self.losses = Losses()
        self.is_repaired = True
        self.lost = self.throttled = self.repairs = self.records = self.rereads = 0

    def detect_own_identity(self) -> None:
        """Finds our root, which shows what processes see the paths that we see, and our real pid."""
        own = self.own_pid
        try:
            scan = self._source.scan_process(own) if own else None
        except ScanTimeout:
            scan = None
        if scan is None:
            return
        self.own_pid = scan.tgid
        # If the kernel's numbers are not those of /proc, it would look up the wrong process.
        self._scanner.can_read_one = scan.tgid == own
        if scan.maps:
            self._publisher.own_view_id = scan.maps.first().view

    # ---- the loop's calls ---------------------------------------------------------------------

    def take_snapshot(self, make_ready: Callable[[int, float], Event]) -> None:
        """Fills the mapping table by a full scan; ``make_ready`` gets the number of processes and of seconds."""
        begun = time.monotonic()
        self._report(Report.PROCESSES | Report.RANGES)
        scans, records = self._scanner.read_all_with_records()
        if self.intake.error is not None:
            raise self.intake.error  # who starts a watch can do something about it
        self._note(merge(self._table, scans, records, SNAPSHOT, is_start=True, between=self._publish_found))
        self._mark_unread(SNAPSHOT)
        self._report(Report.NOTHING)
        self._effects.changes = self._carry_out()
        self._publish_found(self._effects, 0)
        seconds = time.monotonic() - begun
        self._publisher.announce(lambda: make_ready(len(scans), seconds), holds=True)
        self._flush()
        self._check_losses()

    def _publish_found(self, effects: Effects, least: int = MANY_CHANGES) -> None:
        """Publishes what the start-up snapshot has found so far, if it is much; what came since waits for `Ready`."""
        if len(effects.changes) >= least:
            if not self._silent:
                self._publisher.publish([change for change in effects.changes if change.cause == SNAPSHOT.load])
            effects.changes = [change for change in effects.changes if change.cause != SNAPSHOT.load]

    def _report(self, more: Report) -> None:
        """Makes the source report this beyond what it always does."""
        if self._source.reports is not None:
            self._source.reports.set(self._base | more)

    def drain(self) -> int:
        """Takes one batch, and says of how many; if there is more the loop calls again, and nothing else starves."""
        self._take(records := self.intake.drain())
        return len(records)

    def _take(self, records: list[Record]) -> None:
        self._note(self._table.apply(*records))
        self.records += len(records)
        self._flush()

    def next_work_at(self, next_tick: float) -> float:
        """When there is something to do even if no record comes."""
        earliest = min(next_tick, self._schedule.next_at)
        if self._publisher.is_waiting:
            earliest = min(earliest, time.monotonic() + FACTS_TURN_S)
        if self._repairs.at is not None:
            earliest = min(earliest, self._repairs.at)
        if self._rules_again_at is not None:
            earliest = min(earliest, self._rules_again_at)
        if self._search.is_asked:
            earliest = min(earliest, self._search.at)
        return earliest

    def do_what_is_due(self, now: float) -> None:
        """Makes the rescans and repairs that are due."""
        if self._source.unread:
            self._take_readable()
        if self._publisher.is_waiting:
            self._publisher.flush(now)
        if self._table.compat:
            for pid in self._schedule.take_compat(self._table.compat, now):
                self._table.await_rescan(pid)
        if self._table.needs_rescan or self._schedule.due or self._throttled:
            self._reread()
        if self._repairs.is_due:
            self._repair()
        if self._rules_again_at is not None and now >= self._rules_again_at:
            self._rules_again_at = None
            self._read_for_rules()
        if self._search.is_due(now):
            self._scan_for_sharers()

    def tick(self) -> None:
        """Checks for losses, and drops what is out of date."""
        if self._source.answer_clock is not None:
            self._source.answer_clock.tick()
        self._take(self.intake.drain())
        if not self.is_repaired and not (self._throttled or self._newly_throttled):
            self._repairs.ask()  # no record has named the throttled process for a second
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
        if self._scanner.has_spare_memory and not self._repairs.is_due:
            self._scanner.has_spare_memory = False
            give_back()
        if time.monotonic() >= self._names_at:
            # What was ignored may be wanted by the name that it has now, in processes that mapped it before, too.
            self._names_at = time.monotonic() + self._ttl_s
            self._search.needs_full_scan = True

    @property
    def is_resting(self) -> bool:
        """Whether a search or full scan is put off, so that scans do not take all the CPU time."""
        return self._search.is_resting

    def sync(self) -> None:
        """Drains, and scans every process that needs a rescan, and compat processes; a few times at most.

        Losses that no tick has seen yet are reported and repaired, so that a query gets a right mapping table.
        In a flood there is always more to scan: after `SETTLING_S` the schedule scans the rest.
        """
        begun = time.monotonic()
        for pid in self._table.compat:
            self._table.await_rescan(pid)
        if self._source.polls is not None:
            self._source.polls.ask()
        self._check_losses()
        if self._repairs.is_due:
            self._repair()
        for _ in range(10):
            self.drain()
            if self._search.is_due(time.monotonic()):
                self._scan_for_sharers()
            is_flood = len(self._table.needs_rescan) > MANY_RESCANS
            if not self._schedule.expedite(self._table.needs_rescan, begun):
                return
            self._reread()
            if is_flood or time.monotonic() >= begun + SETTLING_S:
                return

    def finish(self) -> None:
        """Takes the records that are still in the source, and publishes everything."""
        for batch in self.intake.drain_all():
            self._take(batch)
        self._check_losses()
        if not self.is_repaired:
            self._repair()
        self._publisher.flush_all()

    def _note(self, effects: Effects) -> None:
        """Takes what the table asks for; `_flush` carries it out."""
        self._search.ask(effects.with_untracked_sharers, effects.executed)
        self._newly_throttled |= effects.throttled
        for pid in effects.throttled:
            self._schedule.slow_down(pid)
        self._effects += effects

    def _carry_out(self) -> list[Change]:
        """Sends verdicts to the kernel, and returns the changes to publish."""
        effects, self._effects = self._effects, Effects()
        if effects.verdicts:
            for places, is_wanted in zip(effects.answers(), (True, False), strict=True):
                try:
                    self._source.answer(places, is_wanted=is_wanted)
                except BpfError as error:
                    self.intake.excuse(error)  # it is asked for again
        for pid, start_ns, activity in dict.fromkeys(effects.untrack):
            if self._table.is_idle(pid) and self._untrack(pid, start_ns, activity):
                effects.changes += self._table.untracked(pid, start_ns).changes
        return effects.changes

    def _untrack(self, pid: int, start_ns: int, activity: int) -> bool:
        try:
            return self._source.untrack(pid, start_ns, activity)
        except BpfError as error:
            self.intake.excuse(error)
            return False

    def _flush(self) -> None:
        if changes := self._carry_out():
            self._publisher.publish(changes)

    def _publish_many(self, effects: Effects) -> None:
        """Publishes the changes of a merge that is under way if they are many: any user decides how many they are."""
        if len(self._effects.changes) + len(effects.changes) >= MANY_CHANGES and not self._holds_changes:
            self._effects.changes += effects.changes
            effects.changes, changes, self._effects.changes = [], self._effects.changes, []
            self._publisher.publish(changes)

    # ---- other rules --------------------------------------------------------------------------

    def set_rules(self, change: RuleChange, done: Callable[[], None]) -> None:
        """Replaces the rules.

        Args:
            change: the new ones, and what goes with them.
            done: called once everything that is mapped is published by them.
        """
        self._flush()
        self._publisher.change_rules(change)
        self._table.set_rules(change.rules)
        self._base = base_report(change.rules)
        # In this order: what the kernel drops by a verdict of the old epoch is found by the scan.
        self._source.new_epoch()
        self._read_for_rules()
        self._publisher.rescan_for(self._table.loads(lambda _: True, time.monotonic_ns()), only_held=self._silent)
        self._publisher.after_all(done)
        self._rules_again_at = time.monotonic() + RULES_SECOND_LOOK_S

    def rescan_for(self, pid: int, rule: Rule) -> None:
        """Scans a process, and publishes what the rule wants of it and was not published."""
        self._table.await_rescan(pid)
        self.sync()
        now_ns = time.monotonic_ns()
        self._publisher.rescan_for(self._table.loads(lambda one: rule.matches_path(one.name.path), now_ns, pid))

    def _look_at_recovered(self) -> None:
        """Publishes files that can be read now; their file system hung before."""
        inspector = self._publisher.in_force.inspector
        files = inspector.take_recovered() if inspector is not None else ()
        if files:
            found = self._table.loads(lambda one: one.name.file_id in files, time.monotonic_ns())
            self._publisher.recheck(found, only_held=self._silent)

    def _read_for_rules(self) -> None:
        since_ns = time.monotonic_ns()
        self._holds_changes = True
        try:
            scanned = self._read_everything(RULES)
            self._owes_rules = self._scanner.is_lacking
            if not self._owes_rules:
                self._forget_vanished(scanned, since_ns)
        finally:
            self._holds_changes = False
        changes = self._carry_out()
        if self._silent:
            # With a silent baseline, no rule publishes what was mapped before.
            changes = [one for one in changes if one.cause != RULES.load]
        self._publisher.publish(changes)
        if self._owes_rules:
            self._rules_again_at = time.monotonic() + RULES_SECOND_LOOK_S

    # ---- scans --------------------------------------------------------------------------------

    def _reread(self) -> None:
        """Scans the processes that need a rescan, each as soon as its pace allows."""
        due = self._schedule.take(self._table.needs_rescan, time.monotonic())
        self._table.begin_rescans(due)
        if not due:
            if self._throttled:
                self._unthrottle(())  # some may have ended before their scan
            return
        was_read = self._scan(due)
        if self._throttled:
            self._unthrottle(was_read)
        self._flush()

    def _scan(self, due: dict[int, Causes]) -> set[int]:
        """Scans these processes, and gives those that were read; one that has ended is forgotten in any case."""
        self._report(Report.RANGES | Report.SCANS)
        concerned = ScanRecords(pid for one in due for pid in (one, *self._table.sharers_of(one)))
        apply_others = partial(self._apply_others, holds=bool(self._effects.changes))
        take_others = partial(concerned.take_others, self.intake.drain, apply_others)

        def between(effects: Effects) -> None:
            self._publish_many(effects)
            take_others()

        scans, records = self._scanner.read(due, take_others)
        missing = due.keys() - (was_read := {scan.tgid for scan in scans})
        # Before the ring is drained: the exit record of a process that has ended is in the ring, or lost.
        gone = [pid for pid in missing if self._has_ended(pid, is_lossy=due[pid] is REPAIR)]
        for batch in chain(records.batches(), self.intake.drain_all()):
            apply_others(concerned.keep_back(batch))
        self._report(Report.NOTHING)
        self.rereads += len(due)
        others = (one for one in scans if one.tgid not in due and one.intro is not None)
        self._note(self._table.learn_only(one for one in others if self._is_tracked(one.tgid, one.start_ns)))
        scans = [scan for scan in scans if scan.tgid in due]
        self._note(merge(self._table, scans, concerned.take(), LIVE, own_causes=due, between=between))
        concerned.apply_kept(self._apply_kept, take_others)
        for pid in gone:
            self._note(self._table.forget_pid(pid, "repair", time.monotonic_ns()))
        self._unscanned.difference_update(due)
        self._unscanned.update(pid for pid in missing - set(gone) if due[pid] is REPAIR)
        return due.keys() & was_read

    def _apply_kept(self, records: Iterable[Record]) -> None:
        """Applies what waited for a scan."""
        effects = self._table.apply(*records)
        self._publish_many(effects)
        self._note(effects)

    def _apply_others(self, records: list[Record], *, holds: bool) -> None:
        """Applies records of processes that are not scanned now: published at once, or behind what it ``holds``."""
        effects = self._table.apply(*records)
        if not holds:
            self._publisher.publish(effects.changes)
            effects.changes = []
        self._note(effects)

    def _has_ended(self, pid: int, *, is_lossy: bool) -> bool:
        """Whether the process known by this pid has ended, or, if its exit record may be lost, is about to."""
        start_ns = self._table.start_of(pid)
        try:
            if start_ns is None:
                return isinstance(self._proc.stat(pid), Miss)
            return has_ended(self._proc, ProcessId(pid, start_ns), is_lossy=is_lossy)
        except ProcReadError as error:
            self.intake.excuse(error)
            return False

    def _mark_unread(self, causes: Causes) -> None:
        """Marks processes whose scan hangs: they are rescanned as soon as they can be read."""
        for pid in self._source.unread:
            if pid:
                self._table.await_rescan(pid, causes)

    def _take_readable(self) -> None:
        """Expedites rescans of processes that do not hang any more."""
        for pid in self._source.unread.take_readable():
            self._table.await_rescan(pid, REPAIR, replaces=True)
            self._schedule.due[pid] = 0.0

    def _read_everything(self, causes: Causes) -> set[int]:
        """Merges a full scan and the records that came meanwhile; returns the tgids that were scanned."""
        self._report(Report.PROCESSES | Report.RANGES | Report.SCANS)
        scans, records = self._scanner.read_all_with_records()
        self._report(Report.NOTHING)
        self._table.begin_rescans(scan.tgid for scan in scans)
        self._note(merge(self._table, scans, records, causes, between=self._publish_many))
        self._mark_unread(causes)
        return {scan.tgid for scan in scans}

    def _scan_for_sharers(self) -> None:
        """Scans processes together with their untracked sharers, or all if it is not known who those are."""
        begun_s = self._scanner.cpu_s()
        for due in self._search.rounds(self.drain, can_find=self._scanner.can_read_one):
            if due is None:
                self._read_everything(LIVE)
                self._search.needs_full_scan |= self._scanner.is_lacking
            else:
                self._table.begin_rescans(due)
                self._scan(dict.fromkeys(due, LIVE))
            self._flush()
        rest_s = SHARERS_REST * (self._scanner.cpu_s() - begun_s)
        self._search.at = time.monotonic() + (max(rest_s, LACK_REST_S) if self._search.needs_full_scan else rest_s)

    def _forget_vanished(self, scanned: set[int], since_ns: int) -> None:
        """Scans or forgets each process of the table that was known before ``since_ns`` and is not ``scanned``."""
        late: dict[int, Causes] = {}
        # Unannounced processes first: else they would inherit the files of a parent that has ended.
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
        """Untracks a process without files whose exec record was lost: the kernel side does not report its exit."""
        pid, space = process.id.pid, process.space
        if space.files or len(space.sharers) > 1 or pid in self._table.needs_rescan:
            return
        if not self._is_tracked(pid, process.id.start_ns):
            self._untrack(pid, process.id.start_ns, 0)
            self._note(self._table.untracked(pid, process.id.start_ns))

    def _is_tracked(self, pid: int, start_ns: int) -> bool:
        tracked = self._source.tracked(pid)
        return tracked is not None and tracked.start_ns == start_ns and bool(tracked.activity)

    # ---- losses and repairs -------------------------------------------------------------------

    def _check_losses(self) -> None:
        before, self.losses = self.losses, self.intake.losses()
        if throttled := self.losses.throttled - before.throttled:
            self._throttle(throttled)
        unresolved = self.losses.unresolved - before.unresolved
        if others := sum(self.losses) - sum(before) - throttled - unresolved:
            self._lose(others)
            self._repairs.ask()
        if unresolved:
            self._lose(unresolved)
            self._make_up_for_unresolved()

    def _make_up_for_unresolved(self) -> None:
        """Repairs mappings whose file could not be identified: their processes need a rescan already."""
        if self._repairs.at is not None or self._throttled:
            return
        begun = time.monotonic()
        self._schedule.expedite(self._table.needs_rescan)
        self._reread()
        self._has_repaired(time.monotonic() - begun)

    def _lose(self, count: int) -> None:
        self.lost += count
        if self.is_repaired:
            self._publisher.take_repaired()  # what was found before is not this loss's
        self.is_repaired = False
        self._publisher.announce(lambda: Lost(time.time_ns(), count, "kernel"))

    def _throttle(self, count: int) -> None:
        """Counts what the kernel dropped of processes over their limit: a rescan of each repairs it."""
        self._lose(count)
        self.throttled += count
        self._note_throttled()

    def _note_throttled(self) -> None:
        """Queues the throttled processes that records have named; their loss is reported before."""
        if not self._throttled:
            self._throttled_since = time.monotonic()
        newly, self._newly_throttled = self._newly_throttled, set()
        if len(newly) > MANY_RESCANS and self._scanner.can_read_one:
            try:
                newly &= set(self._proc.pids())  # a flood of forks: what has ended has nothing to be scanned
            except ProcReadError as error:
                self.intake.excuse(error)
        self._throttled |= newly
        for pid in self._throttled:
            self._table.await_rescan(pid, REPAIR, replaces=True)

    def _unthrottle(self, was_read: Collection[int]) -> None:
        """Called once the scans of these processes are merged; their changes are not flushed yet."""
        owed = self._table.needs_rescan
        # A process whose scan hangs is reported as unread, and the others do not wait for it.
        self._throttled = {
            pid for pid in self._throttled if pid in owed and pid not in was_read and pid not in self._source.unread
        }
        if self._throttled or self._repairs.at is not None:
            return
        self._has_repaired(time.monotonic() - self._throttled_since)

    def _has_repaired(self, seconds: float) -> None:
        self._flush()
        loads, unloads = self._publisher.take_repaired()
        self.repairs, self.is_repaired = self.repairs + 1, True
        self._publisher.announce(lambda: Repaired(time.time_ns(), loads, unloads, seconds))

    def _repair(self) -> None:
        """Merges a full scan; repeated later if more was lost meanwhile."""
        begun = time.monotonic()
        self._check_losses()
        if self._owes_rules:
            self._repairs.end(is_repaired=False)  # what is found by then is not the loss's
            return
        self._repairs.at = None
        before = self.losses
        since_ns = time.monotonic_ns()
        self._forget_vanished(self._read_everything(REPAIR), since_ns)
        after = self.intake.losses()
        # What is dropped of a process that floods is repaired by rescans of that process.
        stood_still = after._replace(throttled=0, unresolved=0) == before._replace(throttled=0, unresolved=0)
        if stood_still and self._scanner.has_scanned_all:
            self._repairs.end(is_repaired=True)
            self._throttled.clear()
            self._has_repaired(time.monotonic() - begun)
            return
        self._flush()
        self._check_losses()
        self._repairs.end(is_repaired=False)
