"""What the tap's program puts into its ring is read as it was written."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

import sowatch.bpf
from sowatch.http.flows import Chunk, ConnectionKey, Peer
from sowatch.http.records import CONNECTION, COUNTERS, HEAD, Ended, decode, peer_of, spare_key
from sowatch.model.identity import ProcessId

HEADER = (Path(sowatch.bpf.__file__).parent / "programs" / "tls_taps.h").read_text(encoding="utf-8")
KEY = ConnectionKey(ProcessId(7, 2), 1, 9)
FOUR = socket.inet_aton("10.1.2.3") + bytes(12)


def record(kind: int, direction: int, data: bytes = b"") -> bytes:
    numbers = (1, 2, 3, 40, 50, 60, 9, 7, 8, 100, 5, len(data), kind, direction, 2, 443, 40_000, 0)
    return HEAD.pack(*numbers, FOUR, FOUR) + data + bytes(64)


def test_sizes_and_counters_are_those_of_the_header() -> None:
    sizes = dict(re.findall(r"_Static_assert\(sizeof\(struct (\w+)\) == (\d+)", HEADER))
    assert {name: int(size) for name, size in sizes.items()} == {
        "tls_connection_key": CONNECTION.size,
        "tls_record": HEAD.size,
    }
    (counters,) = re.findall(r"enum tls_counter \{(.*?)TLS_COUNTERS", HEADER, re.DOTALL)
    assert tuple(one.lower() for one in re.findall(r"TLS_(\w+),", counters)) == COUNTERS


def test_the_fields_of_the_record_stand_in_the_order_of_the_header() -> None:
    (body,) = re.findall(r"struct tls_record \{(.*?)char bytes", HEADER, re.DOTALL)
    widths = {"__u64": "Q", "__u32": "I", "__u16": "H", "__u8": "B"}
    fields = re.findall(r"(__u\d+) \w+(\[16\])?;", body)
    assert "=" + "".join("16s" if array else widths[kind] for kind, array in fields) == HEAD.format


@pytest.mark.parametrize(("direction", "name", "time_ns"), [(0, "read", 50), (1, "write", 40)])
def test_a_read_passes_when_it_ends_and_a_write_when_it_begins(direction: int, name: str, time_ns: int) -> None:
    expected = Chunk(KEY, name, b"data", 100, 5, 60, time_ns, 3, Peer("10.1.2.3", 443), 40_000)  # type: ignore[arg-type]
    assert decode(record(1, direction, b"data")) == expected


def test_the_end_of_a_connection() -> None:
    assert decode(record(2, 0)) == Ended(KEY, 50)
    assert decode(record(3, 0)) == Ended(KEY, 50, is_half=True)


@pytest.mark.parametrize(
    ("family", "address", "peer"),
    [
        (0, bytes(16), None),
        (1, bytes(16), None),
        (2, FOUR, Peer("10.1.2.3", 1)),
        (10, socket.inet_pton(socket.AF_INET6, "fd00::7"), Peer("fd00::7", 1)),
        (10, socket.inet_pton(socket.AF_INET6, "::ffff:10.1.2.3"), Peer("10.1.2.3", 1)),
    ],
)
def test_the_other_end_of_a_socket(family: int, address: bytes, peer: Peer | None) -> None:
    assert peer_of(family, address, 1) == peer


def test_the_key_of_what_is_spared_is_that_of_the_connection_with_its_birth_and_direction() -> None:
    assert CONNECTION.unpack(spare_key(KEY, "write")) == (1, 2, 7, 1, 9)
