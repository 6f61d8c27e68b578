"""How many processes could be read, and whether some are hidden."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

from sowatch.inventory.coverage import Coverage, coverage_of
from sowatch.linux.hidepid import hidepid_of
from sowatch.linux.proc import ProcFs

DEVICE = os.makedev(0, 23)
MOUNT = b"24 31 0:23 / /proc rw,nosuid shared:13 - proc proc rw%s\n"


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (b"", (None, 0)),
        (b",hidepid=invisible", (b"invisible", 0)),
        (b",gid=27,hidepid=2", (b"2", 27)),
        (b",hidepid=ptraceable", (b"ptraceable", 0)),
        (b",subset=pid,hidepid=noaccess", (b"noaccess", 0)),
    ],
)
def test_the_options_of_a_proc_mount_are_found(options: bytes, found: tuple[bytes | None, int]) -> None:
    others = b"25 31 0:24 / /sys rw - sysfs sysfs rw,hidepid=2\n26 31 0:25 / /p rw - proc proc rw,hidepid=2\n"

    assert hidepid_of(others + MOUNT % options, DEVICE) == found


def test_a_process_that_may_be_read_is_one_that_was_read(spawn: Any) -> None:
    process = spawn(["sleep", "300"])

    assert coverage_of(ProcFs(), [process.pid]) == Coverage(1, 0, is_hidden=False)


def test_kernel_threads_and_what_has_ended_are_no_processes_that_could_not_be_read(spawn: Any, wait_until: Any) -> None:
    zombie = spawn(["true"])
    wait_until(lambda: (stat := ProcFs().stat(zombie.pid)) and stat.is_dead, what="the end of the process")
    proc = ProcFs()
    kernel_threads = [pid for pid in proc.pids() if (stat := proc.stat(pid)) and stat.is_kernel_thread]

    assert coverage_of(proc, [zombie.pid, *kernel_threads]) == Coverage(0, 0, is_hidden=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
def test_what_nobody_may_not_read_is_counted(spawn: Any) -> None:
    code = (
        "import os, sys\n"
        "from sowatch.inventory.coverage import coverage_of\n"
        "from sowatch.linux.proc import ProcFs\n"
        "proc = ProcFs()\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "print(coverage_of(proc, [os.getppid()]))\n"
        "print(coverage_of(proc, [os.getppid()], lambda pid: False))\n"
    )
    asked = spawn([sys.executable, "-c", code], stdout=-1)

    assert asked.communicate()[0].decode().splitlines() == [
        "1 process could not be read",
        "every process could be read",
    ]


def test_what_is_hidden_leaves_every_answer_open() -> None:
    assert not Coverage(5, 0, is_hidden=True).is_complete
    assert Coverage(5, 0, is_hidden=False).is_complete
