"""FileRegistry with several threads: who waits for whom, counting ahead of calling, the end; and who is alive."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from random import Random
from typing import Any

import pytest

from sowatch.engine.activation import FileRegistry
from sowatch.linux.liveness import process_is_alive
from sowatch.linux.proc import Miss, ProcFs
from sowatch.model.config import Config
from sowatch.model.errors import EnvironmentFault, RegistryError, RegistryStopped
from sowatch.model.events import Library
from sowatch.model.identity import TICK_NS, FileId, ProcessId
from support.registry import P1, P2, P3, A, B, Gate, Hooks, id_of, library, register, unregister


@pytest.fixture
def registry() -> FileRegistry:
    return FileRegistry(is_alive=lambda process: True)


@pytest.fixture
def hooks() -> Hooks:
    return Hooks()


@pytest.fixture
def gate(deadline: Any) -> Gate:
    return Gate(deadline(30))


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


# -- several threads -------------------------------------------------------------------------


def test_second_activate_waits_for_the_one_under_way(registry, hooks, gate, pool, wait_until, deadline):
    hooks.on_activate = gate
    first = pool.submit(register, registry, A, P1, hooks)
    assert gate.reached.wait(deadline(10))
    assert [file.state for file in registry.files()] == ["attaching"]
    second = pool.submit(registry.activate, "default", A, hooks.activate)
    assert not second.done()

    gate.open()

    assert first.result(deadline(10)) is True
    assert second.result(deadline(10)) is False
    assert hooks.names == ["on"]


def test_waiting_activate_tries_itself_when_the_surroundings_were_at_fault(registry, hooks, gate, pool, deadline):
    failing = Hooks()
    failing.on_activate, failing.fail_with = gate, EnvironmentFault("not now")
    first = pool.submit(register, registry, A, P1, failing)
    assert gate.reached.wait(deadline(10))
    second = pool.submit(registry.activate, "default", A, hooks.activate)

    gate.open()

    assert first.result(deadline(10)) is False
    assert second.result(deadline(10)) is True
    assert (failing.names, hooks.names) == (["on", "off"], ["on"])


def test_waiting_activate_is_refused_when_the_activation_fails(registry, hooks, gate, pool, deadline):
    hooks.on_activate, hooks.fail_with = gate, ValueError("bad")
    first = pool.submit(register, registry, A, P1, hooks)
    assert gate.reached.wait(deadline(10))
    second = pool.submit(registry.activate, "default", A, hooks.activate)

    gate.open()

    assert (first.result(deadline(10)), second.result(deadline(10))) == (False, False)
    assert hooks.names == ["on", "off"]
    assert registry.stats.blocked == 1


def test_activate_waits_for_a_deactivation_and_activates_again(registry, hooks, gate, pool, deadline):
    def slow_off(file: Library) -> None:
        gate()
        hooks.deactivate(file)

    register(registry, A, P1, hooks)
    leaving = pool.submit(registry.deactivate, "default", A.id, slow_off)
    assert gate.reached.wait(deadline(10))
    coming = pool.submit(registry.activate, "default", A, hooks.activate)
    assert [file.state for file in registry.files()] == ["detaching"]

    gate.open()

    assert leaving.result(deadline(10)) is True
    assert coming.result(deadline(10)) is True
    assert hooks.names == ["on", "off", "on"]


def test_other_files_are_not_held_up_by_a_slow_activation(registry, hooks, gate, pool, deadline):
    slow = Hooks()
    slow.on_activate = gate
    first = pool.submit(register, registry, A, P1, slow)
    assert gate.reached.wait(deadline(10))

    assert register(registry, B, P2, hooks) is True
    assert registry.acquire("default", A, P3) is False
    assert registry.stats.total_pids == 3

    gate.open()
    first.result(deadline(10))


def test_callback_may_use_the_registry_but_not_wait_for_itself(registry, hooks):
    inner = Hooks()

    def nested() -> None:
        register(registry, B, P1, inner)
        assert registry.stats.registered == 1
        with pytest.raises(RegistryError, match="callback must not wait"):
            registry.activate("default", A, inner.activate)

    hooks.on_activate = nested
    register(registry, A, P1, hooks)

    assert inner.calls == [("on", B)]
    assert registry.processes() == {P1}


def test_callback_may_deactivate_the_file_that_it_activates(registry, hooks):
    hooks.on_activate = lambda: unregister(registry, A, P1, hooks)

    register(registry, A, P1, hooks)

    assert hooks.names == ["on", "off"]
    assert registry.files() == ()


# -- counting ahead of calling ------------------------------------------------------------------


def test_acquire_and_release_tell_the_first_and_the_last(registry):
    assert registry.acquire("tls", A, P1) is True
    assert registry.acquire("tls", A, P1) is False
    assert registry.acquire("tls", A, P2) is False
    assert registry.release("tls", A.id, P1) is False
    assert registry.release("tls", A.id, P1) is False
    assert registry.release("tls", A.id, P2) is True

    assert registry.files() == ()
    assert registry.stats.unregister_errors == 1


def test_callbacks_alternate_even_if_the_counting_is_far_ahead(registry, hooks):
    assert registry.acquire("tls", A, P1)
    assert registry.release("tls", A.id, P1)
    assert registry.acquire("tls", A, P2)

    assert registry.activate("tls", A, hooks.activate) is True
    assert registry.deactivate("tls", A.id, hooks.deactivate) is True
    assert registry.activate("tls", A, hooks.activate) is True

    assert hooks.names == ["on", "off", "on"]
    assert [(file.state, file.processes) for file in registry.files()] == [("attached", {P2})]


def test_activate_of_an_active_file_and_deactivate_of_an_inactive_one_do_nothing(registry, hooks):
    assert registry.deactivate("tls", A.id, hooks.deactivate) is False
    registry.activate("tls", A, hooks.activate)
    assert registry.activate("tls", A, hooks.activate) is False
    registry.deactivate("tls", A.id, hooks.deactivate)
    assert registry.deactivate("tls", A.id, hooks.deactivate) is False

    assert hooks.names == ["on", "off"]


def test_failed_activate_is_reported_cleaned_up_and_blocked(registry, hooks):
    hooks.fail_with = ValueError("bad")
    registry.acquire("tls", A, P1)

    assert registry.activate("tls", A, hooks.activate, deactivate=hooks.deactivate) is False
    assert registry.activate("tls", A, hooks.activate, deactivate=hooks.deactivate) is False
    assert registry.deactivate("tls", A.id, hooks.deactivate) is False

    assert hooks.names == ["on", "off"]
    assert [file.state for file in registry.files()] == ["held"]
    assert registry.stats.blocked == 1
    assert registry.release("tls", A.id, P1) is True


def test_failed_activate_for_a_process_that_is_gone_does_not_block(hooks):
    registry = FileRegistry(is_alive=lambda process: process != P1)
    hooks.fail_with = ValueError("cannot open")
    registry.acquire("tls", A, P1)

    assert registry.activate("tls", A, hooks.activate) is False
    assert registry.blocked() == ()
    assert registry.activate("tls", A, hooks.activate, process=P2) is False

    assert [one.id for one in registry.blocked()] == [A.id]


def test_failed_activate_of_a_file_that_nobody_holds_any_more_leaves_only_the_block(registry, hooks):
    registry.acquire("tls", A, P1)
    registry.release("tls", A.id, P1)
    hooks.fail_with = ValueError("bad")

    assert registry.activate("tls", A, hooks.activate) is False

    assert registry.files() == ()
    assert [one.id for one in registry.blocked()] == [A.id]


def test_deactivate_during_the_activation_is_left_to_the_thread_that_activates(registry, hooks, gate, pool, deadline):
    hooks.on_activate = gate
    activation = pool.submit(registry.activate, "tls", A, hooks.activate)
    assert gate.reached.wait(deadline(10))

    assert registry.deactivate("tls", A.id, hooks.deactivate) is True
    assert registry.deactivate("tls", A.id, hooks.deactivate) is False
    assert hooks.names == ["on"]
    gate.open()

    assert activation.result(deadline(10)) is True
    assert hooks.names == ["on", "off"]
    assert registry.files() == ()


# -- the end ---------------------------------------------------------------------------------


def test_clear_deactivates_everything_and_stops_for_ever(registry, hooks):
    for number in range(5):
        register(registry, (A, B)[number % 2], ProcessId(200 + number, TICK_NS), hooks)
    assert (registry.stats.total_pids, registry.stats.total_files) == (5, 2)
    hooks.calls.clear()

    assert registry.clear() == ()

    assert sorted(file.path for _, file in hooks.calls) == ["/usr/lib/lib1.so", "/usr/lib/lib2.so"]
    assert (registry.stats.total_pids, registry.stats.total_files) == (0, 0)
    with pytest.raises(RegistryStopped):
        registry.acquire("default", A, P1)
    assert registry.activate("default", A, hooks.activate) is False
    assert registry.release("default", A.id, P1) is False
    assert registry.clear() == ()
    assert len(hooks.calls) == 2


def test_clear_tries_every_file_and_returns_what_failed(registry):
    tried = []

    def fail(file: Library) -> None:
        tried.append(file)
        raise ValueError(file.path)

    for one in (A, B):
        registry.activate("default", one, lambda _: None, deactivate=fail)

    errors = registry.clear()

    assert sorted(str(error) for error in errors) == ["/usr/lib/lib1.so", "/usr/lib/lib2.so"]
    assert len(tried) == 2
    assert registry.stats.unregister_failed_cb == 2


def test_clear_ends_split_activations_with_the_callback_they_left(registry, hooks):
    registry.acquire("tls", A, P1)
    registry.activate("tls", A, hooks.activate, deactivate=hooks.deactivate)

    registry.clear()

    assert hooks.names == ["on", "off"]


def test_clear_waits_for_an_activation_and_has_it_undone(registry, hooks, gate, pool, deadline):
    hooks.on_activate = gate
    first = pool.submit(register, registry, A, P1, hooks)
    assert gate.reached.wait(deadline(10))
    (busy,) = registry.clear(timeout_s=0)
    assert isinstance(busy, RegistryError)
    assert "1 file" in str(busy)
    end: Future[Any] = pool.submit(registry.clear)

    gate.open()

    assert end.result(deadline(10)) == ()
    assert first.result(deadline(10)) is True
    assert hooks.names == ["on", "off"]


def test_waiting_activate_ends_when_the_registry_is_cleared(registry, hooks, gate, pool, deadline):
    hooks.on_activate = gate
    pool.submit(register, registry, A, P1, hooks)
    assert gate.reached.wait(deadline(10))
    second = pool.submit(registry.activate, "default", A, hooks.activate)

    registry.clear(timeout_s=0)

    assert second.result(deadline(10)) is False
    gate.open()


def test_callback_may_clear_the_registry(registry, hooks):
    register(registry, B, P2, hooks)
    hooks.on_activate = registry.clear

    register(registry, A, P1, hooks)

    assert hooks.calls == [("on", B), ("on", A), ("off", B), ("off", A)]
    assert registry.files() == ()


# -- who is alive ----------------------------------------------------------------------------


def test_running_process_is_alive_and_one_that_was_reaped_is_not(spawn):
    child = spawn(["sleep", "60"])
    process = id_of(child.pid)
    assert process_is_alive(process, ProcFs())

    spawn.end(child)

    assert not process_is_alive(process, ProcFs())


def test_zombie_is_not_alive(spawn, wait_until):
    child = spawn(["sleep", "60"])
    process = id_of(child.pid)
    child.kill()

    def is_zombie() -> bool:
        stat = ProcFs().stat(child.pid)
        return not isinstance(stat, Miss) and stat.state == "Z"

    wait_until(is_zombie)
    assert not process_is_alive(process, ProcFs())


def test_process_whose_leader_left_before_its_threads_is_alive(spawn, wait_until):
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
    process = id_of(child.pid)

    def leader_is_gone() -> bool:
        stat = ProcFs().stat(child.pid)
        return not isinstance(stat, Miss) and stat.is_dead

    wait_until(leader_is_gone)
    assert process_is_alive(process, ProcFs())
    assert child.stdin is not None
    child.stdin.close()
    wait_until(lambda: not process_is_alive(process, ProcFs()))


def test_process_counts_as_alive_when_there_are_no_descriptors_left_to_look():
    import resource

    proc = ProcFs()
    gone = ProcessId(2**22 - 1, 0)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        answer = process_is_alive(gone, proc)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    assert answer is True
    assert process_is_alive(gone, proc) is False


# -- everything at once ----------------------------------------------------------------------


def test_threads_that_hammer_the_registry_never_overlap_or_repeat_a_callback(deadline):
    registry = FileRegistry(Config(max_blocked=2), is_alive=lambda process: process.start_ns != 0)
    files = [library(number) for number in range(4)]
    processes = [ProcessId(number, TICK_NS) for number in range(1, 7)]
    threads = 8
    barrier = threading.Barrier(threads)
    busy = {file.id: threading.Lock() for file in files}
    active: dict[FileId, bool] = dict.fromkeys((file.id for file in files), False)
    faults: list[str] = []

    def switch(file: Library, *, on: bool, fails: bool = False) -> None:
        if not busy[file.id].acquire(blocking=False):
            faults.append(f"two callbacks at once for {file.path}")
            return
        try:
            if active[file.id] is on:
                faults.append(f"{file.path} was {'on' if on else 'off'} already")
            active[file.id] = on
            registry.stats  # noqa: B018 - must not deadlock
        finally:
            busy[file.id].release()
        if fails:
            raise EnvironmentFault("now and then")

    def hammer(seed: int) -> None:
        random = Random(seed)
        barrier.wait(deadline(10))
        for _ in range(400):
            file, process = random.choice(files), random.choice(processes)
            action = random.random()
            if action < 0.6:
                fails = random.random() < 0.2
                registry.activate(
                    "default",
                    file,
                    lambda one, fails=fails: switch(one, on=True, fails=fails),
                    deactivate=lambda one: switch(one, on=False),
                    process=process,
                )
            elif action < 0.95:
                registry.deactivate("default", file.id, lambda one: switch(one, on=False))
            else:
                registry.files()
                registry.processes()

    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(hammer, seed) for seed in range(threads)]:
            done.result(deadline(60))
    held = {file.library.id for file in registry.files()}
    assert {file_id for file_id, is_on in active.items() if is_on} == held
    assert registry.clear() == ()

    assert faults == []
    assert not any(active.values())
    stats = registry.stats
    assert stats.registered == stats.unregistered > 0
    assert (stats.total_files, stats.total_pids) == (0, 0)
