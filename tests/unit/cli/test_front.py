"""The process that waits for a command: its exit code, its signals, and its end where the command cannot end."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest

#: Runs ``work()``, which the test writes, behind a front.
PROGRAM = """
import os, signal, sys, threading
from sowatch.cli._front import front_pid, run_behind_front
{work}
sys.exit(run_behind_front(work))
"""


def words(work: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM.format(work=work)]


@pytest.mark.parametrize("code", [0, 1, 3])
def test_the_exit_code_is_that_of_the_command(spawn: Any, code: int) -> None:
    process = spawn(words(f"def work():\n    print(front_pid() == os.getppid())\n    return {code}"), stdout=-1)
    text, _ = process.communicate()

    assert (text, process.returncode) == (b"True\n", code)


def test_a_command_that_dies_of_a_signal_is_reported_as_such(spawn: Any) -> None:
    process = spawn(words("def work():\n    os.kill(os.getpid(), signal.SIGKILL)"))

    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_command_and_whoever_waits_for_it(spawn: Any, number: int, wait_until: Any) -> None:
    process = spawn(words("def work():\n    print(os.getpid(), flush=True)\n    signal.pause()"), stdout=-1)
    worker = int(process.stdout.readline())

    process.send_signal(number)

    assert process.wait() == -number
    wait_until(lambda: not Path(f"/proc/{worker}").exists(), what="the end of the worker")


def test_an_interrupt_reaches_the_command(spawn: Any) -> None:
    work = (
        "def work():\n    try:\n        print(flush=True)\n        signal.pause()\n"
        "    except KeyboardInterrupt:\n        return 42"
    )
    process = spawn(words(work), stdout=-1)
    assert process.stdout.readline() == b"\n"

    process.send_signal(signal.SIGINT)

    assert process.wait() == 42


def test_the_command_does_not_outlive_whoever_waits_for_it(spawn: Any, wait_until: Any) -> None:
    process = spawn(words("def work():\n    print(os.getpid(), flush=True)\n    signal.pause()"), stdout=-1)
    worker = int(process.stdout.readline())

    process.kill()

    wait_until(lambda: not Path(f"/proc/{worker}").exists(), what="the end of the worker")


def test_a_command_that_does_not_come_back_to_be_interrupted_is_ended(spawn: Any, deadline: Any) -> None:
    # As in a library that holds the main thread: the exception is forgotten.
    work = (
        "def work():\n"
        "    import time\n"
        "    from sowatch.cli._front import end_now\n"
        "    from sowatch.cli._stop import obey_interrupts\n"
        "    with obey_interrupts(lambda: end_now(130)):\n"
        "        while True:\n"
        "            try:\n"
        "                print(flush=True)\n"
        "                time.sleep(100)\n"
        "            except KeyboardInterrupt:\n"
        "                pass\n"
    )
    process = spawn(words(work), stdout=-1)
    assert process.stdout.readline() == b"\n"

    process.send_signal(signal.SIGINT)

    assert process.wait(deadline(10)) == 130


def test_a_command_that_dies_is_reported_though_a_child_of_it_has_the_pipe_to_whoever_waits(
    spawn: Any, deadline: Any
) -> None:
    work = (
        "def work():\n"
        "    if not os.fork():\n"
        "        os._exit(len(os.read(0, 1)))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    process = spawn(words(work), stdin=-1)  # its end ends the child

    assert process.wait(deadline(10)) == -signal.SIGKILL
