"""The sources of the C libraries that a wheel brings: Debian's source packages, checked by apt's signatures."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

from msgspec import Struct

from outside import OutsideError, apt_options, mirror, run
from wheels.place import NEXT_STEP, cache_directory

__all__ = ["PACKAGES", "SUITE", "Source", "fetch"]

#: The stable release: its maintainers keep these versions free of known holes.
SUITE: Final = "trixie"
PACKAGES: Final = ("zlib", "elfutils", "libbpf")


class Source(Struct, frozen=True):
    """An unpacked source package.

    Attributes:
        name: of the package.
        version: Debian's, such as ``1.5.0-3``.
        directory: the tree with Debian's patches applied.
        files: what the package consists of, with the SHA-256 of each.
    """

    name: str
    version: str
    directory: Path
    files: dict[str, str]

    @property
    def upstream(self) -> str:
        """The version without Debian's epoch and revision."""
        version = self.version.partition(":")[2] or self.version
        return re.sub(r"^.*really", "", version.rpartition("-")[0]).partition("+")[0]


def fetch() -> list[Source]:
    """Brings the newest source packages of the suite into the cache, if they are not there yet.

    Raises:
        OutsideError: no mirror, or it has no such package.
    """
    site = mirror(NEXT_STEP)
    lines = [f"deb-src {{keys}} {site} {SUITE} main"]
    lines.append(f"deb-src {{keys}} {site.rstrip('/')}-security {SUITE}-security main")
    apt = apt_options(cache_directory("apt", SUITE), lines)
    run(["apt-get", *apt, "-qq", "update"], next_step=NEXT_STEP)
    return [_fetch(package, apt) for package in PACKAGES]


def _fetch(package: str, apt: list[str]) -> Source:
    """The newest version that the mirror really has: of one that has just come it may list the files and lack them."""
    said = run(["apt-cache", *apt, "showsrc", "--only-source", package], next_step=NEXT_STEP)
    versions = set(re.findall(r"^Version: (\S+)$", said, flags=re.MULTILINE))
    fault = OutsideError(f"the mirror has no source package {package} in {SUITE}. {NEXT_STEP}")
    for version in sorted(versions, key=functools.cmp_to_key(_compare), reverse=True):
        download = cache_directory("sources", f"{package}-{version.replace(':', '.')}")
        command = ["apt-get", *apt, "-qq", "source", "--download-only", f"{package}={version}"]
        try:
            run(command, next_step=NEXT_STEP, directory=download)
        except OutsideError as error:
            fault = error
            continue
        return _unpacked(download, package, version)
    raise fault


def _compare(one: str, other: str) -> int:
    """As dpkg does."""
    is_less = ["dpkg", "--compare-versions", one, "lt", other]
    return -1 if subprocess.run(is_less, check=False).returncode == 0 else 1


def _unpacked(download: Path, package: str, version: str) -> Source:
    description = next(download.glob("*.dsc"))
    text = description.read_text(encoding="utf-8")
    # Of the three lists of checksums the one whose digests have 64 digits.
    files = {name: digest for digest, name in re.findall(r"^ ([0-9a-f]{64}) \d+ (\S+)$", text, flags=re.MULTILINE)}
    directory = download / "tree"
    if not directory.is_dir():
        fresh = download / "unfinished"
        shutil.rmtree(fresh, ignore_errors=True)
        run(["dpkg-source", "--no-copy", "-q", "-x", description, fresh], next_step=NEXT_STEP)
        fresh.rename(directory)
    return Source(package, version, directory, files)
