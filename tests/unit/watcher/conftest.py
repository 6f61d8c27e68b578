"""Monitors on a feed that is filled by hand, and processes to watch."""

from __future__ import annotations

import pytest

from sowatch.linux.proc import Miss, ProcFs
from sowatch.watcher.monitor import ProcessMonitor
from support.feed import MARK, Inbox, PipeFeed, described, event, ghost


@pytest.fixture
def feed():
    return PipeFeed()


@pytest.fixture
def start():
    """Starts monitors, and stops what still runs at the end."""
    started = []

    def start_it(feed, *, subscribe=True, **options):
        monitor = ProcessMonitor(feed, **options)
        inbox = Inbox()
        if subscribe:
            inbox.subscribe(monitor)
        monitor.start()
        started.append(monitor)
        return monitor, inbox

    yield start_it
    for monitor in started:
        while monitor.is_running:
            monitor.stop()


@pytest.fixture
def spawn_sleeper(spawn, wait_until):
    """A process whose exec is over: in the middle of it, /proc shows neither the old program nor the new one."""

    def has_started(pid):
        rows = ProcFs().executable_maps(pid)
        return (
            not isinstance(rows, Miss) and any(b"/libc" in row.path for row in rows) and described(pid).comm == "sleep"
        )

    def spawn_it():
        child = spawn(["sleep", "300"])
        wait_until(lambda: has_started(child.pid))
        return child

    return spawn_it


@pytest.fixture
def sleeper(spawn_sleeper):
    return spawn_sleeper()


@pytest.fixture
def passed(wait_until):
    """``passed(feed, inbox)`` returns when everything sent up to now was delivered."""
    marks = iter(range(1, 1000))

    def wait(feed, inbox):
        mark = ghost(MARK, next(marks))
        feed.send(event("fork", mark), event("exit", mark))
        wait_until(lambda: any(one.process == mark and one.kind == "exit" for one in inbox.all(MARK)))

    return wait
