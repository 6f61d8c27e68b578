"""Compiles the C programs of ``tests/programs`` and drives the one that takes commands."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, NamedTuple, Self

__all__ = [
    "SOURCES",
    "Image",
    "Mapper",
    "build",
    "compile_bpf",
    "compile_library",
    "executable_images",
    "make_libraries",
]

SOURCES = Path(__file__).resolve().parent.parent / "programs"
#: A directory that what is compiled is kept in and taken from, by what it is made of: where one machine compiles for
#: others without a compiler. None: no such thing.
KEPT = os.environ.get("SOWATCH_TEST_PROGRAMS")

#: Further files of a program, and what it needs from the compiler beyond the usual.
_PARTS = {"mapper": ["mapper_threads.c"]}
_FLAGS = {"mapper": ["-pthread"], "churn": ["-pthread"], "caller": ["-pthread"]}


def build(name: str, directory: Path, *, flags: Sequence[str] = (), output: str | None = None) -> Path:
    """Compile ``tests/programs/NAME.c`` into ``directory``, once for each set of flags.

    Args:
        name: of the program, without ``.c``.
        directory: where the program goes; made if need be.
        flags: given to the compiler last, so that libraries may stand among them.
        output: name of the result; default: ``name`` and a hash of the flags if there are any.
    """
    sources = [SOURCES / f"{name}.c", *(SOURCES / part for part in _PARTS.get(name, []))]
    if output is None:
        output = f"{name}-{hashlib.sha256(repr(list(flags)).encode()).hexdigest()[:8]}" if flags else name
    directory.mkdir(parents=True, exist_ok=True)
    program = directory / output
    if not program.exists():
        # Built beside and renamed: two test workers may build the same program at once.
        fresh = program.with_name(f"{output}.{os.getpid()}")
        _compile(["-O2", "-Wall", "-Wextra", "-Werror"], fresh, sources, [*_FLAGS.get(name, []), *flags])
        fresh.rename(program)
    return program


def _compile(words: Sequence[str], made: Path, sources: Sequence[Path], flags: Sequence[str] = ()) -> None:
    """Compiles C into ``made``, or takes what was kept of the same words and sources."""
    if KEPT is None:
        subprocess.run(["cc", *words, "-o", made, *sources, *flags], check=True)
        return
    key = hashlib.sha256("\0".join([*words, *flags]).encode())
    for source in [*sources, *sorted(SOURCES.glob("*.h"))]:
        key.update(source.read_bytes())
    kept = Path(KEPT) / key.hexdigest()
    if not kept.exists():
        fresh = kept.with_name(f".{kept.name}.{os.getpid()}")
        subprocess.run(["cc", *words, "-o", fresh, *sources, *flags], check=True)
        fresh.rename(kept)
    shutil.copy(kept, made)


def compile_bpf(name: str, directory: Path) -> Path:
    """Compile ``tests/programs/NAME.bpf.c`` as users compile theirs."""
    made = directory / f"{name}.bpf.o"
    include = subprocess.run(["cc", "-print-multiarch"], capture_output=True, text=True, check=True).stdout.strip()
    target = {"x86_64": "x86", "aarch64": "arm64"}[os.uname().machine]
    command = ["clang", "-target", "bpf", "-O2", "-g", f"-D__TARGET_ARCH_{target}"]
    command += ["-idirafter", f"/usr/include/{include}"]
    subprocess.run([*command, "-c", SOURCES / f"{name}.bpf.c", "-o", made], check=True)
    return made


def compile_library(made: Path, exports: Iterable[str] = ()) -> Path:
    """Makes the shared library ``made``; see the fixture ``make_library``."""
    made.parent.mkdir(parents=True, exist_ok=True)
    functions = "".join(f"int {export}(void) {{ return {i}; }}\n" for i, export in enumerate(exports))
    # Without a function there would be no executable segment, so nothing to watch.
    functions += "static int here(void) { return 0; }\nint (*const sowatch_test_anchor)(void) = here;\n"
    source = made.with_name(f".{made.name}.c")
    source.write_text(functions, encoding="utf-8")
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-Wl,-soname,{made.name}", "-Wl,--build-id"]
    _compile(flags, made, [source])
    source.unlink()
    return made


def make_libraries(directory: Path, count: int, *, prefix: str = "tiny") -> list[Path]:
    """``count`` different small libraries ``libPREFIX0.so``..., each with one function of its own."""
    made = []
    for number in range(count):
        function = f"{prefix}{number}" if count > 1 else prefix
        flags = ["-shared", "-fPIC", f"-DNAME={function}"]
        made.append(build("tiny_library", directory, flags=flags, output=f"lib{function}.so"))
    return made


class Image(NamedTuple):
    """A file mapped executable, as ``/proc/PID/maps`` shows it."""

    dev: str
    inode: int
    path: str


def executable_images(pid: int) -> set[Image]:
    """The files that the process has mapped executable now, by its ``/proc/PID/maps``.

    ``dev`` is ``major:minor`` in decimal, ``path`` the kernel's text, ``(deleted)`` included.
    """
    found = set()
    for line in Path(f"/proc/{pid}/maps").read_bytes().splitlines():
        columns = line.split(None, 5)
        if len(columns) == 6 and b"x" in columns[1] and int(columns[4]):
            major, minor = (int(part, 16) for part in columns[3].split(b":"))
            found.add(Image(f"{major}:{minor}", int(columns[4]), os.fsdecode(columns[5])))
    return found


class Refused(Exception):
    """The mapper could not do what it was told."""


class Mapper:
    """A running ``mapper`` (see ``tests/programs/mapper.c``): each call is one thing it does.

    Args:
        program: the compiled mapper.
        sockets: a directory for the sockets that forked mappers connect to; short, because a
            socket's path may have 107 bytes at most.
    """

    def __init__(self, program: Path, sockets: Path) -> None:
        self._program = program
        self._sockets = sockets
        self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        assert self._process.stdin
        assert self._process.stdout
        self._input: IO[bytes] | None = self._process.stdin
        self._output = self._process.stdout.fileno()
        self._connection: socket.socket | None = None
        self._unread = b""
        self.pid = int(self._answer()[0])

    @classmethod
    def _of_child(cls, parent: Mapper, connection: socket.socket) -> Self:
        self = cls.__new__(cls)
        self._program, self._sockets = parent._program, parent._sockets
        self._process, self._connection = None, connection
        self._input, self._output = None, connection.fileno()
        self._unread = b""
        self.pid = int(self._answer()[0])
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process (it ends when nobody can give it commands) and wait for it."""
        if self._connection:
            self._connection.close()
            self._connection = None
        elif self._process:
            assert self._process.stdin
            assert self._process.stdout
            self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()
            self._process = None

    def send(self, *words: object) -> None:
        """Give a command without waiting for its answer."""
        escaped = [os.fsencode(str(word)) for word in words]
        for raw, written in ((b"\\", b"\\\\"), (b"\t", b"\\t"), (b"\n", b"\\n")):
            escaped = [word.replace(raw, written) for word in escaped]
        line = b"\t".join(escaped) + b"\n"
        if self._connection:
            self._connection.sendall(line)
        else:
            assert self._input
            self._input.write(line)

    def emit(self, *words: object) -> list[str]:
        """Give a command and return the words of its answer.

        Raises:
            Refused: the mapper answered with an error.
            EOFError: it ended instead.
        """
        self.send(*words)
        return self._answer()

    def _answer(self) -> list[str]:
        while b"\n" not in self._unread:
            more = os.read(self._output, 4096)
            if not more:
                raise EOFError("the mapper ended")
            self._unread += more
        line, self._unread = self._unread.split(b"\n", 1)
        kind, *results = line.decode(errors="surrogateescape").split(" ")
        if kind != "ok":
            raise Refused(line.decode(errors="replace"))
        return results

    def map(self, path: Path | str, *words: object) -> tuple[int, int]:
        """Map a file, executable unless told otherwise: its address and length."""
        at, length = self.emit("map", path, *words)
        return int(at, 16), int(length)

    def unmap(self, at: int, length: int) -> None:
        """Unmap a range."""
        self.emit("unmap", f"{at:x}", length)

    def protect(self, at: int, length: int, protection: str) -> None:
        """Change the protection of a range to ``r``, ``rx``, ``rw`` or ``rwx``."""
        self.emit("protect", f"{at:x}", length, protection)

    def fork(self, *, how: str = "fork") -> Mapper:
        """A child that takes commands of its own; ``how="clonevm"`` shares the address space."""
        path = self._sockets / f"{self.pid}-{os.urandom(4).hex()}"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.fspath(path))
            listener.listen(1)
            self.send(how, path)
            connection, _ = listener.accept()
        path.unlink()
        child = Mapper._of_child(self, connection)
        self._answer()
        return child

    def exec(self, *, how: str = "exec") -> None:
        """Execute the mapper anew in place; ``how="execthread"`` does so from another thread."""
        self.emit(how, self._program)
        assert int(self._answer()[0]) == self.pid

    def exit(self, code: int = 0) -> None:
        """End the process with ``code`` and collect what is left of it."""
        self.send("exit", code)
        self.close()
