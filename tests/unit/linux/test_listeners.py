"""Which ports processes listen on: real sockets of real processes, and tables that no kernel would write.

Network namespaces: tests/kernel/linux/test_listeners.py.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sowatch.linux import listeners
from sowatch.linux.listeners import Listener, Listeners, Listening, listening_from, parse_listening, ports_of
from sowatch.linux.proc import Miss, ProcFs

ME = os.getpid()
ROW = b"   0: 0100007F:%04X 00000000:0000 %s 00000000:00000000 00:00000000 00000000     0        0 %d 1 0 100"


@pytest.fixture
def sockets() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def mine() -> set[tuple[str, int, str]]:
    found = Listeners(ProcFs()).of(ME)
    assert isinstance(found, Listening)
    assert found.is_complete
    return {(one.protocol, one.port, one.address) for one in found.sockets}


def bound(stack: ExitStack, kind: int, address: str, port: int = 0) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = stack.enter_context(socket.socket(family, kind))
    made.bind((address, port))
    return made


def free_low_port(stack: ExitStack, address: str) -> socket.socket:
    for port in range(20_000, 30_000):
        try:
            return bound(stack, socket.SOCK_DGRAM, address, port)
        except OSError:
            continue
    raise AssertionError("no free port")


def test_tcp_and_udp_of_both_families_are_found_with_their_addresses(sockets: ExitStack) -> None:
    four = bound(sockets, socket.SOCK_STREAM, "127.0.0.1")
    six = bound(sockets, socket.SOCK_STREAM, "::1")
    for one in (four, six):
        one.listen()
    datagrams = free_low_port(sockets, "127.0.0.1")

    assert {
        ("tcp", four.getsockname()[1], "127.0.0.1"),
        ("tcp", six.getsockname()[1], "::1"),
        ("udp", datagrams.getsockname()[1], "127.0.0.1"),
    } <= mine()


def test_what_is_bound_or_connected_does_not_listen(sockets: ExitStack) -> None:
    server = bound(sockets, socket.SOCK_STREAM, "127.0.0.1")
    server.listen()
    idle = bound(sockets, socket.SOCK_STREAM, "127.0.0.1")
    client = sockets.enter_context(socket.create_connection(server.getsockname()))
    connected = free_low_port(sockets, "127.0.0.1")
    connected.connect(("127.0.0.1", 9))
    # The kernel chose this port for a client, which looks like a server that waits there.
    ephemeral = bound(sockets, socket.SOCK_DGRAM, "127.0.0.1")

    ports = {port for _, port, _ in mine()}
    assert server.getsockname()[1] in ports
    for one in (idle, client, connected, ephemeral):
        assert one.getsockname()[1] not in ports


def test_every_process_that_has_the_socket_open_listens_on_it(sockets: ExitStack, spawn: Any) -> None:
    server = bound(sockets, socket.SOCK_STREAM, "127.0.0.1")
    server.listen()
    # As a service manager hands over a socket, or a server its own to workers that it forks.
    child = spawn([sys.executable, "-c", "input()"], pass_fds=[server.fileno()], stdin=subprocess.PIPE)

    found = Listeners(ProcFs())
    wanted = ("tcp", server.getsockname()[1])
    for pid in (ME, child.pid):
        of = found.of(pid)
        assert isinstance(of, Listening)
        assert wanted in {(one.protocol, one.port) for one in of.sockets}


def test_tables_are_read_once_in_a_pass(sockets: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = listeners._table_of
    monkeypatch.setattr(listeners, "_table_of", lambda base: read.append(base) or real(base))
    found = Listeners(ProcFs())
    found.of(ME)
    first = len(read)
    found.of(ME)
    assert len(read) == first
    found.begin_pass()
    found.of(ME)
    assert len(read) == 2 * first


def test_a_process_with_more_descriptors_than_the_bound_is_not_complete(
    sockets: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = bound(sockets, socket.SOCK_STREAM, "127.0.0.1")
    server.listen()
    monkeypatch.setattr(listeners, "MAX_FDS", 2)
    found = Listeners(ProcFs()).of(ME)
    assert isinstance(found, Listening)
    assert not found.is_complete


def test_a_process_that_has_ended_is_gone_and_one_of_another_user_is_denied(spawn: Any) -> None:
    child = spawn(["true"])
    child.wait()
    assert Listeners(ProcFs()).of(child.pid) is Miss.GONE
    if os.getuid() != 0:
        assert Listeners(ProcFs()).of(1) is Miss.DENIED


def test_every_live_process_gets_an_answer() -> None:
    proc = ProcFs()
    found = Listeners(proc)
    for pid in proc.pids():
        of = found.of(pid)
        assert isinstance(of, (Listening, Miss))


# ---- tables ---------------------------------------------------------------------------------


def test_lines_that_are_no_rows_are_left_out() -> None:
    rows = [b"", b"  sl  local_address", b"\xff" * 200, ROW[:40] % (80, b"0A"), ROW % (443, b"0A", 77)]
    assert list(parse_listening("tcp", rows)) == [Listener("tcp", 443, "127.0.0.1", 77)]


def test_reading_ends_at_the_first_socket_of_tcp_that_does_not_listen() -> None:
    def lines() -> Iterator[bytes]:
        yield ROW % (80, b"0A", 1)
        yield ROW % (81, b"01", 2)
        raise AssertionError("a host may have a million connections")

    assert [one.port for one in parse_listening("tcp", lines())] == [80]


def test_a_udp_socket_with_a_peer_is_a_client() -> None:
    row = b"  11: 00000000:0035 0100007F:1000 01 00000000:00000000 00:00000000 00000000 0 0 5 2 0 0"
    other = b"  11: 00000000:0035 00000000:0000 07 00000000:00000000 00:00000000 00000000 0 0 6 2 0 0"
    assert [one.inode for one in parse_listening("udp", [row, other])] == [6]


def test_an_ipv6_address_is_written_as_people_do() -> None:
    row = (
        b"   0: 0000000000000000FFFF00000100007F:0016 00000000000000000000000000000000:0000 0A "
        b"00000000:00000000 00:00000000 00000000 0 0 9 1 0 100"
    )
    if sys.byteorder == "little":
        assert list(parse_listening("tcp", [row])) == [Listener("tcp", 22, "::ffff:127.0.0.1", 9)]


@given(st.lists(st.binary(max_size=200), max_size=20))
def test_no_table_raises(lines: list[bytes]) -> None:
    for protocol in ("tcp", "udp"):
        list(parse_listening(protocol, lines))  # type: ignore[arg-type]


def test_ports_are_named_once_whatever_their_addresses() -> None:
    found = [Listener("tcp", 80, "0.0.0.0", 1), Listener("tcp", 80, "::", 2), Listener("udp", 53, "::", 3)]
    assert ports_of(found) == "tcp:80,udp:53"
    assert str(Listening(())) == ""


@pytest.mark.parametrize(
    ("protocol", "state", "limit_bytes", "is_cut"),
    [
        ("tcp", b"0A", 100_000, True),
        ("udp", b"07", 100_000, True),
        ("tcp", b"0A", 10_000_000, False),
        ("tcp", b"01", 100_000, False),  # nobody reads on behind the first socket that does not listen
    ],
)
def test_a_huge_table_is_read_up_to_its_bound_and_is_not_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str, state: bytes, limit_bytes: int, is_cut: bool
) -> None:
    (tmp_path / "net").mkdir()
    with (tmp_path / "net" / protocol).open("wb") as file:
        for number in range(1, 5_000):
            file.write((ROW + b"\n") % (number, state, number))
    monkeypatch.setattr(listeners, "_MAX_TABLE_BYTES", limit_bytes)
    found = listeners._table_of(str(tmp_path))
    assert found.is_complete == (not is_cut)
    assert len(found.sockets) < 2_000 or not is_cut


def test_a_table_that_was_cut_leaves_the_answer_open(monkeypatch: pytest.MonkeyPatch) -> None:
    real = listeners._table_of
    monkeypatch.setattr(listeners, "_table_of", lambda base: real(base)._replace(is_complete=False))
    found = Listeners(ProcFs())
    for _ in range(2):  # also when the table is remembered
        of = found.of(ME)
        assert isinstance(of, Listening)
        assert not of.is_complete


def test_ports_that_an_agent_has_named_are_read_back() -> None:
    assert str(listening_from(["tcp:80", "udp:53", "sctp:1", "tcp:x", "tcp:80\n"])) == "tcp:80,udp:53"
