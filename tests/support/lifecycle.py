"""Programs whose mappings come and go, and what is asked of their story; the fixtures are the engine's."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from sowatch.model.events import LibraryEvent
from support.kernel import Ledger
from support.programs import Mapper

__all__ = [
    "COMMON",
    "OURS",
    "PAGE",
    "PYTHON",
    "NewLibrary",
    "Start",
    "Story",
    "events_of",
    "inode",
    "is_right",
    "line",
    "program_of",
    "wait_story",
]

PAGE = 4096
PYTHON = "/usr/bin/python3"
Start = Callable[..., Mapper]
NewLibrary = Callable[..., Path]
Story = list[tuple[str, str | None]]

#: In the path of every file here, and of nobody else's: what other suites do at the same time is not watched.
OURS = f"sow-life-{os.getpid()}-"

#: What a program says and hears: a word when it got there, then nothing until it may go on.
COMMON = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
static inline void *map(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	void *at = mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0);
	if (at == MAP_FAILED)
		_exit(9);
	close(fd);
	return at;
}
static inline void stay(void)
{
	char byte;
	while (read(0, &byte, 1) > 0)
		;
}
static inline void say(long number)
{
	char text[32];
	int length = snprintf(text, sizeof(text), "%ld\n", number);
	if (write(1, text, length) != length)
		_exit(8);
}
"""


def inode(path: Path) -> int:
    return path.stat().st_ino


def wait_story(ledger: Ledger, pid: int, number: int, expected: Story) -> None:
    """Waits for exactly this story of a file in a process."""
    ledger.wait_for(
        lambda: ledger.story(pid, number) == expected,
        lambda: f"the story of inode {number} in {pid} is {ledger.story(pid, number)}, not {expected}",
    )


def events_of(ledger: Ledger, pid: int, path: Path) -> list[LibraryEvent]:
    """Loads and unloads, in every process, of the file that this process had at ``path``; inode numbers come again."""
    file_id = next(one.library.id for one in ledger.of(pid) if one.library.id.inode == inode(path))
    reported = [one for one in ledger.events if isinstance(one, LibraryEvent) and one.library.id == file_id]
    return [one for one in reported if one.event in ("load", "unload")]


def is_right(ledger: Ledger, *pids: int) -> None:
    """The map and ``/proc`` agree on these processes."""
    assert [one for one in ledger.watcher.audit().differences if one.pid in pids] == []


def program_of(process: subprocess.Popen[bytes]) -> Path:
    """The file that the process runs."""
    return Path(os.readlink(f"/proc/{process.pid}/exe"))


def line(process: subprocess.Popen[bytes]) -> int:
    """The next number that the program says."""
    assert process.stdout
    said = process.stdout.readline()
    assert said, f"the program ended with {process.wait()}"
    return int(said)
