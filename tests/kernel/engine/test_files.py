"""Every kind of file: one identity and one activation for one real file, whatever names and mounts lead to it.

The file systems are made by loop or in memory, in mount namespaces that end with the test's processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sowatch import ActiveFile, Rule
from sowatch.model.events import LibraryEvent
from sowatch.model.identity import FileId
from sowatch.model.literals import KINDS
from support.hostile import SOWATCH
from support.kernel import IN_OWN_MOUNTS, Ledger, with_prelude
from support.programs import Mapper

Start = Callable[..., Mapper]
NewLibrary = Callable[..., Path]

#: In the path of every file here, and of nobody else's: what other suites do at the same time is not watched.
OURS = f"sow-file-{os.getpid()}-"
#: Of an overlay on an overlay a reading knows only the inner path, so here the name itself has to say it.
LOW = f"lib{OURS}low.so"


@pytest.fixture
def scratch() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix=OURS, dir="/var/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture
def other_library(make_library: Any, scratch: Path) -> Callable[[str], Path]:
    """``other_library(name)`` is a library in ``scratch`` with a soname and build id of its own."""

    def make(name: str) -> Path:
        made = scratch / name
        made.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(make_library(made.name), made)
        return made

    return make


@pytest.fixture
def contents() -> dict[FileId, list[bytes]]:
    """What the watched rule's on_activate read through its descriptor, by file."""
    return {}


@pytest.fixture
def open_ours(open_ledger: Callable[..., Ledger], contents: dict[FileId, list[bytes]]) -> Callable[..., Ledger]:
    """``open_ours()`` is a Ledger of the files of this test, which opens each as it becomes active."""

    def read(file: ActiveFile) -> None:
        contents.setdefault(file.library.id, []).append(os.pread(file.fileno(), 1 << 20, 0))

    return lambda: open_ledger(Rule(OURS, kind=KINDS, name="ours", on_activate=read))


@pytest.fixture
def ledger(open_ours: Callable[..., Ledger]) -> Iterator[Ledger]:
    ledger = open_ours()
    yield ledger
    ledger.catch_up()
    assert not ledger.controls()[1:], "events were lost, so the test shows nothing"


def inode(path: Path) -> int:
    return path.stat().st_ino


def loads_of(ledger: Ledger, pid: int) -> dict[str, LibraryEvent]:
    """The libraries a process was told to have loaded, by path."""
    return {one.library.path: one for one in ledger.of(pid, "load") if one.library.kind == "library"}


def wait_path(ledger: Ledger, pid: int, path: str | Path) -> LibraryEvent:
    """The load of the file by that path in a process."""
    wanted = os.fspath(path)
    found = ledger.wait_for(
        lambda: loads_of(ledger, pid).get(wanted), lambda: f"{wanted} was not told: {sorted(loads_of(ledger, pid))}"
    )
    assert isinstance(found, LibraryEvent)
    return found


def activations(ledger: Ledger, file_id: FileId) -> list[str]:
    ledger.catch_up()
    reported = [one for one in ledger.events if isinstance(one, LibraryEvent) and one.library.id == file_id]
    return [one.event for one in reported if one.event in ("activate", "deactivate")]


def is_right(ledger: Ledger, *pids: int) -> None:
    """The map and ``/proc`` agree on these processes."""
    assert [one for one in ledger.watcher.audit().differences if one.pid in pids] == []


def snapshot_agrees(ledger: Ledger, open_ours: Callable[..., Ledger], *pids: int) -> None:
    """A watch that starts now, and reads what is there, finds the very files that were told live."""
    fresh = open_ours()

    def held(of: Ledger) -> set[tuple[int, FileId]]:
        return {(one.process.pid, one.library.id) for one in of.watcher.snapshot() if one.process.pid in pids}

    assert held(fresh) == held(ledger)
    fresh.stop()


# ---- names --------------------------------------------------------------------------------------


def test_hard_links_are_one_file_that_is_active_once(
    ledger: Ledger, start: Start, library: NewLibrary, contents: dict[FileId, list[bytes]]
) -> None:
    first, second, one = start(), start(), library("libone.so")
    two = one.with_name("libtwo.so")
    two.hardlink_to(one)
    first.map(one)
    second.map(two)
    loads = [wait_path(ledger, first.pid, one), wait_path(ledger, second.pid, two)]
    assert loads[0].library.id == loads[1].library.id
    # Callbacks come after events, and none for what is gone by then.
    ledger.wait_for(lambda: contents, "on_activate was not called")
    first.exit()
    ledger.wait_unload(first.pid, inode(one))
    second.exit()
    ledger.wait_for(lambda: "deactivate" in activations(ledger, loads[0].library.id), "it stayed active")
    assert activations(ledger, loads[0].library.id) == ["activate", "deactivate"]
    assert contents[loads[0].library.id] == [one.read_bytes()]


def test_one_process_that_maps_both_names_of_a_file_has_it_once_until_both_are_gone(
    ledger: Ledger, start: Start, library: NewLibrary
) -> None:
    mapper, one = start(), library("libone.so")
    two = one.with_name("libtwo.so")
    two.hardlink_to(one)
    at, length = mapper.map(one)
    also, _ = mapper.map(two)
    mapper.unmap(at, length)
    is_right(ledger, mapper.pid)
    assert ledger.story(mapper.pid, inode(one)) == [("load", "mmap")]
    mapper.unmap(also, length)
    ledger.wait_unload(mapper.pid, inode(one))


@pytest.mark.parametrize("kind", ["absolute", "relative"])
def test_a_symlink_in_another_root_leads_to_the_file_of_that_root(
    ledger: Ledger,
    start: Start,
    scratch: Path,
    other_library: Callable[[str], Path],
    programs: Any,
    contents: dict[FileId, list[bytes]],
    kind: str,
) -> None:
    """The link's target exists on the host too, where it is another file."""
    decoy = other_library("lib/libtarget.so")
    root = scratch / "root"
    inside = other_library(f"root{decoy}")
    shutil.copyfile(Path(shutil.which("true") or "/bin/true"), decoy)
    link = root / OURS / "liblink.so"
    link.parent.mkdir(parents=True)
    up = "/".join([".."] * len(link.relative_to(root).parent.parts))
    link.symlink_to(decoy if kind == "absolute" else f"{up}{decoy}")
    shutil.copy(programs.variant("mapper", "-static"), link.parent / "mapper")
    mapper = start(with_prelude(scratch, programs["mapper"], f'exec chroot {root} /{OURS}/mapper; "$0"'))
    mapper.map(f"/{OURS}/liblink.so")
    load = wait_path(ledger, mapper.pid, decoy)  # the name of the target, as seen below the root
    assert load.library.id.inode == inode(inside)
    assert load.library.soname == "libtarget.so"
    assert load.library.host_path is not None
    assert os.path.samefile(load.library.host_path, inside)
    ledger.wait_for(lambda: contents.get(load.library.id), "the file was not opened")
    assert contents[load.library.id] == [inside.read_bytes()]
    is_right(ledger, mapper.pid)


def test_a_program_that_no_rule_wants_by_the_path_below_its_root_is_not_missed_by_the_audit(
    ledger: Ledger, start: Start, scratch: Path, programs: Any
) -> None:
    """``/proc`` shows the audit the path on the host, which the rule would want; the process sees ``/mapper``."""
    root = scratch / "root"
    root.mkdir()
    shutil.copy(programs.variant("mapper", "-static"), root / "mapper")
    mapper = start(with_prelude(scratch, programs["mapper"], f'exec chroot {root} /mapper; "$0"'))
    assert str(root) in Path(f"/proc/{mapper.pid}/maps").read_text(encoding="utf-8")
    is_right(ledger, mapper.pid)


# ---- what happens to a file while it is mapped --------------------------------------------------


def test_after_an_upgrade_by_rename_old_and_new_are_two_files_under_one_path(
    ledger: Ledger, start: Start, other_library: Callable[[str], Path], open_ours: Callable[..., Ledger], schema: Any
) -> None:
    old, new = other_library("libupgraded.so"), other_library("libnew.so")
    before, after = start(), start()
    before.map(old)
    first = wait_path(ledger, before.pid, old)
    os.rename(new, old)
    after.map(old)
    second = wait_path(ledger, after.pid, old)
    assert first.library.id != second.library.id
    assert (first.library.soname, second.library.soname) == ("libupgraded.so", "libnew.so")
    assert activations(ledger, first.library.id) == activations(ledger, second.library.id) == ["activate"]
    listed = subprocess.run([SOWATCH, "list", "--stale", "--json", OURS], capture_output=True, check=True)
    stale = [json.loads(line) for line in listed.stdout.splitlines()[1:]]
    assert [(one["process"]["pid"], one["stale"]) for one in stale] == [(before.pid, "replaced")]
    is_right(ledger, before.pid, after.pid)
    snapshot_agrees(ledger, open_ours, before.pid, after.pid)


def test_a_file_deleted_while_it_is_mapped_can_still_be_opened_and_goes_with_its_last_process(
    start: Start,
    library: NewLibrary,
    contents: dict[FileId, list[bytes]],
    open_ours: Callable[..., Ledger],
    closing: contextlib.ExitStack,
) -> None:
    mapper, new = start(), library()
    mapper.map(new)
    content, number = new.read_bytes(), inode(new)
    new.unlink()
    ledger = open_ours()
    load = wait_path(ledger, mapper.pid, new)
    assert (load.library.deleted, load.library.soname) == (True, "libtemplate.so")
    ledger.wait_for(lambda: contents.get(load.library.id), "the deleted file was not opened")
    assert contents[load.library.id] == [content]
    child = closing.enter_context(mapper.fork())
    assert wait_path(ledger, child.pid, new).library.id == load.library.id
    mapper.exit()
    ledger.wait_unload(mapper.pid, number)
    assert activations(ledger, load.library.id) == ["activate"]
    is_right(ledger, child.pid)
    child.exit()
    ledger.wait_for(lambda: "deactivate" in activations(ledger, load.library.id), "it stayed active")


def test_a_file_that_is_deleted_after_its_load_was_told_stays_the_same_file(
    ledger: Ledger, start: Start, library: NewLibrary, open_ours: Callable[..., Ledger]
) -> None:
    mapper, new = start(), library()
    at, length = mapper.map(new)
    load = wait_path(ledger, mapper.pid, new)
    new.unlink()
    is_right(ledger, mapper.pid)
    snapshot_agrees(ledger, open_ours, mapper.pid)
    mapper.unmap(at, length)
    ledger.wait_unload(mapper.pid, load.library.id.inode)
    assert ledger.story(mapper.pid, load.library.id.inode) == [("load", "mmap"), ("unload", "munmap")]


@pytest.mark.parametrize("is_mapped", [True, False])
def test_a_file_that_was_overwritten_in_place_is_the_same_file_with_its_new_facts(
    ledger: Ledger, start: Start, other_library: Callable[[str], Path], is_mapped: bool
) -> None:
    """As ``cp new old`` does it: no name changes, no inode number."""
    old, new = other_library("libold.so"), other_library("libnew.so")
    before, after = start(), start()
    before.map(old)
    first = wait_path(ledger, before.pid, old)
    if not is_mapped:
        before.exit()
        ledger.wait_unload(before.pid, inode(old))
    old.write_bytes(new.read_bytes())
    after.map(old)
    second = wait_path(ledger, after.pid, old)
    assert first.library.id == second.library.id
    assert first.library.soname == "libold.so"
    assert second.library.soname == "libnew.so"
    assert second.library.build_id != first.library.build_id


# ---- overlays -----------------------------------------------------------------------------------


def overlay(at: Path, lower: Path) -> str:
    """Shell commands that make an overlay at ``at`` over ``lower``."""
    return f"""
    mkdir {at} {at}.upper {at}.work
    mount -t overlay -o lowerdir={lower},upperdir={at}.upper,workdir={at}.work none {at}
    """


@pytest.fixture
def in_overlays(
    start: Start, scratch: Path, programs: Any, library: NewLibrary, closing: contextlib.ExitStack
) -> list[Mapper]:
    """Four mappers that see overlays ``a``, ``b``, ``c`` over one lower directory, and ``top/n`` over ``a``."""
    library(f"lower/{LOW}")
    commands = "".join(overlay(scratch / name, scratch / "lower") for name in "abc")
    commands += f"mkdir {scratch}/top; mount -t tmpfs none {scratch}/top" + overlay(scratch / "top/n", scratch / "a")
    first = start(with_prelude(scratch, programs["mapper"], commands, launcher=IN_OWN_MOUNTS))
    return [first, *(closing.enter_context(first.fork()) for _ in range(3))]


def test_one_lower_file_under_several_overlays_is_active_once(
    ledger: Ledger,
    in_overlays: list[Mapper],
    scratch: Path,
    open_ours: Callable[..., Ledger],
    contents: dict[FileId, list[bytes]],
) -> None:
    paths = [scratch / name / LOW for name in ("a", "b", "c", "top/n")]
    for mapper, path in zip(in_overlays, paths, strict=True):
        mapper.map(path)
    loads = [wait_path(ledger, mapper.pid, path) for mapper, path in zip(in_overlays, paths, strict=True)]
    (file_id,) = {load.library.id for load in loads}
    assert file_id.inode == inode(scratch / "lower" / LOW)
    for load in loads:
        assert load.library.host_path is not None
        assert Path(load.library.host_path).read_bytes() == (scratch / "lower" / LOW).read_bytes()
    pids = [mapper.pid for mapper in in_overlays]
    is_right(ledger, *pids)
    ledger.wait_for(lambda: contents.get(file_id), "it was not opened")
    assert len(contents[file_id]) == 1
    snapshot_agrees(ledger, open_ours, *pids)
    for mapper in reversed(in_overlays):
        assert activations(ledger, file_id) == ["activate"]
        mapper.exit()
        ledger.wait_unload(mapper.pid, file_id.inode)
    ledger.wait_for(lambda: activations(ledger, file_id) == ["activate", "deactivate"], "it stayed active")


def test_a_copy_up_makes_a_second_file_for_those_who_map_it_later(
    ledger: Ledger, in_overlays: list[Mapper], scratch: Path, open_ours: Callable[..., Ledger]
) -> None:
    before, after, elsewhere, _ = in_overlays
    path = scratch / "a" / LOW
    before.map(path)
    lower = wait_path(ledger, before.pid, path).library.id
    with open(f"/proc/{before.pid}/root{path}", "ab") as file:
        file.write(b"more")
    after.map(path)
    upper = wait_path(ledger, after.pid, path).library.id
    elsewhere.map(scratch / "b" / LOW)
    assert wait_path(ledger, elsewhere.pid, scratch / "b" / LOW).library.id == lower
    assert upper.inode == os.stat(f"/proc/{before.pid}/root{scratch}/a.upper/{LOW}").st_ino
    assert upper != lower
    assert activations(ledger, lower) == activations(ledger, upper) == ["activate"]
    pids = (before.pid, after.pid, elsewhere.pid)
    is_right(ledger, *pids)
    snapshot_agrees(ledger, open_ours, *pids)


def test_a_file_deleted_in_an_overlay_is_still_its_lower_file_to_who_has_it_mapped(
    ledger: Ledger, in_overlays: list[Mapper], scratch: Path, open_ours: Callable[..., Ledger]
) -> None:
    first, second, *_ = in_overlays
    path = scratch / "a" / LOW
    at, length = first.map(path)
    load = wait_path(ledger, first.pid, path)
    os.unlink(f"/proc/{first.pid}/root{path}")
    second.map(scratch / "b" / LOW)
    assert wait_path(ledger, second.pid, scratch / "b" / LOW).library.id == load.library.id
    is_right(ledger, first.pid, second.pid)
    snapshot_agrees(ledger, open_ours, first.pid, second.pid)
    first.unmap(at, length)
    ledger.wait_unload(first.pid, load.library.id.inode)


# ---- file systems -------------------------------------------------------------------------------

#: Shell commands that make a file system with the files of {0}/content at {0}/m, and what they need.
FILE_SYSTEMS = {
    "tmpfs": ("mount", "mount -t tmpfs none {0}/m; cp {0}/content/* {0}/m"),
    "ext4": (
        "mkfs.ext4",
        "truncate -s 8M {0}/image; mkfs.ext4 -q {0}/image; mount -o loop {0}/image {0}/m; cp {0}/content/* {0}/m",
    ),
    "squashfs": ("mksquashfs", "mksquashfs {0}/content {0}/image >/dev/null; mount -o loop,ro {0}/image {0}/m"),
    "erofs": ("mkfs.erofs", "mkfs.erofs {0}/image {0}/content >/dev/null 2>&1; mount -o loop,ro {0}/image {0}/m"),
    "btrfs": (
        "mkfs.btrfs",
        """truncate -s 128M {0}/image; mkfs.btrfs -q {0}/image >/dev/null; mount -o loop {0}/image {0}/m
        cp {0}/content/* {0}/m""",
    ),
    "overlay over squashfs": (
        "mksquashfs",
        """mkdir {0}/s {0}/u {0}/w; mksquashfs {0}/content {0}/image >/dev/null; mount -o loop,ro {0}/image {0}/s
        mount -t overlay -o lowerdir={0}/s,upperdir={0}/u,workdir={0}/w none {0}/m""",
    ),
    "overlay over tmpfs": (
        "mount",
        """mkdir {0}/t; mount -t tmpfs none {0}/t; mkdir {0}/t/l {0}/t/u {0}/t/w; cp {0}/content/* {0}/t/l
        mount -t overlay -o lowerdir={0}/t/l,upperdir={0}/t/u,workdir={0}/t/w none {0}/m""",
    ),
}


@pytest.mark.parametrize("kind", FILE_SYSTEMS)
def test_on_every_file_system_the_file_is_told_opened_read_and_let_go(
    ledger: Ledger,
    start: Start,
    scratch: Path,
    programs: Any,
    other_library: Callable[[str], Path],
    open_ours: Callable[..., Ledger],
    contents: dict[FileId, list[bytes]],
    kind: str,
) -> None:
    tool, commands = FILE_SYSTEMS[kind]
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    original = other_library("content/libnew.so")
    commands = f"mkdir {scratch}/m; {commands.format(scratch)}"
    mapper = start(with_prelude(scratch, programs["mapper"], commands, launcher=IN_OWN_MOUNTS))
    path = scratch / "m/libnew.so"
    mapper.map(path)
    load = wait_path(ledger, mapper.pid, path)
    assert load.library.soname == "libnew.so"
    assert load.library.host_path is not None
    assert Path(load.library.host_path).read_bytes() == original.read_bytes()
    ledger.wait_for(lambda: contents.get(load.library.id), "it was not opened")
    assert contents[load.library.id] == [original.read_bytes()]
    is_right(ledger, mapper.pid)
    snapshot_agrees(ledger, open_ours, mapper.pid)
    mapper.exit()
    ledger.wait_for(lambda: activations(ledger, load.library.id) == ["activate", "deactivate"], "it stayed active")


def test_files_of_two_btrfs_subvolumes_with_one_inode_number_are_active_each(
    ledger: Ledger, start: Start, scratch: Path, programs: Any, other_library: Callable[[str], Path], open_ours: Any
) -> None:
    if shutil.which("mkfs.btrfs") is None:
        pytest.skip("mkfs.btrfs is not installed (btrfs-progs)")
    one, two = other_library("content/libone.so"), other_library("content/libtwo.so")
    commands = f"""
    mkdir {scratch}/m
    truncate -s 128M {scratch}/image
    mkfs.btrfs -q {scratch}/image >/dev/null
    mount -o loop {scratch}/image {scratch}/m
    btrfs -q subvolume create {scratch}/m/one >/dev/null
    cp {one} {scratch}/m/one/lib.so
    sync -f {scratch}/m
    btrfs -q subvolume snapshot {scratch}/m/one {scratch}/m/two >/dev/null
    cat {two} > {scratch}/m/two/lib.so
    """
    mapper = start(with_prelude(scratch, programs["mapper"], commands, launcher=IN_OWN_MOUNTS))
    loads = []
    for name in ("one", "two"):
        mapper.map(scratch / "m" / name / "lib.so")
        loads.append(wait_path(ledger, mapper.pid, scratch / "m" / name / "lib.so"))
    ids = [load.library.id for load in loads]
    assert ids[0]._replace(subvolume=0) == ids[1]._replace(subvolume=0)
    assert ids[0] != ids[1]
    assert [load.library.soname for load in loads] == ["libone.so", "libtwo.so"]
    assert [activations(ledger, file_id) for file_id in ids] == [["activate"], ["activate"]]
    is_right(ledger, mapper.pid)
    snapshot_agrees(ledger, open_ours, mapper.pid)


def test_a_new_file_that_gets_the_inode_number_of_the_last_one_is_another_file(
    ledger: Ledger, start: Start, scratch: Path, programs: Any, other_library: Callable[[str], Path]
) -> None:
    """ext4 gives a number out again at once; only the generation tells."""
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is not installed (e2fsprogs)")
    other_library("content/libone.so")
    commands = f"""
    mkdir {scratch}/m
    truncate -s 8M {scratch}/image
    mkfs.ext4 -q {scratch}/image
    mount -o loop {scratch}/image {scratch}/m
    """
    mapper = start(with_prelude(scratch, programs["mapper"], commands, launcher=IN_OWN_MOUNTS))
    path = scratch / "m/libnew.so"
    outside = Path(f"/proc/{mapper.pid}/root{path}")
    reported = []
    for name in ("libone.so", "libtwo.so"):
        outside.write_bytes(other_library(f"content/{name}").read_bytes())
        at, length = mapper.map(path)
        number = inode(outside)
        reported.append(ledger.wait_load(mapper.pid, number).library)
        mapper.unmap(at, length)
        ledger.wait_unload(mapper.pid, number)
        outside.unlink()
    assert reported[0].id.inode == reported[1].id.inode, "the number did not come again, so the test shows nothing"
    assert reported[0].id.generation != reported[1].id.generation
    assert [one.soname for one in reported] == ["libone.so", "libtwo.so"]
    assert [activations(ledger, one.id) for one in reported] == [["activate", "deactivate"]] * 2
