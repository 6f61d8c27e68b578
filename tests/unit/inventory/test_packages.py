"""Which package a mapped file is of: real processes in roots with databases made by hand."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sowatch.inventory import package_databases, packages
from sowatch.inventory.ecosystems import osv_package
from sowatch.inventory.packages import PackageIdentity, Packages
from sowatch.linux.proc import ProcFs
from sowatch.model.events import Library, Process
from sowatch.model.identity import FileId
from sowatch.model.stats import Mapped
from support.elf_files import Made
from support.package_roots import (
    SSL,
    Jailed,
    add_dpkg,
    add_file,
    apk_database,
    debian_with_ssl,
    dpkg_status,
    elf,
)

NOTE = {"type": "rpm", "os": "fedora", "osVersion": "41", "name": "openssl", "version": "3.2.2-10.fc41"}


# --- dpkg ---------------------------------------------------------------------------------------


def test_packaged_file_has_package_version_source_and_purl(
    root: Path, jailed: Callable[[], Jailed], found: Packages
) -> None:
    debian_with_ssl(root)

    assert found.identify([jailed().map(SSL)]) == [
        PackageIdentity(
            "libssl3",
            "3.0.11-1~deb12u2",
            "openssl",
            "pkg:deb/debian/libssl3@3.0.11-1~deb12u2?arch=amd64&distro=debian-12&upstream=openssl",
            "dpkg",
            "3.0.11-1~deb12u2",
        )
    ]


def test_source_may_have_a_version_of_its_own(root: Path, jailed: Callable[[], Jailed], found: Packages) -> None:
    status = dpkg_status(libssl3=("3.0.11-1+b1", "Source: openssl (3.0.11-1)\n"))
    add_dpkg(root, status, {"libssl3": {SSL: elf(1)}})

    (one,) = found.identify([jailed().map(SSL)])

    assert one is not None
    assert (one.version, one.source, one.source_version) == ("3.0.11-1+b1", "openssl", "3.0.11-1")


def test_identity_survives_the_upgrade(root: Path, jailed: Callable[[], Jailed], found: Packages) -> None:
    debian_with_ssl(root)
    old = jailed().map(SSL)
    (before,) = found.identify([old])
    debian_with_ssl(root, "3.0.15-1~deb12u1", number=2)
    new = jailed().map(SSL)

    after = found.identify([old, new])

    assert before is not None
    assert [one and one.version for one in after] == ["3.0.11-1~deb12u2", "3.0.15-1~deb12u1"]


def test_file_that_was_replaced_before_anybody_asked_does_not_get_the_new_version(
    root: Path, jailed: Callable[[], Jailed], found: Packages
) -> None:
    debian_with_ssl(root)
    old = jailed().map(SSL)
    debian_with_ssl(root, "3.0.15-1~deb12u1", number=2)

    assert found.identify([old]) == [None]


def test_file_that_was_renamed_away_does_not_get_the_version_of_what_has_its_name(
    root: Path, jailed: Callable[[], Jailed], found: Packages
) -> None:
    debian_with_ssl(root)
    old = jailed().map(SSL)
    (root / SSL.lstrip("/")).rename(root / "usr/lib/kept.so")
    debian_with_ssl(root, "3.0.15-1~deb12u1", number=2)

    assert found.identify([old]) == [None]


def test_file_that_was_replaced_by_the_same_content_keeps_its_version(
    root: Path, jailed: Callable[[], Jailed], found: Packages
) -> None:
    debian_with_ssl(root)
    old = jailed().map(SSL)
    debian_with_ssl(root)  # apt reinstall

    (one,) = found.identify([old])

    assert one is not None
    assert one.version == "3.0.11-1~deb12u2"


def test_other_file_under_a_packaged_name_is_of_no_package(
    root: Path, jailed: Callable[[], Jailed], found: Packages
) -> None:
    debian_with_ssl(root)
    add_file(root, SSL, elf(7))

    assert found.identify([jailed().map(SSL)]) == [None]


def test_other_file_in_a_tree_that_was_copied_is_of_no_package(
    root: Path, jailed: Callable[[], Jailed], found: Packages
) -> None:
    debian_with_ssl(root)
    own = root / SSL.lstrip("/")
    own.with_suffix(".built").write_bytes(elf(7))
    own.with_suffix(".built").rename(own)
    # In the order of names, as `tar --sort=name` does: the lists come after the files that are on them.
    copy = root.parent / "copy"
    for name in ("etc", "usr", "var"):
        shutil.copytree(root / name, copy / name)
    shutil.rmtree(root)
    copy.rename(root)

    assert found.identify([jailed().map(SSL)]) == [None]


def test_file_of_a_package_without_hashes_is_known_by_its_change_time(
    root: Path, jailed: Callable[[], Jailed], found: Packages
) -> None:
    debian_with_ssl(root)
    (root / "var/lib/dpkg/info/libssl3.md5sums").unlink()
    unchanged = jailed().map(SSL)
    (one,) = found.identify([unchanged])
    assert one is not None

    add_file(root, SSL, elf(7))

    assert found.identify([jailed().map(SSL)]) == [None]


def test_file_that_was_overwritten_in_place_is_of_no_package(
    root: Path, jailed: Callable[[], Jailed], found: Packages
) -> None:
    debian_with_ssl(root)
    old = jailed().map(SSL)
    status = dpkg_status(libssl3=("3.0.15-1~deb12u1", "Source: openssl\n"))
    place = root / SSL.lstrip("/")
    place.write_bytes(elf(2))
    add_dpkg(root, status, {})
    (root / "var/lib/dpkg/info/libssl3.md5sums").write_text(f"{hashlib.md5(elf(2)).hexdigest()}  {SSL[1:]}\n")

    assert found.identify([old]) == [None]


@pytest.mark.parametrize("state", ["half-installed", "config-files"])
def test_package_that_is_being_installed_has_no_version_yet(
    root: Path, jailed: Callable[[], Jailed], found: Packages, state: str
) -> None:
    version = "3.0.11-1~deb12u2"
    status = dpkg_status(libssl3=(version, f"Source: openssl\nStatus: install ok {state}\n"))
    add_dpkg(root, status, {"libssl3": {SSL: elf(1)}})
    one = jailed().map(SSL)

    assert found.identify([one]) == [None]

    debian_with_ssl(root, version)
    (now,) = found.identify([one])  # not only after a while
    assert now is not None


def test_what_dpkg_has_noted_beside_its_database_counts(
    root: Path, jailed: Callable[[], Jailed], found: Packages
) -> None:
    debian_with_ssl(root)
    journal = dpkg_status(libssl3=("3.0.15-1~deb12u1", "Source: openssl\n"))
    (root / "var/lib/dpkg/updates/0000").write_text(journal)

    (one,) = found.identify([jailed().map(SSL)])

    assert one is not None
    assert one.version == "3.0.15-1~deb12u1"


def test_database_is_read_again_only_where_it_has_changed(
    root: Path, jailed: Callable[[], Jailed], found: Packages, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"lib{number}": {f"/usr/lib/lib{number}.so": elf(number)} for number in range(5)}
    status = dpkg_status(**dict.fromkeys(files, ("1", "")))
    add_dpkg(root, status, files)
    process = jailed()
    first = [process.map(f"/usr/lib/lib{number}.so") for number in range(2)]
    read: list[str] = []
    whole = package_databases.read_with_version
    monkeypatch.setattr(
        package_databases, "read_with_version", lambda fd, path, limit: (read.append(path), whole(fd, path, limit))[1]
    )
    found.identify(first)
    assert {path for path in read if path.endswith(".list")} == {f"lib{number}.list" for number in range(5)}
    assert "/var/lib/dpkg/status" in read
    read.clear()

    found.identify([process.map("/usr/lib/lib2.so")])

    assert "/var/lib/dpkg/status" not in read
    assert [path for path in read if path.endswith(".list")] == ["lib2.list"]


def test_image_without_dpkg_tells_by_files_of_single_packages(
    root: Path, jailed: Callable[[], Jailed], found: Packages
) -> None:
    add_file(root, SSL, elf(1))
    status = root / "var/lib/dpkg/status.d"
    status.mkdir(parents=True)
    (status / "libssl3").write_text("Package: libssl3\nVersion: 3.0.11-1\nArchitecture: amd64\nSource: openssl\n")
    (status / "libssl3.md5sums").write_text(f"{hashlib.md5(elf(1)).hexdigest()}  {SSL[1:]}\n")
    process = jailed()

    (one,) = found.identify([process.map(SSL)])

    assert one is not None
    assert (one.name, one.version, one.source, one.identified_by) == ("libssl3", "3.0.11-1", "openssl", "dpkg")


def test_packages_of_this_host_are_the_ones_that_dpkg_itself_tells(found: Packages) -> None:
    if shutil.which("dpkg-query") is None:
        pytest.skip("the system has no dpkg to compare with")
    rows = ProcFs().executable_maps(os.getpid())
    assert isinstance(rows, list)
    mapped = [
        Mapped(
            Process(os.getpid(), 0),
            Library(os.fsdecode(row.path), FileId(row.major, row.minor, row.inode)),
            "all",
            ((row.start, row.end),),
        )
        for row in rows
        if row.path.startswith(b"/usr/lib")
    ]
    seen = [(one.name, one.version, one.source, one.source_version) for one in found.identify(mapped) if one]
    form = "${Package}\t${Version}\t${source:Package}\t${source:Version}\n"
    told = subprocess.run(["dpkg-query", "-W", "-f", form], capture_output=True, text=True, check=True).stdout
    assert any(name == "libc6" for name, *_ in seen)
    assert set(seen) <= {tuple(line.split("\t")) for line in told.splitlines()}


# --- the note, apk, rpm -------------------------------------------------------------------------


FEDORA_SSL = PackageIdentity(
    "openssl",
    "3.2.2-10.fc41",
    "openssl",
    "pkg:rpm/fedora/openssl@3.2.2-10.fc41?distro=fedora-41",
    "note",
    "3.2.2-10.fc41",
)


def test_database_that_proves_the_file_comes_before_its_note(
    root: Path, jailed: Callable[[], Jailed], found: Packages
) -> None:
    content = elf(1, json.dumps(NOTE).encode())
    add_dpkg(root, dpkg_status(libssl3=("9", "")), {"libssl3": {SSL: content}})
    process = jailed()

    (packaged,) = found.identify([process.map(SSL)])
    add_file(root, SSL, elf(2, json.dumps(NOTE).encode()))
    (other,) = found.identify([process.map(SSL)])

    assert packaged is not None
    assert (packaged.name, packaged.version, packaged.identified_by) == ("libssl3", "9", "dpkg")
    assert other == FEDORA_SSL


def test_note_tells_where_there_is_no_database(root: Path, jailed: Callable[[], Jailed], found: Packages) -> None:
    add_file(root, SSL, elf(1, json.dumps(NOTE).encode()))

    assert found.identify([jailed().map(SSL)]) == [FEDORA_SSL]


def test_note_that_names_no_release_is_of_that_of_its_root(
    root: Path, jailed: Callable[[], Jailed], found: Packages
) -> None:
    (root / "etc/os-release").write_text('ID=ubuntu\nVERSION_ID="24.10"\n')
    note = {"type": "deb", "os": "ubuntu", "name": "openssl", "version": "3.3.1-2ubuntu2", "architecture": "amd64"}
    add_file(root, SSL, elf(1, json.dumps(note).encode()))
    add_file(root, "/opt/other.so", elf(2, json.dumps({**note, "os": "debian"}).encode()))
    process = jailed()

    own, other = found.identify([process.map(SSL), process.map("/opt/other.so")])

    assert own is not None
    assert own.purl == "pkg:deb/ubuntu/openssl@3.3.1-2ubuntu2?arch=amd64&distro=ubuntu-24.10"
    asked = osv_package(own)
    assert asked is not None
    assert (asked.ecosystem, asked.release) == ("Ubuntu", "24.10")
    assert other is not None
    assert other.purl.endswith("distro=debian")


def test_program_with_the_note_of_the_c_library_only_is_none_of_its_files(
    root: Path, jailed: Callable[[], Jailed], found: Packages
) -> None:
    note = json.dumps({"type": "deb", "os": "ubuntu", "name": "glibc", "version": "2.40-1ubuntu3"}).encode()
    made = Made()
    made.soname = b"libc.so.6"
    made.notes_before = made.note(b"FDO\0", 0xCAFE1A7E, note)
    names = ("/usr/bin/own", "/usr/bin/packaged", "/usr/lib/libc.so.6")
    add_dpkg(root, dpkg_status(packaged=("1", "")), {"packaged": {names[1]: elf(2, note)}})
    add_file(root, names[0], elf(1, note))
    add_file(root, names[2], made.data())
    process = jailed()

    own, packaged, library = found.identify(list(map(process.map, names)))

    assert own is None
    assert packaged is not None
    assert packaged.name == "packaged"
    assert library is not None
    assert (library.name, library.identified_by) == ("glibc", "note")


def test_note_is_read_of_a_file_that_is_deleted(root: Path, jailed: Callable[[], Jailed], found: Packages) -> None:
    add_file(root, SSL, elf(1, json.dumps(NOTE).encode()))
    one = jailed().map(SSL)
    (root / SSL.lstrip("/")).unlink()

    (identity,) = found.identify([one])

    assert identity is not None
    assert identity.version == "3.2.2-10.fc41"


def test_apk_tells_by_its_database(root: Path, jailed: Callable[[], Jailed], found: Packages) -> None:
    (root / "etc/os-release").write_text("ID=alpine\nVERSION_ID=3.20.3\n")
    add_file(root, "/lib/libssl.so.3", elf(1))
    (root / "lib/apk/db").mkdir(parents=True)
    database = apk_database({"libssl3": ("3.3.2-r0", "openssl", {"/lib/libssl.so.3": elf(1)})})
    (root / "lib/apk/db/installed").write_text(database)
    process = jailed()
    one = process.map("/lib/libssl.so.3")

    assert found.identify([one]) == [
        PackageIdentity(
            "libssl3",
            "3.3.2-r0",
            "openssl",
            "pkg:apk/alpine/libssl3@3.3.2-r0?arch=x86_64&distro=alpine-3.20.3&upstream=openssl",
            "apk",
            "3.3.2-r0",
        )
    ]

    # The upgrade has put the file in its place, and not yet written its database.
    add_file(root, "/lib/libssl.so.3", elf(2))
    assert found.identify([process.map("/lib/libssl.so.3")]) == [None]


RPM = """#!/bin/sh
eval "path=\\${{$#}}"
test "$path" = {path} || {{ echo "file $path is not owned by any package"; exit 1; }}
printf 'openssl-libs\\t1\\t3.0.7-27.el9\\tx86_64\\topenssl-3.0.7-27.el9.src.rpm\\t8\\n\\t{digest}\\t{path}\\n'
"""


def test_rpm_tells_source_and_epoch_where_its_digest_is_that_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spawn: Any
) -> None:
    library = tmp_path / "libssl.so.3"
    library.write_bytes(elf(1))
    digest = hashlib.sha256(elf(1)).hexdigest()
    (tmp_path / "rpm").write_text(RPM.format(path=library, digest=digest))
    (tmp_path / "rpm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(packages, "_has_rpm", lambda _: True)
    one = Jailed(spawn, Path("/")).map(str(library))

    with Packages() as found:
        (identity,) = found.identify([one])
    assert identity is not None
    assert (identity.name, identity.version, identity.source) == ("openssl-libs", "1:3.0.7-27.el9", "openssl")
    assert "arch=x86_64&" in identity.purl
    assert identity.purl.endswith("&epoch=1&upstream=openssl")

    library.with_suffix(".new").write_bytes(elf(2))
    library.with_suffix(".new").rename(library)
    with Packages() as found:
        assert found.identify([Jailed(spawn, Path("/")).map(str(library))]) == [None]


# --- languages ----------------------------------------------------------------------------------
