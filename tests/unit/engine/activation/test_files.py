"""FileRegistry: activation once, deactivation once, refusals, and the blocklist."""

from __future__ import annotations

import errno
import os

import pytest

from sowatch.engine.activation import FileRegistry
from sowatch.model.config import Config
from sowatch.model.errors import BpfError, EnvironmentFault, ProcessGone
from sowatch.model.events import Library
from sowatch.model.identity import TICK_NS, ProcessId
from support.registry import P1, P2, A, B, Clock, Hooks, id_of, library, register, unregister


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(clock: Clock) -> FileRegistry:
    return FileRegistry(clock=clock, is_alive=lambda process: True)


@pytest.fixture
def hooks() -> Hooks:
    return Hooks()


# -- activation once, deactivation once ------------------------------------------------------


def test_first_process_activates_the_file(registry, hooks):
    assert register(registry, A, P1, hooks) is True

    assert hooks.calls == [("on", A)]
    assert registry.processes() == {P1}
    assert registry.stats.registered == 1


def test_second_process_does_not_repeat_the_activation_and_the_last_one_deactivates(registry, hooks):
    register(registry, A, P1, hooks)
    register(registry, A, P2, hooks)
    assert hooks.names == ["on"]

    assert unregister(registry, A, P1, hooks) is False
    assert hooks.names == ["on"]
    assert unregister(registry, A, P2, hooks) is True

    assert hooks.calls == [("on", A), ("off", A)]
    stats = registry.stats
    assert (stats.registered, stats.already_registered, stats.unregistered) == (1, 1, 1)


def test_processes_are_counted_not_their_mappings(registry, hooks):
    register(registry, A, P1, hooks)
    register(registry, A, P1, hooks)

    unregister(registry, A, P1, hooks)

    assert hooks.names == ["on", "off"]
    assert registry.files() == ()


def test_one_process_seen_by_the_kernel_and_by_proc_is_one_process(registry, hooks):
    exact = ProcessId(101, 5 * TICK_NS + 1234)
    truncated = ProcessId(101, 5 * TICK_NS)
    register(registry, A, exact, hooks)
    register(registry, A, truncated, hooks)

    unregister(registry, A, truncated, hooks)

    assert hooks.names == ["on", "off"]


def test_a_later_process_with_the_same_pid_is_another_one(registry, hooks):
    earlier, later = ProcessId(101, 5 * TICK_NS), ProcessId(101, 6 * TICK_NS)
    register(registry, A, earlier, hooks)
    register(registry, A, later, hooks)

    unregister(registry, A, earlier, hooks)

    assert registry.processes() == {later}
    assert hooks.names == ["on"]


def test_file_becomes_active_again_after_its_deactivation(registry, hooks):
    register(registry, A, P1, hooks)
    unregister(registry, A, P1, hooks)
    register(registry, A, P2, hooks)

    assert hooks.names == ["on", "off", "on"]


def test_two_rules_activate_the_same_file_apart(registry, hooks):
    register(registry, A, P1, hooks, rule="tls")
    register(registry, A, P1, hooks, rule="all")

    assert hooks.names == ["on", "on"]
    assert {(file.rule, file.library.id) for file in registry.files()} == {("tls", A.id), ("all", A.id)}


def test_release_leaves_the_other_files_of_the_process(registry, hooks):
    register(registry, A, P1, hooks)
    register(registry, B, P1, hooks)
    hooks.calls.clear()

    assert unregister(registry, A, P1, hooks) is True
    assert hooks.calls == [("off", A)]
    assert registry.processes() == {P1}


def test_release_of_an_unknown_file_and_by_a_process_without_it_are_counted_apart(registry, hooks):
    register(registry, A, P1, hooks)

    assert registry.release("default", B.id, P1) is False
    assert registry.release("default", A.id, P2) is False

    stats = registry.stats
    assert (stats.unregister_path_id_not_found, stats.unregister_errors) == (1, 1)
    assert hooks.names == ["on"]


# -- activations that fail -------------------------------------------------------------------


def test_failed_activation_cleans_up_once_and_blocks_the_file(registry, hooks):
    hooks.fail_with = ValueError("no symbols")
    assert register(registry, A, P1, hooks) is False
    assert hooks.names == ["on", "off"]
    assert registry.processes() == {P1}
    assert [file.state for file in registry.files()] == ["held"]

    assert unregister(registry, A, P1, hooks) is False
    assert register(registry, A, P2, hooks) is False

    assert hooks.names == ["on", "off"]
    stats = registry.stats
    assert (stats.hook_failed, stats.blocked, stats.registered, stats.total_files) == (1, 1, 0, 1)


def test_block_has_rule_path_reason_and_time(registry, hooks, clock):
    hooks.fail_with = RuntimeError()
    register(registry, A, P1, hooks, rule="tls")

    (block,) = registry.blocked()

    assert (block.rule, block.id, block.sample_path) == ("tls", A.id, "/usr/lib/lib1.so")
    assert block.reason == "RuntimeError"
    assert (block.since_s, block.expires_s) == (1000.0, 1000.0 + Config().block_ttl_s)


def test_cleared_blocklist_lets_the_file_be_tried_again(registry, hooks):
    hooks.fail_with = ValueError("half written")
    register(registry, A, P1, hooks)

    assert registry.clear_blocked() == 1
    assert registry.blocked() == ()
    hooks.fail_with = None
    assert registry.activate("default", A, hooks.activate) is True

    assert hooks.names == ["on", "off", "on"]


@pytest.mark.parametrize(
    "failure",
    [
        EnvironmentFault("buildkit"),
        ProcessGone(101),
        MemoryError(),
        OSError(errno.EMFILE, "too many open files"),
        FileNotFoundError(errno.ENOENT, "no such file"),
        BpfError("attach", errno.EBUSY),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_failure_of_the_surroundings_does_not_block(registry, hooks, failure):
    hooks.fail_with = failure
    assert register(registry, A, P1, hooks) is False
    assert hooks.names == ["on", "off"]
    assert registry.blocked() == ()
    assert (registry.stats.hook_failed, registry.stats.environment_faults) == (0, 1)

    hooks.fail_with = None
    assert registry.activate("default", A, hooks.activate) is True


@pytest.mark.parametrize("failure", [OSError("odd"), OSError(errno.ENOEXEC, "bad format"), BpfError("attach", 22)])
def test_failure_that_may_be_the_fault_of_the_file_blocks(registry, hooks, failure):
    hooks.fail_with = failure
    register(registry, A, P1, hooks)

    assert [block.id for block in registry.blocked()] == [A.id]


def test_process_that_dies_during_a_failed_activation_does_not_block_the_file(hooks, spawn):
    registry = FileRegistry()
    child = spawn(["sleep", "60"])
    hooks.on_activate = lambda: spawn.end(child)
    hooks.fail_with = ValueError("cannot open")

    assert register(registry, A, id_of(child.pid), hooks) is False

    assert registry.blocked() == ()
    assert registry.stats.environment_faults == 1


def test_failure_in_a_process_that_only_has_the_pid_of_the_one_meant_does_not_block(hooks):
    registry = FileRegistry()
    other = id_of(os.getpid())._replace(start_ns=7 * TICK_NS)
    hooks.fail_with = ValueError("cannot open")

    register(registry, A, other, hooks)
    assert registry.blocked() == ()
    register(registry, B, id_of(os.getpid()), hooks)

    assert [block.id for block in registry.blocked()] == [B.id]


def test_failed_clean_up_is_counted(registry, hooks):
    hooks.fail_with, hooks.fail_off_with = ValueError("first"), ValueError("second")

    register(registry, A, P1, hooks)

    assert registry.stats.unregister_failed_cb == 1
    assert hooks.names == ["on", "off"]


def test_interrupted_activation_leaves_nothing_active_and_blocks_nothing(registry, hooks):
    hooks.fail_with = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        register(registry, A, P1, hooks)

    assert ([file.state for file in registry.files()], registry.blocked()) == (["held"], ())
    assert hooks.names == ["on", "off"]


def test_failed_deactivation_is_counted_and_the_file_is_inactive(registry, hooks, caplog):
    register(registry, A, P1, hooks)
    hooks.fail_off_with = ValueError("stuck probe")

    assert unregister(registry, A, P1, hooks) is True

    stats = registry.stats
    assert (stats.unregister_failed_cb, stats.unregistered, stats.total_files) == (1, 1, 0)
    assert caplog.text.count("stuck probe") == 1


def test_names_in_the_log_are_escaped(registry, hooks, caplog):
    hooks.fail_with = ValueError("first\nline")
    register(registry, library(path="/tmp/a\nb.so"), P1, hooks)

    (message,) = [record.getMessage() for record in caplog.records]
    assert "\n" not in message
    assert "/tmp/a\\nb.so" in message


# -- the blocklist ---------------------------------------------------------------------------


def block(registry: FileRegistry, file: Library) -> None:
    def fail(_: Library) -> None:
        raise ValueError("bad")

    assert registry.activate("default", file, fail) is False


def is_refused(registry: FileRegistry, file: Library) -> bool:
    if not registry.activate("default", file, lambda _: None):
        return True
    registry.deactivate("default", file.id, lambda _: None)
    return False


def test_block_ends_with_its_time(registry, clock):
    block(registry, A)
    clock.now_s += Config().block_ttl_s - 1
    assert is_refused(registry, A)

    clock.now_s += 1

    assert registry.blocked() == ()
    assert not is_refused(registry, A)


def test_new_file_with_a_reused_inode_number_is_not_blocked(registry):
    block(registry, library(7, generation=1))

    assert not is_refused(registry, library(7, generation=2))
    assert is_refused(registry, library(7, generation=1))


def test_block_is_of_one_rule(registry, hooks):
    block(registry, A)

    register(registry, A, P1, hooks, rule="other")

    assert hooks.names == ["on"]


def test_least_recently_refused_file_leaves_a_full_blocklist(clock):
    registry = FileRegistry(Config(max_blocked=2), clock=clock, is_alive=lambda process: True)
    block(registry, library(1))
    block(registry, library(2))
    assert is_refused(registry, library(1))

    block(registry, library(3))

    assert [one.id.inode for one in registry.blocked()] == [1, 3]


def test_reading_the_blocklist_does_not_keep_files_on_it(clock):
    registry = FileRegistry(Config(max_blocked=2), clock=clock, is_alive=lambda process: True)
    block(registry, library(1))
    block(registry, library(2))
    assert [one.id.inode for one in registry.blocked()] == [1, 2]

    block(registry, library(3))

    assert [one.id.inode for one in registry.blocked()] == [2, 3]


def test_expired_blocks_leave_a_full_blocklist_before_the_others(clock):
    registry = FileRegistry(Config(max_blocked=2, block_ttl_s=100), clock=clock, is_alive=lambda process: True)
    block(registry, library(1))
    clock.now_s += 50
    block(registry, library(2))
    assert is_refused(registry, library(1))
    clock.now_s += 50

    block(registry, library(3))

    assert [one.id.inode for one in registry.blocked()] == [2, 3]


def test_reason_of_a_block_is_kept_but_not_without_end(registry, hooks):
    hooks.fail_with = ValueError("x" * 1_000_000)
    register(registry, A, P1, hooks)

    assert registry.blocked()[0].reason == "x" * 1000


# -- what is there ---------------------------------------------------------------------------


def test_files_are_frozen_records(registry, hooks, clock):
    register(registry, A, P1, hooks, rule="tls")
    clock.now_s += 5

    (file,) = registry.files()

    assert (file.rule, file.library, file.state, file.processes) == ("tls", A, "attached", frozenset({P1}))
    assert file.since_s == 1000.0
    with pytest.raises(AttributeError):
        file.state = "held"  # type: ignore[misc]


def test_gauges_follow_processes_that_join_an_active_file(registry, hooks):
    register(registry, A, P1, hooks)
    register(registry, A, P2, hooks)

    assert (registry.stats.total_files, registry.stats.total_pids) == (1, 2)
