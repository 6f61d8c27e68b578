"""Every error sowatch raises, each with its facts as attributes and the next step at its end.

An ``OSError`` is translated into one of these at the edge where it happens, so callers only ever see ``SowatchError``
and its kinds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

__all__ = [
    "BpfError",
    "CompileError",
    "ConfigError",
    "DecodeError",
    "EnvironmentFault",
    "FileRefused",
    "LibbpfMissing",
    "LoadAttempt",
    "LoadError",
    "NotPermitted",
    "PatternError",
    "PidNamespaceError",
    "ProcRootError",
    "ProcessGone",
    "ProgramRefused",
    "RegistryError",
    "RegistryStopped",
    "SinkError",
    "SowatchError",
    "TracefsNotMounted",
    "UsageError",
]


class SowatchError(Exception):
    """Base of every error of this package.

    ``exit_code`` is what the command line ends with: 1 could not do it, 2 wrong usage,
    3 not permitted. Subclasses rebuild from ``args`` so they survive pickling.
    """

    exit_code = 1

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.args, self.__dict__))


def _rebuild(kind: type[SowatchError], args: tuple[Any, ...], facts: dict[str, Any]) -> Any:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(facts)
    return error


class UsageError(SowatchError):
    """Options that contradict each other, or a value outside its range."""

    exit_code = 2


class PatternError(UsageError):
    """A pattern that is not a Python regular expression."""

    def __init__(self, pattern: str, reason: str, position: int | None) -> None:
        self.pattern = pattern
        self.reason = reason
        self.position = position
        where = "" if position is None else f" at position {position}"
        super().__init__(
            f"bad pattern {pattern!r}: {reason}{where}. "
            "Patterns are Python regular expressions; escape special characters with a backslash."
        )


class ConfigError(UsageError):
    """A configuration value that cannot be used; ``source`` names file, variable or flag."""

    def __init__(self, key: str, problem: str, *, source: str | None = None) -> None:
        self.key = key
        self.problem = problem
        self.source = source
        origin = "" if source is None else f" (from {source})"
        super().__init__(f"{key}{origin}: {problem}")


class ProcRootError(UsageError):
    """The given proc root does not hold a proc file system."""

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(
            f"{path!r} is not a proc file system: {reason}. "
            "Give the directory where the host's proc is mounted, usually /proc."
        )


class DecodeError(SowatchError):
    """A line that is no event of schema 1; ``reason`` says where it is not."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"not an event of schema 1: {reason}. Give one whole line of `sowatch watch --json`; "
            "a line of a later version may need that version of sowatch."
        )


class NotPermitted(SowatchError):
    """The kernel allows this user neither to load BPF programs nor to read what is needed."""

    exit_code = 3

    def __init__(self, what: str, missing: str, remedy: str) -> None:
        self.what = what
        self.missing = missing
        self.remedy = remedy
        super().__init__(f"{what}: {missing}. {remedy}")


class BpfError(SowatchError):
    """One call into libbpf or bpf(2) failed.

    ``errno`` is the positive error number, ``log`` what libbpf and the verifier wrote.
    """

    def __init__(self, operation: str, errno: int, log: str = "") -> None:
        self.operation = operation
        self.errno = errno
        self.log = log
        first = _telling_line(log)
        said = f"; {first}" if first else ""
        super().__init__(
            f"{operation} failed: {os.strerror(errno)}{said}. See `sowatch doctor` for what this kernel can do."
        )


class ProgramRefused(BpfError):
    """An object of a user that does not load. The message has the last lines of libbpf and the verifier."""

    def __init__(self, path: str, error: BpfError) -> None:
        self.path = path
        self.operation, self.errno, self.log = error.operation, error.errno, error.log
        lines = [line.removeprefix("libbpf: ") for line in error.log.splitlines() if line.strip()]
        said = [line for line in lines if not _FRAME.search(line)][-_LAST_LINES:]
        text = f"cannot load {path}: {os.strerror(error.errno)}."
        if said:
            text += " Its last lines:\n  " + "\n  ".join(said) + "\n"
        else:
            text += " "
        SowatchError.__init__(self, f"{text}Correct the program, or see `sowatch doctor` for what this kernel can do.")


class TracefsNotMounted(BpfError):
    """tracefs is mounted nowhere, and this user may not mount it."""

    reason = "tracefs is not mounted, and to mount it takes CAP_SYS_ADMIN"
    remedy = "As root: mount -t tracefs tracefs /sys/kernel/tracing"

    def __init__(self, errno: int) -> None:
        self.operation, self.errno, self.log = "opening tracefs", errno, ""
        SowatchError.__init__(self, f"{self.reason}. {self.remedy}")


#: Lines of libbpf around the verifier's own: its head and foot, and that the program or object failed.
_FRAME: Final = re.compile(r"-- (BEGIN|END) PROG LOAD LOG --|^-- |^processed \d|failed to load(: -\d+| object| BPF)")


#: So many last lines of the log show what is wrong, and where.
_LAST_LINES: Final = 6


def _telling_line(log: str) -> str:
    """The line of a libbpf log that names the cause: the last one that is not only a frame."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for line in reversed(lines):
        text = line.removeprefix("libbpf: ")
        if not _FRAME.search(text):
            return text
    return ""


class LibbpfMissing(SowatchError):
    """The compiled binding or the libbpf shared library could not be loaded."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"cannot load libbpf: {reason}. Install libbpf 1.1 or newer (Debian, Ubuntu: "
            "apt-get install libbpf1) and reinstall sowatch if the binding was not built."
        )


class CompileError(SowatchError):
    """The BPF programs could not be compiled on this machine; ``reason`` is one clause."""

    def __init__(self, reason: str, remedy: str) -> None:
        self.reason = reason
        self.remedy = remedy
        super().__init__(f"cannot compile the BPF programs: {reason}. {remedy}")


class LoadAttempt(NamedTuple):
    """One candidate of strategy selection that was tried: which, whether it worked, why not."""

    strategy: str
    ok: bool
    error: str | None


class LoadError(SowatchError):
    """No strategy could be loaded; ``attempts`` has every one that was tried, in order."""

    def __init__(self, attempts: Sequence[LoadAttempt], remedy: str) -> None:
        self.attempts = tuple(attempts)
        self.remedy = remedy
        tried = "; ".join(f"{attempt.strategy}: {attempt.error}" for attempt in self.attempts)
        super().__init__(f"cannot watch. {tried}. {remedy}")


class PidNamespaceError(SowatchError):
    """Processes would be looked up by the numbers of another pid namespace than the kernel's."""

    remedy = (
        "Run it in the host's pid namespace: `docker run --pid=host`, `hostPID: true`, or "
        "`nsenter --target PID --pid --mount` from the host; and give the host's proc file system with --proc-root."
    )

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"cannot watch the whole host: {reason}. {self.remedy}")


class EnvironmentFault(SowatchError):
    """Raised by a callback to say: the surroundings are at fault, not this file.

    A file whose activation ends with this is not blocked and may be tried again.
    """


class FileRefused(SowatchError):
    """Raised by a callback that says itself why it does nothing with a file, which is blocked; nothing is logged."""


class RegistryError(SowatchError):
    """What a `FileRegistry` refuses, and the base of why."""


class ProcessGone(RegistryError):
    """The process ended before the work on it could be done."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        super().__init__(f"process {pid} does not exist any more. Nothing to do; it is not blocked.")


class RegistryStopped(RegistryError):
    """The registry was cleared for good; make a new one."""

    def __init__(self) -> None:
        super().__init__("the registry was stopped. Make a new FileRegistry.")


class SinkError(SowatchError):
    """A sink did not take all events. ``delivered`` of them it did; ``is_final`` says that it never will."""

    def __init__(self, what: str, *, delivered: int = 0, is_final: bool = False) -> None:
        self.what = what
        self.delivered = delivered
        self.is_final = is_final
        super().__init__(f"{what}. {'It is closed.' if is_final else 'It is tried again.'}")
