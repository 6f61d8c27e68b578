"""Which file, under which path, in which process: on every file system that makes this hard."""

from __future__ import annotations

import array
import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sowatch.bpf.records import (
    FLAG_ASK,
    FLAG_DELETED,
    FLAG_IMAGE,
    FLAG_PARTIAL,
    MapRecord,
    ProcessRecord,
    RecordType,
    path_of,
    paths_of,
)
from sowatch.linux.cgroups import choose_cgroup, parse_cgroup
from sowatch.model.identity import FileId
from sowatch.sources.base import Report
from support.kernel import IN_OWN_MOUNTS, Tap, host_pid, id_by_stat, id_of, with_prelude
from support.programs import Mapper

Start = Callable[..., Mapper]
NewLibrary = Callable[..., Path]

#: FS_IOC_GETVERSION, _IOR('v', 1, long); ext4 gives the inode's generation, in 4 bytes.
FS_IOC_GETVERSION = 0x80087601
#: linux/magic.h
EXT4_SUPER_MAGIC = 0xEF53


def live(tap: Tap, pid: int, path: str | Path) -> MapRecord:
    """The last record that the hooks sent of a file in a process."""
    tap.flush()
    found = tap.maps(pid, path)
    assert found, f"{path} was not told; but {sorted({path_of(r.text) for r in tap.maps(pid)})}"
    return found[-1]


def read(tap: Tap, pid: int) -> dict[str, MapRecord]:
    """What a reading shows of a process, by path."""
    scan = tap.source.scan_process(pid)
    assert scan is not None
    return {path_of(row.text): row for row in scan.maps}


def both_ways(tap: Tap, pid: int, path: str | Path) -> MapRecord:
    """The live record of a mapping, after checking that a reading says the same of it."""
    record = live(tap, pid, path)
    row = read(tap, pid).get(os.fspath(path))
    assert row is not None, f"a reading calls it otherwise: {sorted(read(tap, pid))}"
    assert (row.key, row.text, row.start, row.end) == (record.key, record.text, record.start, record.end)
    assert row.flags & (FLAG_DELETED | FLAG_PARTIAL) == record.flags & (FLAG_DELETED | FLAG_PARTIAL)
    return record


def file_system_of(path: Path) -> int:
    said = subprocess.run(["stat", "--file-system", "--format=%t", path], check=True, capture_output=True, text=True)
    return int(said.stdout, 16)


# ---- file systems -------------------------------------------------------------------------------


def test_on_an_ordinary_file_system_the_identity_is_that_of_stat(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper, new = start(), library()
    if file_system_of(new) == 0x794C7630:
        pytest.skip("/var/tmp is an overlay here, where stat gives another device")
    mapper.map(new)
    assert id_of(both_ways(tap, mapper.pid, new))[:3] == id_by_stat(new)[:3]


def test_the_generation_is_the_one_of_ext4(tap: Tap, start: Start, scratch: Path, library: NewLibrary) -> None:
    commands = f"""
    truncate -s 8M {scratch}/image
    mkfs.ext4 -q {scratch}/image
    mkdir {scratch}/mount
    mount -o loop {scratch}/image {scratch}/mount
    cp {library("libnew.so")} {scratch}/mount/libext.so
    """
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is not installed (e2fsprogs)")
    mapper = start(with_prelude(scratch, make_mapper(start), commands, launcher=IN_OWN_MOUNTS))
    path = scratch / "mount/libext.so"
    mapper.map(path)
    seen = Path(f"/proc/{mapper.pid}/root{path}")
    word = array.array("I", [0, 0])
    with seen.open("rb") as file:
        fcntl.ioctl(file, FS_IOC_GETVERSION, word)
    assert file_system_of(seen) == EXT4_SUPER_MAGIC
    assert id_of(both_ways(tap, mapper.pid, path)) == id_by_stat(seen)._replace(generation=word[0])
    assert word[0] != 0


def make_mapper(start: Start) -> Path:
    """The path of the compiled mapper."""
    program = start()._program
    assert isinstance(program, Path)
    return program


def test_a_new_file_with_a_used_inode_number_is_another_file(tap: Tap, start: Start, library: NewLibrary) -> None:
    mapper = start()
    seen: dict[int, FileId] = {}
    for number in range(200):
        new = library(f"lib{number}.so")
        mapper.unmap(*mapper.map(new))
        found = id_of(live(tap, mapper.pid, new))
        if found.inode in seen:
            assert found.generation != seen[found.inode].generation
            return
        seen[found.inode] = found
        new.unlink()
    pytest.skip("this file system does not use an inode number again at once")


def test_on_tmpfs_the_identity_is_that_of_stat(tap: Tap, start: Start, scratch: Path, library: NewLibrary) -> None:
    commands = f"mkdir {scratch}/t; mount -t tmpfs none {scratch}/t; cp {library('libnew.so')} {scratch}/t/libt.so"
    mapper = start(with_prelude(scratch, make_mapper(start), commands, launcher=IN_OWN_MOUNTS))
    path = scratch / "t/libt.so"
    mapper.map(path)
    assert id_of(both_ways(tap, mapper.pid, path))[:3] == id_by_stat(f"/proc/{mapper.pid}/root{path}")[:3]


def overlay_commands(scratch: Path, name: str, lower: str) -> str:
    """Shell commands that make an overlay at ``scratch/name`` over ``lower``."""
    at = scratch / name
    return f"""
    mkdir {at} {at}.upper {at}.work
    mount -t overlay -o lowerdir={lower},upperdir={at}.upper,workdir={at}.work none {at}
    """


@pytest.fixture
def lower(scratch: Path, library: NewLibrary) -> Path:
    """A library in a directory that is to be the lower layer."""
    return library("lower/lib/liblow.so")


@pytest.fixture
def in_overlays(start: Start, scratch: Path, lower: Path) -> Mapper:
    """A mapper with two overlays ``a`` and ``b`` over one lower layer, and ``n`` over ``a``, on a tmpfs above."""
    commands = overlay_commands(scratch, "a", f"{scratch}/lower")
    commands += overlay_commands(scratch, "b", f"{scratch}/lower")
    commands += f"mkdir {scratch}/top; mount -t tmpfs none {scratch}/top"
    commands += overlay_commands(scratch / "top", "n", f"{scratch}/a")
    return start(with_prelude(scratch, make_mapper(start), commands, launcher=IN_OWN_MOUNTS))


def test_one_lower_file_through_two_overlays_is_one_file_under_two_paths(
    tap: Tap, in_overlays: Mapper, scratch: Path, lower: Path
) -> None:
    found = []
    for name in ("a", "b"):
        path = scratch / name / "lib/liblow.so"
        in_overlays.map(path)
        found.append(both_ways(tap, in_overlays.pid, path))
    assert id_of(found[0]) == id_of(found[1])
    assert id_of(found[0])[:3] == id_by_stat(lower)[:3]
    assert found[0].key != found[1].key


def test_below_an_overlay_on_an_overlay_is_the_real_file(
    tap: Tap, in_overlays: Mapper, scratch: Path, lower: Path
) -> None:
    path = scratch / "top/n/lib/liblow.so"
    in_overlays.map(path)
    assert id_of(live(tap, in_overlays.pid, path))[:3] == id_by_stat(lower)[:3]
    # Of the outer overlay a mapping keeps no trace: a reading, like /proc/PID/maps, has the inner path.
    (row,) = [row for row in read(tap, in_overlays.pid).values() if path_of(row.text).endswith("/liblow.so")]
    assert id_of(row)[:3] == id_by_stat(lower)[:3]
    assert path_of(row.text) in Path(f"/proc/{in_overlays.pid}/maps").read_text(encoding="utf-8")


def test_after_a_copy_up_the_file_is_the_upper_one(tap: Tap, in_overlays: Mapper, scratch: Path, lower: Path) -> None:
    path = scratch / "a/lib/liblow.so"
    with open(f"/proc/{in_overlays.pid}/root{path}", "ab") as file:
        file.write(b"more")
    in_overlays.map(path)
    found = id_of(both_ways(tap, in_overlays.pid, path))
    assert found[:3] == id_by_stat(f"/proc/{in_overlays.pid}/root{scratch}/a.upper/lib/liblow.so")[:3]
    assert found.inode != id_by_stat(lower).inode


def test_a_file_of_an_overlay_made_executable_by_mprotect_has_its_path_and_real_identity(
    tap: Tap, in_overlays: Mapper, scratch: Path, lower: Path
) -> None:
    path = scratch / "a/lib/liblow.so"
    at, length = in_overlays.map(path, "noexec")
    in_overlays.protect(at, length, "rx")
    assert id_of(both_ways(tap, in_overlays.pid, path))[:3] == id_by_stat(lower)[:3]


def test_an_answer_on_a_file_of_an_overlay_holds_live_and_in_a_reading(
    tap: Tap, in_overlays: Mapper, scratch: Path
) -> None:
    path = scratch / "a/lib/liblow.so"
    in_overlays.map(path)
    tap.source.answer(tap.places_of(in_overlays.pid, path), is_wanted=False)
    assert tap.during(lambda: in_overlays.map(path), in_overlays.pid) == []
    assert str(path) not in read(tap, in_overlays.pid)
    # Not so of the same file through the other mount.
    other = scratch / "b/lib/liblow.so"
    in_overlays.map(other)
    assert live(tap, in_overlays.pid, other).flags == FLAG_ASK


def test_the_main_program_in_an_overlay_is_claimed_as_such_by_a_scan(
    tap: Tap, start: Start, scratch: Path, lower: Path
) -> None:
    program = make_mapper(start)
    shutil.copy(program, lower.parent.parent / "program")
    commands = overlay_commands(scratch, "a", f"{scratch}/lower") + f'exec "{scratch}/a/program"'
    commands += ' # "$0"'
    mapper = start(with_prelude(scratch, program, commands, launcher=IN_OWN_MOUNTS))
    # That it is the program is a claim of the process; the publisher asks the file.
    assert read(tap, mapper.pid)[str(scratch / "a/program")].flags & FLAG_IMAGE


def test_one_btrfs_file_in_two_subvolumes_is_two_files(
    tap: Tap, start: Start, scratch: Path, library: NewLibrary
) -> None:
    if shutil.which("mkfs.btrfs") is None:
        pytest.skip("mkfs.btrfs is not installed (btrfs-progs)")
    commands = f"""
    truncate -s 128M {scratch}/image
    mkfs.btrfs -q {scratch}/image >/dev/null
    mkdir {scratch}/m
    mount -o loop {scratch}/image {scratch}/m
    btrfs -q subvolume create {scratch}/m/one >/dev/null
    cp {library("libnew.so")} {scratch}/m/one/lib.so
    sync -f {scratch}/m
    btrfs -q subvolume snapshot {scratch}/m/one {scratch}/m/two >/dev/null
    printf other >> {scratch}/m/two/lib.so
    """
    mapper = start(with_prelude(scratch, make_mapper(start), commands, launcher=IN_OWN_MOUNTS))
    found = []
    for name in ("one", "two"):
        path = scratch / "m" / name / "lib.so"
        mapper.map(path)
        found.append(id_of(both_ways(tap, mapper.pid, path)))
    assert found[0]._replace(subvolume=0) == found[1]._replace(subvolume=0)
    assert found[0].subvolume != found[1].subvolume
    assert all(one.subvolume >= 256 for one in found)  # BTRFS_FIRST_FREE_OBJECTID


# ---- paths --------------------------------------------------------------------------------------


def test_through_a_bind_mount_the_path_is_the_one_that_was_opened(
    tap: Tap, start: Start, scratch: Path, library: NewLibrary
) -> None:
    library("real/libnew.so")
    commands = f"mkdir {scratch}/bound; mount --bind {scratch}/real {scratch}/bound"
    mapper = start(with_prelude(scratch, make_mapper(start), commands, launcher=IN_OWN_MOUNTS))
    found = []
    for name in ("real", "bound"):
        path = scratch / name / "libnew.so"
        mapper.map(path)
        found.append(both_ways(tap, mapper.pid, path))
    assert id_of(found[0]) == id_of(found[1])
    assert found[0].key != found[1].key


def test_after_a_directory_above_was_renamed_the_path_of_a_matched_file_is_the_new_one(
    tap: Tap, start: Start, scratch: Path, library: NewLibrary
) -> None:
    mapper = start()
    path = library("old/inner/libnew.so")
    mapper.map(path)
    tap.source.answer(tap.places_of(mapper.pid, path), is_wanted=True)
    (scratch / "old").rename(scratch / "new")
    path = scratch / "new/inner/libnew.so"
    mapper.map(path)
    assert path_of(live(tap, mapper.pid, path).text) == str(path)
    assert str(path) in read(tap, mapper.pid)


def test_in_a_chroot_the_path_is_the_one_below_its_root(
    tap: Tap, start: Start, scratch: Path, library: NewLibrary, programs: Any
) -> None:
    path = library("root/lib/libnew.so")
    shutil.copy(programs.variant("mapper", "-static"), scratch / "root/mapper")
    outside = start()
    commands = f'exec chroot {scratch}/root /mapper; "$0"'
    inside = start(with_prelude(scratch, programs["mapper"], commands))
    outside.map(path)
    inside.map("/lib/libnew.so")
    plain = both_ways(tap, outside.pid, path)
    rooted = both_ways(tap, inside.pid, "/lib/libnew.so")
    assert id_of(plain) == id_of(rooted)
    assert plain.key != rooted.key


@pytest.mark.parametrize(
    "name",
    [
        "lib with space.so",
        "lib\nnewline.so",
        "lib\ttab\x1b[31mcolour.so",
        os.fsdecode(b"lib\xff\xfe.so"),
        "lib (deleted)",
        "lib\\012.so",
        "n" * 255,
    ],
)
def test_any_name_comes_through_as_it_is(tap: Tap, start: Start, library: NewLibrary, name: str) -> None:
    mapper, new = start(), library(name)
    mapper.map(new)
    record = both_ways(tap, mapper.pid, new)
    assert path_of(record.text) == str(new)
    assert not record.flags & (FLAG_DELETED | FLAG_PARTIAL)


def deep_directory(scratch: Path, length: int, name: str) -> str:
    """Makes directories below ``scratch`` until the path to the last has ``length`` characters or a few less."""
    path = os.fspath(scratch)
    fd = os.open(path, os.O_PATH)
    while len(path) + len(name) + 1 <= length:
        os.mkdir(name, dir_fd=fd)
        deeper = os.open(name, os.O_PATH, dir_fd=fd)
        os.close(fd)
        fd = deeper
        path += f"/{name}"
    os.close(fd)
    return path


@pytest.mark.parametrize("name", ["d" * 200, "d"])
def test_a_path_of_4000_bytes_is_told_whole(tap: Tap, start: Start, library: NewLibrary, name: str) -> None:
    new = library()
    path = Path(deep_directory(new.parent, 4000, name), "libdeep.so")
    new.rename(path)
    mapper = start()
    mapper.map(path)
    assert not both_ways(tap, mapper.pid, path).flags & FLAG_PARTIAL


def test_a_path_longer_than_any_system_call_takes_is_cut_at_its_start_and_says_so(
    tap: Tap, start: Start, library: NewLibrary, scratch: Path
) -> None:
    mapper, new = start(), library()
    fd = os.open(scratch, os.O_PATH)
    for _ in range(30):
        os.mkdir("d" * 200, dir_fd=fd)
        deeper = os.open("d" * 200, os.O_PATH, dir_fd=fd)
        os.close(fd)
        fd = deeper
    try:
        os.rename(new, "libdeep.so", dst_dir_fd=fd)
        mapper.map(f"/proc/{os.getpid()}/fd/{fd}/libdeep.so")
    finally:
        os.close(fd)
    tap.flush()
    record = tap.maps(mapper.pid)[-1]
    assert record.flags & FLAG_PARTIAL
    path = path_of(record.text)
    assert path.endswith("/" + "d" * 200 + "/libdeep.so")
    assert 4000 <= record.path_bytes <= 4096 + 256


def test_a_file_that_was_deleted_before_and_one_deleted_after_say_so_and_keep_their_names(
    tap: Tap, start: Start, library: NewLibrary
) -> None:
    mapper = start()
    before, after = library("libbefore.so"), library("libafter.so")
    mapper.map(after)
    with before.open("rb") as file:
        before.unlink()
        mapper.map(f"/proc/{os.getpid()}/fd/{file.fileno()}")
    assert live(tap, mapper.pid, before).flags & FLAG_DELETED
    assert not live(tap, mapper.pid, after).flags & FLAG_DELETED
    after.unlink()
    rows = read(tap, mapper.pid)
    assert rows[str(before)].flags & FLAG_DELETED
    assert rows[str(after)].flags & FLAG_DELETED


@pytest.mark.parametrize("name", ["jit code", "m" * 249, ""])
def test_a_memfd_is_called_by_its_name_and_deleted(tap: Tap, start: Start, library: NewLibrary, name: str) -> None:
    mapper = start()
    mapper.emit("memfd", name, library())
    record = both_ways(tap, mapper.pid, f"/memfd:{name}")
    assert record.flags & FLAG_DELETED


# ---- processes ----------------------------------------------------------------------------------


def introduction(tap: Tap, pid: int) -> ProcessRecord:
    tap.flush()
    record = [r for r in tap.records if r.type == RecordType.INTRO and r.tgid == pid][-1]
    assert isinstance(record, ProcessRecord)
    return record


def test_a_process_that_is_gone_when_its_record_is_read_is_described_all_the_same(
    tap: Tap, start: Start, scratch: Path, programs: Any
) -> None:
    """In a pid namespace, as another user, under a name of its own; only its records say so."""
    program = scratch / "named-program"
    shutil.copy(programs["mapper"], program)
    launcher = "unshare --pid --fork --kill-child setpriv --reuid 12345 --clear-groups sh -c"
    mapper = start(with_prelude(scratch, program, "", launcher=launcher))
    pid = host_pid(mapper)
    stat = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    assert mapper.pid == 1
    mapper.exit()
    record = introduction(tap, pid)
    assert not Path(f"/proc/{pid}").exists()
    assert record.ns_pid == 1
    assert record.uid == 12345
    assert record.ppid == int(stat[1])
    assert record.start_ns // 10_000_000 == int(stat[19])
    assert record.comm.rstrip(b"\0") == b"named-program"
    assert path_of(record.path) == str(program)


def test_in_the_first_pid_namespace_the_own_pid_is_the_pid(tap: Tap, start: Start) -> None:
    mapper = start()
    assert introduction(tap, mapper.pid).ns_pid == mapper.pid


def test_a_thread_that_maps_first_is_introduced_as_its_process(tap: Tap, start: Start, library: NewLibrary) -> None:
    tap.source.reports.set(Report.NOTHING)
    mapper = start()
    mapper.emit("leaderexit")
    mapper.map(library())
    tap.flush()
    record = tap.maps(mapper.pid)[-1]
    stat = Path(f"/proc/{mapper.pid}/stat").read_bytes().rpartition(b")")[2].split()
    assert record.start_ns // 10_000_000 == int(stat[19])
    assert introduction(tap, mapper.pid).start_ns == record.start_ns


def cgroup_roots() -> list[Path]:
    """Where a group of the test's own can be made: the v2 hierarchy, then some v1 ones."""
    found = {}
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        left, _, right = line.partition(" - ")
        root, at = left.split()[3:5]
        kind, _, options = right.split()[:3]
        if root == "/" and at.startswith("/sys/fs/cgroup"):
            if kind == "cgroup2":
                found["v2"] = Path(at)
            elif kind == "cgroup":
                found |= {name: Path(at) for name in ("memory", "pids", "cpu") if name in options.split(",")}
    return [found[name] for name in ("v2", "memory", "pids", "cpu") if name in found]


@pytest.mark.parametrize("which", [0, 1])
def test_the_cgroup_is_the_one_that_proc_names(
    tap: Tap, start: Start, scratch: Path, programs: Any, which: int
) -> None:
    roots = cgroup_roots()
    if len(roots) <= which:
        pytest.skip("no cgroup hierarchy, or only the one of version 2")
    outer = roots[which] / f"sowatch-test-{os.getpid()}"
    inner = outer / "inner group.scope"
    inner.mkdir(parents=True)
    try:
        # The shell's own dollar, not the one of the prelude's quotes.
        commands = f'echo $$ > "{inner}/cgroup.procs"'
        mapper = start(with_prelude(scratch, programs["mapper"], commands))
        expected = parse_cgroup(Path(f"/proc/{mapper.pid}/cgroup").read_bytes())
        assert "sowatch-test" in Path(f"/proc/{mapper.pid}/cgroup").read_text(encoding="utf-8")
        mapper.exit()
        record = introduction(tap, mapper.pid)
        assert choose_cgroup(paths_of(record.cgroup)) == expected
    finally:
        inner.rmdir()
        outer.rmdir()
