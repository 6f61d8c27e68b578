"""`Capture`: the programs on TLS libraries, and the thread that makes flows of what they send. Watches nothing itself.

Each export is probed on its own and none has to be there; which program goes on it is its ABI.
"""

from __future__ import annotations

import logging
import select
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple

from sowatch.bpf.binding import PROGRAMS, Tracefs
from sowatch.bpf.probe_object import ProbeObject, Ring, set_probe_constants
from sowatch.engine.failure_log import FailureLog
from sowatch.http.flows import Chunk, Flow, FlowTable
from sowatch.http.records import COUNTERS, decode, spare_key
from sowatch.linux.tls_libraries import FAMILIES, NSS_CIPHERS
from sowatch.model.errors import BpfError, SowatchError, UsageError
from sowatch.model.events import Http, Library, Load, Process, Unload
from sowatch.model.identity import ProcessId
from sowatch.model.literals import Kind
from sowatch.model.rules import Rule
from sowatch.uprobes.attacher import Attacher
from sowatch.uprobes.probes import Probe
from sowatch.uprobes.records import Failure

__all__ = ["CAPTURE_BYTES", "TAPS", "Activity", "Capture", "HttpFlow", "family_rules"]

LOG = logging.getLogger("sowatch.http")

#: By export the program that knows its ABI. ssl.h, gnutls/gnutls.h, prio.h; see docs/http.md for versions.
TAPS: Final = {
    "SSL_write": "tls_write",
    "SSL_write_ex": "tls_write_ex",
    "SSL_write_ex2": "tls_write_ex2",
    "SSL_write_early_data": "tls_write_ex",
    "SSL_read": "tls_read",
    "SSL_read_ex": "tls_read_ex",
    "SSL_read_early_data": "tls_read_ex",
    "SSL_peek": "tls_handshake",
    "SSL_peek_ex": "tls_handshake",
    "SSL_do_handshake": "tls_handshake",
    "SSL_connect": "tls_handshake",
    "SSL_accept": "tls_handshake",
    "gnutls_record_send": "tls_write",
    "gnutls_record_send2": "tls_write",
    "gnutls_record_recv": "tls_read",
    "gnutls_record_recv_seq": "tls_read",
    "gnutls_record_recv_packet": "tls_read_unseen",
    "gnutls_record_recv_early_data": "tls_read",
    "gnutls_record_send_early_data": "tls_write_all",
    "gnutls_handshake": "tls_gnutls_handshake",
    "PR_Write": "tls_nspr_write",
    "PR_Send": "tls_nspr_write",
    "PR_Writev": "tls_nspr_writev",
    "PR_Read": "tls_nspr_read",
    "PR_Recv": "tls_nspr_recv",
}
#: Where a connection ends.
ENDS: Final = ("SSL_free", "SSL_clear", "gnutls_deinit", "PR_Close")
#: Where a process says that it writes no more.
SHUTS: Final = ("SSL_shutdown", "gnutls_bye")
#: Where an object gets a socket: of a new connection, if it had one.
TRANSPORTS: Final = (
    *("SSL_set_fd", "SSL_set_bio"),
    *("gnutls_transport_set_int2", "gnutls_transport_set_ptr", "gnutls_transport_set_ptr2"),
)
#: Where OpenSSL hands over what it has encrypted: to a socket, or to memory.
BIO_WRITE: Final = FAMILIES["crypto"][0]
#: Programs write heads, chunks and frames in one call with 64 KiB and more of bodies (curl, node); MAX_CAPTURE of
#: tls_taps.h is the most.
CAPTURE_BYTES: Final = 1 << 18
#: So much is worth a system call, where it need not be sent.
_SPARED_BYTES: Final = 16384
#: How long records may wait: fewer and larger batches cost less.
_BATCH_S: Final = 0.01
#: Processes whose libraries are gone are remembered for flows that come later.
_MAX_GONE: Final = 4096


class HttpFlow(NamedTuple):
    """A flow with what is known of its process and of the library that it passed."""

    flow: Flow
    process: Process
    library: Library | None

    def event(self, offset_ns: int, *, keeps_query: bool = True, has_headers: bool = False) -> Http:
        """The flow as an event.

        Args:
            offset_ns: between CLOCK_MONOTONIC and the wall clock.
            keeps_query: else what stands behind ``?`` goes, if the flow has it.
            has_headers: header fields were named, so the event has those of them that are there.
        """
        flow = self.flow
        begin_ns = flow.begin_ns or flow.first_byte_ns or flow.end_ns
        return Http(
            time_ns=time.time_ns() if begin_ns is None else begin_ns + offset_ns,
            process=self.process,
            library=self.library,
            side=flow.side,
            protocol=flow.protocol,
            method=flow.method,
            authority=flow.authority,
            path=flow.path if keeps_query or flow.path is None else flow.path.partition("?")[0],
            status=flow.status,
            grpc_status=flow.grpc_status,
            request_bytes=flow.request_bytes,
            response_bytes=flow.response_bytes,
            ttfb_ns=flow.ttfb_ns,
            duration_ns=flow.duration_ns,
            is_complete=flow.is_complete,
            peer=None if flow.peer is None else (flow.peer.address, flow.peer.port),
            local_port=flow.local_port,
            request_headers=dict(flow.request_headers) if has_headers else None,
            response_headers=dict(flow.response_headers) if has_headers else None,
        )


@dataclass(slots=True)
class Activity:
    """What a process has done with TLS libraries that are probed: calls that moved bytes, and flows."""

    calls: int = 0
    flows: int = 0


class Capture:
    """The programs, loaded; attached to each file that `attacher` is given, by the caller who watches.

    Args:
        on_flow: called with each flow once it is over, on the thread of the capture; it must not block.
        on_failure: called on that thread if it cannot go on.
        on_drained: called on that thread after the flows of one batch.
        is_filtered: calls of those processes only that `note` was given a load of.
        capture_bytes: of each call, at most `CAPTURE_BYTES`; what is longer is counted.
        linger_s: see `sowatch.uprobes.attacher.Attacher`.
        keeps_query: paths keep what stands behind ``?``; see docs/privacy.md.
        headers: names of header fields that flows keep; see there, too.

    Raises:
        UsageError: ``capture_bytes`` is out of range, or a header that is never kept.
    """

    def __init__(
        self,
        on_flow: Callable[[HttpFlow], None],
        *,
        on_failure: Callable[[], None],
        on_drained: Callable[[], None] = lambda: None,
        is_filtered: bool = False,
        capture_bytes: int = CAPTURE_BYTES,
        linger_s: float = 5.0,
        keeps_query: bool = False,
        headers: Iterable[str] = (),
    ) -> None:
        if not 64 <= capture_bytes <= CAPTURE_BYTES:
            raise UsageError(f"capture_bytes is {capture_bytes}. Give 64 to {CAPTURE_BYTES}.")
        self._on_flow = on_flow
        self._failures = FailureLog(LOG)
        self._on_failure = on_failure
        self._on_drained = on_drained
        self.is_filtered = is_filtered
        self._capture_bytes = capture_bytes
        self.attacher = Attacher(
            str(PROGRAMS / "tls_taps.bpf.o"),
            list(_probes()),
            linger_s=linger_s,
            prepare=self._prepare,
        )
        self.table = FlowTable(self._hand_out, keeps_query=keeps_query, headers=headers)
        self._processes: dict[ProcessId, Process] = {}
        self._activity: dict[ProcessId, Activity] = {}
        #: Of those, the ones that have no library any more, the first to go first.
        self._gone: OrderedDict[ProcessId, None] = OrderedDict()
        #: Processes that are gone, with None; those that exec'd, with when that was.
        self._ended: deque[tuple[ProcessId, int | None]] = deque()
        self._lock = threading.Lock()
        self._ring: Ring | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self.sees_sockets = False
        self._follows_memory = False
        self._libraries: dict[int, Library | None] = {0: None}
        self._counters: dict[str, int] | None = None
        self.callback_failures = 0

    # ---- life ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Loads the programs and starts the thread; nothing is attached yet.

        Raises:
            SowatchError: they cannot be loaded; nothing is left of them.
        """
        try:
            self.attacher.start()
            self._follow_sockets()
            self._ring = self.attacher.ring("records")
            self._thread = threading.Thread(target=self._run, name="sowatch-http", daemon=True)
            self._thread.start()
        except BaseException:
            self.close()
            raise

    def finish(self) -> None:
        """Takes what has passed until now and nothing more: flows and `stats` are final. Safe to call again.

        What is under way is handed out as incomplete. `close` detaches, for which the kernel may take seconds.
        """
        with suppress(SowatchError):  # it was not started, or is closed
            self.attacher.variable(".bss", "is_over").value = 1
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._ring = None
        if self._counters is None:
            with suppress(SowatchError):  # it was not started
                self._counters = self._read_counters()

    def close(self) -> None:
        """Ends the watch, hands out what is under way as incomplete, and detaches everything. Safe to call again."""
        self.finish()
        self.attacher.close()

    def note(self, event: Load | Unload) -> None:
        """A process has a TLS library, or has it no more; any thread, in the order that it happened."""
        process = event.process
        key = process.id
        with self._lock:
            if event.event == "load":
                self._processes[key] = process
                self._gone.pop(key, None)
            elif event.cause in ("exit", "exec"):
                self._gone[key] = None
                if len(self._gone) > _MAX_GONE:
                    oldest = self._gone.popitem(last=False)[0]
                    self._processes.pop(oldest, None)
                    self._activity.pop(oldest, None)
                # The program after exec has the same key, and may have connections by now.
                self._ended.append((key, (event.t_ns or 0) if event.cause == "exec" else None))
        if self.is_filtered and (event.event == "load" or event.cause in ("exit", "exec")):
            self.select(process, is_wanted=event.event == "load")

    def select(self, process: Process, *, is_wanted: bool) -> None:
        """Where calls are filtered: whether those of a process count."""
        wanted = self.attacher.map("wanted")
        pid = process.pid.to_bytes(4, "little")
        if is_wanted:
            wanted.update(pid, b"\1")
        else:
            wanted.delete(pid)

    # ---- what is there ---------------------------------------------------------------------------

    def activity(self, process: ProcessId) -> Activity | None:
        """What it has done so far; None if it is not known to have a library that is probed.

        Its start may be rounded down to the tick, as ``/proc`` has it.
        """
        with self._lock:
            known = process if process in self._processes else next(filter(process.same_tick, self._processes), None)
            return None if known is None else self._activity.get(known, Activity())

    @property
    def failures(self) -> list[Failure]:
        """The files that could not be attached, and why."""
        return [
            Failure(one.library, "*", one.reason or "it is tried again", one.state == "failed")
            for one in self.attacher.files()
            if one.state != "attached"
        ]

    def stats(self) -> dict[str, int]:
        """`sowatch.http.flows.FlowStats`, and the program's counters by their names in `COUNTERS`; also once closed."""
        return asdict(self.table.stats) | (self._counters or self._read_counters())

    def _read_counters(self) -> dict[str, int]:
        loaded = self.attacher.objects()[0]
        return {name: loaded.per_cpu_sum("counters", index) for index, name in enumerate(COUNTERS)}

    # ---- inside ------------------------------------------------------------------------------------

    def _prepare(self, loaded: ProbeObject, _: int) -> None:
        set_probe_constants(loaded, is_filtered=self.is_filtered)
        loaded.set_constant("capture_bytes", self._capture_bytes.to_bytes(4, "little"))
        self.sees_sockets = _shows_sockets(loaded)
        loaded.set_constant("sees_sockets", bytes([self.sees_sockets]))
        # A program on a tracepoint that is not there would keep the object from loading.
        if not self.sees_sockets:
            for program in _SOCKET_PROGRAMS:
                loaded.skip(program)

    def _run(self) -> None:
        try:
            self._drain_until_stopped()
        except Exception:
            LOG.exception("the capture of HTTP flows has ended by itself")
            self._on_failure()

    def _drain_until_stopped(self) -> None:
        ring = self._ring
        assert ring is not None
        poll = select.poll()
        poll.register(ring.fileno(), select.POLLIN)
        while not self._stop.is_set():
            # What a process did stands in the ring before its end is reported.
            ended = [self._ended.popleft() for _ in range(len(self._ended))]
            if poll.poll(0 if ended else 200):
                self._drain(ring)
                self._stop.wait(_BATCH_S)
            for process, exec_ns in ended:
                self.table.end_process(process, time.monotonic_ns(), born_before_ns=exec_ns)
            self._on_drained()
        self._drain(ring)
        self.table.close(time.monotonic_ns())
        self._on_drained()

    def _drain(self, ring: Ring) -> None:
        spare = self.attacher.map("spare")
        for record in ring.take():
            found = decode(record)
            if not isinstance(found, Chunk):
                (self.table.shut if found.is_half else self.table.end)(found.key, found.time_ns)
                continue
            self._activity_of(found.key.process).calls += 1
            until = self.table.take(found)
            # So much that it is worth a system call; where the map refuses it, the bytes are sent.
            if until > found.offset + found.length + _SPARED_BYTES:
                with suppress(BpfError):
                    spare.update(spare_key(found.key, found.direction), until.to_bytes(8, "little"))

    def _activity_of(self, process: ProcessId) -> Activity:
        found = self._activity.get(process)
        if found is None:
            with self._lock:
                found = Activity()
                if process in self._processes:  # by which it will go again
                    self._activity[process] = found
        return found

    def _follow_sockets(self) -> None:
        """The socket that a thread uses within a call is the connection's."""
        if self.sees_sockets:
            for program in _SOCKET_PROGRAMS:
                self.attacher.objects()[0].attach(program)
        else:
            self._attach_to_calls(dict.fromkeys(_DESCRIPTOR_CALLS, "tls_uses_descriptor"))

    def _attach_to_calls(self, programs: Mapping[str, str]) -> None:
        """Attaches a program to the entry of each of some system calls; those that the machine lacks are left out."""
        loaded = self.attacher.objects()[0]
        try:
            with Tracefs() as tracefs:
                for call, program in programs.items():
                    tracepoint = tracefs.tracepoint_id("syscalls", f"sys_enter_{call}")
                    if tracepoint is not None:
                        loaded.attach_tracepoint(program, tracepoint)
        except BpfError as error:
            LOG.warning("peers of connections stay unknown: %s", error)

    def _follow_memory(self) -> None:
        """Somebody encrypts into memory and sends later: from now on, what is sent is compared with that.

        Not before: the programs run at each write of the whole host.
        """
        self._follows_memory = True
        self._attach_to_calls(_SENDS)

    def _hand_out(self, flow: Flow) -> None:
        process = self._processes.get(flow.key.process)
        self._activity_of(flow.key.process).flows += 1
        if flow.peer is None and not self._follows_memory:
            self._follow_memory()
        if flow.site not in self._libraries:
            # Kept also for files that are detached by now. Without cookies (before 5.15) there is no site.
            self._libraries |= {cookie: site.library for cookie, site in self.attacher.sites.items()}
            self._libraries.setdefault(flow.site, None)
        library = self._libraries[flow.site]
        known = process or Process(pid=flow.key.process.pid, start_ns=flow.key.process.start_ns)
        try:
            self._on_flow(HttpFlow(flow, known, library))
        except Exception as error:  # noqa: BLE001 - counted and logged; the next flow comes all the same
            self.callback_failures += 1
            self._failures.note("the callback for flows", error)


_SOCKET_PROGRAMS: Final = ("tls_socket_sent", "tls_socket_received")
#: System calls whose first argument is the descriptor of a socket that they move bytes of.
_DESCRIPTOR_CALLS: Final = (
    *("read", "readv", "recvfrom", "recvmsg"),
    *("write", "writev", "sendto", "sendmsg"),
)
#: By system call the program that finds what it sends.
_SENDS: Final = {
    "write": "tls_sends_buffer",
    "sendto": "tls_sends_buffer",
    "writev": "tls_sends_vector",
    "sendmsg": "tls_sends_message",
}


def family_rules(pattern: str | None, *, prefix: str = "", **callbacks: Callable[[Any], None]) -> list[Rule]:
    """A rule for each family of libraries that can be probed.

    Args:
        pattern: a regular expression that paths have to match; None: all of them.
        prefix: of their names.
        callbacks: of each, as `sowatch.Rule` takes them.
    """
    kinds: tuple[Kind, ...] = ("library", "executable")
    return [
        Rule(pattern, name=prefix + name, kind=kinds, exports=exports, **callbacks)
        for name, exports in FAMILIES.items()
    ]


def _shows_sockets(loaded: ProbeObject) -> bool:
    """Whether the kernel has the tracepoints sock_send_length and sock_recv_length (6.3+)."""
    return loaded.has_function("__traceiter_sock_send_length")


def _probes() -> Iterator[Probe]:
    for symbol, program in TAPS.items():
        yield Probe(symbol, program, is_optional=True, is_movable=True)
        yield Probe(symbol, "tls_returned", is_return=True, is_optional=True, is_movable=True)
    for symbol in ENDS:
        yield Probe(symbol, "tls_end", is_optional=True, is_movable=True)
    for symbol in SHUTS:
        yield Probe(symbol, "tls_shut", is_optional=True, is_movable=True)
    for symbol in TRANSPORTS:
        yield Probe(symbol, "tls_transport", is_optional=True, is_movable=True)
    for symbol in NSS_CIPHERS:
        yield Probe(symbol, "tls_nss_encrypts", is_optional=True, is_movable=True)
    yield Probe(BIO_WRITE, "tls_bio_write", is_optional=True, is_movable=True)
