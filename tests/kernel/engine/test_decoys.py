"""What the agent opens: the file that was mapped, never what took its name, its place or its inode number.

Containers swap files under the agent's eyes. Baits tell (fanotify) who opened them.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sowatch import ActiveFile, Rule
from support import bpfsys
from support.hostile import SOWATCH, Command, Held, Opens
from support.kernel import IN_OWN_MOUNTS, with_prelude
from support.programs import Mapper

PAGE = 4096
Start = Callable[..., Mapper]
NewLibrary = Callable[..., Path]

#: In the path of every file here, and of nobody else's: what other suites do at the same time is not watched.
OURS = f"sow-bait-{os.getpid()}-"


@pytest.fixture
def scratch() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix=OURS, dir="/var/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def feed(schema: Any, deadline: Any) -> Iterator[Command]:
    """A running ``sowatch watch --json`` of the files of these tests; the whole of its output is checked."""
    error = bpfsys.why_no_bpf()
    if error is not None:
        pytest.skip(f"bpf(2) cannot create a map: {error.strerror}")
    with Command([OURS], check=schema, timeout_s=deadline(10)) as command:
        yield command
        assert command.close() == 0


@pytest.fixture
def other_library(make_library: Any, scratch: Path) -> Callable[[str], Path]:
    """``other_library(name)`` is a library in ``scratch`` with a soname of its own."""

    def make(name: str) -> Path:
        made = scratch / name
        made.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(make_library(made.name), made)
        return made

    return make


def inode(path: Path) -> int:
    return os.stat(path).st_ino


class Swap:
    """A library that gives way to something else under its name before the agent has looked at it.

    ``base`` is the root as the process sees it, ``seen`` the library's path there.
    """

    def __init__(self, base: Path, is_container: bool, template: Path, other: Path, host_decoy: Path) -> None:
        self.directory = base / OURS
        self.directory.mkdir(parents=True)
        self.library = self.directory / "libswap.so"
        shutil.copyfile(template, self.library)
        self.seen = f"/{OURS}/libswap.so" if is_container else os.fspath(self.library)
        self.decoy = base / "bait" / "libswap.so"
        self.decoy.parent.mkdir()
        shutil.copyfile(other, self.decoy)
        self.seen_decoy = "/bait/libswap.so" if is_container else os.fspath(self.decoy)
        self.host_decoy = host_decoy
        self.number = inode(self.library)

    def symlink(self) -> Path:
        self.library.unlink()
        self.library.symlink_to(self.seen_decoy)
        return self.decoy

    def escape(self) -> Path:
        self.library.unlink()
        self.library.symlink_to(self.host_decoy)
        return self.host_decoy

    def directory_symlink(self) -> Path:
        self.directory.rename(self.directory.with_name("moved"))
        self.directory.symlink_to(os.path.dirname(self.seen_decoy))
        return self.decoy

    def file(self) -> Path:
        os.rename(self.decoy, self.library)
        return self.library

    def fifo(self) -> Path:
        self.library.unlink()
        os.mkfifo(self.library)
        return self.library

    def device(self) -> Path:
        self.library.unlink()
        os.mknod(self.library, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        return self.library

    def socket(self) -> Path:
        self.library.unlink()
        with socket.socket(socket.AF_UNIX) as listener:
            here = os.getcwd()
            os.chdir(self.directory)
            try:
                listener.bind(self.library.name)
            finally:
                os.chdir(here)
        return self.library


WAYS = ["symlink", "escape", "directory_symlink", "file", "fifo", "device", "socket"]


@pytest.mark.parametrize("where", ["on the host, gone", "on the host, alive", "in a container, alive"])
@pytest.mark.parametrize("way", WAYS)
def test_what_takes_the_name_of_a_library_before_it_was_looked_at_is_not_opened(
    feed: Command,
    start: Start,
    scratch: Path,
    programs: Any,
    library: NewLibrary,
    other_library: Callable[[str], Path],
    way: str,
    where: str,
) -> None:
    is_container = "container" in where
    base = scratch / "root" if is_container else scratch
    host_decoy = other_library("host/libbait.so")
    swap = Swap(base, is_container, library("libtemplate.so"), other_library("libbait.so"), host_decoy)
    mapper, marker = start(), library("libmarker.so")
    if is_container:
        shutil.copy(programs.variant("mapper", "-static"), base / "mapper")
        mapper = start(with_prelude(scratch, programs["mapper"], f'exec chroot {base} /mapper; "$0"'))
    feed.freeze()
    try:
        mapper.unmap(*mapper.map(swap.seen))
        if "gone" in where:
            mapper.exit()
        decoy = getattr(swap, way)()
        with Opens(decoy) as opens:
            if decoy.is_file():
                decoy.read_bytes()
                assert opens.by(os.getpid()) == [decoy.name]  # the bait is being watched
            feed.thaw()
            load = feed.load_of(mapper.pid, swap.number)
            feed.unload_of(mapper.pid, swap.number)
            last = start()
            last.map(marker)
            assert feed.load_of(last.pid, inode(marker))["library"]["soname"] == "libtemplate.so"
            assert opens.by(feed.pid) == []
    finally:
        feed.thaw()
    assert load["library"]["path"] == swap.seen
    assert load["library"]["soname"] in (None, "libtemplate.so")


@pytest.mark.parametrize("way", ["symlink", "mount"])
def test_a_file_with_the_same_inode_number_on_another_file_system_is_not_taken_for_the_library(
    feed: Command, start: Start, scratch: Path, programs: Any, other_library: Callable[[str], Path], way: str
) -> None:
    mine, decoy = other_library("libmine.so"), other_library("libbait.so")
    commands = f"""
    mkdir {scratch}/a {scratch}/b
    mount -t tmpfs none {scratch}/a
    mount -t tmpfs none {scratch}/b
    cp {mine} {scratch}/a/lib.so
    cp {decoy} {scratch}/b/lib.so
    """
    mapper = start(with_prelude(scratch, programs["mapper"], commands, launcher=IN_OWN_MOUNTS))
    inside = Path(f"/proc/{mapper.pid}/root{scratch}")
    number = inode(inside / "a/lib.so")
    assert inode(inside / "b/lib.so") == number, "the numbers differ, so the test shows nothing"
    feed.freeze()
    try:
        mapper.unmap(*mapper.map(scratch / "a/lib.so"))
        if way == "symlink":
            (inside / "a/lib.so").rename(inside / "a/moved.so")
            (inside / "a/lib.so").symlink_to(scratch / "b/lib.so")
        else:
            enter = ["nsenter", "-t", str(mapper.pid), "-m", "mount", "--bind"]
            subprocess.run([*enter, scratch / "b/lib.so", scratch / "a/lib.so"], check=True)
    finally:
        feed.thaw()
    assert feed.load_of(mapper.pid, number)["library"]["soname"] != "libbait.so"


def test_a_file_mapped_in_the_place_of_a_library_gives_its_facts_to_nobody(
    feed: Command, start: Start, other_library: Callable[[str], Path]
) -> None:
    """Facts are kept by file, so a lie about a shared layer's library would reach every container."""
    first, honest, real, decoy = start(), start(), other_library("libreal.so"), other_library("libbait.so")
    feed.freeze()
    try:
        at, length = first.map(real)
        first.map(decoy, "at", f"{at:x}", "len", length)
    finally:
        feed.thaw()
    assert feed.load_of(first.pid, inode(real))["library"]["soname"] in (None, "libreal.so")
    assert feed.load_of(first.pid, inode(decoy))["library"]["soname"] == "libbait.so"
    honest.map(real)
    assert feed.load_of(honest.pid, inode(real))["library"]["soname"] == "libreal.so"


def test_a_callback_is_not_given_what_took_the_name_of_the_library(
    open_ledger: Any, start: Start, scratch: Path, other_library: Callable[[str], Path]
) -> None:
    """The callback of a first library keeps the second waiting until its name is another file's."""
    first, second, decoy = (other_library(f"lib{name}.so") for name in ("first", "second", "bait"))
    numbers = [inode(first), inode(second), inode(decoy)]
    go_on, is_waiting = threading.Event(), threading.Event()
    given: list[int] = []

    def activate(file: ActiveFile) -> None:
        given.append(os.fstat(file.fileno()).st_ino)
        is_waiting.set()
        assert go_on.wait(60)

    ledger = open_ledger(Rule(OURS, name="ours", on_activate=activate))
    mapper = start()
    try:
        mapper.map(first)
        ledger.wait_for(is_waiting.is_set, "the first callback was not called")
        at, length = mapper.map(second)
        ledger.wait_load(mapper.pid, numbers[1])
        mapper.unmap(at, length)
        second.unlink()
        second.symlink_to(decoy)
        with Opens(decoy) as opens:
            go_on.set()
            ledger.wait_unload(mapper.pid, numbers[1])
            ledger.stop()
            assert opens.by(os.getpid()) == []
    finally:
        go_on.set()
    assert given == [numbers[0]]


@pytest.mark.parametrize("what", ["fifo", "device", "link to the host"])
def test_a_package_database_that_is_none_is_not_opened(
    start: Start,
    spawn: Any,
    scratch: Path,
    programs: Any,
    library: NewLibrary,
    other_library: Callable[[str], Path],
    what: str,
) -> None:
    """``list --stale`` looks for the package of a stale file in the root of its process."""
    root = scratch / "root"
    stale = library(f"root/{OURS}/libstale.so")
    info = root / "var/lib/dpkg/info"
    info.mkdir(parents=True)
    decoy = info / "bait.list"
    if what == "fifo":
        os.mkfifo(decoy)
    elif what == "device":
        os.mknod(decoy, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    else:
        target = other_library("host/libbait.so")
        decoy.symlink_to(target)
        decoy = target
    shutil.copy(programs.variant("mapper", "-static"), root / "mapper")
    mapper = start(with_prelude(scratch, programs["mapper"], f'exec chroot {root} /mapper; "$0"'))
    mapper.map(f"/{OURS}/libstale.so")
    stale.unlink()
    with Opens(decoy) as opens:
        listing = spawn([SOWATCH, "list", "--stale", "--json", "--pid", str(mapper.pid), OURS], stdout=subprocess.PIPE)
        listed, _ = listing.communicate()
        assert [json.loads(line)["stale"] for line in listed.splitlines()[1:]] == ["deleted"]
        assert opens.by(None) == []  # the work is done by a child of the command


def test_a_file_whose_opening_never_returns_keeps_nobody_elses_facts_waiting(
    open_ledger: Any, start: Start, library: NewLibrary, scratch: Path, programs: Any
) -> None:
    """As on a FUSE or NFS mount whose server is gone, or hostile."""
    honest, template = library("libhonest.so"), library("libtemplate.so")
    commands = f"mkdir {scratch}/m; mount -t tmpfs none {scratch}/m; cp {template} {scratch}/m/libhung.so"
    mapper = start(with_prelude(scratch, programs["mapper"], commands, launcher=IN_OWN_MOUNTS))
    hung = Path(f"/proc/{mapper.pid}/root{scratch}/m/libhung.so")
    number = inode(hung)
    ledger = open_ledger(Rule(OURS))
    with Held(hung, os.getpid()) as held:
        mapper.map(scratch / "m/libhung.so")
        ledger.wait_for(held.is_holding.is_set, "the file was not looked at")
        mapper.map(honest)
        ledger.wait_load(mapper.pid, number)
        found = ledger.wait_load(mapper.pid, inode(honest)).library.soname
        ledger.stop()
    assert found == "libtemplate.so"
