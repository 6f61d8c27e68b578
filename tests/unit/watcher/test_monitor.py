"""ProcessMonitor: every fork, exec and exit reaches its subscribers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from sowatch.linux.proc import Miss, ProcFs
from sowatch.model.config import Config
from sowatch.model.errors import BpfError, ProcRootError
from sowatch.model.identity import TICK_NS, ProcessId
from sowatch.watcher.monitor import ProcessMonitor
from support.feed import MARK, NOWHERE, Inbox, PipeFeed, described, event, ghost

# -- what the kernel tells -------------------------------------------------------------------


def test_each_kind_reaches_those_who_asked_for_it(feed, wait_until):
    execs, forks, exits = Inbox(), Inbox(), Inbox()
    parent = ProcessId(1, 0)
    sent = [event(kind, ghost(comm="x"), parent=parent, t_ns=7) for kind in ("fork", "exec", "exit")]
    monitor = ProcessMonitor(feed, scan=False)
    monitor.on_exec(execs)
    monitor.on_fork(forks)
    monitor.on_exit(exits)
    with monitor:
        feed.send(*sent)
        wait_until(exits.all)

    assert (forks.all(), execs.all(), exits.all()) == ([sent[0]], [sent[1]], [sent[2]])
    stats = monitor.stats
    assert (stats.events, stats.fork, stats.exec, stats.exit, stats.callbacks) == (3, 1, 1, 1, 3)


def test_events_do_not_change():
    with pytest.raises(AttributeError):
        event("fork", ghost()).kind = "exec"


def test_events_come_in_the_order_they_happened(feed, start, passed):
    _, inbox = start(feed, scan=False)
    sent = [
        event(kind, ghost(NOWHERE + 10 + number % 7, start_ticks=number))
        for number in range(300)
        for kind in ("fork", "exec", "exit")
    ]
    for at in range(0, len(sent), 50):
        feed.send(*sent[at : at + 50])
    passed(feed, inbox)

    assert [one for one in inbox.all() if one.process.pid != MARK] == sent


def test_exit_carries_what_was_known_of_the_process(feed, start, wait_until):
    _, inbox = start(feed, scan=False)
    feed.send(
        event("fork", ghost(uid=7)),
        event("exec", ghost(comm="new", exe="/bin/new", cgroup="/a", container="c")),
        event("exit", ghost(comm="renamed")),
    )
    wait_until(lambda: len(inbox.all()) == 3)

    assert inbox.all()[2].process == ghost(comm="renamed", exe="/bin/new", cgroup="/a", container="c", uid=7)


def test_second_exit_of_a_process_is_not_told(feed, start, passed):
    _, inbox = start(feed, scan=False)
    feed.send(event("fork", ghost()), event("exit", ghost()), event("exit", ghost()))
    passed(feed, inbox)

    assert inbox.of(NOWHERE) == [("fork", "event"), ("exit", "event")]


def test_exit_of_a_process_nobody_was_told_of_is_told(feed, start, passed):
    _, inbox = start(feed, scan=False)
    feed.send(event("exit", ghost()))
    passed(feed, inbox)

    assert inbox.of(NOWHERE) == [("exit", "event")]


def test_new_process_with_the_pid_of_a_known_one_ends_that_one_first(feed, start, passed):
    _, inbox = start(feed, scan=False)
    feed.send(event("fork", ghost(start_ticks=5)), event("fork", ghost(start_ticks=6)))
    feed.send(event("exec", ghost(start_ticks=5)), event("exit", ghost(start_ticks=5)))
    passed(feed, inbox)

    assert [(one.kind, one.cause, one.process.start_ns // TICK_NS) for one in inbox.all(NOWHERE)] == [
        ("fork", "event", 5),
        ("exit", "repair", 5),
        ("fork", "event", 6),
    ]


def test_exec_of_a_process_whose_fork_was_lost_brings_the_fork(feed, start, passed):
    _, inbox = start(feed, scan=False)
    feed.send(event("exec", ghost()))
    passed(feed, inbox)

    assert inbox.of(NOWHERE) == [("fork", "repair"), ("exec", "event")]


def test_fork_that_comes_after_the_exec_is_not_told_twice(feed, start, passed):
    _, inbox = start(feed, scan=False)
    feed.send(event("exec", ghost()), event("fork", ghost()))
    passed(feed, inbox)

    assert inbox.of(NOWHERE) == [("fork", "repair"), ("exec", "event")]


# -- what was there before -------------------------------------------------------------------


def test_existing_processes_are_given_to_exec_subscribers(feed, start, sleeper, wait_until):
    _, inbox = start(feed)
    (found,) = wait_until(lambda: inbox.all(sleeper.pid))

    assert (found.kind, found.cause, found.process) == ("exec", "scan", described(sleeper.pid))
    assert found.parent == described(os.getpid()).id
    assert found.process.comm == "sleep"


def test_late_exec_subscriber_gets_the_existing_processes_too(feed, start, sleeper, wait_until):
    monitor, inbox = start(feed)
    wait_until(lambda: inbox.all(sleeper.pid))
    late = Inbox()
    monitor.on_exec(late)
    wait_until(lambda: late.all(sleeper.pid))

    assert late.of(sleeper.pid) == [("exec", "scan")]
    assert inbox.of(sleeper.pid) == [("exec", "scan")]


def test_late_subscriber_gets_no_event_of_before_its_scan(feed, start, sleeper, wait_until, deadline):
    gate = threading.Event()
    monitor, _ = start(feed, subscribe=False)
    wait_until(lambda: monitor.stats.processes > 0)
    reached = threading.Event()

    def hold_up(_):
        reached.set()
        assert gate.wait(deadline(30))

    monitor.on_fork(hold_up)
    monitor.on_exec(lambda _: None)
    feed.send(event("fork", ghost()), event("exec", sleeper.pid))
    assert reached.wait(deadline(10))
    wait_until(lambda: monitor.stats.exec == 1)
    late = Inbox()
    monitor.on_exec(late)
    gate.set()
    wait_until(lambda: late.all(sleeper.pid))
    feed.send(event("exec", ghost()))
    wait_until(lambda: ("exec", "event") in late.of(NOWHERE))

    assert late.of(sleeper.pid) == [("exec", "scan")]


def test_without_scan_existing_processes_are_not_told(feed, start, sleeper, passed):
    monitor, inbox = start(feed, scan=False)
    passed(feed, inbox)
    late = Inbox().subscribe(monitor)
    passed(feed, late)

    assert inbox.of(sleeper.pid) == []
    assert late.of(sleeper.pid) == []
    assert monitor.stats.processes > 0


def test_exec_that_the_scan_has_seen_is_not_told_again(feed, start, sleeper, passed):
    feed.sent_at_open = [event("fork", sleeper.pid), event("exec", sleeper.pid)]
    _, inbox = start(feed)
    passed(feed, inbox)

    assert sorted(inbox.of(sleeper.pid)) == [("exec", "scan"), ("fork", "event")]


def test_exec_after_the_scan_is_told(feed, start, sleeper, passed, wait_until):
    _, inbox = start(feed)
    wait_until(lambda: inbox.all(sleeper.pid))
    feed.send(event("exec", sleeper.pid))
    passed(feed, inbox)

    assert inbox.of(sleeper.pid) == [("exec", "scan"), ("exec", "event")]


def test_zombies_are_not_given_as_existing(feed, start, spawn, sleeper, wait_until):
    dead = spawn(["true"])

    def is_zombie():
        stat = ProcFs().stat(dead.pid)
        return not isinstance(stat, Miss) and stat.state == "Z"

    wait_until(is_zombie)
    _, inbox = start(feed)
    wait_until(lambda: inbox.all(sleeper.pid))

    assert inbox.all(dead.pid) == []


def test_process_whose_leader_left_is_given_as_existing(feed, start, spawn, wait_until):
    program = """
import ctypes, os, sys, threading
def stay():
    sys.stdin.read()
    os._exit(0)
threading.Thread(target=stay).start()
ctypes.CDLL(None).syscall(int(sys.argv[1]), 0)
"""
    sys_exit = {"x86_64": "60", "aarch64": "93"}[os.uname().machine]
    child = spawn([sys.executable, "-c", program, sys_exit], stdin=subprocess.PIPE)

    def leader_is_gone():
        stat = ProcFs().stat(child.pid)
        return not isinstance(stat, Miss) and stat.is_dead

    wait_until(leader_is_gone)
    _, inbox = start(feed)

    wait_until(lambda: inbox.of(child.pid) == [("exec", "scan")])


# -- callbacks -------------------------------------------------------------------------------


def test_callback_that_raises_is_counted_and_the_others_still_run(feed, start, passed, caplog):
    monitor, _ = start(feed, subscribe=False, scan=False)

    def fail(_):
        raise SystemExit("no more")

    monitor.on_fork(fail)
    inbox = Inbox().subscribe(monitor)
    for number in range(20):
        feed.send(event("fork", ghost(start_ticks=number)))
    passed(feed, inbox)

    # The 20, and the mark; each but the first of the 20 also ends the one before.
    assert inbox.of(NOWHERE).count(("fork", "event")) == 20
    stats = monitor.stats
    assert stats.callback_errors == 21
    assert stats.callbacks == 21 + len(inbox.all())
    (logged,) = [one.getMessage() for one in caplog.records if "raised" in one.getMessage()]
    assert logged == "the callback for fork events raised SystemExit: no more"


def test_subscription_may_be_ended_in_its_own_callback(feed, start, passed):
    monitor, inbox = start(feed, scan=False)
    seen = []

    def once(one):
        seen.append(one)
        unsubscribe()
        unsubscribe()

    unsubscribe = monitor.on_fork(once)
    feed.send(*(event("fork", ghost(start_ticks=number)) for number in range(5)))
    passed(feed, inbox)

    assert len(seen) == 1
    assert len(monitor._subscribers.of("fork")) == 1
    assert inbox.of(NOWHERE).count(("fork", "event")) == 5


def test_one_function_may_subscribe_twice(feed, start, wait_until, passed):
    monitor, inbox = start(feed, subscribe=False, scan=False)
    inbox.subscribe(monitor)
    end_second = monitor.on_exit(inbox)
    feed.send(event("exit", ghost(start_ticks=1)))
    wait_until(lambda: len(inbox.all()) == 2)
    end_second()
    feed.send(event("exit", ghost(start_ticks=2)))
    passed(feed, inbox)

    assert len(inbox.all(NOWHERE)) == 3


def test_ten_subscribers_of_each_kind_all_hear(feed, start, wait_until):
    monitor, _ = start(feed, subscribe=False, scan=False)
    inboxes = [Inbox().subscribe(monitor) for _ in range(10)]
    feed.send(*(event(kind, ghost()) for kind in ("fork", "exec", "exit")))
    wait_until(lambda: monitor.stats.callbacks == 30)

    assert all([one.kind for one in inbox.all()] == ["fork", "exec", "exit"] for inbox in inboxes)


def test_callback_may_subscribe(feed, start, passed):
    monitor, inbox = start(feed, scan=False)
    late = Inbox()
    unsubscribe = monitor.on_fork(lambda _: (monitor.on_fork(late), unsubscribe()))
    feed.send(event("fork", ghost(start_ticks=1)))
    passed(feed, inbox)
    feed.send(event("fork", ghost(start_ticks=2)))
    passed(feed, inbox)

    assert [one.process.start_ns // TICK_NS for one in late.all(NOWHERE)] == [2]


# -- start, stop, sharing --------------------------------------------------------------------


def test_ten_starts_need_ten_stops(feed):
    monitor = ProcessMonitor(feed, scan=False)
    for _ in range(10):
        monitor.start()
    for _ in range(9):
        monitor.stop()
    assert monitor.is_running
    assert (feed.opened, feed.closed) == (1, 0)

    monitor.stop()

    assert not monitor.is_running
    assert (feed.opened, feed.closed) == (1, 1)


def test_stop_without_start_and_once_too_often_does_no_harm(feed):
    monitor = ProcessMonitor(feed, scan=False)
    monitor.stop()
    monitor.start()
    monitor.stop()
    monitor.stop()
    monitor.start()
    assert monitor.is_running
    monitor.stop()

    assert (feed.opened, feed.closed) == (2, 2)


def test_subscriptions_are_there_again_after_a_new_start(feed, start, passed, sleeper):
    monitor, inbox = start(feed)
    passed(feed, inbox)
    monitor.stop()
    monitor.start()
    passed(feed, inbox)

    assert inbox.of(sleeper.pid) == [("exec", "scan"), ("exec", "scan")]


def test_events_of_before_the_stop_are_delivered(feed, start):
    monitor, inbox = start(feed, scan=False)
    feed.send(*(event("exit", ghost(start_ticks=number)) for number in range(500)))
    monitor.stop()

    assert len(inbox.all(NOWHERE)) == 500
    assert monitor.stats.lost_queue == 0


def test_event_that_comes_with_the_stop_is_delivered(start):
    class LateFeed(PipeFeed):
        monitor = None

        def drain(self):
            events = super().drain()
            if self.monitor is not None:
                self.monitor, monitor = None, self.monitor
                self._events.append(event("exit", ghost()))
                monitor._run.ask_to_stop(60)
            return events

    feed = LateFeed()
    monitor, inbox = start(feed, scan=False, stop_timeout_s=60)
    feed.monitor = monitor
    feed.wake()
    monitor._run._thread.join()
    monitor.stop()

    assert inbox.of(NOWHERE) == [("exit", "event")]


def test_stop_does_not_wait_for_a_callback_that_blocks(feed, start, deadline):
    gate = threading.Event()
    reached = threading.Event()
    monitor, _ = start(feed, subscribe=False, scan=False, stop_timeout_s=0.05)

    def block(_):
        reached.set()
        assert gate.wait(deadline(60))

    monitor.on_exit(block)
    feed.send(*(event("exit", ghost(start_ticks=number)) for number in range(5)))
    assert reached.wait(deadline(10))

    monitor.stop()

    assert not gate.is_set()
    assert not feed.is_open
    assert monitor.stats.lost_queue == 4
    gate.set()


def test_monitor_runs_again_while_an_old_callback_still_blocks(feed, start, deadline, wait_until):
    gate = threading.Event()
    reached = threading.Event()
    monitor, _ = start(feed, subscribe=False, scan=False, stop_timeout_s=0.05)

    def block(_):
        reached.set()
        assert gate.wait(deadline(60))

    end = monitor.on_exit(block)
    feed.send(event("exit", ghost(start_ticks=1)))
    assert reached.wait(deadline(10))
    monitor.stop()
    end()
    inbox = Inbox().subscribe(monitor)
    monitor.start()
    feed.send(event("exit", ghost(start_ticks=2)))

    wait_until(lambda: inbox.of(NOWHERE) == [("exit", "event")])
    gate.set()


def test_callback_may_stop_the_monitor(feed, start, wait_until):
    monitor, _ = start(feed, subscribe=False, scan=False)
    stopped = threading.Event()
    monitor.on_exit(lambda _: (monitor.stop(), stopped.set()))
    feed.send(event("exit", ghost()))

    wait_until(stopped.is_set)
    wait_until(lambda: not feed.is_open)
    assert not monitor.is_running


def test_feed_that_cannot_be_opened_is_told_and_leaves_nothing(feed):
    before = (set(threading.enumerate()), set(os.listdir("/proc/self/fd")))
    feed.open_errors = [BpfError("load", 1)]
    monitor = ProcessMonitor(feed)

    with pytest.raises(BpfError):
        monitor.start()

    assert not monitor.is_running
    assert (set(threading.enumerate()), set(os.listdir("/proc/self/fd"))) == before
    with monitor:
        assert feed.is_open


def test_proc_root_that_is_none_is_told(feed, tmp_path):
    with pytest.raises(ProcRootError):
        ProcessMonitor(feed, config=Config(proc_root=str(tmp_path))).start()

    assert feed.opened == 0


def test_stopped_monitor_has_no_thread_and_no_descriptor_left(feed, start, passed):
    before = (set(threading.enumerate()), set(os.listdir("/proc/self/fd")))
    monitor, inbox = start(feed)
    passed(feed, inbox)
    assert {thread.name for thread in threading.enumerate()} >= {"sowatch-process-drain", "sowatch-process-callbacks"}

    monitor.stop()

    assert (set(threading.enumerate()), set(os.listdir("/proc/self/fd"))) == before


def test_shared_monitor_is_one_until_its_last_user_stops():
    feeds = []

    def make_feed():
        feeds.append(PipeFeed())
        return feeds[-1]

    users = [ProcessMonitor.shared(make_feed) for _ in range(10)]
    assert len(set(map(id, users))) == 1
    for monitor in users[:9]:
        monitor.stop()
    assert users[0].is_running
    users[9].stop()
    assert not users[0].is_running

    again = ProcessMonitor.shared(make_feed)
    try:
        assert again is not users[0]
        assert again.is_running
        assert [feed.is_open for feed in feeds] == [False, True]
    finally:
        again.stop()


def test_shared_monitor_that_cannot_start_is_made_anew_the_next_time(feed):
    broken = PipeFeed()
    broken.open_errors = [BpfError("load", 1)]
    with pytest.raises(BpfError):
        ProcessMonitor.shared(lambda: broken)

    monitor = ProcessMonitor.shared(lambda: feed)
    monitor.stop()

    assert (feed.opened, feed.closed) == (1, 1)


def test_threads_that_share_the_monitor_get_the_same_one_and_leave_it_stopped(deadline):
    feeds = []
    lock = threading.Lock()
    barrier = threading.Barrier(6)
    faults = []

    def make_feed():
        with lock:
            feeds.append(PipeFeed())
            return feeds[-1]

    def use():
        barrier.wait(deadline(10))
        for _ in range(10):
            monitor = ProcessMonitor.shared(make_feed)
            if not monitor.is_running:
                faults.append("a monitor was handed out that does not run")
            monitor.stop()

    threads = [threading.Thread(target=use) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(deadline(60))

    assert faults == []
    assert [(feed.opened, feed.closed) for feed in feeds] == [(1, 1)] * len(feeds)
