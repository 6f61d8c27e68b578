"""ProcessMonitor: what the kernel or the queue lost is counted and made good."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from sowatch.linux.proc import ProcFs
from sowatch.model.config import Config
from sowatch.model.errors import BpfError
from sowatch.watcher import run
from support.feed import MARK, NOWHERE, PipeFeed, described, event, ghost

# -- losses ----------------------------------------------------------------------------------


def test_process_whose_start_the_kernel_lost_is_found(feed, start, spawn_sleeper, passed, wait_until):
    monitor, inbox = start(feed)
    passed(feed, inbox)
    child = spawn_sleeper()
    feed.lose(2)
    wait_until(lambda: len(inbox.of(child.pid)) == 2)

    assert inbox.of(child.pid) == [("fork", "repair"), ("exec", "repair")]
    assert inbox.all(child.pid)[1].process == described(child.pid)
    assert inbox.all(child.pid)[0].parent == described(os.getpid()).id
    wait_until(lambda: monitor.stats.repairs == 1)
    assert monitor.stats.lost_kernel == 2


def test_process_whose_end_the_kernel_lost_is_ended(feed, start, spawn, sleeper, passed, wait_until):
    _, inbox = start(feed)
    wait_until(lambda: inbox.all(sleeper.pid))
    process = described(sleeper.pid)
    spawn.end(sleeper)
    feed.lose()
    wait_until(lambda: len(inbox.of(sleeper.pid)) == 2)

    assert inbox.of(sleeper.pid) == [("exec", "scan"), ("exit", "repair")]
    assert inbox.all(sleeper.pid)[1].process == process
    feed.send(event("exit", process))
    passed(feed, inbox)
    assert len(inbox.of(sleeper.pid)) == 2


def test_exec_in_place_that_the_kernel_lost_is_found(feed, start, spawn, wait_until):
    script = "echo ready; read line; exec sleep 300"
    child = spawn(["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"ready\n"
    _, inbox = start(feed)
    wait_until(lambda: inbox.all(child.pid))
    child.stdin.write(b"go\n")
    child.stdin.flush()
    wait_until(lambda: described(child.pid).comm == "sleep")
    feed.lose()
    wait_until(lambda: len(inbox.of(child.pid)) == 2)

    assert inbox.of(child.pid) == [("exec", "scan"), ("exec", "repair")]
    assert inbox.all(child.pid)[-1].process.comm == "sleep"


def test_exec_of_the_very_same_program_that_the_kernel_lost_is_found(feed, start, spawn, wait_until):
    script = "import os, sys; sys.stdin.readline(); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    child = spawn([sys.executable, "-c", script, "-c", "print(1, flush=True); input()"], stdin=-1, stdout=-1)
    wait_until(lambda: described(child.pid).comm.startswith("python"))
    _, inbox = start(feed)
    wait_until(lambda: inbox.all(child.pid))
    child.stdin.write(b"go\n")
    child.stdin.flush()
    assert child.stdout.readline() == b"1\n"
    feed.lose()
    wait_until(lambda: len(inbox.of(child.pid)) == 2)

    assert inbox.of(child.pid) == [("exec", "scan"), ("exec", "repair")]


def test_kernel_threads_fork_but_run_no_program(feed, start, passed, wait_until, monkeypatch):
    proc = ProcFs()
    kernel = {pid for pid in proc.pids() if (stat := proc.stat(pid)) and stat.is_kernel_thread}
    looks = []

    def look(_):
        """The first time without those of odd pids, as if they were made later."""
        found = real_look(proc)
        looks.append(len(found))
        return {pid: seen for pid, seen in found.items() if len(looks) > 1 or pid not in kernel or pid % 2 == 0}

    real_look = run.look
    monkeypatch.setattr(run, "look", look)
    monitor, inbox = start(feed)
    passed(feed, inbox)
    feed.lose()
    wait_until(lambda: monitor.stats.repairs > 0)
    passed(feed, inbox)

    reported = {one.process.pid: (one.kind, one.cause) for one in inbox.all() if one.process.pid in kernel}
    assert reported == {pid: ("fork", "repair") for pid in kernel if pid % 2}


def test_repair_tells_nothing_of_what_did_not_change(feed, start, sleeper, passed, wait_until):
    monitor, inbox = start(feed)
    wait_until(lambda: inbox.all(sleeper.pid))
    for repairs in (1, 2):
        feed.lose()
        wait_until(lambda repairs=repairs: monitor.stats.repairs >= repairs)
    passed(feed, inbox)

    assert inbox.of(sleeper.pid) == [("exec", "scan")]


def test_loss_without_any_event_is_noticed(feed, start, passed, wait_until, monkeypatch):
    monkeypatch.setattr(run, "_LOST_POLL_S", 0.01)
    monitor, inbox = start(feed)
    passed(feed, inbox)
    with feed._lock:
        feed._lost += 1  # a full ring wakes nobody

    wait_until(lambda: monitor.stats.repairs == 1)


def test_events_that_find_the_queue_full_are_counted_and_made_good(
    feed, start, spawn, spawn_sleeper, wait_until, deadline
):
    gate = threading.Event()
    reached = threading.Event()
    monitor, inbox = start(feed, config=Config(queue_events=4), scan=False)
    children = [spawn_sleeper() for _ in range(8)]
    leaving = spawn_sleeper()
    feed.send(event("fork", leaving.pid), event("exec", leaving.pid))
    wait_until(lambda: len(inbox.of(leaving.pid)) == 2)

    def hold_up(_):
        reached.set()
        assert gate.wait(deadline(30))

    monitor.on_fork(hold_up)
    feed.send(event("fork", ghost()))
    assert reached.wait(deadline(10))
    for child in children:
        feed.send(event("fork", child.pid), event("exec", child.pid))
    process = described(leaving.pid)
    spawn.end(leaving)
    feed.send(event("exit", process))
    wait_until(lambda: monitor.stats.events == 20)
    assert monitor.stats.lost_queue > 0
    gate.set()

    for child in children:
        wait_until(lambda pid=child.pid: {kind for kind, _ in inbox.of(pid)} == {"fork", "exec"})
    wait_until(lambda: ("exit", "repair") in inbox.of(leaving.pid))
    assert sum(("exec", "repair") in inbox.of(child.pid) for child in children) >= 6
    assert all([kind for kind, _ in inbox.of(child.pid)].count("fork") == 1 for child in children)
    assert all(inbox.of(child.pid)[0][0] == "fork" for child in children)
    wait_until(lambda: monitor.stats.repairs > 0)


@pytest.mark.parametrize("limit", [3, 4])
def test_repair_that_finds_the_queue_full_goes_on_when_there_is_room(
    feed, start, spawn_sleeper, wait_until, deadline, monkeypatch, limit
):
    monkeypatch.setattr(run, "_LOST_POLL_S", 3600.0)  # so that only the word of the queue helps
    gate = threading.Event()
    reached = threading.Event()
    monitor, inbox = start(feed, config=Config(queue_events=limit), scan=False)
    wait_until(lambda: monitor.stats.processes > 0)
    children = [spawn_sleeper() for _ in range(6)]

    def hold_up(_):
        reached.set()
        assert gate.wait(deadline(30))

    monitor.on_fork(hold_up)
    feed.lose()
    assert reached.wait(deadline(10))
    wait_until(lambda: monitor._run._delivery._is_short_of_room)
    gate.set()

    for child in children:
        wait_until(lambda pid=child.pid: inbox.of(pid) == [("fork", "repair"), ("exec", "repair")])
    assert monitor.stats.lost_queue == 0


def test_fact_that_was_on_its_way_during_a_repair_is_told_as_a_fact(start, wait_until):
    class LateFeed(PipeFeed):
        is_armed = False

        def lost(self):
            if self.is_armed:
                self.is_armed = False
                # Asked after the draining and before the look at /proc.
                self._lost += 1
                self._events.append(event("exit", ghost()))
            return super().lost()

    feed = LateFeed()
    monitor, inbox = start(feed, scan=False)
    feed.send(event("fork", ghost()))
    wait_until(lambda: inbox.of(NOWHERE) == [("fork", "event")])
    feed.is_armed = True
    feed.wake()
    wait_until(lambda: monitor.stats.repairs > 0)
    wait_until(lambda: len(inbox.of(NOWHERE)) == 2)

    assert inbox.of(NOWHERE) == [("fork", "event"), ("exit", "event")]


def test_feed_that_fails_is_opened_again_and_what_was_missed_is_found(feed, start, spawn_sleeper, passed, wait_until):
    monitor, inbox = start(feed)
    passed(feed, inbox)
    child = spawn_sleeper()
    feed.lose(5)
    wait_until(lambda: monitor.stats.lost_kernel == 5)
    feed.drain_errors = [OSError(5, "input/output error")]
    feed.open_errors = [BpfError("open", 12), BpfError("open", 12)]
    feed.wake()
    wait_until(lambda: feed.opened == 2)
    wait_until(lambda: len(inbox.of(child.pid)) == 2)
    feed.lose(2)
    wait_until(lambda: monitor.stats.lost_kernel == 7)
    feed.send(event("exec", child.pid))
    passed(feed, inbox)

    assert inbox.of(child.pid)[:2] == [("fork", "repair"), ("exec", "repair")]
    assert ("exec", "event") in inbox.of(child.pid)
    assert monitor.stats.feed_errors == 3


def test_processes_are_found_while_the_feed_cannot_be_opened(feed, start, spawn, passed, wait_until):
    monitor, inbox = start(feed)
    passed(feed, inbox)
    feed.open_errors = [BpfError("open", 12)] * 10_000
    feed.drain_errors = [OSError(5, "input/output error")]
    feed.wake()
    wait_until(lambda: monitor.stats.feed_errors > 0)
    child = spawn(["sleep", "300"])

    wait_until(lambda: ("exec", "repair") in inbox.of(child.pid))
    assert not feed.is_open


def test_feed_whose_descriptor_hangs_up_is_opened_again(feed, start, passed, wait_until):
    _, inbox = start(feed)
    passed(feed, inbox)
    feed.hang_up()
    wait_until(lambda: feed.opened == 2)
    passed(feed, inbox)

    assert inbox.of(MARK)[-1] == ("exit", "event")
