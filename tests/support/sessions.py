"""Shell sessions of the pages: what is typed, what the page shows for it, and a shell that types it.

``console`` blocks have commands after ``$ `` (continued after ``> ``) with their output below. A session whose output
ends with a line ``^C...`` is in the foreground of a terminal until somebody interrupts it: it goes on while the next
block runs. An ``sh`` block is a script, whose output a ``text`` block directly below it has.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple, Self

from support.doc_blocks import Block, blocks

__all__ = ["Shell", "Step", "missing_lines", "pages", "steps", "steps_of"]

_DATE: Final = r"\d{4}-\d\d-\d\d(?:T[\d:.]+Z)?"
#: What differs from run to run and from kernel to kernel: dates, times, numbers, addresses, directories, hook sets.
_CHANGES: Final = re.compile(
    _DATE + r"|\b(?:syscall|trampoline) hooks|(?<![\w.])/(?:[^\s\"/:,)]+/)*"
    r"|0x[0-9a-f]+|\b(?=[0-9a-f]*\d)[0-9a-f]{7,}\b|cpython-\d+\S*|[0-9.:]+(?:[mun]?s)?\b"
)
_WORD: Final = re.compile(r"[A-Za-z_^$+*-][\w-]*")


class Step(NamedTuple):
    """One command: where it stands, what is typed, the lines that the page shows, whether somebody interrupts it."""

    block: Block
    typed: str
    shown: tuple[str, ...]
    is_interrupted: bool = False

    def __str__(self) -> str:
        return f"{self.block}: {self.typed.splitlines()[0]}"


def pages() -> list[str]:
    """The pages that have something to type."""
    return sorted({block.page for block in blocks() if _is_typed(block)})


def steps(page: str) -> list[Step]:
    """All of a page, in order."""
    return steps_of([block for block in blocks() if block.page == page])


def steps_of(page: Sequence[Block]) -> list[Step]:
    """What the blocks of a page say to type."""
    found: list[Step] = []
    for number, block in enumerate(page):
        if not _is_typed(block):
            continue
        if block.language == "console":
            found += _session(block)
        else:
            below = page[number + 1] if number + 1 < len(page) else None
            shown = below.text.splitlines() if below is not None and below.language == "text" else []
            found.append(Step(block, block.text, tuple(shown)))
    return found


def _is_typed(block: Block) -> bool:
    return block.language in ("console", "sh") and block.marker is None


def _session(block: Block) -> Iterator[Step]:
    typed: list[str] = []
    shown: list[str] = []

    def step() -> Step:
        is_interrupted = bool(shown) and shown[-1].startswith("^C")
        lines = [line.removeprefix("^C") for line in shown]
        return Step(block, "\n".join(typed), tuple(lines), is_interrupted)

    for line in block.text.splitlines():
        if line.startswith("$ "):
            if typed:
                yield step()
            typed, shown = [line[2:]], []
        elif line in (">", "> ") or (line.startswith("> ") and not shown):
            typed.append(line[2:])
        else:
            shown.append(line)
    if typed:
        yield step()


def missing_lines(shown: Sequence[str], output: str) -> list[str]:
    """Lines of a page that no line of the output is like: one with the same words and more, in the page's order."""
    rest = [_words(line) for line in output.splitlines()]
    exact = {_dateless(line) for line in output.splitlines()}
    missing = []
    for line in shown:
        words = _words(line)
        if line.strip() in ("", "..."):
            continue
        if not (any(words <= one for one in rest) if words else _dateless(line) in exact):
            missing.append(line)
    return missing


def _dateless(line: str) -> str:
    return " ".join(re.sub(_DATE, "DATE", line).split())


def _words(line: str) -> set[str]:
    return set(_WORD.findall(_CHANGES.sub(" ", line)))


class Shell:
    """bash in a directory, where ``sudo``, ``sowatch`` and ``python`` are those of this checkout; a context manager."""

    def __init__(self, directory: Path, timeout_s: float) -> None:
        self._directory = directory
        self._timeout_s = timeout_s
        own = directory / ".bin"
        own.mkdir()
        for name, text in {
            "sowatch": f'exec {sys.executable} -m sowatch "$@"',
            "python": f'exec {sys.executable} "$@"',
            "python3": 'exec /usr/bin/python3 "$@"',
            # There is a program of that name in one of several packages only.
            "sudo": '[ "$1" != kill ] || { "$@"; exit; }\nexec "$@"',
        }.items():
            (own / name).write_text(f"#!/bin/sh\n{text}\n", encoding="ascii")
            (own / name).chmod(0o755)
        self._environment = {
            "PATH": f"{own}:{os.environ['PATH']}",
            "HOME": str(directory),
            "LC_ALL": "C.UTF-8",
            "COLUMNS": "160",
        }
        self._output = directory / ".output"
        self._commands = 0

    def __enter__(self) -> Self:
        todo, self._todo = os.pipe()
        self._done, done = os.pipe()
        # Files with commands come by a pipe, so that standard input is nobody's; the status goes back by another.
        loop = (
            f"r=0; while IFS= read -r -u {todo} file; do (exit $r); . $file {todo}<&- {done}>&-; r=$?; "
            f"echo $r >&{done}; done; "
            "kill $(jobs -p) 2>/dev/null; wait"
        )
        with self._output.open("wb") as output:
            self._shell = subprocess.Popen(
                ["bash", "-c", loop],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
                env=self._environment,
                pass_fds=(todo, done),
                start_new_session=True,
            )
        os.close(todo)
        os.close(done)
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._todo)
        try:
            self._shell.wait(self._timeout_s)
        finally:
            os.close(self._done)
            if self._shell.poll() is None:  # something is in its foreground; the session is this shell's own
                os.killpg(self._shell.pid, signal.SIGKILL)
                self._shell.wait()

    def type(self, command: str) -> str:
        """What a command writes to either output, until it ends."""
        self._commands += 1
        file, start = self._directory / f".command-{self._commands}", self._output.stat().st_size
        file.write_text(f"{command}\n", encoding="utf-8")
        os.write(self._todo, f"{file}\n".encode())
        is_over = select.select([self._done], [], [], self._timeout_s)[0] and os.read(self._done, 64)
        text = self._output.read_bytes()[start:].decode("utf-8", "replace")
        assert is_over, f"{command!r} did not end; until then it wrote:\n{text}"
        return text

    def elsewhere(self, command: str) -> list[str]:
        """What runs a command in the same place and environment, in a terminal of its own."""
        environment = [f"{name}={value}" for name, value in self._environment.items()]
        return ["env", f"--chdir={self._directory}", *environment, "bash", "-c", f"exec {command}"]
