"""Packages of Python, npm and Java: of files in roots made by hand, mapped by real processes."""

from __future__ import annotations

import errno
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sowatch.inventory import packages
from sowatch.inventory.packages import PackageIdentity, Packages
from sowatch.linux.proc import ProcReadError
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
