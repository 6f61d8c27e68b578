"""Which package a mapped file is of: real processes in roots with databases made by hand."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import struct
import subprocess
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sowatch.inventory import language_packages, package_databases, packages
from sowatch.inventory.ecosystems import osv_package
from sowatch.inventory.packages import PackageIdentity, Packages
from sowatch.linux.proc import ProcFs, ProcReadError
from sowatch.model.events import Library, Process
from sowatch.model.identity import FileId
from sowatch.model.stats import Mapped
from support.elf_files import Made
from support.package_roots import (
    DEBIAN,
    Jailed,
    add_dpkg,
    add_file,
    apk_database,
    dpkg_status,
    elf,
)
from support.silent_fs import SilentFileSystem

SSL = "/usr/lib/x86_64-linux-gnu/libssl.so.3"
NOTE = {"type": "rpm", "os": "fedora", "osVersion": "41", "name": "openssl", "version": "3.2.2-10.fc41"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "root"
    (made / "etc").mkdir(parents=True)
    (made / "etc/os-release").write_text(DEBIAN)
    return made


@pytest.fixture
def jailed(spawn: Any, root: Path) -> Callable[[], Jailed]:
    return lambda: Jailed(spawn, root)


@pytest.fixture
def found() -> Iterator[Packages]:
    with Packages() as made:
        yield made


def debian_with_ssl(root: Path, version: str = "3.0.11-1~deb12u2", number: int = 1) -> None:
    status = dpkg_status(libssl3=(version, "Source: openssl\n"))
    add_dpkg(root, status, {"libssl3": {SSL: elf(number)}})


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


def wheel(root: Path, site: str, files: dict[str, bytes]) -> None:
    info = root / site.lstrip("/") / "NumPy-1.26.4.dist-info"
    info.mkdir(parents=True)
    rows = []
    for path, content in files.items():
        add_file(root, f"{site}/{path}", content)
        rows.append(f"{path},,{len(content)}")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: NumPy\nVersion: 1.26.4\n\nName: other\n")
    (info / "RECORD").write_text("\n".join(rows) + "\n")


def test_wheel_tells_by_the_record_that_has_the_file(root: Path, jailed: Callable[[], Jailed], found: Packages) -> None:
    site = "/srv/venv/lib/python3.11/site-packages"
    wheel(root, site, {"numpy/core.so": elf(1), "numpy.libs/libopenblas.so": elf(2)})
    add_file(root, f"{site}/numpy/not-listed.so", elf(3))
    process = jailed()
    names = ("numpy/core.so", "numpy.libs/libopenblas.so", "numpy/not-listed.so")

    identities = found.identify([process.map(f"{site}/{name}") for name in names])

    numpy = PackageIdentity("numpy", "1.26.4", None, "pkg:pypi/numpy@1.26.4", "pypi")
    assert identities == [numpy, numpy, None]


def test_file_of_a_wheel_that_a_distribution_packs_is_of_that_package(
    root: Path, jailed: Callable[[], Jailed], found: Packages
) -> None:
    site = "/usr/lib/python3/dist-packages"
    wheel(root, site, {"numpy/core.so": elf(1)})
    add_dpkg(
        root, dpkg_status(**{"python3-numpy": ("1:1.24", "")}), {"python3-numpy": {f"{site}/numpy/core.so": elf(1)}}
    )

    (one,) = found.identify([jailed().map(f"{site}/numpy/core.so")])

    assert one is not None
    assert (one.name, one.identified_by) == ("python3-numpy", "dpkg")


@pytest.mark.parametrize("name", ["bcrypt", "@img/sharp-linux-x64"])
def test_package_of_npm_tells_by_its_json(root: Path, jailed: Callable[[], Jailed], found: Packages, name: str) -> None:
    base = f"/app/node_modules/outer/node_modules/{name}"
    add_file(root, f"{base}/lib/binding.node", elf(1))
    add_file(root, f"{base}/package.json", json.dumps({"name": name, "version": "5.1.1", "x": [1]}).encode())

    (one,) = found.identify([jailed().map(f"{base}/lib/binding.node")])

    assert one is not None
    assert (one.name, one.version, one.identified_by) == (name, "5.1.1", "npm")
    assert one.purl == f"pkg:npm/{name.replace('@', '%40')}@5.1.1"


def jar(root: Path, path: str, files: dict[str, bytes]) -> None:
    (root / path.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(root / path.lstrip("/"), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


POM = "META-INF/maven/io.netty/netty-tcnative/pom.properties"
PROPERTIES = b"#Generated\nartifactId=netty-tcnative\ngroupId=io.netty\nversion=2.0.65.Final\n"


def test_library_from_an_open_archive_of_java_is_of_its_artifact(
    root: Path, jailed: Callable[[], Jailed], found: Packages
) -> None:
    jar(root, "/app/other.jar", {"a.class": b"x"})
    jar(root, "/app/netty-tcnative-2.0.65.jar", {POM: PROPERTIES, "META-INF/native/libnetty.so": elf(1)})
    add_file(root, "/tmp/libnetty8812.so", elf(1))
    add_file(root, "/tmp/other.so", elf(2))
    process = jailed()
    for name in ("/app/other.jar", "/app/netty-tcnative-2.0.65.jar"):
        process.map(name)
    mapped = [process.map("/tmp/libnetty8812.so"), process.map("/tmp/other.so")]
    (root / "tmp/libnetty8812.so").unlink()  # as they do at once

    assert found.identify(mapped) == [
        PackageIdentity(
            "io.netty:netty-tcnative", "2.0.65.Final", None, "pkg:maven/io.netty/netty-tcnative@2.0.65.Final", "maven"
        ),
        None,
    ]


def test_archive_with_several_artifacts_tells_only_the_one_that_it_is_called_as(
    root: Path, jailed: Callable[[], Jailed], found: Packages
) -> None:
    inner = {POM: PROPERTIES, "META-INF/maven/g/app/pom.properties": b"groupId=g\nartifactId=app\nversion=1\n"}
    for number, name in enumerate(("/app/fat.jar", "/app/app-1.0.jar"), 1):
        jar(root, name, {**inner, "lib.so": elf(number)})
        add_file(root, f"/tmp/{number}.so", elf(number))
    process = jailed()
    for name in ("/app/fat.jar", "/app/app-1.0.jar"):
        process.map(name)

    fat, app = found.identify([process.map("/tmp/1.so"), process.map("/tmp/2.so")])

    assert fat is None
    assert app is not None
    assert app.purl == "pkg:maven/g/app@1"


def with_bad_lzma(root: Path, path: str) -> None:
    """A jar whose descriptor is compressed by LZMA with properties that no encoder writes."""
    place = root / path.lstrip("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(place, "w") as archive:
        archive.writestr(POM, PROPERTIES, zipfile.ZIP_LZMA)
        archive.writestr("lib.so", elf(1))
    data = bytearray(place.read_bytes())
    at = data.index(POM.encode()) + len(POM) + 4  # after the version and the size of the properties
    data[at] = 0xFF
    place.write_bytes(data)


def test_archive_that_a_library_fails_on_keeps_no_other_file_from_its_package(
    root: Path, jailed: Callable[[], Jailed], found: Packages
) -> None:
    debian_with_ssl(root)
    with_bad_lzma(root, "/app/netty-tcnative-2.jar")
    add_file(root, "/tmp/lib.so", elf(1))
    process = jailed()
    process.map("/app/netty-tcnative-2.jar")

    bad, good = found.identify([process.map("/tmp/lib.so"), process.map(SSL)])

    assert bad is None
    assert good is not None


@pytest.mark.parametrize("place", ["jar_package", "read_facts"])
def test_whatever_one_file_raises_keeps_no_other_from_its_package(
    root: Path,
    jailed: Callable[[], Jailed],
    found: Packages,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    place: str,
) -> None:
    debian_with_ssl(root)
    bad_files = [f"/opt/bad{number}.so" for number in range(2)]
    for number, path in enumerate(bad_files, 5):
        add_file(root, path, elf(number))
    process = jailed()
    mapped = [*map(process.map, bad_files), process.map(SSL)]
    whole = getattr(packages, place)
    inodes = {one.library.id.inode for one in mapped[:2]}

    def fails(*args: Any) -> Any:
        if os.fstat(args[-1]).st_ino in inodes:
            raise ProcReadError("/proc/1/fd", errno.ENOMEM)
        return whole(*args)

    monkeypatch.setattr(packages, place, fails)

    identities = found.identify(mapped)

    assert [one and one.name for one in identities] == [None, None, "libssl3"]
    assert len([record for record in caplog.records if "ProcReadError" in record.message]) == 1


# --- hostile roots ------------------------------------------------------------------------------


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
