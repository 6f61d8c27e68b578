"""Who owns a file, and how files below a foreign root are opened: real files, real processes."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from sowatch.inventory import package_databases, rpm_database
from sowatch.inventory.staleness import Disk
from sowatch.linux.openat import open_below
from sowatch.linux.proc import ProcFs

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


# --- owners -------------------------------------------------------------------------------------


def debian(root: Path, lists: Mapping[str, str], diversions: str = "") -> None:
    info = root / "var/lib/dpkg/info"
    info.mkdir(parents=True, exist_ok=True)
    for package, files in lists.items():
        (info / f"{package}.list").write_text(files, encoding="utf-8", errors="surrogateescape")
    (info.parent / "diversions").write_text(diversions)


def owner(root_fd: int, path: str) -> str | None:
    listed = package_databases.dpkg_listed(root_fd, [path])[path]
    return None if listed is None else listed.package


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
    monkeypatch.setattr(package_databases, "_MAX_LIST_BYTES", 1000)

    assert owner(root_fd, "/usr/lib/libz.so.1") == "good"


def test_reading_a_database_ends_at_a_size_no_honest_one_has(
    root: Path, root_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    debian(root, {f"package{number}": "/usr/lib/libz.so.1\n" for number in range(20)})
    monkeypatch.setattr(package_databases, "_MAX_DATABASE_BYTES", 50)

    assert len(list(package_databases._dpkg_lists(root_fd))) == 3


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

    listed = package_databases.apk_listed(root_fd, paths)

    assert {path: None if one is None else one.package for path, one in listed.items()} == {
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

    assert rpm_database.rpm_owners(["/usr/lib64/libssl.so.3", "/opt/own.so"]) == {
        "/usr/lib64/libssl.so.3": "openssl-libs",
        "/opt/own.so": None,
    }


def test_without_rpm_nobody_owns_what_only_rpm_could_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    assert rpm_database.rpm_owners(["/usr/lib64/libssl.so.3"]) == {"/usr/lib64/libssl.so.3": None}


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
        for alias in package_databases.aliases(path):
            reported = subprocess.run(["dpkg-query", "-S", alias], capture_output=True, text=True, check=False).stdout
            owners = [line.rpartition(": ")[0] for line in reported.splitlines() if line.endswith(f": {alias}")]
            if owners:
                expected[path] = owners[0]
                break

    assert any(expected)
    assert Disk().owners((os.getpid(), path) for path in paths) == {
        (os.getpid(), path): expected.get(path) for path in paths
    }
