"""Who owns a file, what runs it, and whether it is still the one on disk: real files, real processes."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sowatch.inventory import packages
from sowatch.inventory.packages import Disk, Staleness, is_on_disk
from sowatch.linux.openat import open_below
from sowatch.linux.proc import MapRow, ProcFs
from sowatch.model.events import Library, Process
from sowatch.model.identity import FileId
from support.programs import Mapper

# --- opening below a root -----------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory that plays a container's root; beside it lies a file that is none of its business."""
    (tmp_path / "secret").write_text("the host's")
    inside = tmp_path / "root"
    inside.mkdir()
    return inside


@pytest.fixture
def root_fd(root: Path) -> Iterator[int]:
    fd = os.open(root, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def content(root_fd: int, path: str) -> str:
    with os.fdopen(open_below(root_fd, path, os.O_RDONLY)) as file:
        return file.read()


def test_an_absolute_link_is_followed_inside_the_root(root: Path, root_fd: int) -> None:
    (root / "secret").write_text("the container's")
    (root / "link").symlink_to("/secret")

    assert content(root_fd, "/link") == "the container's"


def test_an_absolute_link_does_not_lead_to_the_hosts_file(root: Path, root_fd: int, tmp_path: Path) -> None:
    (root / "link").symlink_to(tmp_path / "secret")

    with pytest.raises(FileNotFoundError):
        content(root_fd, "/link")


def test_dots_do_not_lead_out_of_the_root(root: Path, root_fd: int) -> None:
    (root / "link").symlink_to("../secret")

    with pytest.raises(FileNotFoundError):
        content(root_fd, "/link")
    with pytest.raises(FileNotFoundError):
        content(root_fd, "/../../secret")


def test_a_link_of_proc_is_refused(root: Path, root_fd: int) -> None:
    proc_fd = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    try:
        with pytest.raises(OSError, match="symbolic links"):
            open_below(proc_fd, "/self/root/etc/passwd", os.O_RDONLY)
    finally:
        os.close(proc_fd)


def test_opening_a_fifo_does_not_wait_for_its_writer(root: Path, root_fd: int) -> None:
    os.mkfifo(root / "fifo")

    os.close(open_below(root_fd, "/fifo", os.O_RDONLY))


def test_what_was_opened_is_not_inherited_by_programs(root: Path, root_fd: int) -> None:
    (root / "file").touch()

    fd = open_below(root_fd, "/file", os.O_RDONLY)

    assert not os.get_inheritable(fd)
    os.close(fd)


# --- staleness ----------------------------------------------------------------------------------


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

    assert Disk().staleness(*mapped(mapper.pid, named(library))) is None


def test_a_library_whose_name_is_gone_is_deleted(mapper: Mapper, make_library: Any) -> None:
    library = make_library("libgone.so")
    mapper.map(library)
    library.unlink()

    assert Disk().staleness(*mapped(mapper.pid, named(library))) is Staleness.DELETED


def test_a_library_deleted_after_its_event_is_deleted(mapper: Mapper, make_library: Any) -> None:
    library = make_library("liblater.so")
    mapper.map(library)
    process, told, ranges = mapped(mapper.pid, named(library))
    library.unlink()

    assert not told.deleted
    assert Disk().staleness(process, told, ranges) is Staleness.DELETED


def test_a_name_that_is_out_of_reach_is_not_called_deleted(mapper: Mapper, make_library: Any) -> None:
    library = make_library("libfar.so")
    mapper.map(library)
    process, told, ranges = mapped(mapper.pid, named(library))

    assert Disk().staleness(process, replace(told, path="/other/root/libfar.so"), ranges) is None


def test_a_library_that_an_upgrade_renamed_over_is_replaced(mapper: Mapper, make_library: Any) -> None:
    library = make_library("libold.so")
    mapper.map(library)
    make_library("libold.so.new").rename(library)

    assert Disk().staleness(*mapped(mapper.pid, named(library))) is Staleness.REPLACED


def test_a_library_replaced_by_a_file_of_another_kind_is_replaced(mapper: Mapper, make_library: Any) -> None:
    library = make_library("libfifo.so")
    mapper.map(library)
    library.unlink()
    os.mkfifo(library)

    assert Disk().staleness(*mapped(mapper.pid, named(library))) is Staleness.REPLACED


def test_a_library_whose_directory_was_replaced_by_a_file_is_deleted(mapper: Mapper, make_library: Any) -> None:
    library = make_library("dir/libinside.so")
    mapper.map(library)
    library.unlink()
    library.parent.rmdir()
    library.parent.touch()

    assert Disk().staleness(*mapped(mapper.pid, named(library))) is Staleness.DELETED


def test_a_library_whose_link_was_put_back_is_not_stale(mapper: Mapper, make_library: Any) -> None:
    library = make_library("libback.so")
    other = library.with_name("other-name")
    os.link(library, other)
    mapper.map(library)
    library.unlink()
    process, told, ranges = mapped(mapper.pid, named(library))
    os.link(other, library)

    assert told.deleted
    assert Disk().staleness(process, told, ranges) is None


def test_a_path_that_names_another_file_than_the_mapped_one_is_replaced_even_if_the_kernel_calls_none_deleted(
    mapper: Mapper, make_library: Any
) -> None:
    library = make_library("libone.so")
    mapper.map(library)
    process, told, ranges = mapped(mapper.pid, named(library))
    library.rename(library.with_name("libmoved.so"))
    make_library("libone.so")

    assert not told.deleted
    assert Disk().staleness(process, told, ranges) is Staleness.REPLACED


def test_the_kernels_identity_decides_where_the_range_is_no_mapping_any_more(mapper: Mapper, make_library: Any) -> None:
    library = make_library("libmerged.so")
    mapper.map(library)
    process, told, _ = mapped(mapper.pid, named(library))
    nowhere = ((0x1000, 0x2000),)

    assert Disk().staleness(process, told, nowhere) is None
    make_library("libmerged.so.new").rename(library)
    assert Disk().staleness(process, told, nowhere) is Staleness.REPLACED


def test_a_memfd_is_never_stale(mapper: Mapper, make_library: Any) -> None:
    mapper.tell("memfd", "libjit.so", make_library("libjit.so"))

    process, told, ranges = mapped(mapper.pid, lambda row: row.path.startswith(b"/memfd:libjit.so"))

    assert told.deleted
    assert Disk().staleness(process, told, ranges) is None


def test_sysv_memory_is_never_stale(mapper: Mapper) -> None:
    mapper.tell("shm", 4096)

    process, told, ranges = mapped(mapper.pid, lambda row: row.path.startswith(b"/SYSV"))

    assert told.deleted
    assert Disk().staleness(process, told, ranges) is None


@pytest.mark.parametrize(
    ("path", "kind", "answer"),
    [
        ("/usr/lib/libz.so.1", "library", True),
        ("/dev/shm/libz.so.1", "library", True),
        ("/memfd:libz.so.1", "library", False),
        ("/SYSV00001234", "library", False),
        ("/dev/zero", "library", False),
        ("/dev/nvidia0", "other", False),
        ("[vdso]", "library", False),
        ("(unreachable)/lib/libz.so", "library", False),
    ],
)
def test_memory_without_a_file_is_not_on_disk(path: str, kind: str, answer: bool) -> None:
    assert is_on_disk(Library(path=path, id=FileId(0, 1, 2), kind=kind, deleted=True)) is answer


def test_nothing_is_stale_for_a_process_that_is_gone(mapper: Mapper, make_library: Any) -> None:
    library = make_library("libghost.so")
    mapper.map(library)
    library.unlink()
    told = mapped(mapper.pid, named(library))
    mapper.exit()

    assert Disk().staleness(*told) is None


def test_a_process_whose_leader_has_exited_is_looked_at_through_another_thread(
    mapper: Mapper, make_library: Any, wait_until: Any
) -> None:
    library = make_library("libdeadleader.so")
    mapper.map(library)
    mapper.tell("leaderexit")
    wait_until(lambda: (found := ProcFs().stat(mapper.pid)) and found.is_dead, what="the end of the leader")
    told = mapped(mapper.pid, named(library))

    assert Disk().staleness(*told) is None
    make_library("libdeadleader.so.new").rename(library)
    assert Disk().staleness(*told) is Staleness.REPLACED


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
    who, told, ranges = mapped(process.pid, named(library))
    there = Library(path="/lib/libjailed.so", id=told.id)
    gone = Library(path="/lib/libjailed.so", id=told.id, deleted=True)

    assert Disk().staleness(who, there, ranges) is None
    library.unlink()
    library.symlink_to("/etc/passwd")  # which the jail has not
    assert Disk().staleness(who, gone, ranges) is Staleness.DELETED
    (jail / "etc").mkdir()
    (jail / "etc/passwd").touch()
    assert Disk().staleness(who, gone, ranges) is Staleness.REPLACED


# --- owners -------------------------------------------------------------------------------------


def debian(root: Path, lists: Mapping[str, str], diversions: str = "") -> None:
    info = root / "var/lib/dpkg/info"
    info.mkdir(parents=True, exist_ok=True)
    for package, files in lists.items():
        (info / f"{package}.list").write_text(files, encoding="utf-8", errors="surrogateescape")
    (info.parent / "diversions").write_text(diversions)


def owner(root_fd: int, path: str) -> str | None:
    return packages._dpkg_owners(root_fd, [path])[path]


def test_dpkg_knows_the_owner_of_a_file_by_its_list(root: Path, root_fd: int) -> None:
    debian(root, {"libssl3:amd64": "/.\n/usr/lib\n/usr/lib/libssl.so.3\n", "zlib1g": "/usr/lib/libz.so.1\n"})

    assert owner(root_fd, "/usr/lib/libssl.so.3") == "libssl3:amd64"
    assert owner(root_fd, "/usr/lib/libz.so.1") == "zlib1g"
    assert owner(root_fd, "/usr/lib/libssl.so") is None
    assert owner(root_fd, "/lib/libssl") is None


def test_names_that_are_not_utf8_have_owners_too(root: Path, root_fd: int) -> None:
    debian(root, {"odd": "/usr/lib/lib\udcff.so\n"})

    assert owner(root_fd, "/usr/lib/lib\udcff.so") == "odd"


@pytest.mark.parametrize(("listed", "seen"), [("/lib/libc.so.6", "/usr/lib/libc.so.6"), ("/usr/bin/sh", "/bin/sh")])
def test_a_merged_usr_is_looked_through_both_ways(root: Path, root_fd: int, listed: str, seen: str) -> None:
    debian(root, {"base": f"{listed}\n"})

    assert owner(root_fd, seen) == "base"


def test_the_literal_name_beats_the_one_through_a_merged_usr(root: Path, root_fd: int) -> None:
    debian(root, {"a-old": "/lib/libx.so\n", "new": "/usr/lib/libx.so\n", "z-old": "/lib/libx.so\n"})

    assert owner(root_fd, "/usr/lib/libx.so") == "new"


def test_other_directories_below_usr_are_no_alias(root: Path, root_fd: int) -> None:
    debian(root, {"wrong": "/local/lib/libx.so\n"})

    assert owner(root_fd, "/usr/local/lib/libx.so") is None


DIVERTED = "/usr/lib/libgl.so\n/usr/lib/mesa/libgl.so\nvendor-gl\n"


def test_a_diverted_file_belongs_to_the_package_that_lists_its_original_name(root: Path, root_fd: int) -> None:
    debian(root, {"mesa": "/usr/lib/libgl.so\n", "vendor-gl:amd64": "/usr/lib/libgl.so\n"}, DIVERTED)

    assert owner(root_fd, "/usr/lib/mesa/libgl.so") == "mesa"


def test_the_original_name_of_a_diverted_file_belongs_to_the_package_that_diverted_it(root: Path, root_fd: int) -> None:
    debian(root, {"mesa": "/usr/lib/libgl.so\n", "vendor-gl:amd64": "/usr/lib/libgl.so\n"}, DIVERTED)

    assert owner(root_fd, "/usr/lib/libgl.so") == "vendor-gl:amd64"


def test_a_diversion_is_looked_through_a_merged_usr(root: Path, root_fd: int) -> None:
    debian(root, {"base": "/lib/libm.so\n"}, "/lib/libm.so\n/lib/libm.so.real\nother\n")

    assert owner(root_fd, "/usr/lib/libm.so.real") == "base"


def test_what_lies_at_the_original_name_of_a_local_diversion_belongs_to_nobody(root: Path, root_fd: int) -> None:
    debian(root, {"perf": "/usr/bin/perf\n"}, "/usr/bin/perf\n/usr/bin/perf.distrib\n:\n")

    assert owner(root_fd, "/usr/bin/perf") is None
    assert owner(root_fd, "/usr/bin/perf.distrib") == "perf"


def test_a_database_that_is_a_link_out_of_the_root_is_not_read(root: Path, root_fd: int, tmp_path: Path) -> None:
    debian(tmp_path / "host", {"hosts": "/usr/lib/libz.so.1\n"})
    (root / "var/lib").mkdir(parents=True)
    (root / "var/lib/dpkg").symlink_to(tmp_path / "host/var/lib/dpkg")

    assert owner(root_fd, "/usr/lib/libz.so.1") is None


def test_fifos_sockets_and_oversized_files_in_a_database_are_passed_over(
    root: Path, root_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    debian(root, {"good": "/usr/lib/libz.so.1\n", "huge": "/usr/lib/libz.so.1\n" * 100})
    info = root / "var/lib/dpkg/info"
    os.mkfifo(info / "fifo.list")
    (info / "directory.list").mkdir()
    monkeypatch.chdir(info)  # the name of a socket may have 107 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.list")
    monkeypatch.setattr(packages, "_MAX_LIST_BYTES", 1000)

    assert owner(root_fd, "/usr/lib/libz.so.1") == "good"


def test_reading_a_database_ends_at_a_size_no_honest_one_has(
    root: Path, root_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    debian(root, {f"package{number}": "/usr/lib/libz.so.1\n" for number in range(20)})
    monkeypatch.setattr(packages, "_MAX_DATABASE_BYTES", 50)

    assert len(list(packages._dpkg_lists(root_fd))) == 3


APK = """\
C:Q1abc=
P:musl
V:1.2.5-r0
F:lib
R:ld-musl-x86_64.so.1
a:0:0:755
R:libc.musl-x86_64.so.1

P:libssl3
V:3.3.2-r0
F:usr
F:usr/lib
R:libssl.so.3
Z:Q1def=

P:rootfile
F:
R:top.so
"""


@pytest.mark.parametrize("place", ["lib/apk/db", "usr/lib/apk/db"])
def test_apk_knows_the_owner_of_a_file_by_package_directory_and_name(root: Path, root_fd: int, place: str) -> None:
    (root / place).mkdir(parents=True)
    (root / place / "installed").write_text(APK)
    paths = ["/lib/libc.musl-x86_64.so.1", "/usr/lib/libssl.so.3", "/lib/libssl.so.3", "/lib/libz.so.1", "/top.so"]

    assert packages._apk_owners(root_fd, paths) == {
        "/lib/libc.musl-x86_64.so.1": "musl",
        "/usr/lib/libssl.so.3": "libssl3",
        "/lib/libssl.so.3": "libssl3",  # through a merged /usr
        "/lib/libz.so.1": None,
        "/top.so": "rootfile",
    }


#: What rpm 4.18 answers, verbatim but for the name of the package.
RPM = """#!/bin/sh
test "$*" = '-qf --qf %{NAME}\\n -- /usr/lib64/libssl.so.3' && echo openssl-libs && exit 0
eval "path=\\${$#}"
echo "file $path is not owned by any package"
exit 1
"""


def test_rpm_is_asked_for_the_name_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "rpm"
    program.write_text(RPM)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    assert packages._rpm_owners(["/usr/lib64/libssl.so.3", "/opt/own.so"]) == {
        "/usr/lib64/libssl.so.3": "openssl-libs",
        "/opt/own.so": None,
    }


def test_without_rpm_nobody_owns_what_only_rpm_could_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    assert packages._rpm_owners(["/usr/lib64/libssl.so.3"]) == {"/usr/lib64/libssl.so.3": None}


def test_owners_are_found_in_the_root_of_each_process(spawn: Any, root: Path) -> None:
    debian(root, {"jailed": "/usr/lib/libz.so.1\n"})
    code = (
        "import ctypes, os, sys\n"
        "if os.geteuid(): ctypes.CDLL(None).unshare(0x10000000)\n"
        "os.chroot(sys.argv[1]); print(flush=True); sys.stdin.read()\n"
    )
    process = spawn([sys.executable, "-c", code, root], stdin=-1, stdout=-1)
    assert process.stdout.readline() == b"\n"
    inside, outside = (process.pid, "/usr/lib/libz.so.1"), (os.getpid(), "/usr/lib/libz.so.1")

    found = Disk().owners([inside, outside, (process.pid, "/usr/lib/other.so")])

    assert found[inside] == "jailed"
    assert found[outside] != "jailed"
    assert found[process.pid, "/usr/lib/other.so"] is None


def test_a_process_that_is_gone_has_no_owners(spawn: Any) -> None:
    process = spawn(["true"])
    process.wait()

    assert Disk().owners([(process.pid, "/usr/lib/libz.so.1")]) == {(process.pid, "/usr/lib/libz.so.1"): None}


@pytest.mark.skipif(shutil.which("dpkg-query") is None, reason="the system has no dpkg to compare with")
def test_owners_are_the_ones_that_dpkg_itself_tells() -> None:
    rows = ProcFs().executable_maps(os.getpid())
    assert isinstance(rows, list)
    paths = sorted({os.fsdecode(row.path) for row in rows})
    expected = {}
    for path in paths:
        # dpkg itself does not look through a merged /usr.
        for alias in packages._aliases(path):
            told = subprocess.run(["dpkg-query", "-S", alias], capture_output=True, text=True, check=False).stdout
            owners = [line.rpartition(": ")[0] for line in told.splitlines() if line.endswith(f": {alias}")]
            if owners:
                expected[path] = owners[0]
                break

    assert any(expected)
    assert Disk().owners((os.getpid(), path) for path in paths) == {
        (os.getpid(), path): expected.get(path) for path in paths
    }
