"""What is said of a mapped file is of what is mapped: versions, copy-up, paths that open it from here."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sowatch import ActiveFile, Config, Rule
from sowatch.engine.queries import Known, KnownProcess
from sowatch.explain import ProcessReport
from sowatch.explain.audit import audit
from sowatch.linux.elf import read_facts
from sowatch.linux.proc import ProcFs
from sowatch.model.events import Library, Process, Unload
from sowatch.model.identity import FileId
from sowatch.model.literals import KINDS
from sowatch.model.rules import RuleSet
from support.explained import known_file
from support.kernel import IN_OWN_MOUNTS, Ledger, with_prelude
from support.programs import Mapper
from support.records import File

Start = Callable[..., Mapper]

TAG = f"sow-facts-{os.getpid()}-"
STRATEGIES = ["core", "prebuilt", "procfs"]


def config(strategy: str) -> Config:
    return Config(strategy=strategy, poll_interval_s=0.05, poll_cpu_percent=100)


@pytest.fixture
def scratch() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix=TAG, dir="/var/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture
def one_and_two(make_library: Any) -> tuple[bytes, bytes]:
    """The contents of two libraries with different build ids."""
    return make_library("libone.so").read_bytes(), make_library("libtwo.so").read_bytes()


def build_id(content: bytes, scratch: Path) -> str:
    place = scratch / "content"
    place.write_bytes(content)
    fd = os.open(place, os.O_RDONLY)
    try:
        facts = read_facts(fd)
    finally:
        os.close(fd)
        place.unlink()
    assert facts is not None
    assert facts.build_id is not None
    return facts.build_id


def held(ledger: Ledger, pid: int, path: str | Path) -> Library | None:
    """What is published of the file by that path in a process."""
    ledger.catch_up()
    found = [one.library for one in ledger.watcher.snapshot() if one.process is not None and one.process.pid == pid]
    return next((one for one in found if one.path == os.fspath(path)), None)


def wait_held(ledger: Ledger, pid: int, path: str | Path, is_right: Callable[[Library], bool]) -> Library:
    def look() -> Library | None:
        one = held(ledger, pid, path)
        return one if one is not None and is_right(one) else None

    found = ledger.wait_for(look, lambda: f"{path} in {pid} is {held(ledger, pid, path)}")
    assert isinstance(found, Library)
    return found


# ---- versions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_file_that_was_overwritten_in_place_has_its_new_build_id_when_it_is_mapped_again(
    open_ledger: Callable[..., Ledger],
    start: Start,
    scratch: Path,
    one_and_two: tuple[bytes, bytes],
    strategy: str,
) -> None:
    ledger = open_ledger(Rule(TAG, kind=KINDS), config=config(strategy))
    path = scratch / "lib.so"
    for content in one_and_two:
        mapper = start()
        path.write_bytes(content)
        mapper.map(path)
        wanted = build_id(content, scratch)
        wait_held(ledger, mapper.pid, path, lambda one, wanted=wanted: one.build_id == wanted)  # type: ignore[misc]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("size", [0, 3, 64])
def test_a_file_that_is_mapped_while_it_is_written_is_told_as_what_it_is_when_it_is_complete(
    open_ledger: Callable[..., Ledger],
    start: Start,
    scratch: Path,
    one_and_two: tuple[bytes, bytes],
    strategy: str,
    size: int,
) -> None:
    ledger = open_ledger(Rule(TAG, kind=KINDS), config=config(strategy))
    path, mapper = scratch / "lib.so", start()
    path.write_bytes(one_and_two[0][:size])
    mapper.map(path, *(["len", 4096] if not size else []))
    wait_held(ledger, mapper.pid, path, lambda one: one.build_id is None)
    with path.open("ab") as file:
        file.write(one_and_two[0][size:])
    wanted = build_id(one_and_two[0], scratch)
    wait_held(ledger, mapper.pid, path, lambda one: one.build_id == wanted and one.kind == "library")


# ---- an inode number that is used again ---------------------------------------------------------


@pytest.fixture
def on_ext4(start: Start, scratch: Path, programs: Any) -> tuple[Mapper, Path]:
    """A mapper, and a directory that it sees on a file system which gives an inode number out again at once."""
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is not installed (e2fsprogs)")
    commands = f"""
    mkdir {scratch}/m
    truncate -s 8M {scratch}/image
    mkfs.ext4 -q {scratch}/image
    mount -o loop {scratch}/image {scratch}/m
    """
    mapper = start(with_prelude(scratch, programs["mapper"], commands, launcher=IN_OWN_MOUNTS))
    return mapper, scratch / "m"


def put(mapper: Mapper, path: Path, content: bytes) -> int:
    """Makes a new file that the mapper sees; its inode number."""
    place = Path(f"/proc/{mapper.pid}/root{path}")
    place.unlink(missing_ok=True)
    place.write_bytes(content)
    return place.stat().st_ino


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("names", [("lib.so", "lib.so"), ("one.so", "two.so")])
def test_a_new_file_on_the_inode_number_of_the_last_one_has_its_own_build_id(
    open_ledger: Callable[..., Ledger],
    on_ext4: tuple[Mapper, Path],
    scratch: Path,
    one_and_two: tuple[bytes, bytes],
    strategy: str,
    names: tuple[str, str],
) -> None:
    ledger = open_ledger(Rule(TAG, kind=KINDS), config=config(strategy))
    mapper, directory = on_ext4
    inodes = []
    for name, content in zip(names, one_and_two, strict=True):
        path = directory / name
        inodes.append(put(mapper, path, content))
        at = mapper.map(path)
        wanted = build_id(content, scratch)
        wait_held(ledger, mapper.pid, path, lambda one, wanted=wanted: one.build_id == wanted)  # type: ignore[misc]
        mapper.unmap(*at)
        ledger.wait_for(lambda path=path: held(ledger, mapper.pid, path) is None, "it stays")  # type: ignore[misc]
        Path(f"/proc/{mapper.pid}/root{path}").unlink()
    assert inodes[0] == inodes[1]


@pytest.mark.parametrize("strategy", ["core", "prebuilt"])
def test_a_new_file_on_the_inode_number_of_one_that_went_in_the_same_moment_has_its_own_build_id(
    open_ledger: Callable[..., Ledger],
    on_ext4: tuple[Mapper, Path],
    scratch: Path,
    one_and_two: tuple[bytes, bytes],
    strategy: str,
) -> None:
    """Between two polls of ``procfs`` it is one file: its limits say so."""
    ledger = open_ledger(Rule(TAG, kind=KINDS), config=config(strategy))
    mapper, directory = on_ext4
    path = directory / "lib.so"
    first = put(mapper, path, one_and_two[0])
    at = mapper.map(path)
    wait_held(ledger, mapper.pid, path, lambda one: one.build_id == build_id(one_and_two[0], scratch))
    mapper.unmap(*at)
    assert put(mapper, path, one_and_two[1]) == first
    mapper.map(path)
    wait_held(ledger, mapper.pid, path, lambda one: one.build_id == build_id(one_and_two[1], scratch))


# ---- copy-up ------------------------------------------------------------------------------------


@pytest.fixture
def overlaid(start: Start, scratch: Path, programs: Any, one_and_two: tuple[bytes, bytes]) -> tuple[Mapper, Path]:
    """A mapper that has mapped a library of the lower layer, in whose place is another one by now."""
    for name in ("lower", "upper", "rw", "m"):
        (scratch / name).mkdir()
    (scratch / "lower/lib.so").write_bytes(one_and_two[0])
    (scratch / "new").write_bytes(one_and_two[1])
    commands = f"""mount -t tmpfs none {scratch}/rw; mkdir {scratch}/rw/u {scratch}/rw/w
    mount -t overlay -o lowerdir={scratch}/lower,upperdir={scratch}/rw/u,workdir={scratch}/rw/w none {scratch}/m"""
    mapper = start(with_prelude(scratch, programs["mapper"], commands, launcher=IN_OWN_MOUNTS))
    path = scratch / "m/lib.so"
    mapper.map(path)
    subprocess.run(["cp", scratch / "new", f"/proc/{mapper.pid}/root{path}"], check=True)
    assert Path(f"/proc/{mapper.pid}/root{path}").read_bytes() == one_and_two[1]
    return mapper, path


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_after_a_copy_up_the_build_id_is_that_of_the_lower_file_that_is_mapped(
    open_ledger: Callable[..., Ledger],
    overlaid: tuple[Mapper, Path],
    scratch: Path,
    one_and_two: tuple[bytes, bytes],
    strategy: str,
) -> None:
    mapper, path = overlaid
    ledger = open_ledger(Rule(TAG, kind=KINDS), config=config(strategy))
    found = wait_held(ledger, mapper.pid, path, lambda _: True)
    assert found.build_id == build_id(one_and_two[0], scratch)
    assert found.host_path is None


def test_after_a_copy_up_a_rule_gets_a_descriptor_of_the_lower_file(
    open_ledger: Callable[..., Ledger], overlaid: tuple[Mapper, Path], one_and_two: tuple[bytes, bytes]
) -> None:
    contents: list[bytes] = []

    def read(file: ActiveFile) -> None:
        contents.append(os.pread(file.fileno(), 1 << 20, 0))

    ledger = open_ledger(Rule(r"m/lib\.so$", kind=KINDS, on_activate=read), Rule(TAG, name="all", kind=KINDS))
    mapper, path = overlaid
    wait_held(ledger, mapper.pid, path, lambda _: True)
    ledger.wait_for(lambda: contents, "it was not opened")
    assert contents == [one_and_two[0]]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_explain_after_a_copy_up_has_the_facts_of_the_lower_file_and_a_reason_for_those_it_has_not(
    open_ledger: Callable[..., Ledger],
    overlaid: tuple[Mapper, Path],
    scratch: Path,
    one_and_two: tuple[bytes, bytes],
    strategy: str,
) -> None:
    mapper, path = overlaid
    ledger = open_ledger(Rule(TAG, kind=KINDS), config=config(strategy))
    wait_held(ledger, mapper.pid, path, lambda _: True)
    report = ledger.watcher.explain(mapper.pid)
    assert isinstance(report, ProcessReport)
    (found,) = [one for one in report.mappings if one.library.path == str(path)]
    assert found.look.build_id == found.library.build_id == build_id(one_and_two[0], scratch)
    if strategy == "core":
        assert found.look.opened_by == "layer"
        assert found.look.soname == "libone.so"
    else:
        assert (found.look.elf, found.look.soname, found.library.host_path) == ("partial", None, None)
        assert "copy" in str(found.look.reason)


# ---- btrfs --------------------------------------------------------------------------------------


@pytest.fixture
def on_btrfs(start: Start, scratch: Path, programs: Any, one_and_two: tuple[bytes, bytes]) -> Mapper:
    """A mapper that sees two subvolumes, ``s/one`` and ``s/two``, with a ``lib.so`` each on one inode number."""
    if shutil.which("mkfs.btrfs") is None:
        pytest.skip("mkfs.btrfs is not installed (btrfs-progs)")
    for name, content in zip(("one", "two"), one_and_two, strict=True):
        (scratch / name).write_bytes(content)
    commands = f"""
    truncate -s 128M {scratch}/image
    mkfs.btrfs -q {scratch}/image >/dev/null
    mkdir {scratch}/s {scratch}/m
    mount -o loop {scratch}/image {scratch}/s
    btrfs -q subvolume create {scratch}/s/one >/dev/null
    cp {scratch}/one {scratch}/s/one/lib.so
    sync -f {scratch}/s
    btrfs -q subvolume snapshot {scratch}/s/one {scratch}/s/two >/dev/null
    cat {scratch}/two > {scratch}/s/two/lib.so
    """
    return start(with_prelude(scratch, programs["mapper"], commands, launcher=IN_OWN_MOUNTS))


def held_by(ledger: Ledger, pid: int) -> dict[int, Library]:
    """What a process holds, by subvolume."""
    ledger.catch_up()
    found = [one.library for one in ledger.watcher.snapshot() if one.process is not None and one.process.pid == pid]
    return {one.id.subvolume: one for one in found if one.path.endswith("lib.so")}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_files_of_two_subvolumes_are_two_files_with_their_own_facts(
    open_ledger: Callable[..., Ledger],
    on_btrfs: Mapper,
    scratch: Path,
    one_and_two: tuple[bytes, bytes],
    strategy: str,
) -> None:
    ledger = open_ledger(Rule(TAG, kind=KINDS), config=config(strategy))
    for name in ("one", "two"):
        on_btrfs.map(scratch / "s" / name / "lib.so")
    found = ledger.wait_for(
        lambda: len(both := held_by(ledger, on_btrfs.pid)) == 2 and both, lambda: str(held_by(ledger, on_btrfs.pid))
    )
    assert len({one.id._replace(subvolume=0) for one in found.values()}) == 1
    assert sorted(found) == subvolumes_of(on_btrfs.pid)
    for name, content in zip(("one", "two"), one_and_two, strict=True):
        wanted = build_id(content, scratch)
        wait_held(ledger, on_btrfs.pid, scratch / "s" / name / "lib.so", lambda one, w=wanted: one.build_id == w)  # type: ignore[misc]
    assert ledger.watcher.audit().differences == ()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_files_of_two_subvolumes_under_one_path_are_two_files_of_which_each_goes_by_itself(
    open_ledger: Callable[..., Ledger], on_btrfs: Mapper, scratch: Path, strategy: str
) -> None:
    ledger = open_ledger(Rule(TAG, kind=KINDS), config=config(strategy))
    at = []
    for name in ("one", "two"):
        command = ["mount", "--bind", scratch / "s" / name, scratch / "m"]
        subprocess.run(["nsenter", "-m", "-t", str(on_btrfs.pid), *command], check=True)
        at.append(on_btrfs.map(scratch / "m/lib.so"))
    one, two = subvolumes_of(on_btrfs.pid)
    ledger.wait_for(
        lambda: set(held_by(ledger, on_btrfs.pid)) == {one, two}, lambda: str(held_by(ledger, on_btrfs.pid))
    )
    assert ledger.watcher.audit().differences == ()
    on_btrfs.unmap(*at[0])
    ledger.wait_for(lambda: set(held_by(ledger, on_btrfs.pid)) == {two}, lambda: str(held_by(ledger, on_btrfs.pid)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_file_in_a_subvolume_that_is_deleted_while_it_is_mapped_stays_the_same_file(
    open_ledger: Callable[..., Ledger], on_btrfs: Mapper, scratch: Path, strategy: str
) -> None:
    ledger = open_ledger(Rule(TAG, kind=KINDS), config=config(strategy))
    path = scratch / "s/two/lib.so"
    on_btrfs.map(path)
    wait_held(ledger, on_btrfs.pid, path, lambda one: one.id.subvolume >= 256)
    subprocess.run(["nsenter", "-m", "-t", str(on_btrfs.pid), "rm", path], check=True)
    begun = len(ledger.events)
    on_btrfs.map(scratch / "s/one/lib.so")
    wait_held(ledger, on_btrfs.pid, scratch / "s/one/lib.so", lambda _: True)
    assert ledger.watcher.audit().differences == ()
    assert [one for one in ledger.events[begun:] if isinstance(one, Unload)] == []


def test_the_audit_finds_a_file_that_is_held_as_that_of_another_subvolume(on_btrfs: Mapper, scratch: Path) -> None:
    rules = RuleSet([Rule(TAG, kind=KINDS)])
    ranges = {name: on_btrfs.map(scratch / "s" / name / "lib.so") for name in ("one", "two")}
    (process,) = [one for one in [ProcFs().process(on_btrfs.pid)] if one is not None]
    one, two = subvolumes_of(on_btrfs.pid)
    row = next(row for row in ProcFs().executable_maps(on_btrfs.pid) or () if row.path.endswith(b"lib.so"))

    def differences(subvolumes: dict[str, int]) -> list[str]:
        held = []
        for name, (at, length) in ranges.items():
            one = known_file(File(str(scratch / "s" / name / "lib.so")), ((at, at + -(-length // 4096) * 4096),))
            one.name.file_id = FileId(row.major, row.minor, row.inode, subvolume=subvolumes[name])
            held.append(one)
        known = Known(
            {on_btrfs.pid: KnownProcess(process, 0, True, True, False, False, tuple(held))}, None, None, False, False
        )
        report = audit(lambda: known, ProcFs(), rules, only=on_btrfs.pid)
        return [one.kind for one in report.differences]

    assert differences({"one": one, "two": two}) == []
    assert differences({"one": two, "two": one}) == ["extra", "extra"]


def test_nobody_finds_the_subvolume_by_the_name_of_a_file(on_btrfs: Mapper, scratch: Path) -> None:
    # ctypes is imported before: what nobody may not read cannot be imported later.
    code = f"""
import ctypes, mmap, os
from sowatch.linux.proc import ProcFs
os.setgroups([]); os.setgid(65534); os.setuid(65534)
kept = []
for name in ("one", "two"):
    fd = os.open(f"{scratch}/s/{{name}}/lib.so", os.O_RDONLY)
    kept.append(mmap.mmap(fd, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC))
rows = [row for row in ProcFs().executable_maps(os.getpid()) if row.path.endswith(b"lib.so")]
print(sorted((row.path[-10:-7], row.subvolume) for row in ProcFs().resolve(os.getpid(), rows)))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = ["nsenter", "-m", "-t", str(on_btrfs.pid), sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    for name in ("one", "two"):
        on_btrfs.map(scratch / "s" / name / "lib.so")
    one, two = subvolumes_of(on_btrfs.pid)
    assert done.stdout.strip() == str([(b"one", one), (b"two", two)])


def subvolumes_of(pid: int) -> list[int]:
    """Those of the files that a process has mapped, in their order."""
    found = set()
    for link in Path(f"/proc/{pid}/map_files").iterdir():
        if os.readlink(link).endswith("lib.so"):
            done = subprocess.run(
                ["btrfs", "inspect-internal", "rootid", link], capture_output=True, text=True, check=True
            )
            found.add(int(done.stdout))
    return sorted(found)


# ---- paths from here ----------------------------------------------------------------------------


def opens_the_same(library: Library, pid: int, at: int, length: int) -> bool:
    """Whether the host path leads to what is mapped there."""
    assert library.host_path is not None
    return os.path.samefile(library.host_path, f"/proc/{pid}/map_files/{at:x}-{at + -(-length // 4096) * 4096:x}")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_host_path_of_a_file_that_another_mount_covers_opens_that_file(
    open_ledger: Callable[..., Ledger],
    start: Start,
    scratch: Path,
    programs: Any,
    one_and_two: tuple[bytes, bytes],
    strategy: str,
) -> None:
    (scratch / "m").mkdir()
    path = scratch / "m/lib.so"
    path.write_bytes(one_and_two[0])
    mapper = start(with_prelude(scratch, programs["mapper"], "", launcher=IN_OWN_MOUNTS))
    at, length = mapper.map(path)
    enter = ["nsenter", "-m", "-t", str(mapper.pid), "sh", "-ec"]
    (scratch / "decoy").write_bytes(one_and_two[1])
    subprocess.run([*enter, f"mount -t tmpfs none {scratch}/m && cp {scratch}/decoy {path}"], check=True)
    ledger = open_ledger(Rule(TAG, kind=KINDS), config=config(strategy))
    found = wait_held(ledger, mapper.pid, path, lambda _: True)
    assert found.build_id == build_id(one_and_two[0], scratch)
    assert opens_the_same(found, mapper.pid, at, length)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_host_path_after_a_lazy_unmount_does_not_lead_to_a_decoy(
    open_ledger: Callable[..., Ledger],
    start: Start,
    scratch: Path,
    programs: Any,
    one_and_two: tuple[bytes, bytes],
    strategy: str,
) -> None:
    (scratch / "m").mkdir()
    (scratch / "content").write_bytes(one_and_two[0])
    name = f"{TAG}lib.so"
    commands = f"mount -t tmpfs none {scratch}/m; cp {scratch}/content {scratch}/m/{name}"
    mapper = start(with_prelude(scratch, programs["mapper"], commands, launcher=IN_OWN_MOUNTS))
    at, length = mapper.map(scratch / "m" / name)
    (scratch / "m" / name).write_bytes(one_and_two[1])
    subprocess.run(["nsenter", "-m", "-t", str(mapper.pid), "umount", "-l", scratch / "m"], check=True)
    ledger = open_ledger(Rule(TAG, kind=KINDS), config=config(strategy))

    def find() -> Library | None:
        ledger.catch_up()
        found = [one for one in ledger.watcher.snapshot() if one.process is not None and one.process.pid == mapper.pid]
        return next((one.library for one in found if one.library.path.endswith(name)), None)

    found = ledger.wait_for(find, "it was not told")
    assert opens_the_same(found, mapper.pid, at, length)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_host_path_of_a_file_in_a_jail_opens_that_file_and_not_ours_by_that_name(
    open_ledger: Callable[..., Ledger],
    start: Start,
    scratch: Path,
    programs: Any,
    one_and_two: tuple[bytes, bytes],
    strategy: str,
) -> None:
    jail = scratch / "jail"
    inside = jail / scratch.relative_to("/")
    inside.mkdir(parents=True)
    (inside / "lib.so").write_bytes(one_and_two[0])
    (scratch / "lib.so").write_bytes(one_and_two[1])
    mapper = start(
        with_prelude(scratch, programs["mapper"], f"mount --rbind {inside} {scratch}", launcher=IN_OWN_MOUNTS)
    )
    path = scratch / "lib.so"
    at, length = mapper.map(path)
    ledger = open_ledger(Rule(TAG, kind=KINDS), config=config(strategy))
    found = wait_held(ledger, mapper.pid, path, lambda _: True)
    assert found.host_path != str(path)
    assert opens_the_same(found, mapper.pid, at, length)


# ---- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["x.so (deleted)", r"a\012b.so", "a\nb.so", "a\\012\n (deleted)"])
def test_a_file_whose_name_maps_shows_like_another_is_told_by_its_name(
    open_ledger: Callable[..., Ledger],
    start: Start,
    scratch: Path,
    one_and_two: tuple[bytes, bytes],
    strategy: str,
    name: str,
) -> None:
    path, mapper = scratch / name, start()
    path.write_bytes(one_and_two[0])
    mapper.map(path)
    ledger = open_ledger(Rule(TAG, kind=KINDS), config=config(strategy))
    found = wait_held(ledger, mapper.pid, path, lambda _: True)
    assert not found.deleted
    assert found.host_path == str(path)
    assert found.build_id == build_id(one_and_two[0], scratch)
    assert ledger.watcher.audit().differences == ()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_deleted_file_is_not_taken_for_one_that_is_named_like_it(
    open_ledger: Callable[..., Ledger],
    start: Start,
    scratch: Path,
    one_and_two: tuple[bytes, bytes],
    strategy: str,
) -> None:
    path, mapper = scratch / "x.so", start()
    path.write_bytes(one_and_two[0])
    mapper.map(path)
    path.unlink()
    (scratch / "x.so (deleted)").write_bytes(one_and_two[1])
    ledger = open_ledger(Rule(TAG, kind=KINDS), config=config(strategy))
    found = wait_held(ledger, mapper.pid, path, lambda _: True)
    assert found.deleted
    assert found.build_id == build_id(one_and_two[0], scratch)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_program_whose_name_ends_like_the_mark_is_named_whole(
    open_ledger: Callable[..., Ledger], start: Start, scratch: Path, programs: Any, strategy: str
) -> None:
    program = scratch / "mapper (deleted)"
    shutil.copy(programs["mapper"], program)
    ledger = open_ledger(Rule(TAG, kind=KINDS), config=config(strategy))
    mapper = start(program)

    def find() -> Process | None:
        ledger.catch_up()
        found = [one for one in ledger.watcher.snapshot() if one.process is not None and one.process.pid == mapper.pid]
        return next((one.process for one in found if one.library.kind == "executable"), None)

    found = ledger.wait_for(find, "the program was not told as one")
    assert found.exe == str(program)
    assert held(ledger, mapper.pid, program) is not None
    assert ledger.watcher.audit().differences == ()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_file_that_is_the_root_of_a_detached_mount_has_the_path_that_the_kernel_gives_it(
    open_ledger: Callable[..., Ledger],
    start: Start,
    scratch: Path,
    one_and_two: tuple[bytes, bytes],
    strategy: str,
) -> None:
    path, mapper = scratch / "lib.so", start()
    path.write_bytes(one_and_two[0])
    detached = open_tree(path)
    try:
        at, length = mapper.map(f"/proc/{os.getpid()}/fd/{detached}")
    finally:
        os.close(detached)
    ledger = open_ledger(Rule("^/$", kind=KINDS), config=config(strategy))
    found = wait_held(ledger, mapper.pid, "/", lambda _: True)
    assert found.build_id == build_id(one_and_two[0], scratch)
    assert opens_the_same(found, mapper.pid, at, length)
    assert ledger.watcher.audit().differences == ()


def open_tree(path: Path) -> int:
    """A descriptor of a copy of the mount that is nothing but the file (OPEN_TREE_CLONE; Linux 5.2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(428, -100, os.fsencode(path), 1 | os.O_CLOEXEC)  # AT_FDCWD
    assert fd >= 0, os.strerror(ctypes.get_errno())
    return int(fd)
