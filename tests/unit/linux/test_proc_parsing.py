"""procfs: its parsers, against a writer that formats maps rows as the kernel does."""

from __future__ import annotations

import doctest
import sys
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sowatch.linux import auxv
from sowatch.linux import proc as procfs
from sowatch.linux.cgroups import parse_cgroup
from sowatch.linux.proc_parse import MapRow, executable_maps, parse_maps, parse_stat, parse_status, seen_path


def test_examples_in_docstrings_hold() -> None:
    assert doctest.testmod(procfs).failed == 0


# -- maps, parsed ----------------------------------------------------------------------------


def kernel_row(row: MapRow, *, pointer_bytes: int = 8) -> bytes:
    """As show_map_vma of fs/proc/task_mmu.c writes it: seq_setwidth, seq_put_hex_ll, seq_pad, mangle_path."""
    line = b"%08x-%08x %s %08x %02x:%02x %d " % (
        row.start,
        row.end,
        row.perms.encode(),
        row.offset_bytes,
        row.major,
        row.minor,
        row.inode,
    )
    if row.path:
        line = line.ljust(25 + pointer_bytes * 6 - 1) + b" " + row.shown_path.replace(b"\n", b"\\012")
    return line + b"\n"


def row_of(path: bytes = b"/lib/x.so", **other: Any) -> MapRow:
    found = MapRow(0x7F00_0000_0000, 0x7F00_0000_1000, "r-xp", 0x2000, 0xFE, 0x10, 4711, path, False)
    return found._replace(**other)


# Not in names: NUL; \012 and a final mark, of which the text does not say which they are.
names = (
    st.lists(
        st.sampled_from(
            [b" ", b"\n", b"\\", b"012", b"(deleted)", b" (deleted)", b"/", b"\xff", b"\r", b"x", b"\xc3\xa9"]
        ),
        max_size=12,
    )
    .map(b"".join)
    .filter(lambda name: b"\\012" not in name and not name.endswith(b" (deleted)"))
)
numbers = st.integers(0, 2**64 - 1)
files = st.builds(
    MapRow,
    start=numbers,
    end=numbers,
    perms=st.sampled_from(["r--p", "r-xp", "--xp", "rwxs", "-w-s", "rw-p"]),
    offset_bytes=numbers,
    major=st.integers(0, 4095),
    minor=st.integers(0, 2**20 - 1),
    inode=numbers,
    path=names.map(lambda name: b"/" + name),
    is_deleted=st.booleans(),
    subvolume=st.just(0),
)
anonymous = st.builds(
    MapRow,
    start=numbers,
    end=numbers,
    perms=st.sampled_from(["rw-p", "r-xp"]),
    offset_bytes=st.just(0),
    major=st.just(0),
    minor=st.just(0),
    inode=st.just(0),
    path=st.sampled_from([b"", b"[heap]", b"[vdso]", b"[anon:a b]", b"//anon", b"anon_inode:[perf_event]"]),
    is_deleted=st.just(False),
    subvolume=st.just(0),
)
tables = st.lists(files | anonymous, max_size=8)


@given(tables, st.sampled_from([4, 8]))
def test_maps_written_as_the_kernel_does_read_back_the_same(rows: list[MapRow], pointer_bytes: int) -> None:
    text = b"".join(kernel_row(row, pointer_bytes=pointer_bytes) for row in rows)

    assert parse_maps(text) == rows


@given(tables)
def test_executable_maps_are_the_rows_with_x_and_a_file(rows: list[MapRow]) -> None:
    text = b"".join(map(kernel_row, rows))

    assert executable_maps(text) == [
        row for row in rows if row.perms[2] == "x" and (row.inode or row.major or row.minor)
    ]


@given(tables, st.integers(0, 200))
def test_a_row_that_was_cut_off_is_left_out(rows: list[MapRow], missing: int) -> None:
    text = b"".join(map(kernel_row, rows))
    cut = text[: max(0, len(text) - missing)]

    assert parse_maps(cut) == rows[: cut.count(b"\n")]


def spoilt(rows: list[MapRow], at: int, dirt: bytes) -> bytes:
    """A table as the kernel writes it, with a few bytes of it replaced."""
    text = b"".join(map(kernel_row, rows))
    return text[:at] + dirt + text[at + len(dirt) :]


@given(
    st.builds(spoilt, tables, st.integers(0, 400), st.binary(max_size=6))
    | st.binary()
    | st.text("0123456789abcdef-: rwxp\n/").map(str.encode)
)
@example(b"\n" * 100)
@example(b"7f00-8f00 r-xp 0 0:0 0")
def test_no_bytes_make_the_maps_parsers_raise(data: bytes) -> None:
    assert all(row in parse_maps(data) for row in executable_maps(data))


@pytest.mark.parametrize(
    "path",
    [
        b"/lib/with space/lib x.so",
        b"/ leading and trailing ",
        b"/lib/two\nlines.so",
        b"/lib/(deleted)/x.so (deleted).old",
        b"/lib/" + b"n" * 195,
        b"/deep" * 800,
        b"/lib/\xff\xfe\r\t\x1b[31m.so",
        b"/lib/back\\slash\\0123.so".replace(b"\\0123", b"\\01"),
    ],
    ids=["space", "edges", "newline", "mark inside", "200 bytes", "4000 bytes", "control", "backslash"],
)
def test_a_path_is_everything_to_the_end_of_the_row(path: bytes) -> None:
    assert [row.path for row in executable_maps(kernel_row(row_of(path)))] == [path]


def test_a_literal_backslash_012_is_read_as_the_newline_it_cannot_be_told_from() -> None:
    assert kernel_row(row_of(b"/a\\012b")) == kernel_row(row_of(b"/a\nb"))
    assert parse_maps(kernel_row(row_of(b"/a\\012b")))[0].path == b"/a\nb"


def test_only_the_last_mark_of_a_deleted_file_is_taken_off() -> None:
    row = row_of(b"/lib/x (deleted)", is_deleted=True)

    assert parse_maps(kernel_row(row)) == [row]
    assert row.shown_path == b"/lib/x (deleted) (deleted)"


def test_an_executable_file_with_inode_0_is_seen_by_its_device() -> None:
    fuse, jit = row_of(inode=0, major=0, minor=0x33), row_of(b"", inode=0, major=0, minor=0)

    assert executable_maps(kernel_row(fuse) + kernel_row(jit)) == [fuse]
    no_device = row_of(major=0, minor=0)
    assert executable_maps(kernel_row(no_device)) == [no_device]


# -- stat, status, cgroup, auxv --------------------------------------------------------------


def stat_line(comm: bytes, image: bytes = b"4096 8192 7000") -> bytes:
    return b"17 (" + comm + b") S 1 16 15 0 -1 4194560 " + b"0 " * 10 + b"3 0 12345 0 0 99 " + image + b" 0\n"


@given(st.binary(max_size=64))
@example(b") R 9 9 9 9 9 9")
@example(b"a\nb) (c")
def test_a_comm_may_hold_anything(comm: bytes) -> None:
    found = parse_stat(stat_line(comm))

    assert found == (17, comm, "S", 1, 16, 15, 4194560, 3, 12345, (b"4096", b"8192", b"7000"))


@pytest.mark.parametrize("image", [b"0 0 0", b"1 1 0"])
def test_without_a_program_or_the_right_to_see_it_there_is_no_image(image: bytes) -> None:
    found = parse_stat(stat_line(b"x", image))

    assert found is not None
    assert found.image == ()


@given(st.binary())
def test_no_bytes_make_the_other_parsers_raise(data: bytes) -> None:
    parse_stat(data)
    parse_stat(stat_line(b"x")[: len(data)])
    parse_status(data)
    parse_status(b"\nTgid:" + data + b"\nUid:" + data + b"\nNStgid:" + data + b"\nPPid:1\nThreads:1\n")
    parse_cgroup(data)
    parse_cgroup(data.replace(b"\0", b":"))
    auxv.is_32bit(data)


def test_start_is_in_ns_at_tick_precision() -> None:
    found = parse_stat(stat_line(b"x"))

    assert found is not None
    assert found.start_ns == 123_450_000_000


def test_status_takes_the_innermost_pid_and_the_real_uid() -> None:
    text = b"Name:\tx\\nUid:\t7\nTgid:\t900\nPid:\t901\nPPid:\t1\nUid:\t33\t0\t0\t0\nNStgid:\t900\t40\t1\nThreads:\t2\n"

    assert parse_status(text) == (900, 1, 33, 1, 2)
    assert parse_status(text.replace(b"NStgid", b"Other")) == (900, 1, 33, None, 2)


HEX = b"0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "path"),
    [
        (b"0::/system.slice/a.service\n", "/system.slice/a.service"),
        (b"9:memory:/docker/abc\n0::/user.slice\n", "/user.slice"),
        (b"9:memory:/docker/abc\n8:pids:/x\n0::/\n", "/docker/abc"),
        (b"9:cpu,cpuacct:/docker/abc\n8:memory:/\n0::/\n", "/docker/abc"),
        (b"4:name=systemd:/b\n3:cpu:/c\n2:pids:/d\n1:memory:/e\n", "/b"),
        (b"1:name=systemd:/docker/%s\n0::/system.slice/containerd.service\n" % HEX, f"/docker/{HEX.decode()}"),
        (
            b"3:freezer:/default/web\n2:cpu:/user.slice/much-longer\n0::/system.slice/containerd.service\n",
            "/default/web",
        ),
        (
            b"1:memory:/docker/%s\n0::/system.slice/docker-%s.scope\n" % (HEX, HEX),
            f"/system.slice/docker-{HEX.decode()}.scope",
        ),
        (b"1:memory:/lxc/a/lxc/b\n0::/lxc.payload.a\n", "/lxc/a/lxc/b"),
        (b"4:freezer:/only/here\n1:memory:/\n", "/only/here"),
        (b"1:name=systemd:/with:colon\n", "/with:colon"),
        (b"0::/../../sibling\n", "/../../sibling"),
        (b"1:memory:/\n0::/\n", "/"),
        (b"1:memory:/\n", "/"),
        (b"0::/\xff\n", "/\udcff"),
        (b"", None),
    ],
)
def test_the_cgroup_is_the_one_that_names_a_container_then_v2_unless_that_is_the_root_then_the_longest_v1(
    text: bytes, path: str | None
) -> None:
    assert parse_cgroup(text) == path


def test_a_32_bit_vector_is_told_from_a_64_bit_one() -> None:
    pairs = [(33, 0xF7F0_0000), (6, 4096), (7, 0), (9, 0x0804_8000), (0, 0)]
    words = [word for pair in pairs for word in pair]

    assert auxv.is_32bit(b"".join(word.to_bytes(4, sys.byteorder) for word in words)) is True
    assert auxv.is_32bit(b"".join(word.to_bytes(8, sys.byteorder) for word in words)) is False
    assert auxv.is_32bit(b"") is None


@pytest.mark.parametrize(
    ("path", "root", "seen"),
    [
        ("/srv/jail/lib/z.so", "/srv/jail", "/lib/z.so"),
        ("/srv/jail2/lib/z.so", "/srv/jail", "/srv/jail2/lib/z.so"),
        ("/lib/z.so", "/", "/lib/z.so"),
        ("/memfd:x", "/srv/jail", "/memfd:x"),
    ],
)
def test_a_path_is_told_from_the_root_of_the_process(path: str, root: str, seen: str) -> None:
    assert seen_path(path, root) == seen
    assert seen_path(path.encode(), root.encode()) == seen.encode()
