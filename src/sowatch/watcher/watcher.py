"""`Watcher`: source, map, rules and subscribers put together.

This is the module to read first to see how the parts meet: a `Watcher` opens a source, gives it to an `Engine` thread,
and hands out what that publishes; each rule with callbacks has a worker thread of its own, so a slow callback delays
only its own rule.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Self, overload

from sowatch.engine.activation import FileRegistry
from sowatch.engine.address_space import Mapping
from sowatch.engine.descendants import Descendants, following
from sowatch.engine.file_inspector import Inspector
from sowatch.engine.loop import Engine
from sowatch.engine.owner import Owner
from sowatch.engine.published_map import mapped_by
from sowatch.engine.publisher import Publisher, Selection
from sowatch.engine.rule_change import RuleChange
from sowatch.engine.subscription import SubscriberQueue
from sowatch.engine.table import MappingTable
from sowatch.engine.workers import ActiveFile, RuleWorker
from sowatch.linux.containers import container_id
from sowatch.linux.disk_calls import HangingCalls
from sowatch.linux.proc import Miss, ProcFs
from sowatch.model.config import Config
from sowatch.model.errors import SowatchError, UsageError
from sowatch.model.events import AddedEvent, LibraryEvent, Ready
from sowatch.model.histogram import RuleTimings
from sowatch.model.identity import FileId, ProcessId
from sowatch.model.literals import EVENT_KINDS, STREAM_KINDS, StreamKinds
from sowatch.model.rules import Rule, RuleSet
from sowatch.model.stats import Losses, Mapped, Stats
from sowatch.sources.base import EventSource
from sowatch.sources.select import Opening, open_source
from sowatch.sources.unread import PatientProcFs, UnreadProcesses
from sowatch.watcher.subscription import Subscription

# `explain` is imported where it is used: most watches never are explained.
if TYPE_CHECKING:
    from sowatch.explain import ExplainContext, PathReport, ProcessReport
    from sowatch.explain.audit import AuditReport
    from sowatch.watcher.pod_names import PodNames, PodNamesState

__all__ = ["ActiveFile", "Watcher"]

#: How long stop() waits for the callbacks of one rule that are under way.
WORKER_STOP_S = 1.0
#: The draining thread checks for losses once a second; after so long without, nobody knows of any.
KNOWS_S = 5.0


class Watcher:
    r"""Watches the whole host, and reports the libraries that its rules want.

    Args:
        rules: the first that matches a file wins; without any, every shared library.
        config: limits and policy.
        pids: only these processes (pids in the initial pid namespace).
        follow: and all that descend from them, what they fork later included.
        container: only processes of containers whose id starts with this.
        exclude_self: leave this very process out.
        exclude_pids: leave these processes out (pids in the initial pid namespace).
        snapshot: report what is mapped already. Without, only what is new is reported.
        hidden_rules: names of rules whose events and mappings only those get that ask for ``with_hidden``.
        open_source: where records come from; the default selects the strategy. An `Opening` is closed by `stop`.

    Use it as a context manager, or `start` and `stop` it. All methods may be called from any
    thread, but not in a child of ``os.fork()``, where they raise `UsageError`; only leaving the context does nothing
    there. Iterating gives the library events from before the start on.

    >>> with Watcher(Rule(r"libc\.so", name="libc")) as watcher:  # doctest: +SKIP
    ...     print(len(watcher.snapshot()))
    """

    def __init__(
        self,
        *rules: Rule,
        config: Config = Config(),  # noqa: B008 - frozen
        pids: Collection[int] = (),
        follow: bool = False,
        container: str | None = None,
        exclude_self: bool = False,
        exclude_pids: Collection[int] = (),
        snapshot: bool = True,
        hidden_rules: Collection[str] = (),
        open_source: Callable[[Config], EventSource] = open_source,
    ) -> None:
        self._config = config
        self._pids = frozenset(pids)
        if follow and not pids:
            raise UsageError("follow=True needs pids: whose descendants are to be watched?")
        self._descendants = Descendants(pids, ProcFs(config.proc_root)) if follow else None
        self._container = container
        self._exclude_self = exclude_self
        self._excluded_pids = frozenset(exclude_pids)
        self._wants_snapshot = snapshot
        self._hidden_rules = frozenset(hidden_rules)
        self._open_source = open_source
        self._proc = ProcFs(config.proc_root)
        self._patient = PatientProcFs(config.proc_root, UnreadProcesses(), raises=False)
        #: Who has what, what is active, what is blocked.
        self.registry = FileRegistry(config)
        self._engine: Engine | None = None
        self._changing_rules = threading.Lock()
        self._lock = threading.RLock()
        self._is_started = False
        self._is_stopped = False
        self._audit_lock = threading.Lock()
        self._hanging = HangingCalls()
        self._audits = 0
        self._audit_differences = 0
        self._stopped = threading.Event()
        self._pod_names = None if config.cri_socket is None else _pod_names(config.cri_socket)
        self._publisher = Publisher(
            RuleSet(rules),
            self.registry,
            Selection(self._pids, container),
            proc_root=config.proc_root,
            limit_bytes=config.queue_bytes,
            process_names=self._pod_names,
        )
        self._own: Subscription | None = None
        self._owner = Owner()

    def __repr__(self) -> str:
        rules = ", ".join(rule.name for rule in self._publisher.in_force.rules)
        if not self._is_started:
            return f"<Watcher not started: {rules}>"
        state = "running" if self.is_running else "stopped"
        processes, _, mappings = self._publisher.published.counts()
        return f"<Watcher {state}: {rules}; {mappings} mappings of {processes} processes>"

    def start(self) -> Ready:
        """Loads, attaches, takes the snapshot. Returns what the ``ready`` event says.

        Raises:
            NotPermitted: this user may not load BPF programs.
            LoadError: no strategy works; ``attempts`` has each.
            LibbpfMissing: the binding to libbpf does not load.
            UsageError: it was started before.
        """
        self._owner.check()
        with self._lock:
            if self._is_started:
                raise UsageError("a Watcher can be started once. Make a new one.")
            source = self._open_source(self._config)
            self._is_started = True
            try:
                return self._start(source)
            except BaseException:
                if self._engine is None:
                    source.close()
                self.stop()  # ends the thread that uses the source before it closes it
                raise

    def _start(self, source: EventSource) -> Ready:
        rules = self._publisher.in_force.rules
        if self._descendants is not None:
            source = following(source, self._descendants)
        engine = Engine(
            source,
            MappingTable(rules, container_id),
            self._publisher,
            rules,
            self._config,
            silent_baseline=not self._wants_snapshot,
        )
        self._engine = engine
        engine.reconciler.detect_own_identity()
        own = {engine.reconciler.own_pid} if self._exclude_self else set()
        self._publisher.selection = Selection(self._pids, self._container, self._excluded_pids | own, self._descendants)
        first = self._change_to(rules, engine)
        if self._pod_names is not None:
            self._pod_names.on_done = engine.wake
            self._pod_names.start()
        ready = engine.start(first)
        self._patient.start()
        first.workers.note_live()
        return ready

    def _change_to(self, rules: RuleSet, engine: Engine) -> RuleChange:
        """What the engine is to apply so that it watches by these rules."""
        config, subscribers = self._config, self._publisher.subscribers

        def new_worker(rule: Rule, after: RuleWorker | None) -> RuleWorker:
            subscription = SubscriberQueue(
                subscribers,
                events=EVENT_KINDS,
                control=False,
                limit=config.queue_events,
                limit_bytes=config.queue_bytes,
                rule=rule.name,
            )
            return RuleWorker(rule, subscription, self.registry, self._proc, after)

        return self._publisher.in_force.changed_to(
            rules, lambda exports: Inspector(proc=self._proc, exports=exports, on_done=engine.wake), new_worker
        )

    def stop(self) -> None:
        """Detaches everything, deactivates every active file, ends every thread. Safe to call again."""
        self._owner.check()
        with self._lock:
            if self._is_stopped:
                return
            self._is_stopped = True
            if isinstance(self._open_source, Opening):
                self._open_source.close()
            if self._engine is not None:
                self._engine.stop()
            # Once more if the engine's thread did so: a reader of events must not wait for ever.
            self._publisher.subscribers.end()
            deadline = time.monotonic() + WORKER_STOP_S
            _, inspector, workers = self._publisher.in_force
            for worker in (*workers.running, *workers.retired):
                worker.join(max(0.0, deadline - time.monotonic()))
            if inspector is not None:
                inspector.close(max(0.0, deadline - time.monotonic()))
            self._patient.close()
            if self._pod_names is not None:
                self._pod_names.close(max(0.0, deadline - time.monotonic()))
            self.registry.clear(timeout_s=max(0.0, deadline - time.monotonic()))
            self._stopped.set()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._owner.is_this_process:
            self.stop()

    def __iter__(self) -> Iterator[LibraryEvent]:
        with self._lock:
            if self._own is None:
                self._own = self.subscribe(control=False)
            own = self._own
        # Not a generator: the subscription has to be there before the start.
        return (event for event in own if isinstance(event, LibraryEvent))

    @property
    def ready(self) -> Ready | None:
        """What the ``ready`` event reported; None before the start."""
        return None if self._engine is None else self._engine.ready

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until `stop` was called, or the time is up; whether it was stopped."""
        self._owner.check()
        return self._stopped.wait(timeout_s)

    def subscribe(
        self,
        *,
        events: StreamKinds = EVENT_KINDS,
        control: bool = True,
        limit: int | None = None,
        with_hidden: bool = False,
    ) -> Subscription:
        """A queue of events from now on; subscribe before `start` to get the snapshot too.

        Args:
            events: which of ``load``, ``unload``, ``activate``, ``deactivate``; ``http``, ``stale`` and
                ``renewed`` are for what `publish` is given.
            control: also `Ready`, `Lost`, `Repaired`, `Stopped`.
            limit: events that may wait in it before some are lost; default ``config.queue_events``. So many
                as take ``config.queue_bytes``, if that is fewer.
            with_hidden: also those of rules that are hidden.

        Raises:
            UsageError: an unknown event.
        """
        self._owner.check()
        for one in events:
            if one not in STREAM_KINDS:
                raise UsageError(f"unknown event {one!r}. Use some of: {', '.join(STREAM_KINDS)}.")
        return Subscription(
            self._publisher.subscribers.subscribe(
                events=events,
                control=control,
                limit=limit or self._config.queue_events,
                limit_bytes=self._config.queue_bytes,
                without_rules=() if with_hidden else self._hidden_rules,
            )
        )

    def publish(self, events: Sequence[AddedEvent]) -> Future[None]:
        """Sends what others found out to every subscription that asked for it, among the other events.

        From any thread, at once.

        Returns:
            What is done once they are in the queues.

        Raises:
            SowatchError: the watch is not running.
        """
        return self._running_engine().publish(events)

    def snapshot(self, *, with_ranges: bool = True, with_hidden: bool = False) -> list[Mapped]:
        """The map as published so far: every (process, library) that the rules want.

        Ranges are those of now, which may be others than its load had; of a watch that has ended, the
        load's.

        Args:
            with_ranges: without, all ranges are the load's, and the draining thread is not asked.
            with_hidden: also what rules want that are hidden.
        """
        self._owner.check()
        hidden = frozenset() if with_hidden else self._hidden_rules
        now: dict[ProcessId, dict[FileId, Mapping]] = {}
        if with_ranges and self.ready is not None:
            # The watch may end at any moment.
            with contextlib.suppress(SowatchError):
                now = (engine := self._running_engine()).ask(engine.mappings, synced=False)
        return mapped_by(self._publisher.published.copy(), now, self._publisher.named, hidden)

    def audit(self) -> AuditReport:
        """Compares the mapping table with an independent scan of ``/proc``, every live process tried.

        A difference counts if it is still there after a few scans some 50 ms apart. Takes about as
        long as reading every process's maps; `set_rules` waits for it. Any thread but a callback's may ask.

        Raises:
            SowatchError: the watch is not running.
        """
        from sowatch.explain.audit import audit

        engine = self._running_engine()
        with self._changing_rules:  # the rules of the mapping table must not change during it
            rules = self._publisher.in_force.rules
            report = audit(engine.query, self._asked_anew(), rules, lambda: engine.unread, hanging=self._hanging)
        with self._audit_lock:
            self._audits += 1
            self._audit_differences = len(report.differences)
        return report

    @overload
    def explain(self, target: int) -> ProcessReport: ...
    @overload
    def explain(self, target: str | os.PathLike[str]) -> PathReport: ...
    def explain(self, target: int | str | os.PathLike[str]) -> ProcessReport | PathReport:
        """The decision trail of one process or one file: what was seen of it, and why no more.

        Reads ``/proc``, the mapping table, the kernel side's verdicts, and the files, each of which
        is given up after 2 s. Changes nothing. Any thread but a callback's may ask.

        Args:
            target: a pid, or the path of a file as this process sees it; the file may be gone.

        Raises:
            SowatchError: the watch is not running, there is no such process, or nothing of that name
                exists or is mapped.
            UsageError: the id of a thread, or no path.
        """
        from sowatch.explain import explain

        return explain(target, self._explain_context())

    def explain_published(
        self, *, pid: int | None = None, path: str | None = None, build_id: str | None = None
    ) -> ProcessReport | PathReport:
        """The same from the published map only, for askers who must not see more than its load events say.

        No file is opened or looked up, no link followed. Exactly one argument is given. Any thread but a callback's
        may ask.

        Args:
            pid: a process: what it has mapped of what load events name.
            path: the path of load events.
            build_id: hexadecimal digits.

        Raises:
            SowatchError: the watch is not running, there is no such process, or no load event in force names the file.
            UsageError: the id of a thread, or not exactly one argument.
        """
        from sowatch.explain import Published, explain_published_file, explain_published_process

        if (pid is not None) + (path is not None) + (build_id is not None) != 1:
            raise UsageError("explain_published() takes one of pid, path and build_id. Give exactly one.")
        published = Published(self._explain_context(), self._publisher.published.copy)
        if pid is not None:
            return explain_published_process(published, pid)
        return explain_published_file(published, path=path, build_id=build_id)

    def _explain_context(self) -> ExplainContext:
        from sowatch.explain import ExplainContext

        engine = self._running_engine()
        return ExplainContext(
            self._asked_anew(),
            self._publisher.in_force.rules,
            self.registry,
            query=engine.query,
            open_verdicts=engine.open_verdicts,
            is_repaired=lambda: engine.reconciler.is_repaired,
            reads_proc=self.ready is not None and self.ready.strategy in ("prebuilt", "procfs"),
            hanging=self._hanging,
        )

    def _asked_anew(self) -> ProcFs:
        """``/proc`` for those who ask: what hung the last time and does not any more is tried again."""
        self._patient.unread.take_readable()
        return self._patient

    @property
    def unread(self) -> dict[int, float]:
        """Processes whose mappings cannot be read now, as the kernel does not answer, and for how many seconds.

        A page fault that a file system does not answer can hold the lock of an address space. What is known of
        such a process may be old; it is read as soon as that is over.
        """
        return {} if self._engine is None else self._engine.unread

    def _running_engine(self) -> Engine:
        self._owner.check()
        engine = self._engine
        if engine is None or self._is_stopped:
            raise SowatchError("the watch is not running. Call start() first.")
        return engine

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules in force, in order."""
        return tuple(self._publisher.in_force.rules)

    def set_rules(self, *rules: Rule) -> None:
        """Watches by other rules from now on, without a gap. Returns once everything mapped was reported by them.

        What no rule wants any more is unloaded with cause ``rules``, what is wanted now loaded with cause
        ``snapshot`` (unless the watch began without a snapshot), and what another rule wants both. Rules
        go on if their name and callbacks stay; a worker thread of the others ends or begins. Any thread
        but a callback's may call.

        Raises:
            SowatchError: the watch is not running, or ended meanwhile.
            UsageError: two rules of one name.
        """
        self._owner.check()
        new = RuleSet(rules)
        with self._changing_rules:
            engine = self._running_engine()
            before = self._publisher.in_force
            change = self._change_to(new, engine)
            try:
                engine.change_rules(change).result()
            finally:
                unused = before if self._publisher.in_force is change else change
                if change.inspector is not before.inspector and unused.inspector is not None:
                    unused.inspector.close()
            change.workers.note_live()

    def attach_pid(self, pid: int, rule: str) -> int:
        """Scans a process once more, by hand: what the rule wants is reported and activated if it was not.

        Activations that failed are tried again, unless their file is blocked.

        Args:
            pid: in the initial pid namespace.
            rule: name of a rule in force.

        Returns:
            How many files the process holds under the rule now.

        Raises:
            SowatchError: there is no such process, or it has nothing that the rule wants.
        """
        wanted, engine = self._rule_named(rule), self._running_engine()
        if isinstance(self._proc.stat(pid), Miss):
            raise SowatchError(f"there is no process {pid}. Find the right one with `ps -e`.")

        def retry_held() -> int:
            held = [one for one in self._publisher.published.of_pid(pid) if one.rule == rule]
            idle = {one.library.id for one in self.registry.files() if one.rule == rule and one.state == "held"}
            for worker in self._publisher.in_force.workers.running:
                if worker.rule.name == rule:
                    for load in held:
                        if load.library.id in idle:
                            worker.retry(load)
            return len(held)

        def look(answer: Future[int]) -> None:
            engine.reconciler.rescan_for(pid, wanted)
            self._publisher.after_all(lambda: answer.set_result(retry_held()))

        held = engine.request(look).result()
        if not held:
            raise SowatchError(f"no rules matched for pid {pid}. See `sowatch explain {pid}`.")
        return held

    def detach_pid(self, pid: int, rule: str) -> int:
        """Takes away by hand what a process holds under a rule: unloads with cause ``rules``, and deactivations.

        It stays so until the process maps the file anew, or `attach_pid` or `set_rules` looks again.

        Args:
            pid: in the initial pid namespace.
            rule: name of a rule in force.

        Returns:
            How many files it held.

        Raises:
            SowatchError: it held none.
        """
        self._rule_named(rule)
        publisher = self._publisher

        def let_go(answer: Future[int]) -> None:
            publisher.after_all(lambda: answer.set_result(publisher.let_go(pid, rule)))

        held = self._running_engine().request(let_go).result()
        if not held:
            raise SowatchError(f"pid {pid} is not registered. See `sowatch debug traced`.")
        return held

    def _rule_named(self, name: str) -> Rule:
        rules = self._publisher.in_force.rules
        rule = rules.named(name)
        if rule is None:
            raise UsageError(f"there is no rule {name!r}. Use one of: {', '.join(one.name for one in rules)}.")
        return rule

    @property
    def is_running(self) -> bool:
        """Whether it was started and has neither been stopped nor failed."""
        return self._engine is not None and self._engine.is_running and not self._is_stopped

    @property
    def silent_s(self) -> float:
        """Seconds since the draining thread last drained, which it does each second; more than a few mean a hang."""
        return 0.0 if self._engine is None else time.monotonic() - self._engine.reconciler.intake.drained_s

    @property
    def stats(self) -> Stats:
        """Figures so far."""
        processes, libraries, mappings = self._publisher.published.counts()
        engine, pods = self._engine, self.pod_names
        return Stats(
            processes=processes,
            libraries=libraries,
            mappings=mappings,
            events=self._publisher.subscribers.events,
            loads=self._publisher.loads,
            unloads=self._publisher.unloads,
            lost_kernel=0 if engine is None else engine.reconciler.lost,
            lost_throttled=0 if engine is None else engine.reconciler.throttled,
            lost_queue=self._publisher.subscribers.lost_in_queues,
            repairs=0 if engine is None else engine.reconciler.repairs,
            rereads=0 if engine is None else engine.reconciler.rereads,
            unresolved=self._publisher.unresolved,
            callback_errors=self._publisher.in_force.workers.errors,
            records=0 if engine is None else engine.reconciler.records,
            losses=Losses() if engine is None else engine.reconciler.losses,
            audits=self._audits,
            audit_differences=self._audit_differences,
            poll_interval_s=None if engine is None else engine.poll_interval_s,
            partial=self._publisher.partial,
            unread=0 if engine is None else len(engine.unread),
            pod_lookups=0 if pods is None else pods.lookups,
            pod_lookup_failures=0 if pods is None else pods.failures,
        )

    @property
    def pod_names(self) -> PodNamesState | None:
        """How the container runtime answers, which is asked for names of pods; None without ``config.cri_socket``."""
        return None if self._pod_names is None else self._pod_names.state

    @property
    def timings(self) -> dict[str, RuleTimings]:
        """How long callbacks took, by rule; rules without callbacks have none."""
        return {worker.rule.name: worker.timings for worker in self._publisher.in_force.workers.running}

    @property
    def is_repaired(self) -> bool:
        """Whether every loss in the kernel that was noticed is repaired; within a second each is noticed.

        `audit` and `explain` notice and repair before they answer.
        """
        # A thread that hangs or drowns has not checked for losses for that long: nobody knows.
        engine = self._engine
        return engine is None or (engine.reconciler.is_repaired and (not self.is_running or self.silent_s < KNOWS_S))


def _pod_names(socket: str) -> PodNames:
    from sowatch.watcher.cri import Cri  # most watches have no runtime to ask
    from sowatch.watcher.pod_names import PodNames

    return PodNames(Cri(socket))
