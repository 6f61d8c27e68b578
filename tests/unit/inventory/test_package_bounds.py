"""What keeps a hostile or slow root from taking packages away from others, or memory and time from all."""

from __future__ import annotations

import errno
import json
import os
import resource
import struct
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sowatch.inventory import language_packages, package_databases, packages
from sowatch.inventory.packages import Packages
from sowatch.linux.proc import ProcFs
from sowatch.model.events import Library, Process
from sowatch.model.identity import FileId
from sowatch.model.stats import Mapped
from support.package_roots import (
    POM,
    PROPERTIES,
    SSL,
    Jailed,
    add_dpkg,
    add_file,
    debian_with_ssl,
    dpkg_status,
    elf,
    jar,
    wheel,
)
from support.silent_fs import SilentFileSystem


def test_hostile_databases_are_passed_over(
    root: Path, jailed: Callable[[], Jailed], found: Packages, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    debian_with_ssl(root)
    info = root / "var/lib/dpkg"
    os.mkfifo(info / "info/fifo.list")
    (info / "info/link.list").symlink_to("/etc/os-release")
    (info / "updates/0001").symlink_to(tmp_path / "outside")
    (tmp_path / "outside").write_text(dpkg_status(libssl3=("666", "")))
    os.mkfifo(info / "updates/0002")
    (root / "lib/apk/db").mkdir(parents=True)
    os.mkfifo(root / "lib/apk/db/installed")
    (root / "node_modules/bomb").mkdir(parents=True)
    (root / "node_modules/bomb/package.json").write_text("[" * 900_000)
    add_file(root, "/node_modules/bomb/x.so", elf(4))
    site = root / "opt/site-packages/bad-1.dist-info"
    site.mkdir(parents=True)
    os.mkfifo(site / "METADATA")
    (site / "RECORD").write_text('bad/x.so,,\n"' + "x" * 300_000)
    add_file(root, "/opt/site-packages/bad/x.so", elf(5))
    jar(root, "/bad.jar", {"x.so": elf(6)})
    data = bytearray((root / "bad.jar").read_bytes())
    data[-22 + 12 : -22 + 16] = (0xFFFFFFF0).to_bytes(4, "little")
    (root / "bad.jar").write_bytes(data)
    add_file(root, "/tmp/y.so", elf(6))
    process = jailed()
    process.map("/bad.jar")
    names = (SSL, "/node_modules/bomb/x.so", "/opt/site-packages/bad/x.so", "/tmp/y.so")

    identities = found.identify([process.map(name) for name in names])

    assert [one and one.version for one in identities] == ["3.0.11-1~deb12u2", None, None, None]


def test_names_with_control_characters_are_encoded_in_the_purl(
    root: Path, jailed: Callable[[], Jailed], found: Packages
) -> None:
    (root / "etc/os-release").write_text('ID="deb\x1b[2J"\nVERSION_ID=../../x\n')
    status = dpkg_status(evil=("1\x1b]0;x\x07?arch=z", "Source: a+b\n"))
    add_dpkg(root, status, {"evil": {SSL: elf(1)}})

    (one,) = found.identify([jailed().map(SSL)])

    assert one is not None
    assert one.purl.isprintable()
    assert one.purl.count("?") == 1


@pytest.mark.parametrize("bad", ["/", "//", "@", "a/b", "a b", "\x1b[2J", "?", "#", "%2F", "\u00e4", ".."])
def test_name_that_no_registry_allows_is_of_no_package(
    root: Path, jailed: Callable[[], Jailed], found: Packages, bad: str
) -> None:
    names = {"deb": SSL, "npm": "/node_modules/x/x.so", "pypi": "/lib/site-packages/numpy/x.so", "maven": "/tmp/x.so"}
    add_dpkg(root, dpkg_status(**{bad: ("1", "")}), {"listed": {SSL: elf(1)}})
    os.rename(root / "var/lib/dpkg/info/listed.list", root / f"var/lib/dpkg/info/{bad.replace('/', '_')}.list")
    add_file(root, names["npm"], elf(2))
    add_file(root, "/node_modules/x/package.json", json.dumps({"name": bad, "version": "1"}).encode())
    wheel(root, "/lib/site-packages", {"numpy/x.so": elf(3)})
    metadata = root / "lib/site-packages/NumPy-1.26.4.dist-info/METADATA"
    metadata.write_text(f"Name: {bad}\nVersion: 1\n")
    jar(root, "/app.jar", {POM: f"groupId=g\nartifactId={bad}\nversion=1\n".encode(), "x.so": elf(4)})
    add_file(root, names["maven"], elf(4))
    process = jailed()
    process.map("/app.jar")

    assert found.identify(list(map(process.map, names.values()))) == [None] * 4


def test_process_that_is_gone_has_no_packages_and_is_asked_again(
    root: Path, jailed: Callable[[], Jailed], found: Packages
) -> None:
    debian_with_ssl(root)
    process = jailed()
    one = process.map(SSL)
    process.process.kill()
    process.process.wait()

    assert found.identify([one]) == [None]
    assert found.identify([jailed().map(SSL)]) != [None]


def test_file_system_that_hangs_keeps_no_other_file_from_its_package(
    root: Path, jailed: Callable[[], Jailed], found: Packages, make_library: Any, tmp_path: Path
) -> None:
    debian_with_ssl(root)
    good = jailed().map(SSL)
    (tmp_path / "mnt").mkdir()
    with SilentFileSystem(tmp_path / "mnt", make_library("libserved.so")) as silent:
        rows = ProcFs().executable_maps(silent.pid)
        assert isinstance(rows, list)
        (row,) = [row for row in rows if row.path == os.fsencode(silent.path)]
        library = Library(str(silent.path), FileId(row.major, row.minor, row.inode))
        hanging = Mapped(Process(silent.pid, 0), library, "all", ((row.start, row.end),))
        silent.fall_silent()

        for _ in range(2):
            first, second = found.identify([hanging, good])
            assert first is None
            assert second is not None
            assert found.content_name(hanging) is None


def test_file_without_build_id_is_named_by_its_content(
    root: Path, jailed: Callable[[], Jailed], found: Packages
) -> None:
    add_file(root, "/opt/plain.so", b"\x7fELF" + b"x" * 5000)
    one = jailed().map("/opt/plain.so")
    assert one.library.build_id is None

    name = found.content_name(one)
    (root / "opt/plain.so").unlink()

    assert name is not None
    assert name.startswith("htlhash:")
    assert found.content_name(one) == name


def test_memory_that_is_no_file_has_no_package(found: Packages) -> None:
    made = Mapped(Process(os.getpid(), 0), Library("[vdso]", FileId(0, 0, 0)), "all", ())

    assert found.identify([made]) == [None]


def test_what_is_unknown_is_looked_up_again_after_a_while(root: Path, jailed: Callable[[], Jailed]) -> None:
    now_s = 1000.0
    add_file(root, SSL, elf(1))
    with Packages(clock=lambda: now_s) as found:
        one = jailed().map(SSL)
        assert found.identify([one]) == [None]
        add_dpkg(root, dpkg_status(libssl3=("1", "")), {})
        (root / "var/lib/dpkg/info/libssl3.list").write_text(f"{SSL}\n")
        assert found.identify([one]) == [None]
        now_s += packages.ASK_AGAIN_S

        assert found.identify([one]) != [None]


def packaged(root: Path, number: int) -> list[str]:
    files = {f"/usr/lib/lib{one}.so": elf(one) for one in range(number)}
    add_dpkg(root, dpkg_status(all=("1", "")), {"all": files})
    return list(files)


def test_more_files_than_descriptors_have_their_packages(
    root: Path, jailed: Callable[[], Jailed], found: Packages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "MAX_OPEN", 16, raising=False)
    process = jailed()
    mapped = [process.map(path) for path in packaged(root, 80)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = set(map(int, os.listdir("/proc/self/fd")))
    free = [number for number in range(len(used) + 40) if number not in used]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[39] + 1, hard))
    try:
        assert all(found.identify(mapped))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE])
def test_lack_of_descriptors_says_nothing_about_a_file(
    root: Path, jailed: Callable[[], Jailed], found: Packages, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    debian_with_ssl(root)
    one = jailed().map(SSL)

    def fails(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(package_databases, "open_below", fails)
        assert found.identify([one]) == [None]

    assert found.identify([one]) != [None]


def test_what_was_found_before_a_file_that_takes_too_long_counts(
    root: Path, jailed: Callable[[], Jailed], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "MAX_OPEN", 1, raising=False)
    monkeypatch.setattr(packages, "_TIMEOUT_S", 0.5)
    process, is_over, has_ended = jailed(), threading.Event(), threading.Event()
    first, second = (process.map(path) for path in packaged(root, 2))
    whole = packages._has_digest

    def slow(fd: int, *digest: str) -> bool | None:
        if os.fstat(fd).st_ino != second.library.id.inode:
            return whole(fd, *digest)
        is_over.wait(30)
        try:
            return whole(fd, *digest)  # the budget ends it
        finally:
            has_ended.set()

    monkeypatch.setattr(packages, "_has_digest", slow)
    with Packages() as found:
        identities = found.identify([first, second])
        is_over.set()
        assert has_ended.wait(30)

    assert [one and one.name for one in identities] == ["all", None]


def test_file_without_a_record_is_not_read(
    root: Path, jailed: Callable[[], Jailed], found: Packages, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = packaged(root, 1)
    (root / "var/lib/dpkg/status").write_text("")
    monkeypatch.setattr(packages, "_has_digest", lambda *_: pytest.fail("it was read"))

    assert found.identify([jailed().map(path)]) == [None]


def test_root_that_costs_too_much_is_given_up_for_a_while_and_no_other(
    root: Path, jailed: Callable[[], Jailed], spawn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = packaged(root, 1)
    (root / "var/lib/dpkg/info/huge.list").write_text("/x\n" * 5000)
    other = tmp_path / "other"
    other.mkdir()
    packaged(other, 1)
    monkeypatch.setattr(packages, "LookBudget", partial(packages.LookBudget, lines=4000))
    now_s = 1000.0
    with Packages(clock=lambda: now_s) as found:
        mapped = [jailed().map(path), Jailed(spawn, other).map(path)]

        assert [one and one.name for one in found.identify(mapped)] == [None, "all"]
        (root / "var/lib/dpkg/info/huge.list").unlink()
        assert found.identify(mapped)[0] is None
        now_s += packages.ASK_AGAIN_S
        assert found.identify(mapped)[0] is not None


def test_record_of_a_wheel_is_read_once_for_all_of_its_files(
    root: Path, jailed: Callable[[], Jailed], found: Packages, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = "/lib/site-packages"
    wheel(root, site, {f"numpy/{number}.so": elf(number) for number in range(8)})
    add_file(root, f"{site}/numpy/not-listed.so", elf(9))
    process = jailed()
    names = [*(f"numpy/{number}.so" for number in range(8)), "numpy/not-listed.so"]
    mapped = [process.map(f"{site}/{name}") for name in names]
    read: list[str] = []
    whole = language_packages.read_with_version
    monkeypatch.setattr(
        language_packages, "read_with_version", lambda fd, path, limit: (read.append(path), whole(fd, path, limit))[1]
    )

    identities = found.identify(mapped)

    assert [one is not None for one in identities] == [True] * 8 + [False]
    assert len([path for path in read if path.endswith("/RECORD")]) == 1


def test_archive_whose_list_has_another_length_elsewhere_is_not_read(
    root: Path, jailed: Callable[[], Jailed], found: Packages
) -> None:
    jar(root, "/app.jar", {POM: PROPERTIES, "x.so": elf(1)})
    data = (root / "app.jar").read_bytes()
    end = data.rindex(b"PK\5\6")
    count, size, offset = struct.unpack_from("<HII", data, end + 10)
    record = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, offset)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
    (root / "app.jar").write_bytes(data[:end] + record + locator + data[end:])
    add_file(root, "/tmp/x.so", elf(1))
    process = jailed()
    process.map("/app.jar")

    assert found.identify([process.map("/tmp/x.so")]) == [None]


def test_a_bound_holds_for_identities(
    root: Path, jailed: Callable[[], Jailed], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "MAX_KEPT", 2)
    files = {f"/usr/lib/lib{number}.so": elf(number) for number in range(5)}
    add_dpkg(root, dpkg_status(all=("1", "")), {"all": files})
    process = jailed()
    with Packages() as found:
        mapped = [process.map(path) for path in files]

        assert all(found.identify(mapped))
        assert len(found._kept) == 2
