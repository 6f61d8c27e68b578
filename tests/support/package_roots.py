"""Root directories with package databases made by hand, and processes that have files of them mapped."""

from __future__ import annotations

import base64
import hashlib
import os
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sowatch.linux.elf import read_facts
from sowatch.linux.proc import ProcFs
from sowatch.model.events import Library, Process
from sowatch.model.identity import FileId
from sowatch.model.stats import Mapped
from support.elf_files import Made

__all__ = [
    "DEBIAN",
    "POM",
    "PROPERTIES",
    "SSL",
    "Jailed",
    "add_dpkg",
    "add_file",
    "apk_database",
    "debian_with_ssl",
    "dpkg_status",
    "elf",
    "jar",
    "wheel",
]

SSL = "/usr/lib/x86_64-linux-gnu/libssl.so.3"
#: The properties of an artifact of Maven, in a jar.
POM = "META-INF/maven/io.netty/netty-tcnative/pom.properties"
PROPERTIES = b"#Generated\nartifactId=netty-tcnative\ngroupId=io.netty\nversion=2.0.65.Final\n"
DEBIAN = 'ID=debian\nVERSION_ID="12"\n'

#: Chroots, maps what it is told line by line, answers each with a line.
_PROGRAM = """
import ctypes, mmap, os, sys
if os.geteuid(): ctypes.CDLL(None).unshare(0x10000000)
os.chroot(sys.argv[1]); os.chdir("/")
kept = []
print(flush=True)
for line in sys.stdin:
    fd = os.open(line.rstrip("\\n"), os.O_RDONLY)
    kept.append(fd if line.endswith(".jar\\n") else mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC))
    if not line.endswith(".jar\\n"): os.close(fd)
    print(flush=True)
"""


def elf(number: int, note: bytes | None = None) -> bytes:
    """A library whose build id, and so content, is another one for each number."""
    made = Made()
    made.build_id = number.to_bytes(20, "big")
    if note is not None:
        made.notes_before = made.note(b"FDO\0", 0xCAFE1A7E, note)
    return made.data()


def add_file(root: Path, path: str, content: bytes) -> None:
    """As a package manager does: written beside, then renamed."""
    place = root / path.lstrip("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    new = place.with_name(place.name + ".dpkg-new")
    new.write_bytes(content)
    new.rename(place)


def dpkg_status(**packages: tuple[str, str]) -> str:
    """The stanzas of packages: version, and further fields."""
    stanzas = []
    for name, (version, more) in packages.items():
        status = "" if "Status:" in more else "Status: install ok installed\n"
        stanzas.append(f"Package: {name}\n{status}Architecture: amd64\nVersion: {version}\n{more}")
    return "\n".join(stanzas)


def add_dpkg(root: Path, status: str, files: Mapping[str, Mapping[str, bytes]]) -> None:
    """Installs packages: their files, lists, MD5 sums and then the status, which is replaced as dpkg does."""
    database = root / "var/lib/dpkg"
    (database / "info").mkdir(parents=True, exist_ok=True)
    (database / "updates").mkdir(exist_ok=True)
    for package, contents in files.items():
        for path, content in contents.items():
            add_file(root, path, content)
        sums = "".join(f"{hashlib.md5(one).hexdigest()}  {path.lstrip('/')}\n" for path, one in contents.items())
        (database / f"info/{package}.md5sums").write_text(sums)
        new = database / f"info/{package}.list-new"
        new.write_text("".join(f"{path}\n" for path in ("/.", *contents)))
        new.rename(database / f"info/{package}.list")
    (database / "status-new").write_text(status)
    (database / "status-new").rename(database / "status")


def apk_database(packages: Mapping[str, tuple[str, str, Mapping[str, bytes]]]) -> str:
    """The text of apk's database: of each package its version, its origin, and its files."""
    lines = []
    for name, (version, origin, files) in packages.items():
        lines += [f"P:{name}", f"V:{version}", "A:x86_64", f"o:{origin}"]
        for path, content in files.items():
            directory, _, base = path.lstrip("/").rpartition("/")
            digest = base64.b64encode(hashlib.sha1(content).digest()).decode()
            lines += [f"F:{directory}", f"R:{base}", f"Z:Q1{digest}"]
        lines.append("")
    return "\n".join(lines) + "\n"


class Jailed:
    """A process with a root of its own that maps files of it."""

    def __init__(self, spawn: Any, root: Path) -> None:
        self.process = spawn([sys.executable, "-c", _PROGRAM, root], stdin=-1, stdout=-1)
        self.root = root
        assert self.process.stdout.readline() == b"\n"

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def map(self, path: str) -> Mapped:
        """Has it mapped (an archive: opened), and says so as a watch does."""
        self.process.stdin.write(os.fsencode(path) + b"\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == b"\n"
        if path.endswith(".jar"):
            return Mapped(Process(self.pid, 0), Library(path, FileId(0, 0, 0)), "all", ())
        status = os.stat(self.root / path.lstrip("/"))
        rows = ProcFs().executable_maps(self.pid)
        assert isinstance(rows, list)
        row = next(row for row in rows if row.inode == status.st_ino)
        with open(self.root / path.lstrip("/"), "rb") as file:
            facts = read_facts(file.fileno())
        assert facts is not None
        file_id = FileId(row.major, row.minor, row.inode)
        library = Library(path, file_id, build_id=facts.build_id, changed_ns=status.st_ctime_ns)
        return Mapped(Process(self.pid, 0), library, "all", ((row.start, row.end),))


def debian_with_ssl(root: Path, version: str = "3.0.11-1~deb12u2", number: int = 1) -> None:
    """Makes a root have libssl3 by dpkg; ``number`` is that of `elf`."""
    status = dpkg_status(libssl3=(version, "Source: openssl\n"))
    add_dpkg(root, status, {"libssl3": {SSL: elf(number)}})


def wheel(root: Path, site: str, files: dict[str, bytes]) -> None:
    info = root / site.lstrip("/") / "NumPy-1.26.4.dist-info"
    info.mkdir(parents=True)
    rows = []
    for path, content in files.items():
        add_file(root, f"{site}/{path}", content)
        rows.append(f"{path},,{len(content)}")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: NumPy\nVersion: 1.26.4\n\nName: other\n")
    (info / "RECORD").write_text("\n".join(rows) + "\n")


def jar(root: Path, path: str, files: dict[str, bytes]) -> None:
    (root / path.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(root / path.lstrip("/"), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
