"""Containers choose file names, file contents and process names: none of it may mislead, stop or misuse the agent.

What is told goes through the installed command, whose every line is checked against the schema.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sowatch import Rule, Watcher
from sowatch.model.config import Config
from sowatch.model.events import Load
from sowatch.model.literals import KINDS
from support import bpfsys, strict
from support.elf_files import Made
from support.hostile import SOWATCH, Command, Opens, deep_path, is_shown_safely
from support.kernel import Ledger, standing_still
from support.programs import Mapper, Refused

PAGE = 4096
Start = Callable[..., Mapper]
NewLibrary = Callable[..., Path]

#: In the path of every file here, and of nobody else's: what other suites do at the same time is not watched.
OURS = f"sow-host-{os.getpid()}-"

ALL_KINDS = [word for kind in KINDS for word in ("--kind", kind)]

#: File names made to break lines, tables, JSON, terminals, parsers of maps and of our own records.
NAMES = [
    b"lib\x1b[2J\x1b]0;owned\x07.so",
    b"line\nbreak.so",
    b"tab\tcarriage\rreturn.so",
    b'","event":"stopped","x":"',
    b"back\\slash\\012\\n.so",
    "right-to-left-\u202eos.gnol\u200b.so".encode(),
    "c1-control-\u009b31m.so".encode(),
    b"not-utf-8-\xff\xfe\xc3(.so",
    b"half-a-surrogate-\xed\xa0\x80.so",
    b"ends like the mark (deleted)",
    b" starts and ends with spaces ",
    b"-rf",
    b"{0}{evil!r}%s%n[bold red]",
    b"\xff" * 255,
    b"n" * 255,
    b"\x7f\x01\x02",
]


@pytest.fixture
def scratch() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix=OURS, dir="/var/tmp"))
    made.chmod(0o755)
    yield made
    # Deeper than shutil.rmtree can follow.
    subprocess.run(["rm", "-rf", made], check=True)


@pytest.fixture(scope="module")
def feed(schema: Any, deadline: Any) -> Iterator[Command]:
    """A running ``sowatch watch --json`` of the files of these tests; the whole of its output is checked."""
    error = bpfsys.why_no_bpf()
    if error is not None:
        pytest.skip(f"bpf(2) cannot create a map: {error.strerror}")
    # What floods and who is flooded is left out: nobody reads this feed meanwhile.
    with Command([*ALL_KINDS, rf"{OURS}(?!.*/lib(flood|honest))"], check=schema, timeout_s=deadline(10)) as command:
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


def run(*words: object) -> bytes:
    """What the command prints; it must not fail."""
    done = subprocess.run([SOWATCH, *map(str, words)], capture_output=True, check=False)
    warned = [line for line in done.stderr.splitlines() if not line.startswith(b"sowatch: one scan: ")]
    assert (done.returncode, warned) == (0, [])
    return done.stdout


# ---- names --------------------------------------------------------------------------------------


@pytest.fixture
def named(start: Start, library: NewLibrary) -> tuple[Mapper, list[Path]]:
    """A process that maps a library by each of the names."""
    mapper = start()
    paths = [library(os.fsdecode(name)) for name in NAMES]
    for path in paths:
        mapper.map(path)
    return mapper, paths


def test_any_name_is_told_byte_for_byte_on_one_plain_line(feed: Command, start: Start, library: NewLibrary) -> None:
    mapper = start()
    for name in NAMES:
        path = library(os.fsdecode(name))
        at, length = mapper.map(path)
        number = inode(path)
        load = feed.load_of(mapper.pid, number)
        assert os.fsencode(load["library"]["path"]) == os.fsencode(path)
        assert load["library"]["deleted"] is False
        assert load["library"]["soname"] == "libtemplate.so"
        mapper.unmap(at, length)
        feed.unload_of(mapper.pid, number)
    for raw in feed.lines:
        assert raw.isascii()
        assert raw.decode().isprintable()


@pytest.mark.parametrize("by", ["library", "process"])
def test_any_name_stays_on_its_own_line_of_a_table(named: tuple[Mapper, list[Path]], by: str) -> None:
    mapper, paths = named
    shown = run("list", "--format", "table", "--by", by, "--pid", mapper.pid, OURS)
    assert is_shown_safely(shown)
    # By library a line below each file, and one below the head, says who has it.
    assert len(shown.splitlines()) == (1 + len(paths)) * (2 if by == "library" else 1)


def test_any_name_stays_on_its_own_line_of_the_text_feed(named: tuple[Mapper, list[Path]]) -> None:
    mapper, paths = named
    shown = run("watch", "--format", "text", "--events", "load", "--duration", "0", "--pid", mapper.pid, OURS)
    assert is_shown_safely(shown)
    assert len([line for line in shown.splitlines() if b"snapshot" in line]) == len(paths)


def test_any_name_is_listed_in_json_with_its_bytes(named: tuple[Mapper, list[Path]]) -> None:
    mapper, paths = named
    listed = [strict.loads(line) for line in run("list", "--json", "--pid", mapper.pid, OURS).splitlines()[1:]]
    assert {os.fsencode(one["library"]["path"]) for one in listed} == {os.fsencode(path) for path in paths}
    assert {one["stale"] for one in listed} == {None}


def test_any_name_is_the_same_to_the_audit(named: tuple[Mapper, list[Path]], open_ledger: Any) -> None:
    mapper, _ = named
    ledger = open_ledger(Rule(OURS))
    assert [one for one in ledger.watcher.audit().differences if one.pid == mapper.pid] == []


def test_a_path_as_long_as_a_system_call_takes_is_told_whole_and_its_file_is_read(
    feed: Command, start: Start, library: NewLibrary, scratch: Path
) -> None:
    path = deep_path(scratch, 4095, "libdeep.so")
    os.rename(library("libnew.so"), path)
    mapper = start()
    mapper.map(path)
    load = feed.load_of(mapper.pid, os.stat(path).st_ino)
    assert load["library"]["path"] == load["library"]["host_path"] == path
    assert "path_partial" not in load["library"]
    assert load["library"]["soname"] == "libtemplate.so"
    assert len(run("list", "--format", "table", "--pid", mapper.pid, OURS).splitlines()) == 4


def test_a_path_longer_than_any_system_call_takes_is_told_as_partial_and_its_file_is_read(
    feed: Command, start: Start, library: NewLibrary, scratch: Path
) -> None:
    """The end of the path is what is left of it, so the pattern has to match that."""
    new = library(f"lib{OURS}deep.so")
    number = inode(new)
    deepest = os.path.dirname(deep_path(scratch, 4000, "x"))
    fd = os.open(deepest, os.O_PATH)
    try:
        for _ in range(10):
            os.mkdir("e" * 200, dir_fd=fd)
            deeper = os.open("e" * 200, os.O_PATH, dir_fd=fd)
            os.close(fd)
            fd = deeper
        os.rename(new, new.name, dst_dir_fd=fd)
        mapper = start()
        mapper.map(f"/proc/{os.getpid()}/fd/{fd}/{new.name}")
    finally:
        os.close(fd)
    load = feed.load_of(mapper.pid, number)
    assert load["library"]["path_partial"] is True
    # No path leads there; the kernel's link does, while it is mapped.
    assert os.stat(load["library"]["host_path"]).st_ino == number
    assert load["library"]["soname"] == "libtemplate.so"
    assert is_shown_safely(run("list", "--format", "table", "--pid", mapper.pid, OURS))


def test_a_hostile_program_name_is_told_byte_for_byte_and_shown_safely(
    feed: Command, start: Start, scratch: Path, library: NewLibrary, programs: Any
) -> None:
    name = b'\x1b[31m"\n,{\xff\t\\'
    program = scratch / os.fsdecode(name)
    shutil.copy(programs["mapper"], program)
    mapper, new = start(program), library()
    mapper.map(new)
    load = feed.load_of(mapper.pid, inode(new))
    assert os.fsencode(load["process"]["comm"]) == name[:15]
    assert os.fsencode(load["process"]["exe"]) == os.fsencode(program)
    for command in (["list", "--by", "process", "--format", "table"], ["watch", "--format", "text", "--duration", "0"]):
        assert is_shown_safely(run(*command, "--pid", mapper.pid, OURS))


def test_a_hostile_cgroup_name_is_told_byte_for_byte_and_shown_safely(
    feed: Command, start: Start, library: NewLibrary
) -> None:
    mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    roots = [line.split()[4] for line in mounts if " - cgroup2 " in line and line.split()[3] == "/"]
    if not roots:
        pytest.skip("no cgroup hierarchy of version 2 is mounted")
    name = f'{os.getpid()}","pid":1,"x":"\x1b[2J[bold]\\'.encode() + b"\xff (deleted)"
    group = os.fsencode(roots[0]) + b"/" + name
    os.mkdir(group)
    mapper, new = start(), library()
    try:
        with open(group + b"/cgroup.procs", "wb") as file:
            file.write(b"%d" % mapper.pid)
        mapper.exec()  # introduces the process anew
        mapper.map(new)
        load = feed.load_of(mapper.pid, inode(new))
        assert os.fsencode(load["process"]["cgroup"]) == b"/" + name
        assert load["process"]["container"] is None
        assert is_shown_safely(run("list", "--by", "process", "--format", "table", "--pid", mapper.pid, OURS))
        mapper.exit()
        feed.unload_of(mapper.pid, inode(new))
    finally:
        mapper.close()
        os.rmdir(group)


# ---- contents -----------------------------------------------------------------------------------


def test_what_cannot_be_mapped_is_not_told(feed: Command, start: Start, scratch: Path, library: NewLibrary) -> None:
    mapper, marker = start(), library("libmarker.so")
    (scratch / "libdirectory.so").mkdir()
    for name in ("libdirectory.so", "libnothing.so"):
        with pytest.raises(Refused):
            mapper.map(scratch / name, "len", PAGE)
    mapper.map(marker)
    feed.load_of(mapper.pid, inode(marker))
    reported = [one["library"]["path"] for one in feed.about(mapper.pid) if one["library"]["kind"] == "library"]
    assert reported == [str(marker)]


def test_a_device_that_is_mapped_is_no_library_and_is_not_opened(
    feed: Command, start: Start, scratch: Path, library: NewLibrary
) -> None:
    mapper, marker, device = start(), library("libmarker.so"), scratch / "libdevice.so"
    os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(1, 5))
    fd = os.open(device, os.O_RDONLY)
    os.close(fd)
    with Opens(device) as opens:
        mapper.map(device, "len", PAGE)
        assert opens.by(mapper.pid) == ["libdevice.so"]
        mapper.map(marker)
        feed.load_of(mapper.pid, inode(marker))
        reported = [one for one in feed.about(mapper.pid) if one["library"]["path"] == str(device)]
        assert [one["library"]["kind"] for one in reported] in ([], ["other"])
        assert opens.by(feed.pid) == []


def write_sparse(path: Path, head: bytes, size_bytes: int) -> Path:
    path.write_bytes(head)
    os.truncate(path, size_bytes)
    return path


#: Files that claim something: how they begin, how long they are, and what they are told as.
CONTENTS: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "empty": (lambda: b"", 0, "other"),
    "no elf": (lambda: b"#!/bin/sh\n", PAGE, "other"),
    "a terabyte of nothing": (lambda: b"", 1 << 40, "other"),
    "a terabyte behind a header": (lambda: Made().data(), 1 << 40, "library"),
    "only the magic": (lambda: b"\x7fELF", 4, "other"),
    "header cut off": (lambda: Made().data()[:64], 64, "library"),
    "segments beyond the end": (lambda: lying(segments={2: {"offset": 1 << 60, "vaddr": 1 << 60}}), PAGE, "library"),
    "notes of a terabyte": (lambda: lying(segments={4: {"filesz": 1 << 40}}), 1 << 40, "library"),
    "65535 segments": (lambda: lying(phnum=65535), 1 << 30, "library"),
    "a soname that never ends": (lambda: lying(soname=b"A" * 5000), 1 << 20, "library"),
    "a soname to break tables": (lambda: lying(soname=b'\x1b[31m\n","x":"\xff'), 1 << 20, "library"),
    "a hash table without end": (lambda: lying(gnu={"buckets": 0xFFFFFFFF}), 1 << 40, "library"),
}


def lying(**fields: Any) -> bytes:
    made = Made()
    for name, value in fields.items():
        setattr(made, name, value)
    return made.data()


@pytest.mark.parametrize("content", CONTENTS)
def test_a_file_that_lies_is_told_as_what_it_is_and_holds_up_nobody(
    feed: Command, start: Start, scratch: Path, library: NewLibrary, content: str
) -> None:
    head, size_bytes, kind = CONTENTS[content]
    mapper, marker = start(), library("libmarker.so")
    path = write_sparse(scratch / "liblie.so", head(), size_bytes)
    mapper.map(path, "len", PAGE)
    mapper.map(marker)
    feed.load_of(mapper.pid, inode(marker))
    (reported,) = [one for one in feed.about(mapper.pid) if one["library"]["path"] == str(path)]
    assert reported["library"]["kind"] == kind
    assert is_shown_safely(run("list", "--format", "table", "--pid", mapper.pid, *ALL_KINDS, OURS))


@pytest.mark.parametrize("content", [name for name, one in CONTENTS.items() if one[2] == "library"])
def test_a_rule_on_exports_does_not_believe_a_file_that_lies_and_still_finds_an_honest_one(
    open_ledger: Any, start: Start, scratch: Path, make_library: Any, content: str
) -> None:
    head, size_bytes, _ = CONTENTS[content]
    honest = Path(shutil.copy(make_library("libhonest.so", exports=("wanted_call",)), scratch))
    path = write_sparse(scratch / "liblie.so", head(), size_bytes)
    ledger = open_ledger(Rule(OURS, name="exports", exports=("wanted_call",)))
    mapper = start()
    mapper.map(path, "len", PAGE)
    mapper.map(honest)
    ledger.wait_load(mapper.pid, inode(honest))
    assert ledger.story(mapper.pid, inode(path)) == []


# ---- floods -------------------------------------------------------------------------------------


class Flood:
    """Processes that map and unmap a library as fast as they can: one with threads, one without."""

    def __init__(self, start: Start, library: NewLibrary) -> None:
        self.single, self.threaded = start(), start()
        self.single.send("loop", library("libflood0.so"), 100_000_000)
        for number in (1, 2):
            self.threaded.emit("thread", "loop", library(f"libflood{number}.so"))

    def end(self) -> None:
        self.threaded.emit("thread", "stop")
        assert self.single._process
        self.single._process.kill()
        self.single.close()


@pytest.mark.alone
@pytest.mark.parametrize("ring_bytes", [8 << 20, 16384])
def test_a_flood_starves_nobody_and_what_it_cost_is_counted_and_repaired(
    start: Start, library: NewLibrary, wait_until: Any, ring_bytes: int
) -> None:
    honest = [start() for _ in range(4)]
    libraries = [library(f"libhonest{number}.so") for number in range(2)]
    reported: set[tuple[int, int]] = set()

    def note(event: Load) -> None:
        reported.add((event.process.pid, event.library.id.inode))

    rules = [Rule(f"{OURS}.*libhonest", name="honest", on_load=note), Rule(OURS, name="all")]
    watcher = Watcher(*rules, config=Config(ring_bytes=ring_bytes))
    subscription = watcher.subscribe(events=())
    with watcher:
        flood = Flood(start, library)
        try:
            for new in libraries:
                for mapper in honest:
                    mapper.map(new)
                expected = {(mapper.pid, inode(new)) for mapper in honest}
                wait_until(lambda expected=expected: expected <= reported, 20, f"the load of {new.name} in all four")
            if ring_bytes < 1 << 20:
                with standing_still(watcher):
                    for _ in range(300):
                        honest[0].unmap(*honest[0].map(libraries[0]))
                wait_until(lambda: watcher.stats.lost_kernel, 20, "a loss in a tiny ring")
        finally:
            flood.end()
        ours = {mapper.pid for mapper in (*honest, flood.single, flood.threaded)}
        assert [one for one in watcher.audit().differences if one.pid in ours] == []
        wait_until(lambda: watcher.is_repaired, 30, "the repair")
    controls = [event.event for event in subscription]
    assert controls.pop() == "stopped"
    lost = watcher.stats.lost_kernel
    assert ("lost" in controls) == bool(lost)
    assert not lost or controls[-1] == "repaired"


@pytest.mark.alone
def test_a_process_that_says_too_much_is_read_instead_and_costs_the_others_nothing(
    open_ledger: Callable[..., Ledger], start: Start, library: NewLibrary, wait_until: Any
) -> None:
    """100,000 loads and unloads a second and more, as fast as the machine can."""
    ledger = open_ledger(Rule(OURS, name="ours"), config=Config(max_records_s=1000))
    honest = [start() for _ in range(4)]
    libraries = [library(f"libhonest{number}.so") for number in range(5)]
    flooder = start()
    flooded = library("libflood.so")
    flooder.send("loop", flooded, 100_000_000)
    wait_until(lambda: ledger.watcher.stats.lost_throttled, 20, "the first record that is one too many")
    for new in libraries:
        for mapper in honest:
            at, length = mapper.map(new)
            mapper.unmap(at, length)
    stories = {(mapper.pid, inode(new)) for new in libraries for mapper in honest}
    for pid, number in stories:
        ledger.wait_for(lambda p=pid, n=number: len(ledger.story(p, n)) == 2, "both events of an honest process", 30)
        assert ledger.story(pid, number) == [("load", "mmap"), ("unload", "munmap")]
    stats = ledger.watcher.stats
    assert stats.lost_throttled == stats.lost_kernel
    assert flooder._process
    flooder._process.kill()
    flooder.close()
    ledger.wait_unload(flooder.pid, inode(flooded))
    wait_until(lambda: ledger.watcher.is_repaired, 30, "the repair")
    reported = [cause for kind, cause in ledger.story(flooder.pid, inode(flooded)) if kind == "load"]
    assert {"mmap"} <= set(reported) <= {"mmap", "repair"}
    assert ledger.watcher.audit().differences == ()


@pytest.mark.alone
def test_a_flood_of_names_does_not_hide_an_honest_library(feed: Command, start: Start, library: NewLibrary) -> None:
    """Each name is new to the rules, to the kernel's verdicts and to the reader of files."""
    flooder, honest, new, first = start(), start(), library(), library("first.so")
    for number in range(500):
        link = first.with_name(f"{number}.so")
        os.rename(first, link)
        first = link
        flooder.unmap(*flooder.map(link))
    honest.map(new)
    feed.load_of(honest.pid, inode(new))

    def names() -> set[str]:
        flooded = {Path(one["library"]["path"]).stem for one in feed.about(flooder.pid) if one["event"] == "load"}
        return {name for name in flooded if name.isdigit()}

    # Each file is read before it is told of, so what is quick to read may come first.
    feed.wait_for(lambda _: len(names()) == 500, "load of each of the 500 names")
