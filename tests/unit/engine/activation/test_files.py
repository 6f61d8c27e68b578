"""FileRegistry: activation once, deactivation once, refusals, and the blocklist."""

from __future__ import annotations

import errno
import os

import pytest

from sowatch.engine.activation import FileRegistry
from sowatch.model.config import Config
from sowatch.model.errors import (
    AlreadyRegistered,
    BpfError,
    CallbackMissing,
    EnvironmentFault,
    FileBlocked,
    ProcessGone,
)
from sowatch.model.events import Library
from sowatch.model.identity import TICK_NS, ProcessId
from support.registry import P1, P2, A, B, Clock, Hooks, id_of, library, register


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
    register(registry, A, P1, hooks)

    assert hooks.calls == [("on", A)]
    assert registry.processes() == {P1}
    assert registry.stats.registered == 1


def test_second_process_does_not_repeat_the_activation_and_the_last_one_deactivates(registry, hooks):
    register(registry, A, P1, hooks)
    with pytest.raises(AlreadyRegistered) as refused:
        register(registry, A, P2, hooks)
    assert "/usr/lib/lib1.so" in str(refused.value)
    assert hooks.names == ["on", "already"]

    assert registry.unregister(P1) == 1
    assert hooks.names == ["on", "already"]
    assert registry.unregister(P2) == 1

    assert hooks.calls == [("on", A), ("already", A), ("off", A)]
    stats = registry.stats
    assert (stats.registered, stats.already_registered, stats.unregistered) == (1, 1, 1)


def test_processes_are_counted_not_their_mappings(registry, hooks):
    register(registry, A, P1, hooks)
    with pytest.raises(AlreadyRegistered):
        register(registry, A, P1, hooks)

    registry.unregister(P1)

    assert hooks.names == ["on", "already", "off"]
    assert registry.files() == ()


def test_one_process_seen_by_the_kernel_and_by_proc_is_one_holder(registry, hooks):
    exact = ProcessId(101, 5 * TICK_NS + 1234)
    truncated = ProcessId(101, 5 * TICK_NS)
    register(registry, A, exact, hooks)
    with pytest.raises(AlreadyRegistered):
        register(registry, A, truncated, hooks)

    registry.unregister(truncated)

    assert hooks.names == ["on", "already", "off"]


def test_a_later_process_with_the_same_pid_is_another_holder(registry, hooks):
    earlier, later = ProcessId(101, 5 * TICK_NS), ProcessId(101, 6 * TICK_NS)
    register(registry, A, earlier, hooks)
    with pytest.raises(AlreadyRegistered):
        register(registry, A, later, hooks)

    registry.unregister(earlier)

    assert registry.processes() == {later}
    assert "off" not in hooks.names


def test_file_becomes_active_again_after_its_deactivation(registry, hooks):
    register(registry, A, P1, hooks)
    registry.unregister(P1)
    register(registry, A, P2, hooks)

    assert hooks.names == ["on", "off", "on"]


def test_two_rules_activate_the_same_file_apart(registry, hooks):
    register(registry, A, P1, hooks, rule="tls")
    register(registry, A, P1, hooks, rule="all")

    assert hooks.names == ["on", "on"]
    assert {(file.rule, file.library.id) for file in registry.files()} == {("tls", A.id), ("all", A.id)}


def test_unregister_deactivates_only_what_the_process_was_last_to_hold(registry, hooks):
    register(registry, A, P1, hooks)
    register(registry, B, P1, hooks)
    with pytest.raises(AlreadyRegistered):
        register(registry, A, P2, hooks)
    hooks.calls.clear()

    assert registry.unregister(P1) == 2
    assert hooks.calls == [("off", B)]
    registry.unregister(P2)
    assert hooks.calls == [("off", B), ("off", A)]


def test_unregister_file_leaves_the_other_files_of_the_process(registry, hooks):
    register(registry, A, P1, hooks)
    register(registry, B, P1, hooks)
    hooks.calls.clear()

    assert registry.unregister_file("default", A.id, P1) is True
    assert hooks.calls == [("off", A)]
    assert registry.processes() == {P1}


def test_unregister_of_a_process_that_holds_nothing_does_nothing(registry, hooks):
    assert registry.unregister(P1) == 0
    assert registry.stats.unregister_errors == 0


def test_release_of_an_unknown_file_and_by_a_stranger_are_counted_apart(registry, hooks):
    register(registry, A, P1, hooks)

    assert registry.unregister_file("default", B.id, P1) is False
    assert registry.unregister_file("default", A.id, P2) is False

    stats = registry.stats
    assert (stats.unregister_path_id_not_found, stats.unregister_errors) == (1, 1)
    assert hooks.names == ["on"]


# -- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["activate", "deactivate", "both"])
def test_a_missing_callback_is_refused(registry, hooks, missing):
    with pytest.raises(CallbackMissing):
        registry.register(
            A,
            P1,
            activate=None if missing in ("activate", "both") else hooks.activate,
            deactivate=None if missing in ("deactivate", "both") else hooks.deactivate,
        )
    assert registry.files() == ()


def test_process_that_does_not_exist_is_refused_and_nothing_is_blocked(hooks, spawn):
    registry = FileRegistry()
    child = spawn(["sleep", "60"])
    process = id_of(child.pid)
    spawn.end(child)

    with pytest.raises(ProcessGone) as refused:
        register(registry, A, process, hooks)

    assert refused.value.pid == child.pid
    assert hooks.calls == []
    assert registry.blocked() == ()


def test_process_that_only_has_the_pid_of_the_one_meant_is_refused(hooks):
    registry = FileRegistry()
    other = id_of(os.getpid())._replace(start_ns=7 * TICK_NS)

    with pytest.raises(ProcessGone):
        register(registry, A, other, hooks)
    register(registry, A, id_of(os.getpid()), hooks)

    assert hooks.names == ["on"]


def test_failed_activation_cleans_up_once_and_blocks_the_file(registry, hooks):
    failure = ValueError("no symbols")
    hooks.fail_with = failure
    with pytest.raises(ValueError, match="no symbols") as raised:
        register(registry, A, P1, hooks)
    assert raised.value is failure
    assert hooks.names == ["on", "off"]
    assert registry.processes() == frozenset()

    with pytest.raises(FileBlocked) as refused:
        register(registry, A, P2, hooks)

    assert refused.value.reason == "no symbols"
    assert hooks.names == ["on", "off"]
    assert registry.processes() == frozenset()
    stats = registry.stats
    assert (stats.hook_failed, stats.blocked, stats.registered, stats.total_files) == (1, 1, 0, 0)


def test_block_tells_rule_path_reason_and_time(registry, hooks, clock):
    hooks.fail_with = RuntimeError()
    with pytest.raises(RuntimeError):
        register(registry, A, P1, hooks, rule="tls")

    (block,) = registry.blocked()

    assert (block.rule, block.id, block.sample_path) == ("tls", A.id, "/usr/lib/lib1.so")
    assert block.reason == "RuntimeError"
    assert (block.since_s, block.expires_s) == (1000.0, 1000.0 + Config().block_ttl_s)


def test_cleared_blocklist_lets_the_file_be_tried_again(registry, hooks):
    hooks.fail_with = ValueError("half written")
    with pytest.raises(ValueError, match="half written"):
        register(registry, A, P1, hooks)

    assert registry.clear_blocked() == 1
    assert registry.blocked() == ()
    hooks.fail_with = None
    register(registry, A, P1, hooks)

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
    with pytest.raises(type(failure)):
        register(registry, A, P1, hooks)
    assert hooks.names == ["on", "off"]
    assert registry.blocked() == ()
    assert (registry.stats.hook_failed, registry.stats.environment_faults) == (0, 1)

    hooks.fail_with = None
    register(registry, A, P1, hooks)

    assert registry.processes() == {P1}


@pytest.mark.parametrize("failure", [OSError("odd"), OSError(errno.ENOEXEC, "bad format"), BpfError("attach", 22)])
def test_failure_that_may_be_the_fault_of_the_file_blocks(registry, hooks, failure):
    hooks.fail_with = failure
    with pytest.raises(type(failure)):
        register(registry, A, P1, hooks)

    assert [block.id for block in registry.blocked()] == [A.id]


def test_process_that_dies_during_a_failed_activation_does_not_block_the_file(hooks, spawn):
    registry = FileRegistry()
    child = spawn(["sleep", "60"])
    hooks.on_activate = lambda: spawn.end(child)
    hooks.fail_with = ValueError("cannot open")
    with pytest.raises(ProcessGone) as refused:
        register(registry, A, id_of(child.pid), hooks)
    assert refused.value.__cause__ is hooks.fail_with
    assert registry.blocked() == ()

    hooks.on_activate, hooks.fail_with = lambda: None, None
    register(registry, A, id_of(os.getpid()), hooks)

    assert hooks.names == ["on", "off", "on"]


def test_process_that_dies_during_a_good_activation_holds_nothing(hooks, spawn):
    registry = FileRegistry()
    child = spawn(["sleep", "60"])
    hooks.on_activate = lambda: spawn.end(child)

    with pytest.raises(ProcessGone):
        register(registry, A, id_of(child.pid), hooks)

    assert hooks.names == ["on", "off"]
    assert registry.files() == ()


def test_process_that_dies_while_it_joins_an_active_file_holds_nothing(hooks):
    answers = {P1: iter([True, True]), P2: iter([True, False])}
    registry = FileRegistry(is_alive=lambda process: next(answers[process]))
    register(registry, A, P1, hooks)

    with pytest.raises(ProcessGone):
        register(registry, A, P2, hooks)

    assert registry.processes() == {P1}
    assert hooks.names == ["on"]


def test_failed_clean_up_is_counted(registry, hooks):
    hooks.fail_with, hooks.fail_off_with = ValueError("first"), ValueError("second")

    with pytest.raises(ValueError, match="first"):
        register(registry, A, P1, hooks)

    assert registry.stats.unregister_failed_cb == 1
    assert hooks.names == ["on", "off"]


def test_interrupted_activation_leaves_nothing_and_blocks_nothing(registry, hooks):
    hooks.fail_with = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        register(registry, A, P1, hooks)

    assert (registry.files(), registry.blocked()) == ((), ())
    assert hooks.names == ["on", "off"]


def test_error_of_the_already_registered_callback_is_seen_in_the_refusal(registry, hooks):
    register(registry, A, P1, hooks)
    failure = ValueError("x")

    def already(file: Library) -> None:
        raise failure

    with pytest.raises(AlreadyRegistered) as refused:
        registry.register(A, P2, activate=hooks.activate, deactivate=hooks.deactivate, already_registered=already)

    assert refused.value.__cause__ is failure
    assert registry.processes() == {P1, P2}


def test_failed_deactivation_is_counted_and_the_other_files_are_deactivated(registry, hooks, caplog):
    register(registry, A, P1, hooks)
    register(registry, B, P1, hooks)
    hooks.calls.clear()
    hooks.fail_off_with = ValueError("stuck probe")

    assert registry.unregister(P1) == 2

    assert sorted(file.path for _, file in hooks.calls) == ["/usr/lib/lib1.so", "/usr/lib/lib2.so"]
    stats = registry.stats
    assert (stats.unregister_failed_cb, stats.unregistered, stats.total_files) == (2, 2, 0)
    assert caplog.text.count("stuck probe") == 2


def test_names_in_the_log_are_escaped(registry, hooks, caplog):
    hooks.fail_with = ValueError("first\nline")
    with pytest.raises(ValueError, match="first"):
        register(registry, library(path="/tmp/a\nb.so"), P1, hooks)

    (message,) = [record.getMessage() for record in caplog.records]
    assert "\n" not in message
    assert "/tmp/a\\nb.so" in message


# -- the blocklist ---------------------------------------------------------------------------


def block(registry: FileRegistry, file: Library) -> None:
    def fail(_: Library) -> None:
        raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        registry.register(file, P1, activate=fail, deactivate=lambda _: None)


def is_refused(registry: FileRegistry, file: Library) -> bool:
    try:
        registry.register(file, P1, activate=lambda _: None, deactivate=lambda _: None)
    except FileBlocked:
        return True
    registry.unregister(P1)
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


def test_looking_at_the_blocklist_does_not_keep_files_on_it(clock):
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
    with pytest.raises(ValueError, match="x"):
        register(registry, A, P1, hooks)

    assert registry.blocked()[0].reason == "x" * 1000


# -- what is there ---------------------------------------------------------------------------


def test_files_are_told_as_frozen_records(registry, hooks, clock):
    register(registry, A, P1, hooks, rule="tls")
    clock.now_s += 5

    (file,) = registry.files()

    assert (file.rule, file.library, file.state, file.processes) == ("tls", A, "attached", frozenset({P1}))
    assert file.since_s == 1000.0
    with pytest.raises(AttributeError):
        file.state = "held"  # type: ignore[misc]


def test_gauges_follow_processes_that_join_an_active_file(registry, hooks):
    register(registry, A, P1, hooks)
    with pytest.raises(AlreadyRegistered):
        register(registry, A, P2, hooks)

    assert (registry.stats.total_files, registry.stats.total_pids) == (1, 2)
