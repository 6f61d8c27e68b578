"""Nice values: of one thread, and what happens where they may not be lowered."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from sowatch.linux.capabilities import effective_capabilities
from sowatch.linux.priority import add_nice

#: linux/capability.h
SYS_NICE = 23


def in_a_thread(work: Callable[[], object]) -> list[int]:
    """The nice value of a thread before and after it."""
    found: list[int] = []

    def run() -> None:
        own = threading.get_native_id()
        found.append(os.getpriority(os.PRIO_PROCESS, own))
        work()
        found.append(os.getpriority(os.PRIO_PROCESS, own))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found


def test_nice_value_of_the_calling_thread_changes_and_of_no_other() -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    before, after = in_a_thread(lambda: add_nice(2))
    assert after == before + 2
    assert os.getpriority(os.PRIO_PROCESS, 0) == own


@pytest.mark.skipif(not effective_capabilities() >> SYS_NICE & 1, reason="takes CAP_SYS_NICE")
def test_nice_value_is_lowered_by_who_may() -> None:
    before, after = in_a_thread(lambda: add_nice(-5))
    assert after == max(before - 5, -20)


def test_who_may_not_lower_it_keeps_it() -> None:
    code = """
import os
from sowatch.linux.priority import add_nice, allow_nice
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
before = os.getpriority(os.PRIO_PROCESS, 0)
allow_nice(-5)
add_nice(-5)
print(before, os.getpriority(os.PRIO_PROCESS, 0))
"""
    limit = resource.getrlimit(resource.RLIMIT_NICE)
    if limit[1] > 20:
        pytest.skip("RLIMIT_NICE lets everybody lower it here")
    before, after = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    ).stdout.split()
    assert before == after


def test_a_limit_lets_threads_without_capabilities_lower_it() -> None:
    code = """
import os
from sowatch.linux.priority import add_nice, allow_nice
before = os.getpriority(os.PRIO_PROCESS, 0)
allow_nice(-5)
os.setresuid(65534, 65534, 65534)
add_nice(-5)
print(before, os.getpriority(os.PRIO_PROCESS, 0))
"""
    if not _may_raise_limits():
        pytest.skip("RLIMIT_NICE cannot be raised without CAP_SYS_RESOURCE")
    before, after = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    ).stdout.split()
    assert int(after) == int(before) - 5


def _may_raise_limits() -> bool:
    code = "import resource; resource.setrlimit(resource.RLIMIT_NICE, (26, 26))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
