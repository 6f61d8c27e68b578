"""`HttpTap`: probes on TLS libraries, wherever they are or will be loaded, and the flows that pass them.

Each export is probed on its own and none has to be there; which program goes on it is its ABI.
"""

from __future__ import annotations

import logging
import select
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from types import TracebackType
from typing import Final, NamedTuple, Self

from sowatch.bpf.binding import PROGRAMS, Tracefs
from sowatch.bpf.probe_object import ProbeObject, Ring, set_probe_constants
from sowatch.http.flows import Chunk, Flow, FlowTable
from sowatch.http.records import COUNTERS, decode, spare_key
from sowatch.model.config import Config
from sowatch.model.errors import BpfError, SowatchError, UsageError
from sowatch.model.events import Library, Load, Process, Ready, Unload
from sowatch.model.identity import ProcessId
from sowatch.model.rules import Rule
from sowatch.uprobes.attacher import Attacher
from sowatch.uprobes.probes import Probe
from sowatch.uprobes.records import AttacherStats, Failure
from sowatch.watcher.watcher import Watcher

__all__ = ["CAPTURE_BYTES", "TAPS", "HttpFlow", "HttpTap"]

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
BIO_WRITE: Final = "BIO_write"
#: What libssl3 of NSS calls for each record that it encrypts or decrypts (pk11pub.h): NSPR's PR_Write and PR_Read serve
#: files and plain sockets, too, and only those that do this meanwhile are TLS.
NSS_CIPHERS: Final = ("PK11_AEADOp", "PK11_AEADRawOp", "PK11_CipherOp", "PK11_Encrypt", "PK11_Decrypt")
#: What a library of each family exports; one of them is enough to be probed.
FAMILIES: Final = {
    "openssl": ("SSL_read", "SSL_write"),
    "gnutls": ("gnutls_record_recv", "gnutls_record_send"),
    "crypto": (BIO_WRITE,),
    "nspr": ("PR_Read", "PR_Write"),
    "nss": NSS_CIPHERS,
}
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


class HttpTap:
    """Reports HTTP flows that pass TLS libraries; a context manager.

    Args:
        on_flow: called with each flow once it is over, on the tap's own thread; it must not block.
        pids: flows of these processes only.
        container: flows of processes only whose container's id begins with this.
        pattern: a regular expression that paths of TLS libraries have to match; None: all of them.
        config: of the watch.
        capture_bytes: of each call, at most `CAPTURE_BYTES`; what is longer is counted.
        linger_s: see `sowatch.uprobes.attacher.Attacher`.
        keeps_query: paths keep what stands behind ``?``; see docs/privacy.md.

    Raises:
        UsageError: ``capture_bytes`` is out of range, or a pattern that is none.

    >>> with HttpTap(lambda found: print(found.flow.method, found.flow.path)):  # doctest: +SKIP
    ...     time.sleep(10)
    """

    def __init__(
        self,
        on_flow: Callable[[HttpFlow], None],
        *,
        pids: Collection[int] = (),
        container: str | None = None,
        pattern: str | None = None,
        config: Config = Config(),  # noqa: B008 - frozen
        capture_bytes: int = CAPTURE_BYTES,
        linger_s: float = 5.0,
        keeps_query: bool = False,
    ) -> None:
        if not 64 <= capture_bytes <= CAPTURE_BYTES:
            raise UsageError(f"capture_bytes is {capture_bytes}. Give 64 to {CAPTURE_BYTES}.")
        self._on_flow = on_flow
        self._is_filtered = bool(pids) or container is not None
        self._capture_bytes = capture_bytes
        self._attacher = Attacher(
            str(PROGRAMS / "tls_taps.bpf.o"),
            list(_probes()),
            linger_s=linger_s,
            prepare=self._prepare,
        )
        rules = [
            Rule(
                pattern,
                name=name,
                kind=("library", "executable"),
                exports=exports,
                on_activate=self._attacher.attach,
                on_deactivate=self._attacher.detach,
                on_load=self._note,
                on_unload=self._note,
            )
            for name, exports in FAMILIES.items()
        ]
        self.watcher = Watcher(*rules, config=config, pids=frozenset(pids), container=container)
        self.table = FlowTable(self._hand_out, keeps_query=keeps_query)
        self._processes: dict[ProcessId, Process] = {}
        #: Of those, the ones that have no library any more, the first to go first.
        self._gone: OrderedDict[ProcessId, None] = OrderedDict()
        #: Processes that are gone, with None; those that exec'd, with when that was.
        self._ended: deque[tuple[ProcessId, int | None]] = deque()
        self._lock = threading.Lock()
        self._ring: Ring | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._sees_sockets = False
        self._follows_memory = False
        self._libraries: dict[int, Library | None] = {0: None}
        self._counters: dict[str, int] | None = None
        self.callback_failures = 0

    # ---- life ---------------------------------------------------------------------------------

    def start(self) -> Ready:
        """Loads the programs and starts the watch; libraries that are mapped already are attached soon after."""
        try:
            self._attacher.start()
            self._follow_sockets()
            self._ring = self._attacher.ring("records")
            self._thread = threading.Thread(target=self._run, name="sowatch-http", daemon=True)
            self._thread.start()
            return self.watcher.start()
        except BaseException:
            self.close()
            raise

    def finish(self) -> None:
        """Takes what has passed until now and nothing more: flows and `stats` are final. Safe to call again.

        `close` detaches, for which the kernel may take seconds.
        """
        with suppress(SowatchError):  # it was not started, or is closed
            self._attacher.variable(".bss", "is_over").value = 1
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
        self.watcher.stop()
        self._attacher.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- what is there ---------------------------------------------------------------------------

    @property
    def sees_sockets(self) -> bool:
        """Whether this kernel shows which socket a call used (6.3+); without it descriptors of system calls do."""
        return self._sees_sockets

    @property
    def attached(self) -> AttacherStats:
        """How the probes are."""
        return self._attacher.stats

    @property
    def failures(self) -> list[Failure]:
        """The files that could not be attached, and why; that a library lacks some of the exports is none."""
        found = [
            Failure(one.library, "*", one.reason or "it is tried again", one.state == "failed")
            for one in self._attacher.files()
            if one.state != "attached"
        ]
        found += [
            Failure(Library(blocked.sample_path, blocked.id), "*", blocked.reason, is_permanent=True)
            for blocked in self.watcher.registry.blocked()
        ]
        return list({one.library.id: one for one in found}.values())

    def stats(self) -> dict[str, int]:
        """`sowatch.http.flows.FlowStats`, and the program's counters by their names in `COUNTERS`; also once closed."""
        return asdict(self.table.stats) | (self._counters or self._read_counters())

    def _read_counters(self) -> dict[str, int]:
        loaded = self._attacher.objects()[0]
        return {name: loaded.per_cpu_sum("counters", index) for index, name in enumerate(COUNTERS)}

    # ---- inside ------------------------------------------------------------------------------------

    def _prepare(self, loaded: ProbeObject, _: int) -> None:
        set_probe_constants(loaded, is_filtered=self._is_filtered)
        loaded.set_constant("capture_bytes", self._capture_bytes.to_bytes(4, "little"))
        self._sees_sockets = _shows_sockets(loaded)
        loaded.set_constant("sees_sockets", bytes([self._sees_sockets]))
        # A program on a tracepoint that is not there would keep the object from loading.
        if not self._sees_sockets:
            for program in _SOCKET_PROGRAMS:
                loaded.skip(program)

    def _run(self) -> None:
        """The tap's thread; what it cannot go on after ends the watch, which is seen, and not the flows alone."""
        try:
            self._drain_until_stopped()
        except Exception:
            LOG.exception("the tap ended")
            self.watcher.stop()

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
        self._drain(ring)
        self.table.close(time.monotonic_ns())

    def _drain(self, ring: Ring) -> None:
        spare = self._attacher.map("spare")
        for record in ring.take():
            found = decode(record)
            if not isinstance(found, Chunk):
                (self.table.shut if found.is_half else self.table.end)(found.key, found.time_ns)
                continue
            until = self.table.take(found)
            # So much that it is worth a system call; where the map refuses it, the bytes are sent.
            if until > found.offset + found.length + _SPARED_BYTES:
                with suppress(BpfError):
                    spare.update(spare_key(found.key, found.direction), until.to_bytes(8, "little"))

    def _note(self, event: Load | Unload) -> None:
        """A process has a TLS library, or has it no more; on the thread of a rule."""
        process = event.process
        key = process.id
        with self._lock:
            if event.event == "load":
                self._processes[key] = process
                self._gone.pop(key, None)
            elif event.cause in ("exit", "exec"):
                self._gone[key] = None
                if len(self._gone) > _MAX_GONE:
                    self._processes.pop(self._gone.popitem(last=False)[0], None)
                # The program after exec has the same key, and may have connections by now.
                self._ended.append((key, (event.t_ns or 0) if event.cause == "exec" else None))
        if self._is_filtered:
            wanted = self._attacher.map("wanted")
            pid = process.pid.to_bytes(4, "little")
            if event.event == "load":
                wanted.update(pid, b"\1")
            elif event.cause in ("exit", "exec"):
                wanted.delete(pid)

    def _follow_sockets(self) -> None:
        """The socket that a thread uses within a call is the connection's."""
        if self._sees_sockets:
            for program in _SOCKET_PROGRAMS:
                self._attacher.objects()[0].attach(program)
        else:
            self._attach_to_calls(dict.fromkeys(_DESCRIPTOR_CALLS, "tls_uses_descriptor"))

    def _attach_to_calls(self, programs: Mapping[str, str]) -> None:
        """Attaches a program to the entry of each of some system calls; those that the machine lacks are left out."""
        loaded = self._attacher.objects()[0]
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
        if flow.peer is None and not self._follows_memory:
            self._follow_memory()
        if flow.site not in self._libraries:
            # Kept also for files that are detached by now. Without cookies (before 5.15) there is no site.
            self._libraries |= {cookie: site.library for cookie, site in self._attacher.sites.items()}
            self._libraries.setdefault(flow.site, None)
        library = self._libraries[flow.site]
        known = process or Process(pid=flow.key.process.pid, start_ns=flow.key.process.start_ns)
        try:
            self._on_flow(HttpFlow(flow, known, library))
        except Exception:
            self.callback_failures += 1
            LOG.exception("the callback for flows failed")


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
