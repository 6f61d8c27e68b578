"""identity: who is who, across sources of different precision."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from sowatch.linux.proc import ProcFs
from sowatch.model.identity import TICK_NS, FileId, ProcessId

start_times = st.integers(0, 2**63)


def test_a_tick_is_what_the_kernel_gives_user_space() -> None:
    assert os.sysconf("SC_CLK_TCK") * TICK_NS == 1_000_000_000


@given(st.integers(1, 2**22), start_times, start_times)
def test_two_times_of_one_process_agree_exactly_if_they_fall_into_one_tick(pid: int, one: int, other: int) -> None:
    same = ProcessId(pid, one).same_tick(ProcessId(pid, other))

    assert same == (one // TICK_NS == other // TICK_NS)
    assert same == ProcessId(pid, other).same_tick(ProcessId(pid, one))


@given(st.integers(1, 2**22), start_times)
def test_the_exact_start_and_the_one_of_proc_name_the_same_process(pid: int, start_ns: int) -> None:
    assert ProcessId(pid, start_ns).same_tick(ProcessId(pid, start_ns // TICK_NS * TICK_NS))


def test_a_start_one_ns_into_the_next_tick_is_another_process() -> None:
    assert not ProcessId(7, TICK_NS - 1).same_tick(ProcessId(7, TICK_NS))


def test_another_pid_is_another_process_even_in_the_same_tick() -> None:
    assert not ProcessId(7, 50).same_tick(ProcessId(8, 50))


def test_this_process_is_itself_at_tick_precision() -> None:
    found = ProcFs().process(os.getpid())

    assert found is not None
    assert found.id == ProcessId(os.getpid(), found.start_ns)
    assert found.id.same_tick(ProcessId(os.getpid(), found.start_ns + TICK_NS - 1))


def test_an_inode_number_alone_is_no_identity() -> None:
    plain = FileId(254, 0, 4711)
    others = {
        FileId(254, 1, 4711),
        FileId(253, 0, 4711),
        FileId(254, 0, 4712),
        FileId(254, 0, 4711, generation=2),
        FileId(254, 0, 4711, subvolume=256),
    }

    assert len(others | {plain}) == 6
    assert FileId(254, 0, 4711, 0, 0) == plain


def test_a_file_is_written_with_what_tells_it_apart() -> None:
    assert str(FileId(254, 0, 4711)) == "254:0/4711"
    assert str(FileId(254, 0, 4711, 9)) == "254:0/4711.9"
    assert str(FileId(0, 36, 257, 7, 256)) == "0:36/257.7@256"
    assert str(FileId(0, 36, 257, 0, 256)) == "0:36/257@256"


@given(*[st.integers(0, 2**32)] * 5)
def test_different_files_are_never_written_alike(
    major: int, minor: int, inode: int, generation: int, subvol: int
) -> None:
    one = FileId(major, minor, inode, generation, subvol)
    changed = [one._replace(**{name: getattr(one, name) + 1}) for name in one._fields]

    assert len({str(one), *map(str, changed)}) == 6


def test_the_device_is_written_as_in_mountinfo() -> None:
    info = os.stat("/proc")
    dev = FileId(os.major(info.st_dev), os.minor(info.st_dev), info.st_ino).dev
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        assert dev in [line.split(" ")[2] for line in table]


def test_a_process_is_written_as_pid_and_start() -> None:
    assert str(ProcessId(42, 1_000)) == "42@1000"
