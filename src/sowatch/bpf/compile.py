"""Compiles the shipped BPF programs on this machine, and keeps what came out: strategy ``runtime``.

What is kept is loaded into the kernel later, so it lies in a directory that nobody but this user can write, and each
file's name has the hash of its content. Nothing here loads a program.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

from sowatch.bpf.binding import PROGRAMS
from sowatch.model.config import Config
from sowatch.model.errors import CompileError

__all__ = ["Cache", "Compiler", "cache_key", "compile_programs", "find_compiler", "run_compiler"]

#: libbpf's names for the register layouts (bpf/bpf_tracing.h), by `uname -m`.
ARCHITECTURES: Final = {"x86_64": "x86", "aarch64": "arm64"}
FLAGS: Final = ("-O2", "-g", "-mcpu=v3", "-fdebug-compilation-dir=.", "-I.")
#: A first compilation takes a second; an object has some 500 KB.
MAX_OBJECT_BYTES: Final = 64 << 20
_INSTALL: Final = (
    "Install clang 14 or newer (Debian, Ubuntu: apt-get install clang), or `pip install 'sowatch[compile]'`."
)


class Compiler(NamedTuple):
    """A C compiler that makes BPF objects. ``identity`` changes with its version."""

    command: tuple[str, ...]
    bpf_target: str
    identity: str


def find_compiler() -> Compiler:
    """Clang from PATH (or the one that CLANG names), else the one in the ``ziglang`` wheel.

    Raises:
        CompileError: there is neither.
    """
    chosen = os.environ.get("CLANG")
    names = [chosen] if chosen else ["clang", *(f"clang-{version}" for version in range(30, 13, -1))]
    for name in names:
        found = shutil.which(name)
        if found:
            return Compiler((found,), "bpf", _identity(found))
    zig = importlib.util.find_spec("ziglang")
    if zig is None or zig.origin is None:
        raise CompileError("no compiler found", _INSTALL)
    binary = Path(zig.origin).with_name("zig")
    return Compiler((str(binary), "cc"), "bpfel-freestanding", _identity(str(binary)))


def _identity(path: str) -> str:
    """Which file it is, and which state of it: asking for its version would cost a start of it."""
    real = os.path.realpath(path)
    info = os.stat(real)
    return f"{real} {info.st_size} {info.st_mtime_ns}"


class Cache:
    """A directory of results that only this user can have written. A context manager.

    Args:
        path: None for ``/var/cache/sowatch`` (root) or ``$XDG_CACHE_HOME/sowatch``. Made if missing.

    Raises:
        CompileError: it cannot be made, belongs to somebody else, or others may write to it.
    """

    def __init__(self, path: str | None) -> None:
        self.path = Path(path) if path is not None else _default_directory()
        remedy = "Set runtime_compiler_output_dir to a directory of your own, or remove this one."
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise CompileError(f"cannot use the cache directory {self.path}: {error.strerror}", remedy) from error
        info = os.fstat(self._fd)
        reason = ""
        if info.st_uid != os.geteuid():
            reason = f"it belongs to user {info.st_uid}, not to {os.geteuid()}"
        elif info.st_mode & 0o022:
            reason = f"others may write to it (mode {stat.S_IMODE(info.st_mode):04o})"
        elif not os.access(self.path, os.W_OK):
            reason = "it cannot be written"
        if reason:
            self.close()
            raise CompileError(f"cannot use the cache directory {self.path}: {reason}", remedy)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Safe to call again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def get(self, key: str) -> int | None:
        """A descriptor of what is kept under a key, read-only; the caller closes it.

        What is not as it was put in is removed, and None is the answer.
        """
        for name in os.listdir(self._fd):
            if not name.startswith(f"{key}-"):
                continue
            fd = -1
            with suppress(OSError):
                fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._fd)
                if _is_sound(fd, name.removeprefix(f"{key}-")):
                    return fd
            if fd >= 0:
                os.close(fd)
            with suppress(OSError):
                os.unlink(name, dir_fd=self._fd)
        return None

    def put(self, key: str, made: Path) -> int:
        """Keeps a file (it is moved) and gives a descriptor of it, as `get` does.

        Raises:
            CompileError: there is no such file, or it cannot be kept.
        """
        if not made.is_file():
            raise CompileError("the compiler made nothing", _INSTALL)
        digest = hashlib.sha256(made.read_bytes()).hexdigest()
        made.chmod(0o600)
        os.rename(made, f"{key}-{digest}", dst_dir_fd=self._fd)
        fd = self.get(key)
        if fd is None:
            raise CompileError(f"what was put into {self.path} cannot be read back", "Check its file system.")
        return fd

    @contextmanager
    def workshop(self) -> Iterator[Path]:
        """A directory of our own to compile in, on the cache's file system; gone afterwards."""
        try:
            made = tempfile.mkdtemp(prefix="tmp-", dir=f"/proc/self/fd/{self._fd}")
        except OSError as error:
            raise CompileError(
                f"cannot write to the cache directory {self.path}: {error.strerror}",
                "Free space there, or set runtime_compiler_output_dir to another one.",
            ) from error
        try:
            yield Path(os.path.realpath(made))
        finally:
            shutil.rmtree(made, ignore_errors=True)


def _default_directory() -> Path:
    if os.geteuid() == 0:
        return Path("/var/cache/sowatch")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sowatch"


def _is_sound(fd: int, digest: str) -> bool:
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o022:
        return False
    if info.st_size > MAX_OBJECT_BYTES:
        return False
    with open(fd, "rb", closefd=False) as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == digest


def run_compiler(command: Sequence[str], *, directory: Path, workshop: Path, timeout_s: float) -> None:
    """Runs it to its end, and not longer.

    Args:
        command: with absolute paths for what it writes.
        directory: where it runs.
        workshop: for its temporary files.
        timeout_s: it and its children are killed then.

    Raises:
        CompileError: it failed, with its first diagnostic; it did not end; it could not be started.
    """
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "LC_ALL": "C",
        "TMPDIR": str(workshop),
        # zig keeps its own libraries' builds here.
        "ZIG_GLOBAL_CACHE_DIR": str(workshop),
        "ZIG_LOCAL_CACHE_DIR": str(workshop),
    }
    try:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise CompileError(f"cannot run {command[0]}: {error.strerror}", _INSTALL) from error
    try:
        _, said = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise CompileError(
            f"{command[0]} did not end within {timeout_s:g} s", "Try it by hand, or raise compile_timeout_s."
        ) from None
    finally:
        # Also what it has left behind: nobody but it is in this session.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stderr is not None:
            process.stderr.close()
    if process.returncode != 0:
        text = said.decode("utf-8", "replace")
        raise CompileError(f"{command[0]} failed: {first_diagnostic(text)}", _INSTALL)


def first_diagnostic(text: str) -> str:
    r"""The line that says what is wrong.

    >>> first_diagnostic("in a.h:1:\na.c:2:3: error: no such thing\na.c:4: error: more")
    'a.c:2:3: error: no such thing'
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[-1] if lines else "it ended without any output")


@contextmanager
def compile_programs(config: Config, names: Sequence[str]) -> Iterator[list[str]]:
    """Paths of the compiled programs, good while the context lasts: made now, or kept from before.

    Args:
        config: where to keep them, and for how long to wait for the compiler.
        names: such as ``watch.bpf.c``.

    Raises:
        CompileError: no compiler, it failed or hung, or the cache cannot be used.
    """
    architecture = ARCHITECTURES.get(os.uname().machine)
    if architecture is None:
        raise CompileError(f"no BPF register layout is known for {os.uname().machine}", "Use another strategy.")
    compiler = find_compiler()
    flags = (f"-D__TARGET_ARCH_{architecture}", *FLAGS, *_includes())
    with Cache(config.runtime_compiler_output_dir) as cache, ExitStack() as stack:
        paths = []
        for name in names:
            key = cache_key(compiler.identity, name, *flags, _sources())
            fd = cache.get(key)
            if fd is None:
                with cache.workshop() as workshop:
                    made = workshop / "made.bpf.o"
                    command = [*compiler.command, "-target", compiler.bpf_target, *flags, "-c", name, "-o", str(made)]
                    run_compiler(command, directory=PROGRAMS, workshop=workshop, timeout_s=config.compile_timeout_s)
                    fd = cache.put(key, made)
            stack.callback(os.close, fd)
            paths.append(f"/proc/self/fd/{fd}")
        yield paths


def cache_key(*parts: str) -> str:
    """What a result is kept under: it changes with the parts and with the running kernel."""
    kernel = os.uname()
    text = "\0".join((kernel.release, kernel.version, kernel.machine, *parts))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _sources() -> str:
    """A hash of every source and header that ships."""
    digest = hashlib.sha256()
    for path in sorted(PROGRAMS.rglob("*.[ch]")):
        digest.update(str(path.relative_to(PROGRAMS)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _includes() -> list[str]:
    """The headers of libbpf, and of the kernel for user space, that setup.py has put beside the programs."""
    return ["-nostdlibinc", "-idirafter", str(PROGRAMS / "headers")]
