"""Real processes that do what they are told, and a model of what each of them has mapped then.

`World` drives ``tests/programs/actor.c`` and keeps the model: each method is one thing that one
process does, done for real and written down. Nothing here knows the package; `mapped_by_proc`
reads ``/proc`` on its own. ``model_judge`` compares the two with what a watch says.

A page that a background thread maps and unmaps all the time is *restless*: the model cannot know
it. A child that shares its parent's memory is *silent* until somebody had reason to tell of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "ARENA",
    "ARENA_PAGES",
    "PAGE",
    "Actor",
    "File",
    "Move",
    "Piece",
    "Ranges",
    "World",
    "mapped_by_proc",
    "merged",
]

PAGE = 4096
#: Mappings that are not placed by the kernel go here, where nothing else ever is.
ARENA = 0x100000000000
ARENA_PAGES = 24
_PR_SET_CHILD_SUBREAPER = 36

Ranges = tuple[tuple[int, int], ...]


class File(NamedTuple):
    """A file as ``/proc/PID/maps`` names it."""

    major: int
    minor: int
    inode: int

    @classmethod
    def at(cls, path: Path) -> File:
        about = path.stat()
        return cls(os.major(about.st_dev), os.minor(about.st_dev), about.st_ino)


class Page(NamedTuple):
    """One page of an address space. Pages of one call of mmap share its number; 0: nobody knows which."""

    file: File | None
    call: int
    protection: str
    offset: int


class Piece(NamedTuple):
    """Neighbouring pages that are one mapping to the kernel."""

    at: int
    pages: int
    first: Page

    def part(self, first: int, pages: int) -> Piece:
        """Some of its pages."""
        return Piece(self.at + first * PAGE, pages, _after(self.first, first))


class Move(NamedTuple):
    """What is sent to an actor, and what the model makes of the answer."""

    packet: str
    take: Callable[[list[str]], None]
    #: The answer has to be an error.
    fails: Callable[[], bool] = lambda: False


class Space:
    """The mappings of one address space, its libraries opened with dlopen, and who holds it."""

    def __init__(self) -> None:
        self.pages: dict[int, Page] = {}
        #: dlopen handle: the pages of its executable part, and how often it is open.
        self.opened: dict[str, tuple[range, int]] = {}
        self.holders: list[Actor] = []
        #: Files that a thread mapped when it was ended by force.
        self.unknown: set[File] = set()

    def copy(self) -> Space:
        new = Space()
        new.pages, new.opened = dict(self.pages), dict(self.opened)
        return new

    @property
    def restless(self) -> set[File]:
        return {file for holder in self.holders for file in holder.loops}

    def executable(self) -> dict[File, Ranges]:
        return merged((page.file, at) for at, page in self.pages.items() if page.file and page.protection == "rx")

    def pieces(self) -> list[Piece]:
        """All but what dlopen mapped, which only dlclose may touch, and what chance left there."""
        fixed = {at for pages, _ in self.opened.values() for at in pages}
        found: list[Piece] = []
        for at in sorted(set(self.pages) - fixed):
            page = self.pages[at]
            last = found[-1] if found else None
            if last and at == last.at + last.pages * PAGE and page == _after(last.first, last.pages):
                found[-1] = last._replace(pages=last.pages + 1)
            elif page.file and page.call:
                found.append(Piece(at, 1, page))
        return found


def _after(page: Page, count: int) -> Page:
    return page._replace(offset=page.offset + count)


def merged(pages: Iterable[tuple[File, int]]) -> dict[File, Ranges]:
    """Page addresses as ranges without seams."""
    found: dict[File, list[tuple[int, int]]] = {}
    for file, at in sorted(pages):
        ranges = found.setdefault(file, [])
        if ranges and ranges[-1][1] == at:
            ranges[-1] = (ranges[-1][0], at + PAGE)
        else:
            ranges.append((at, at + PAGE))
    return {file: tuple(ranges) for file, ranges in found.items()}


def mapped_by_proc(pid: int | str) -> dict[File, Ranges]:
    """What a process or thread has mapped executable, by its ``maps``."""
    found: list[tuple[File, int]] = []
    for line in Path(f"/proc/{pid}/maps").read_bytes().splitlines():
        span, protection, _, device, inode = line.split(None, 5)[:5]
        if b"x" in protection and inode != b"0":
            major, minor = (int(part, 16) for part in device.split(b":"))
            start, end = (int(part, 16) for part in span.split(b"-"))
            found += [(File(major, minor, int(inode)), at) for at in range(start, end, PAGE)]
    return merged(found)


class Actor:
    """A running actor, and what it should have."""

    def __init__(self, connection: socket.socket, space: Space) -> None:
        self.connection = connection
        self.space = space
        self.loops: list[File] = []
        self.is_silent = False
        self.pid = self.tid = 0
        self.image: range = range(0)

    def greet(self) -> None:
        """Takes the greeting of a program that has just begun, or of a new child."""
        self.pid, self.tid, start, end = (int(word, 0) for word in self.receive())
        self.image = range(start, end, PAGE)

    def receive(self) -> list[str]:
        """The answer to the oldest command without one.

        Raises:
            Refused: it is an error.
            EOFError: the actor has ended.
        """
        packet = self.connection.recv(1024)
        if not packet:
            raise EOFError(f"actor {self.pid} ended")
        kind, *words = packet.decode().split(" ")
        if kind != "ok":
            raise Refused(packet.decode())
        return words


class Refused(Exception):
    """An actor could not do what it was told."""


@contextlib.contextmanager
def subreaper() -> Iterator[None]:
    """Makes this process the one that orphans below it fall to, so that it can wait for them."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


class World:
    """Some processes, the files they map, and the model of it all. Use within `subreaper`.

    Args:
        actor: the compiled program.
        libraries: templates; the files that are mapped are copies in ``directory``, made if missing.
        directory: whose files are deleted and replaced.
        timeout_s: how long an actor may take for an answer.
        files: every file that was ever mapped is added, with its name; may be shared by worlds.
    """

    def __init__(
        self, actor: Path, libraries: list[Path], directory: Path, timeout_s: float, files: dict[File, str]
    ) -> None:
        self._program, self._templates = actor, libraries
        self._directory, self._timeout_s = directory, timeout_s
        self._calls = itertools.count(1)
        self.program = File.at(actor)
        self.files = files
        self.actors: list[Actor] = []
        #: Every pid so far, the living ones too.
        self.pids: list[int] = []
        self.steps: list[str] = []
        for number in range(len(libraries)):
            if not self.library(number).exists():
                self.replace(number)

    # ---- files --------------------------------------------------------------------------------

    def library(self, number: int) -> Path:
        return self._directory / f"lib{number}.so"

    def _present(self, number: int) -> Path:
        path = self.library(number)
        if not path.exists():
            self.replace(number)
        self.files[File.at(path)] = path.name
        return path

    def replace(self, number: int) -> None:
        """A new file takes the name of a library, as an upgrade does it."""
        path = self.library(number)
        fresh = path.with_suffix(".new")
        shutil.copyfile(self._templates[number], fresh)
        fresh.rename(path)
        self.files[File.at(path)] = path.name
        self.steps.append(f"replace {path.name}")

    def delete(self, number: int) -> None:
        self.library(number).unlink(missing_ok=True)
        self.steps.append(f"delete {self.library(number).name}")

    # ---- telling ------------------------------------------------------------------------------

    def _send(self, actor: Actor, packet: str, given: socket.socket | None = None) -> None:
        self.steps.append(f"{actor.pid}: {packet}")
        if given is None:
            actor.connection.send(packet.encode())
        else:
            socket.send_fds(actor.connection, [packet.encode()], [given.fileno()])

    def emit(self, actor: Actor, packet: str) -> list[str]:
        self._send(actor, packet)
        words = actor.receive()
        if words:
            self.steps[-1] += " -> " + " ".join(words)
        return words

    def run(self, moves: Iterable[tuple[Actor, Move]]) -> None:
        """Sends all of it ahead, then takes the answers in order.

        What actors of one address space do must not meet: nobody knows whose turn comes first.
        """
        moves = list(moves)
        for actor, move in moves:
            self._send(actor, move.packet)
        for actor, move in moves:
            must_fail = move.fails()
            try:
                words = actor.receive()
            except Refused:
                if not must_fail:
                    raise
                words = []
            else:
                assert not must_fail, f"{move.packet} worked, but cannot have"
            move.take(words)

    # ---- mappings: moves, for `run` -----------------------------------------------------------

    def _placed(self, page: int | None) -> int:
        return 0 if page is None else ARENA + page * PAGE

    def map(
        self, actor: Actor, number: int, at: int, pages: int, *, skip: int = 0, protection: str = "rx", sharing: str
    ) -> Move:
        """Maps a library at an address, replacing what is there; or anywhere, if that is 0."""
        path = self._present(number)
        page = Page(File.at(path), next(self._calls), protection, skip)
        return Move(
            f"map {path} {protection} {at:#x} {pages} {skip} {sharing}",
            lambda words: self._put(actor.space, int(words[0], 0), pages, page),
        )

    def map_memory(self, actor: Actor, number: int, at: int, pages: int) -> None:
        """Maps a memfd that holds a copy of a library."""
        where, *identity = self.emit(actor, f"memfd lib{number}.so {self._templates[number]} {at:#x} {pages}")
        file = File(*map(int, identity))
        self.files[file] = f"lib{number}.so"
        self._put(actor.space, int(where, 0), pages, Page(file, next(self._calls), "rx", 0))

    def cover(self, actor: Actor, at: int, pages: int) -> Move:
        """Maps anonymous memory over what is there."""
        page = Page(None, next(self._calls), "rw", 0)
        return Move(f"anon {at:#x} {pages}", lambda _: self._put(actor.space, at, pages, page))

    def unmap(self, actor: Actor, at: int, pages: int) -> Move:
        return Move(f"unmap {at:#x} {pages}", lambda _: self._drop(actor.space, at, pages))

    def protect(self, actor: Actor, at: int, pages: int, protection: str, *, call: str = "protect") -> Move:
        """Up to the first hole; at a hole mprotect fails, but what came before it is done."""
        touched = range(at, at + pages * PAGE, PAGE)

        def take(_: list[str]) -> None:
            space = actor.space
            for address in itertools.takewhile(space.pages.__contains__, touched):
                space.pages[address] = space.pages[address]._replace(protection=protection)

        return Move(
            f"{call} {at:#x} {pages} {protection}",
            take,
            lambda: any(address not in actor.space.pages for address in touched),
        )

    def move(self, actor: Actor, piece: Piece, pages: int, to: int, *, keep: bool) -> Move:
        """mremap: to an address, or wherever there is room if that is 0."""

        def take(words: list[str]) -> None:
            where = int(words[0], 0)
            self._drop(actor.space, piece.at, 0 if keep else piece.pages)
            self._put(actor.space, where, pages, piece.first)

        how = "keep" if keep else "move"
        return Move(f"remap {piece.at:#x} {piece.pages} {pages} {to:#x} {how}", take)

    def _put(self, space: Space, at: int, pages: int, first: Page) -> None:
        for number in range(pages):
            space.pages[at + number * PAGE] = _after(first, number)

    def _drop(self, space: Space, at: int, pages: int) -> None:
        for address in range(at, at + pages * PAGE, PAGE):
            space.pages.pop(address, None)

    def dlopen(self, actor: Actor, number: int) -> None:
        """By name, and the name may have got another file since it was opened first."""
        space = actor.space
        path = self._present(number)
        handle, start, end = self.emit(actor, f"dlopen {path}")
        pages, times = space.opened.get(handle, (range(int(start, 0), int(end, 0), PAGE), 0))
        if not times:
            self._put(space, pages.start, len(pages), Page(File.at(path), next(self._calls), "rx", 0))
        space.opened[handle] = (pages, times + 1)

    def dlclose(self, actor: Actor, handle: str) -> None:
        space = actor.space
        self.emit(actor, f"dlclose {handle}")
        pages, times = space.opened.pop(handle)
        if times > 1:
            space.opened[handle] = (pages, times - 1)
        else:
            self._drop(space, pages.start, len(pages))

    # ---- threads ------------------------------------------------------------------------------

    def loop(self, actor: Actor, kind: str, number: int, pause_us: int) -> None:
        """Starts a thread that maps and unmaps a library."""
        path = self._present(number)
        self.emit(actor, f"loop {kind} {path} {pause_us}")
        actor.loops.append(File.at(path))

    def stop(self, actor: Actor) -> None:
        """Ends such threads; they leave nothing mapped."""
        self.emit(actor, "stop")
        actor.loops.clear()
        self._learn(actor.space)

    def end_leader(self, actor: Actor) -> None:
        actor.tid = int(self.emit(actor, "leaderexit")[0])

    def _learn(self, space: Space) -> None:
        """Whatever threads that were ended by force left mapped is taken from ``/proc``."""
        if space.unknown and space.holders and not space.restless:
            for file, ranges in mapped_by_proc(space.holders[0].tid).items():
                for start, end in ranges if file in space.unknown else ():
                    for at in range(start, end, PAGE):
                        space.pages.setdefault(at, Page(file, 0, "rx", 0))
            space.unknown = set()

    # ---- processes ----------------------------------------------------------------------------

    def start(self) -> Actor:
        """A process that nobody told to begin."""
        ours, theirs = self._connect()
        with theirs:
            os.posix_spawn(
                self._program, ["actor"], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), 0)]
            )
        return self._join(ours, Space(), "start")

    def _connect(self) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(self._timeout_s)
        return ours, theirs

    def _join(self, connection: socket.socket, space: Space, how: str) -> Actor:
        actor = Actor(connection, space)
        actor.greet()
        space.holders.append(actor)
        self.actors.append(actor)
        self.pids.append(actor.pid)
        self.steps.append(f"{actor.pid}: greets after {how}")
        return actor

    def _beget(self, parent: Actor, packet: str, space: Space) -> tuple[Actor, list[str]]:
        ours, theirs = self._connect()
        with theirs:
            self._send(parent, packet, theirs)
        words = parent.receive()
        return self._join(ours, space, packet), words

    def fork(self, parent: Actor, how: str) -> Actor:
        """``how`` is fork, or orphan: then the parent's child has ended."""
        space = parent.space.copy()
        space.unknown = parent.space.restless | parent.space.unknown
        child, _ = self._beget(parent, how, space)
        self._learn(space)
        return child

    def share(self, parent: Actor) -> Actor:
        """A child that has its parent's memory."""
        child, _ = self._beget(parent, "clonevm", parent.space)
        child.is_silent = True
        return child

    def spawn(self, parent: Actor) -> Actor:
        child, _ = self._beget(parent, "spawn", Space())
        return child

    def vfork(self, parent: Actor, number: int | None) -> Actor:
        """A child that executes; before, it may map a library into its parent's memory."""
        path = None if number is None else self._present(number)
        file = None if path is None else File.at(path)
        child, (_, at) = self._beget(parent, f"vfork {path or '-'}", Space())
        if file:
            self._put(parent.space, int(at, 0), 1, Page(file, next(self._calls), "rx", 0))
        return child

    def brief(self, parent: Actor, number: int, count: int) -> None:
        """Children that map a library and end at once."""
        pids = self.emit(parent, f"brief {self._present(number)} {count}")
        self.pids += map(int, pids)

    def exec(self, actor: Actor, how: str) -> None:
        """``how`` is exec, or execthread: then not by the thread that answers."""
        self._send(actor, how)
        self._leave(actor)
        actor.space = Space()
        actor.space.holders.append(actor)
        actor.is_silent = False
        actor.greet()
        self._learn_all()

    def _leave(self, actor: Actor) -> None:
        """It holds its memory no longer."""
        space = actor.space
        space.holders.remove(actor)
        space.unknown |= set(actor.loops)
        actor.loops = []

    def _learn_all(self) -> None:
        for actor in self.actors:
            self._learn(actor.space)

    def end(self, actor: Actor, how: str) -> None:
        """``how`` is exit, or kill."""
        if how == "kill":
            self.steps.append(f"{actor.pid}: SIGKILL")
            os.kill(actor.pid, signal.SIGKILL)
        else:
            self._send(actor, "exit")
        self._bury(actor)
        self._learn_all()

    def _bury(self, actor: Actor) -> None:
        # The kernel closes its descriptors after it gave up its memory.
        assert not actor.connection.recv(1)
        actor.connection.close()
        self.actors.remove(actor)
        self._leave(actor)

    def close(self) -> None:
        """Ends every process, and waits for those that fell to us."""
        for actor in self.actors:
            os.kill(actor.pid, signal.SIGKILL)
        for actor in list(self.actors):
            with contextlib.suppress(ConnectionError, TimeoutError):
                while actor.connection.recv(1024):
                    pass
            actor.connection.close()
            self.actors.remove(actor)
        for pid in self.pids:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
