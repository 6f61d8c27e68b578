"""The agent put together: started in the right order, reloaded, ended in the reverse order.

The main thread waits for signals and for changes of the configuration; everything else runs on threads of its own.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from msgspec.structs import asdict, replace

from sowatch.agent.actions import Actions
from sowatch.agent.attachments import Attachments
from sowatch.agent.fleet_feed import FleetChange, FleetFeed, with_everything
from sowatch.agent.fleet_settings import FLEET_RULE
from sowatch.agent.http_flows import HttpFlows, with_tls_libraries
from sowatch.agent.hub import EventHub
from sowatch.agent.loaded_set import LoadedSet
from sowatch.agent.outputs import Outputs
from sowatch.agent.page import routes
from sowatch.agent.reload import FileWatch
from sowatch.agent.settings import Settings, changed_keys
from sowatch.agent.stale_feed import StaleFeed
from sowatch.agent.vulnerability_feed import VulnerabilityFeed
from sowatch.agent.webapp import Readiness, WebApp
from sowatch.bpf.map_memory import map_bytes
from sowatch.explain.audit import AuditReport
from sowatch.inventory.inventory import Inventory
from sowatch.inventory.packages import Packages
from sowatch.linux.capabilities import SYS_ADMIN, drop_privileges
from sowatch.linux.origin import origin_of
from sowatch.linux.pid_namespaces import why_not_whole_host
from sowatch.linux.priority import allow_nice
from sowatch.linux.proc import ProcFs
from sowatch.model.config import Config
from sowatch.model.errors import PidNamespaceError, SowatchError
from sowatch.model.lines import stamp
from sowatch.model.literals import STREAM_KINDS
from sowatch.model.rules import Rule
from sowatch.sources.base import EventSource
from sowatch.sources.select import open_source
from sowatch.telemetry import MetricRegistry, Sampler, names
from sowatch.uprobes.features import attaching_needs_admin
from sowatch.watcher.watcher import Watcher
from sowatch.web.logs import set_up_logging
from sowatch.web.notify import Notifier
from sowatch.web.servers import HttpThread, UnixSocket, bind_tcp, parse_listen

__all__ = ["Daemon"]

LOG = logging.getLogger("sowatch.agent")

#: The main thread wakes up this often even if nothing has happened.
_TURN_S: Final = 1.0
#: A draining thread that has not gone round for so long hangs: the watchdog is not fed any more.
_HANGS_S: Final = 20.0
#: Differences of an audit that are logged one by one.
_LOGGED_DIFFERENCES: Final = 5
#: What takes effect without a restart.
LIVE_KEYS: Final = frozenset(
    {
        "rules",
        "http",
        "fleet",
        "vulnerabilities",
        "sinks",
        "exporters",
        "audit_interval_s",
        "stale_interval_s",
        "log_level",
        "log_format",
        "allowed_hosts",
    }
)


class _Sockets(NamedTuple):
    """What is served: everything, what changes nothing, and metrics."""

    unix: socket.socket
    tcp: socket.socket | None
    metrics: socket.socket | None


class Daemon:
    """One run of the agent.

    Args:
        settings: to begin with.
        load: reads the settings anew; raises `SowatchError` if they cannot be used.
        config_path: the file that is watched for changes.
        version: of the program, for its metrics.
        notifier: of systemd.
        on_stopping: called in the handler of SIGTERM and SIGINT.
    """

    def __init__(
        self,
        settings: Settings,
        load: Callable[[], Settings],
        config_path: str,
        *,
        version: str,
        notifier: Notifier | None = None,
        on_stopping: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._load = load
        self._config_path = config_path
        self._notifier = notifier or Notifier()
        self._on_stopping = on_stopping
        self._commands: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._metrics = MetricRegistry(sample_interval_s=0.25)
        self._sampler = Sampler(self._metrics, version=version)
        self._actions = Actions(self._metrics, self._sampler, ProcFs(settings.watch.proc_root))
        self._first_actions = self._actions.prepare(settings.rules)
        rules = _rules(self._first_actions.rules, settings)
        self._watcher = Watcher(
            *rules, config=settings.watch, hidden_rules=(FLEET_RULE,), open_source=self._open_source
        )
        self._flows = HttpFlows(self._watcher, self._metrics, self._sampler, ProcFs(settings.watch.proc_root))
        self._first_flows = self._flows.prepare(settings.http)
        self._origin = origin_of(ProcFs(settings.watch.proc_root))
        proc = ProcFs(settings.watch.proc_root)
        self._stale = StaleFeed(self._watcher, self._metrics, proc, settings.stale_interval_s)
        self._packages = Packages(proc, self._stale.watch.hanging)
        self._vulnerabilities = VulnerabilityFeed(
            self._watcher, self._metrics, self._packages, settings.vulnerabilities
        )
        where = (self._watcher, self._sampler, self._origin, proc)
        self._fleet = FleetFeed(*where, stale=self._stale.watch, packages=self._packages)
        self._outputs = Outputs(self._watcher, self._metrics, self._sampler, self._origin)
        self._start_outputs: Callable[[], None] | None = None
        self._first_fleet: FleetChange | None = None
        self._loaded_files: LoadedSet | None = None
        self._allowed_hosts: set[str] = set()
        self._own_hosts = {"localhost"}
        self._config_error: str | None = None
        self._needs_restart: tuple[str, ...] = ()
        self._loaded_ns = time.time_ns()
        self._last_audit: tuple[int, AuditReport] | None = None
        self._audit_interval_s = settings.audit_interval_s
        self._audit_now = threading.Event()

    def run(self) -> int:
        """Starts, serves until SIGTERM or SIGINT, ends. On the main thread.

        Returns:
            0 after a signal, 1 if the watch ended by itself.

        Raises:
            SowatchError: it could not start.
        """
        settings = self._settings
        set_up_logging(settings.log_level, settings.log_format)
        _raise_file_limit()
        with contextlib.ExitStack() as stack:
            stack.callback(self._packages.close)  # last, as others ask it
            sockets = self._bind(stack)
            stack.callback(self._outputs.close)
            stack.callback(self._fleet.close)
            stack.callback(self._actions.close)
            stack.callback(self._flows.close)
            subscription = self._watcher.subscribe(events=STREAM_KINDS)
            self._loaded_files = LoadedSet(self._watcher, ProcFs(settings.watch.proc_root), self._packages)
            stack.enter_context(self._signals())
            stack.callback(self._watcher.stop)
            ready = self._watcher.start()
            stack.callback(self._sampler.follow_watcher(self._watcher))
            stack.enter_context(self._loaded_files)
            assert self._start_outputs is not None
            self._start_outputs()
            assert self._first_fleet is not None
            self._first_fleet.apply()
            self._serve(stack, sockets, EventHub(subscription))
            self._start_thread(stack, self._audit_again_and_again, "sowatch-audit")
            if settings.reload:
                watch = FileWatch(self._config_path, lambda: self._commands.put("reload"))
                stack.callback(watch.close)
                watch.start()
            # Before the watch ends, which would detach one file after the other.
            stack.callback(self._actions.close)
            stack.callback(self._flows.close)
            self._note_config(None)
            status = f"watching by {ready.strategy} ({ready.guarantee})"
            self._notifier.ready(status)
            facts = {"strategy": ready.strategy, "processes": ready.processes, "mappings": ready.mappings}
            LOG.info("ready", extra={"facts": {**facts, "socket": settings.socket, "listen": settings.listen or "-"}})
            code = self._wait(status)
            self._notifier.stopping()
            LOG.info("stopping")
        LOG.info("stopped", extra={"facts": {"exit": code}})
        return code

    # ---- the start ----------------------------------------------------------------------------

    def _bind(self, stack: contextlib.ExitStack) -> _Sockets:
        settings = self._settings
        tcp = _listen(stack, settings.listen)
        metrics = _listen(stack, settings.listen_metrics, is_for_metrics=True)
        unix = UnixSocket(settings.socket, owner=settings.socket_owner, group=settings.socket_group)
        stack.callback(unix.close)
        return _Sockets(unix.socket, tcp, metrics)

    def _open_source(self, config: Config) -> EventSource:
        # An agent stands for its host; to have it for one pid namespace name the strategy.
        reason = why_not_whole_host(ProcFs(config.proc_root))
        if reason is not None and config.strategy != "procfs":
            raise PidNamespaceError(reason)
        source = open_source(config)
        try:
            if self._settings.drop_privileges:
                # A thread that runs already would keep what it has; the helper's is started anew.
                source.unread.close()
                # Asked before they are gone: what is tried needs them all.
                attaches = self._settings.http.enabled or any(one.has_action for one in self._settings.rules)
                is_admin = attaches and attaching_needs_admin()
                allow_nice(config.nice)
                left = drop_privileges(also_keep=1 << SYS_ADMIN if is_admin else 0)
                source.unread.start()
                LOG.info("gave up privileges", extra={"facts": {"capabilities": f"{left:#x}"}})
            # Not before: their threads would keep every capability, and files be opened with all rights.
            self._first_actions.start()
            self._first_flows.start()
            self._start_outputs = self._outputs.prepare(self._settings)
            self._first_fleet = self._fleet.prepare(self._settings.fleet)
            self._first_actions.apply()
            self._first_flows.apply()
            self._actions.start()
        except BaseException:
            self._first_actions.discard()
            self._first_flows.discard()
            if self._first_fleet is not None:
                self._first_fleet.discard()
            source.close()
            raise
        return source

    def _serve(self, stack: contextlib.ExitStack, sockets: _Sockets, hub: EventHub) -> None:
        map_memory = self._metrics.gauge(names.BPF_MAP_BYTES.name)
        stack.callback(self._metrics.add_source(lambda: map_memory.set(map_bytes())))
        cut_off = self._metrics.counter(names.CLIENTS_CUT_OFF.name)
        stack.callback(self._metrics.add_source(lambda: cut_off.add(hub.clients_cut_off - cut_off.get())))
        inventory = Inventory(self._watcher, stale=self._stale.watch)
        attachments = Attachments(self._actions, self._flows, self._watcher)
        pages = routes(inventory, self._actions.tally.sums, self._stale.watch)
        app = WebApp(
            self._watcher,
            self._metrics,
            hub,
            self._readiness,
            attachments,
            pages,
            self._shows_flows_over_tcp,
            self._flows.endpoints,
            self._stale.watch,
            ProcFs(self._settings.watch.proc_root),
            self._loaded_files,
        )
        stack.callback(app.close)
        served = [(sockets.unix, app.for_socket())]
        if self._settings.listen is not None:
            self._own_hosts.add(parse_listen(self._settings.listen)[0])
        self._allow_hosts(self._settings)
        if sockets.tcp is not None:
            served.append((sockets.tcp, app.for_tcp(self._allowed_hosts)))
        if sockets.metrics is not None:
            served.append((sockets.metrics, app.for_metrics(self._allowed_hosts)))
        self._http = HttpThread(served, beside=[hub.run])
        # The watch ends first, which ends the streams of events; they get its last event.
        stack.callback(self._http.stop)
        stack.callback(self._watcher.stop)
        # The streams of pages end with the inventory.
        stack.enter_context(inventory)
        stack.enter_context(self._stale)
        stack.enter_context(self._vulnerabilities)
        self._http.start()

    def _shows_flows_over_tcp(self) -> bool:
        return self._settings.http.flows_over_tcp

    def _allow_hosts(self, settings: Settings) -> None:
        # In place: the check on the HTTP thread reads this very set.
        allowed = {name.lower() for name in (*self._own_hosts, *settings.allowed_hosts)}
        self._allowed_hosts |= allowed
        self._allowed_hosts &= allowed

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        commands = {signal.SIGTERM: "stop", signal.SIGINT: "stop", signal.SIGHUP: "hangup"}
        # SimpleQueue.put may be called from a handler that interrupts a get.

        def take(order: str) -> None:
            self._commands.put(order)
            if order == "stop":
                self._on_stopping()

        before = {
            number: signal.signal(number, lambda *_, order=order: take(order)) for number, order in commands.items()
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _start_thread(self, stack: contextlib.ExitStack, target: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        stack.callback(thread.join, 1.0)
        stack.callback(self._end_waiting)
        thread.start()

    # ---- while it runs ------------------------------------------------------------------------

    def _wait(self, status: str) -> int:
        every_s = min(_TURN_S, (self._notifier.watchdog_s or _TURN_S) / 3)
        while True:
            try:
                order = self._commands.get(timeout=every_s)
            except queue.Empty:
                order = ""
            if order == "stop":
                return 0
            if not self._watcher.is_running or not self._http.is_alive:
                LOG.error("the watch or its HTTP server has ended by itself")
                return 1
            if order:
                if order == "hangup":
                    self._outputs.reopen()
                self._reload(status, is_asked=order == "hangup")
            if self._watcher.silent_s < _HANGS_S:
                self._notifier.alive()

    def _reload(self, status: str, *, is_asked: bool) -> None:
        try:
            new = self._load()
            if new == self._settings and self._config_error is None and not is_asked:
                self._needs_restart = ()
                return
            self._notifier.reloading()
            try:
                self._take_over(new)
            finally:
                self._notifier.ready(status)
        except SowatchError as error:
            LOG.warning("the configuration cannot be used, the one before stays in force: %s", error)
            self._note_config(str(error))
        else:
            self._note_config(None)

    def _take_over(self, new: Settings) -> None:
        old = self._settings
        changed = [name for name in Settings.__struct_fields__ if getattr(old, name) != getattr(new, name)]
        kept = [name for name in changed if name not in LIVE_KEYS]
        self._needs_restart = tuple(key for name in kept for key in changed_keys(name, old, new))
        actions = self._actions.prepare(new.rules)
        flows = self._flows.prepare(new.http)
        fleet = self._fleet.prepare(new.fleet)
        try:
            actions.start()
            flows.start()
            apply_outputs = self._outputs.prepare(new)
            if {"rules", "http", "fleet"} & set(changed) or actions.is_change:
                self._watcher.set_rules(*_rules(actions.rules, new))
        except BaseException:
            actions.discard()
            flows.discard()
            fleet.discard()
            raise
        actions.apply()
        flows.apply()
        apply_outputs()
        fleet.apply()
        set_up_logging(new.log_level, new.log_format)
        self._allow_hosts(new)
        self._audit_interval_s = new.audit_interval_s
        self._audit_now.set()
        self._stale.watch.interval_s = new.stale_interval_s
        self._vulnerabilities.change(new.vulnerabilities)
        # What needs a restart is compared with what is in force the next time, too.
        self._settings = replace(new, **{name: getattr(old, name) for name in kept})
        self._loaded_ns = time.time_ns()
        LOG.info("took over the configuration", extra={"facts": {"changed": ",".join(changed) or "-"}})
        if self._needs_restart:
            LOG.warning("takes effect after a restart only: %s", ", ".join(self._needs_restart))

    def _note_config(self, error: str | None) -> None:
        self._metrics.counter(names.CONFIG_LOADS.name, f"result:{'invalid' if error else 'ok'}").add()
        self._metrics.gauge(names.CONFIG_VALID.name).set(int(error is None))
        # Last: who learns it of /readyz finds it in the metrics and, logged before, in the log.
        self._config_error = error

    def _audit_again_and_again(self) -> None:
        while not self._stopping.is_set():
            interval_s = self._audit_interval_s
            self._audit_now.clear()
            if self._audit_now.wait(interval_s or None) or self._stopping.is_set():
                continue
            try:
                self._audit()
            except SowatchError as error:
                LOG.warning("no audit: %s", error)

    def _end_waiting(self) -> None:
        self._stopping.set()
        self._audit_now.set()

    def _audit(self) -> None:
        report = self._watcher.audit()
        self._last_audit = (time.time_ns(), report)
        self._metrics.gauge(names.AUDIT_SECONDS.name).set(report.seconds)
        self._metrics.gauge(names.AUDIT_TIME.name).set(time.time())
        for one in report.differences[:_LOGGED_DIFFERENCES]:
            LOG.warning(
                "the map differs from /proc", extra={"facts": {"kind": one.kind, "pid": one.pid, "path": one.path}}
            )

    def _readiness(self) -> Readiness:
        watcher = self._watcher
        ready, stats = watcher.ready, watcher.stats
        problems = []
        if not watcher.is_running or ready is None:
            problems.append("the watch is not running")
        elif watcher.silent_s >= _HANGS_S:
            problems.append(f"the draining thread has hung for {watcher.silent_s:.0f} s")
        audit = None
        if self._last_audit is not None:
            time_ns, report = self._last_audit
            audit = {
                "time": stamp(time_ns),
                "differences": len(report.differences),
                "processes": report.processes,
                "mappings": report.mappings,
                "unreadable": report.unreadable,
                "unread": list(report.unread),
                "seconds": round(report.seconds, 3),
            }
        fleet = self._fleet.state()
        fleet_problem = f"fleet: {fleet['error']}" if fleet is not None and not fleet["up"] else None
        facts: dict[str, Any] = {
            **asdict(self._origin),
            "strategy": ready and ready.strategy,
            "guarantee": ready and ready.guarantee,
            "limits": list(ready.limits) if ready else [],
            "rules": [rule.name for rule in watcher.rules],
            "repaired": watcher.is_repaired,
            "silent_seconds": round(watcher.silent_s, 1),
            "unread": [{"pid": pid, "seconds": round(seconds, 1)} for pid, seconds in sorted(watcher.unread.items())],
            "lost": {"kernel": stats.lost_kernel, "queue": stats.lost_queue},
            "audit": audit,
            "config": {
                "path": self._config_path,
                "valid": self._config_error is None,
                "error": self._config_error,
                "loaded": stamp(self._loaded_ns),
                "needs_restart": list(self._needs_restart),
            },
            "attachments": self._actions.summary(),
            "http": self._flows.summary(),
            "outputs": [*self._outputs.problems(), *([fleet_problem] if fleet_problem else [])],
            "output_states": [*self._outputs.state(), *([fleet] if fleet else [])],
            "vulnerabilities": self._vulnerabilities.summary(),
            "pod_names": None if watcher.pod_names is None else asdict(watcher.pod_names),
        }
        return Readiness(tuple(problems), facts)


def _rules(rules: list[Rule], settings: Settings) -> list[Rule]:
    """The rules with those that sections add, each for what no rule before wants."""
    return with_everything(with_tls_libraries(rules, settings.http), settings.fleet)


def _listen(stack: contextlib.ExitStack, listen: str | None, *, is_for_metrics: bool = False) -> socket.socket | None:
    if listen is None:
        return None
    made = bind_tcp(listen, is_for_metrics=is_for_metrics)
    stack.callback(made.close)
    host, port = made.getsockname()[:2]
    what = "listening for metrics" if is_for_metrics else "listening"
    LOG.info(what, extra={"facts": {"host": host, "port": port}})
    return made


def _raise_file_limit() -> None:
    """As many descriptors as allowed: each client and each file that is read is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
