"""Whether a mapped file is still the one on disk: real files, mounts and processes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from sowatch.inventory.staleness import FRESH, Disk, StaleAnswer, Staleness, seen_at
from sowatch.linux.proc import ProcFs
from sowatch.linux.proc_parse import MapRow
from sowatch.model.events import Library, Process
from sowatch.model.identity import TICK_NS, FileId
from support.programs import Mapper
from support.silent_fs import SilentFileSystem

Mapped = tuple[Process, Library, tuple[tuple[int, int], ...]]


def look(process: Process, library: Library, ranges: tuple[tuple[int, int], ...]) -> StaleAnswer:
    with Disk() as disk:
        return disk.staleness(process, library, ranges)


@pytest.fixture
def mapper(programs: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapper]:
    with Mapper(programs["mapper"], tmp_path_factory.mktemp("s")) as running:
        yield running


def mapped(pid: int, wanted: Callable[[MapRow], bool]) -> tuple[Process, Library, tuple[tuple[int, int], ...]]:
    """A mapping as the watcher would tell it, read from the process's maps."""
    rows = ProcFs().executable_maps(pid)
    assert isinstance(rows, list)
    [row] = [row for row in rows if wanted(row)]
    stats = ProcFs().stat(pid)
    assert stats
    library = Library(
        path=os.fsdecode(row.path),
        id=FileId(row.major, row.minor, row.inode),
        deleted=row.is_deleted,
    )
    return Process(pid, stats.start_ns), library, ((row.start, row.end),)


def named(path: Path) -> Callable[[MapRow], bool]:
    return lambda row: row.path == os.fsencode(path)


def test_a_library_that_is_still_there_is_not_stale(mapper: Mapper, make_library: Any) -> None:
    library = make_library("libfresh.so")
    mapper.map(library)

    assert look(*mapped(mapper.pid, named(library))) == FRESH


def test_a_library_whose_name_is_gone_is_deleted(mapper: Mapper, make_library: Any) -> None:
    library = make_library("libgone.so")
    mapper.map(library)
    library.unlink()

    assert look(*mapped(mapper.pid, named(library))).stale is Staleness.DELETED


def test_a_library_deleted_after_its_event_is_deleted(mapper: Mapper, make_library: Any) -> None:
    library = make_library("liblater.so")
    mapper.map(library)
    process, reported, ranges = mapped(mapper.pid, named(library))
    library.unlink()

    assert not reported.deleted
    assert look(process, reported, ranges).stale is Staleness.DELETED


def test_a_name_that_is_out_of_reach_is_not_called_deleted(mapper: Mapper, make_library: Any) -> None:
    library = make_library("libfar.so")
    mapper.map(library)
    process, reported, ranges = mapped(mapper.pid, named(library))

    assert look(process, replace(reported, path="/other/root/libfar.so"), ranges) == FRESH


def test_a_library_that_an_upgrade_renamed_over_is_replaced(mapper: Mapper, make_library: Any) -> None:
    library = make_library("libold.so")
    mapper.map(library)
    make_library("libold.so.new").rename(library)

    assert look(*mapped(mapper.pid, named(library))).stale is Staleness.REPLACED


@pytest.mark.parametrize(("exports", "is_same_build"), [((), True), (("other",), False)])
def test_whether_the_new_file_is_the_same_build_is_known_by_its_build_id(
    mapper: Mapper, make_library: Any, exports: tuple[str, ...], is_same_build: bool
) -> None:
    library = make_library("libbuilt.so")
    mapper.map(library)
    make_library("new/libbuilt.so", exports).rename(library)

    answer = look(*mapped(mapper.pid, named(library)))

    assert answer == StaleAnswer(Staleness.REPLACED, is_same_build=is_same_build)


def test_a_library_that_was_written_to_after_the_start_of_its_process_is_modified(
    programs: Mapping[str, Path], make_library: Any, tmp_path: Path, wait_until: Any
) -> None:
    library = make_library("libwritten.so")
    data = library.read_bytes()
    made_ns = library.stat().st_ctime_ns
    wait_until(lambda: time.time_ns() > made_ns + 3 * TICK_NS, what="a start that is certainly later")
    with Mapper(programs["mapper"], tmp_path) as running:
        running.map(library)
        reported = mapped(running.pid, named(library))
        assert look(*reported) == FRESH

        def is_modified() -> bool:
            library.write_bytes(data)
            return look(*reported).stale is Staleness.MODIFIED

        wait_until(is_modified, what="a clock that is past the start of the process")
        written = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(library.stat().st_mtime))
        assert look(*reported).reason == f"it was written to at {written}, after its process had started"
        os.utime(library, (time.time() + 3600,) * 2)  # by a clock that nobody knows
        assert look(*reported) == FRESH


def test_a_library_that_was_made_after_the_start_of_its_process_is_modified_only_if_its_load_was_seen(
    mapper: Mapper, make_library: Any, wait_until: Any
) -> None:
    library = make_library("liblater.so")
    data = library.read_bytes()
    mapper.map(library)
    loaded_ns = time.time_ns()
    reported = mapped(mapper.pid, named(library))

    def is_modified() -> bool:
        library.write_bytes(data)
        with Disk() as disk:
            return disk.staleness(*reported, loaded_ns=loaded_ns).stale is Staleness.MODIFIED

    with Disk() as disk:
        assert disk.staleness(*reported, loaded_ns=loaded_ns) == FRESH
    wait_until(is_modified, what="a clock that is past the load")
    assert look(*reported) == FRESH


@pytest.mark.parametrize("cause", ["fork", "snapshot", "repair", None])
def test_only_a_load_that_was_seen_says_when_a_file_was_mapped(cause: str | None) -> None:
    assert seen_at(cause, 5) is None
    assert [seen_at("mmap", 5), seen_at("exec", 5)] == [5, 5]


def test_a_library_replaced_by_a_file_of_another_kind_is_replaced(mapper: Mapper, make_library: Any) -> None:
    library = make_library("libfifo.so")
    mapper.map(library)
    library.unlink()
    os.mkfifo(library)

    assert look(*mapped(mapper.pid, named(library))).stale is Staleness.REPLACED


def test_a_library_whose_directory_was_replaced_by_a_file_is_deleted(mapper: Mapper, make_library: Any) -> None:
    library = make_library("dir/libinside.so")
    mapper.map(library)
    library.unlink()
    library.parent.rmdir()
    library.parent.touch()

    assert look(*mapped(mapper.pid, named(library))).stale is Staleness.DELETED


def test_a_library_whose_link_was_put_back_is_not_stale(mapper: Mapper, make_library: Any) -> None:
    library = make_library("libback.so")
    other = library.with_name("other-name")
    os.link(library, other)
    mapper.map(library)
    library.unlink()
    process, reported, ranges = mapped(mapper.pid, named(library))
    os.link(other, library)

    assert reported.deleted
    assert look(process, reported, ranges) == FRESH


@pytest.mark.parametrize(
    ("moved_to", "stale"),
    [("libmoved.so", None), ("libone.so.old", Staleness.REPLACED), ("libone.so~", Staleness.REPLACED)],
)
def test_a_library_that_was_renamed_is_judged_under_its_new_name_whether_its_load_was_seen_or_not(
    mapper: Mapper, make_library: Any, moved_to: str, stale: Staleness | None
) -> None:
    library = make_library("libone.so")
    mapper.map(library)
    seen_loading = mapped(mapper.pid, named(library))
    moved = library.rename(library.with_name(moved_to))
    make_library("libone.so")
    found_later = mapped(mapper.pid, named(moved))

    assert not found_later[1].deleted
    assert [look(*seen_loading).stale, look(*found_later).stale] == [stale, stale]


def test_the_kernels_identity_decides_where_the_range_is_no_mapping_any_more(mapper: Mapper, make_library: Any) -> None:
    library = make_library("libmerged.so")
    mapper.map(library)
    process, reported, _ = mapped(mapper.pid, named(library))
    nowhere = ((0x1000, 0x2000),)

    assert look(process, reported, nowhere) == FRESH
    make_library("libmerged.so.new").rename(library)
    assert look(process, reported, nowhere).stale is Staleness.REPLACED


def test_a_memfd_is_never_stale(mapper: Mapper, make_library: Any) -> None:
    mapper.emit("memfd", "libjit.so", make_library("libjit.so"))

    process, reported, ranges = mapped(mapper.pid, lambda row: row.path.startswith(b"/memfd:libjit.so"))

    assert reported.deleted
    assert look(process, reported, ranges) == FRESH


def test_sysv_memory_is_never_stale(mapper: Mapper) -> None:
    mapper.emit("shm", 4096)

    process, reported, ranges = mapped(mapper.pid, lambda row: row.path.startswith(b"/SYSV"))

    assert reported.deleted
    assert look(process, reported, ranges) == FRESH


def test_nothing_is_stale_for_a_process_that_is_gone(mapper: Mapper, make_library: Any) -> None:
    library = make_library("libghost.so")
    mapper.map(library)
    library.unlink()
    reported = mapped(mapper.pid, named(library))
    mapper.exit()

    assert look(*reported) == FRESH


def test_a_process_whose_leader_has_exited_is_looked_at_through_another_thread(
    mapper: Mapper, make_library: Any, wait_until: Any
) -> None:
    library = make_library("libdeadleader.so")
    mapper.map(library)
    mapper.emit("leaderexit")
    wait_until(lambda: (found := ProcFs().stat(mapper.pid)) and found.is_dead, what="the end of the leader")
    reported = mapped(mapper.pid, named(library))

    assert look(*reported) == FRESH
    make_library("libdeadleader.so.new").rename(library)
    assert look(*reported).stale is Staleness.REPLACED


def test_the_path_is_looked_up_in_the_root_of_the_process(spawn: Any, make_library: Any, tmp_path: Path) -> None:
    jail = tmp_path / "jail"
    library = make_library("jail/lib/libjailed.so")
    code = (
        "import ctypes, os, sys\n"
        "if os.geteuid(): ctypes.CDLL(None).unshare(0x10000000)\n"  # CLONE_NEWUSER brings CAP_SYS_CHROOT
        "ctypes.CDLL(sys.argv[2]); os.chroot(sys.argv[1]); print(flush=True); sys.stdin.read()\n"
    )
    process = spawn([sys.executable, "-c", code, jail, library], stdin=-1, stdout=-1)
    assert process.stdout.readline() == b"\n"
    who, reported, ranges = mapped(process.pid, named(library))
    there = Library(path="/lib/libjailed.so", id=reported.id)
    gone = Library(path="/lib/libjailed.so", id=reported.id, deleted=True)

    assert look(who, there, ranges) == FRESH
    library.unlink()
    library.symlink_to("/etc/passwd")  # which the jail has not
    assert look(who, gone, ranges).stale is Staleness.DELETED
    (jail / "etc").mkdir()
    (jail / "etc/passwd").touch()
    assert look(who, gone, ranges).stale is Staleness.REPLACED


# --- what a path leads to, in the process's own view ----------------------------------------------

#: Loads the library argv[1] and then does what argv[3] says, in mounts of its own; argv[2] is a directory.
IN_OWN_MOUNTS = """
import ctypes, os, sys
library, where, then = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
def check(result):
    assert not result, os.strerror(ctypes.get_errno())
def mount(source, target, kind=None, flags=0):
    check(libc.mount(os.fsencode(source), os.fsencode(target), kind, flags, None))
check(libc.unshare(0x00020000 | (0x10000000 if os.geteuid() else 0)))
mount("none", "/", None, 0x4000 | 0x40000)
exec(then)
print(flush=True)
sys.stdin.read()
"""
TMPFS = "mount('fresh', where, b'tmpfs')"
#: mmap, because the loader takes one library for another of the same path.
COPY = """
import mmap, shutil
kept = globals().setdefault('kept', [])
with open(shutil.copy(library, where), 'rb') as file:
    kept.append(mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC))
"""


@pytest.fixture
def there(spawn: Any) -> Callable[..., int]:
    """``there(library, where, then)`` is the pid of a process that did that."""

    def start(library: Path, where: Path, then: str) -> int:
        where.mkdir(exist_ok=True)
        process = spawn([sys.executable, "-c", IN_OWN_MOUNTS, library, where, then], stdin=-1, stdout=-1)
        assert process.stdout.readline() == b"\n"
        return int(process.pid)

    return start


def ends_with(name: str) -> Callable[[MapRow], bool]:
    return lambda row: row.path.endswith(os.fsencode(name))


def test_after_a_chroot_it_is_unknown_whether_what_lies_outside_is_stale(
    there: Any, make_library: Any, tmp_path: Path
) -> None:
    library = make_library("libouter.so")
    decoy = make_library(f"jail{library}")  # what the same path leads to by then
    reported = mapped(there(library, tmp_path / "jail", "ctypes.CDLL(library); os.chroot(where)"), named(library))

    assert decoy.exists()
    assert look(*reported)[:2] == (Staleness.UNKNOWN, "it lies outside the root directory that the process has now")
    library.unlink()
    assert look(*reported).stale is Staleness.DELETED


def test_a_file_of_a_file_system_that_was_unmounted_meanwhile_is_unknown_even_if_its_path_leads_to_another(
    there: Any, make_library: Any, tmp_path: Path
) -> None:
    library = make_library("libdetached.so")
    where = tmp_path / "mnt"
    where.mkdir()
    seen_at = where / library.name
    pid = there(library, where, f"{TMPFS}{COPY}check(libc.umount2(os.fsencode(where), 2))")
    process, later, ranges = mapped(pid, ends_with(library.name))
    while_it_was_mounted = replace(later, path=str(seen_at))

    assert look(process, later, ranges).stale is Staleness.UNKNOWN
    make_library(f"mnt/{library.name}")  # below the mount point, where nothing was
    assert look(process, while_it_was_mounted, ranges).stale is Staleness.UNKNOWN


def test_a_path_that_another_mount_covers_is_unknown(there: Any, make_library: Any, tmp_path: Path) -> None:
    library = make_library("libcovered.so")
    pid = there(library, tmp_path / "mnt", f"{TMPFS}{COPY}{TMPFS}{COPY}")
    rows = ProcFs().executable_maps(pid)
    assert isinstance(rows, list)
    lower, upper = sorted((row for row in rows if row.path.endswith(b"/libcovered.so")), key=lambda row: row.minor)

    def reported(row: MapRow) -> Mapped:
        return mapped(pid, lambda other: other.start == row.start)

    assert look(*reported(lower)) == StaleAnswer(
        Staleness.UNKNOWN, "its path leads to another mount: its own was covered or unmounted"
    )
    assert look(*reported(upper)) == FRESH


def test_a_file_that_is_bound_over_itself_is_not_stale(there: Any, make_library: Any, tmp_path: Path) -> None:
    library = make_library("libbound.so")
    then = "ctypes.CDLL(library); mount(library, library, None, 0x1000)"

    assert look(*mapped(there(library, tmp_path / "mnt", then), named(library))) == FRESH


def test_what_was_replaced_behind_a_copy_of_its_mount_is_replaced(
    there: Any, make_library: Any, tmp_path: Path
) -> None:
    library = make_library("libcopied.so")
    then = "ctypes.CDLL(library); check(libc.unshare(0x00020000))"
    pid = there(library, tmp_path / "mnt", then)
    make_library("libcopied.so.new").rename(library)

    assert look(*mapped(pid, named(library))).stale is Staleness.REPLACED


@pytest.mark.parametrize("directory", ["memfd:jit", "SYSV00000000", "dev/zero", "anon_hugepage", "[vdso]", "proc"])
def test_a_real_library_below_a_directory_that_is_named_like_memory_is_stale_like_any_other(
    there: Any, make_library: Any, tmp_path: Path, directory: str
) -> None:
    jail = tmp_path / "jail"
    library = make_library(f"jail/{directory}/libreal.so")
    inside = Path("/", directory, "libreal.so")
    pid = there(library, jail, f"os.chroot(where); ctypes.CDLL({str(inside)!r})")
    process, reported, ranges = mapped(pid, named(library))
    seen = replace(reported, path=str(inside))

    assert look(process, seen, ranges) == FRESH
    make_library(f"jail/{directory}/libreal.so.2").rename(library)
    assert look(process, seen, ranges).stale is Staleness.REPLACED
    library.unlink()
    assert look(process, seen, ranges).stale is Staleness.DELETED


@pytest.mark.parametrize(
    ("kept_as", "at_base", "answer"),
    [
        (".nfs0000000000a1b2c300000007", True, (Staleness.DELETED, None)),
        (".nfs0000000000a1b2c300000007", False, (Staleness.DELETED, None)),
        ("libkept.so.dpkg-new", True, (Staleness.REPLACED, "libkept.so")),
        ("libkept.so.dpkg-new", False, (Staleness.DELETED, "libkept.so")),
        ("libkept.so;5f3a2b1c", True, (Staleness.REPLACED, "libkept.so")),
        ("libkept.so;5f3a2b1c", False, (Staleness.DELETED, "libkept.so")),
        ("libkept.so.old", True, (Staleness.REPLACED, "libkept.so")),
        ("libkept.so.old", False, (None, None)),
    ],
)
def test_a_file_that_is_kept_under_such_a_name_is_stale_under_its_base_name(
    mapper: Mapper, make_library: Any, kept_as: str, at_base: bool, answer: tuple[Staleness | None, str | None]
) -> None:
    library = make_library("libkept.so")
    kept = library.rename(library.with_name(kept_as))
    mapper.map(kept)
    if at_base:
        make_library("libkept.so")
    stale, base = answer

    found = look(*mapped(mapper.pid, named(kept)))

    assert (found.stale, found.path) == (stale, base and str(library.with_name(base)))


def test_a_rest_of_an_installer_that_was_deleted_too_is_stale_under_its_base_name(
    mapper: Mapper, make_library: Any
) -> None:
    library = make_library("librest.so;5f3a2b1c")
    mapper.map(library)
    library.unlink()
    reported = mapped(mapper.pid, named(library))
    base = library.with_name("librest.so")

    assert look(*reported) == StaleAnswer(Staleness.DELETED, None, str(base))
    make_library("librest.so")
    assert look(*reported)[:3] == (Staleness.REPLACED, None, str(base))


def test_a_name_that_ends_like_the_kernels_mark_is_no_mark(mapper: Mapper, make_library: Any) -> None:
    library = make_library("libnamed.so (deleted)")
    mapper.map(library)
    reported = mapped(mapper.pid, named(library.with_name("libnamed.so")))

    assert reported[1].deleted
    assert look(*reported) == FRESH
    library.unlink()
    assert look(*reported).stale is Staleness.DELETED


def test_a_process_that_may_not_be_looked_at_is_unknown(make_library: Any, spawn: Any, programs: Any) -> None:
    """By nobody, of a process of root."""
    code = (
        "import os, sys\n"
        "from sowatch.inventory.staleness import Disk\n"
        "from sowatch.linux.proc import ProcFs\n"
        "from sowatch.model.events import Library, Process\n"
        "from sowatch.model.identity import FileId\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "process = Process(os.getppid(), ProcFs().stat(os.getppid()).start_ns)\n"
        "for deleted in (False, True):\n"
        "    library = Library('/usr/lib/libz.so.1', FileId(254, 0, 99), deleted=deleted)\n"
        "    print(*Disk().staleness(process, library)[:2], sep=': ')\n"
    )
    asked = spawn([sys.executable, "-c", code], stdout=-1)

    assert asked.communicate()[0].decode().splitlines() == [
        "unknown: this user may not read the process",
        "deleted: None",
    ]


# --- file systems that do not answer -------------------------------------------------------------


def test_a_file_system_that_does_not_answer_is_unknown_and_keeps_nobody_else_waiting(
    make_library: Any, tmp_path: Path
) -> None:
    (tmp_path / "mnt").mkdir()
    honest = make_library("libhonest.so")
    with SilentFileSystem(tmp_path / "mnt", make_library("libserved.so"), honest) as silent, Disk() as disk:
        assert look(*mapped(silent.pid, named(silent.path))) == FRESH
        silent.fall_silent()
        assert disk.staleness(*mapped(silent.pid, named(silent.path))) == StaleAnswer(
            Staleness.UNKNOWN, "its file system does not answer"
        )
        assert silent.asked.is_set()
        assert disk.staleness(*mapped(silent.pid, named(honest))) == FRESH
        make_library("libhonest.so.new").rename(honest)
        assert look(*mapped(silent.pid, named(honest))).stale is Staleness.REPLACED
