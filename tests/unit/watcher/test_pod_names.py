"""PodNames: asks seldom, never makes others wait for what does not answer, and forgets no name that is in use."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from sowatch.engine.file_inspector import Inspection
from sowatch.model.errors import SowatchError
from sowatch.model.events import Pod, Process
from sowatch.watcher import pod_names
from sowatch.watcher.pod_names import PodNames

UID = "0f0e0d0c-1111-2222-3333-444455556666"
SANDBOX, WEB, SIDE = "a" * 64, "b" * 64, "c" * 64


class Runtime:
    """Answers what it is given; ``hold`` keeps the next answers back."""

    socket = "/run/cri.sock"

    def __init__(self) -> None:
        self.found: dict[str, Pod] = {}
        self.error: Exception | None = None
        self.asked = 0
        self.is_closed = threading.Event()
        self.go = threading.Event()
        self.go.set()

    def pods(self, timeout_s: float) -> dict[str, Pod]:
        self.asked += 1
        found = dict(self.found)
        self.go.wait(30)
        if self.error is not None:
            raise self.error
        return found

    def close(self) -> None:
        self.is_closed.set()
        self.go.set()


def process(container: str | None, *, uid: str = UID, pid: int = 1) -> Process:
    place = "" if container is None else f"/{container}"
    return Process(pid, pid, container=container, cgroup=f"/kubepods/pod{uid}{place}", pod=Pod(uid))


@pytest.fixture
def runtime() -> Runtime:
    made = Runtime()
    made.found = {SANDBOX: Pod(UID, "web-0", "shop"), WEB: Pod(UID, "web-0", "shop", "nginx")}
    return made


@pytest.fixture
def names(runtime: Runtime) -> Iterator[PodNames]:
    made = PodNames(runtime)
    made.start()
    yield made
    made.close(10)


@pytest.fixture
def over(names: PodNames, wait_until: Any) -> Callable[[Inspection | None], None]:
    """Waits for the end of a lookup, if there is one."""

    def wait(lookup: Inspection | None) -> None:
        wait_until(lambda: lookup is None or lookup.facts is not None, 10, "the end of the lookup")

    return wait


@pytest.fixture
def asked_once(runtime: Runtime, names: PodNames, wait_until: Any) -> None:
    wait_until(lambda: names.state.lookups, 10, "the first answer")


def test_a_process_gets_the_names_of_its_container(names: PodNames, asked_once: None) -> None:
    assert names.named(process(WEB)).pod == Pod(UID, "web-0", "shop", "nginx")
    assert names.look_up(process(WEB)) is None


def test_the_process_of_a_sandbox_or_of_no_container_gets_those_of_its_pod(names: PodNames, asked_once: None) -> None:
    for container in (SANDBOX, None):
        assert names.named(process(container)).pod == Pod(UID, "web-0", "shop", None)
        assert names.look_up(process(container)) is None


def test_a_container_inside_a_container_has_the_name_of_the_outer_one(names: PodNames, asked_once: None) -> None:
    inner = Process(1, 1, container=SIDE, cgroup=f"/kubepods/pod{UID}/{WEB}/docker/{SIDE}", pod=Pod(UID))
    assert names.named(inner).pod == Pod(UID, "web-0", "shop", "nginx")


def test_a_container_that_claims_another_pod_gets_no_name_of_that(names: PodNames, asked_once: None) -> None:
    other = process(WEB, uid="aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee")
    assert names.named(other).pod == other.pod


def test_a_process_outside_pods_is_left_alone(names: PodNames, runtime: Runtime, asked_once: None) -> None:
    host = Process(1, 1, cgroup="/system.slice/x.service")
    assert names.named(host) is host
    assert names.look_up(host) is None
    assert runtime.asked == 1


def test_a_new_container_is_asked_for_and_named(names: PodNames, runtime: Runtime, asked_once: None, over: Any) -> None:
    runtime.found = {**runtime.found, SIDE: Pod(UID, "web-0", "shop", "proxy")}
    lookup = names.look_up(process(SIDE))
    assert lookup is not None
    # Until then its pod is known by the other containers.
    assert names.named(process(SIDE)).pod == Pod(UID, "web-0", "shop", None)
    over(lookup)
    assert names.take_finished()[-1] is lookup
    assert names.named(process(SIDE)).pod == Pod(UID, "web-0", "shop", "proxy")


def test_who_has_half_of_the_names_gets_the_rest(names: PodNames, asked_once: None) -> None:
    half = process(WEB)
    assert names.named(Process(1, 1, cgroup=half.cgroup, pod=Pod(UID, "web-0", "shop"))).pod == Pod(
        UID, "web-0", "shop", "nginx"
    )


def test_many_that_come_while_it_is_asked_cost_one_more_question(
    names: PodNames, runtime: Runtime, asked_once: None, over: Any, wait_until: Any
) -> None:
    runtime.go.clear()
    first = names.look_up(process("0" * 64, uid="0" * 32))
    wait_until(lambda: runtime.asked == 2, 10, "the second question")
    new = {f"{number:064x}": Pod(f"{number:032x}", f"p{number}", "n", "c") for number in range(1, 500)}
    lookups = {names.look_up(process(key, uid=pod.uid)) for key, pod in new.items()}
    assert len(lookups) == 1
    assert lookups != {first}, "the answer under way may not have them"
    runtime.found = new
    runtime.go.set()
    over(lookups.pop())
    assert runtime.asked == 3
    assert {key: names.named(process(key, uid=pod.uid)).pod for key, pod in new.items()} == new


def test_who_waits_for_the_next_question_need_not_if_this_answer_has_it(runtime: Runtime, wait_until: Any) -> None:
    runtime.go.clear()
    names = PodNames(runtime)
    names.start()
    wait_until(lambda: runtime.asked, 10, "the first question")
    lookup = names.look_up(process(WEB))
    assert lookup is not None
    runtime.go.set()
    wait_until(lambda: lookup.facts is not None, 10, "the end of the lookup")
    assert names.state.lookups == 1
    names.close(10)


def test_a_container_that_the_runtime_does_not_know_is_not_asked_for_again_at_once(
    names: PodNames, runtime: Runtime, asked_once: None, over: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alien = process(SIDE, uid="0" * 32)
    over(names.look_up(alien))
    asked = runtime.asked
    assert [names.look_up(alien) for _ in range(100)] == [None] * 100
    now_s = time.monotonic()
    monkeypatch.setattr(pod_names, "time", SimpleNamespace(monotonic=lambda: now_s + 1.5))
    assert names.look_up(alien) is not None
    monkeypatch.undo()
    over(names.look_up(alien))
    assert runtime.asked <= asked + 1


def test_nobody_waits_for_a_runtime_that_does_not_answer(
    names: PodNames, runtime: Runtime, asked_once: None, over: Any, caplog: pytest.LogCaptureFixture
) -> None:
    runtime.error = SowatchError("the container runtime on '/run/cri.sock' did not answer: unavailable: gone")
    lookup = names.look_up(process(SIDE))
    assert lookup is not None
    over(lookup)
    assert names.look_up(process(SIDE)) is None
    assert names.look_up(process("d" * 64, uid="0" * 32)) is None
    state = names.state
    assert (state.failures >= 1, state.error) == (True, str(runtime.error))
    assert [one.message for one in caplog.records] == [f"pods have no names, as {runtime.error}"]
    # What was known is known.
    assert names.named(process(WEB)).pod == Pod(UID, "web-0", "shop", "nginx")


def test_once_it_answers_again_everything_is_named(
    names: PodNames, runtime: Runtime, asked_once: None, over: Any, wait_until: Any
) -> None:
    runtime.error = ValueError("what a library raises")
    over(names.look_up(process(SIDE)))
    assert names.state.error == "ValueError: what a library raises"
    runtime.error = None
    runtime.found = {**runtime.found, SIDE: Pod(UID, "web-0", "shop", "proxy")}
    wait_until(lambda: names.state.error is None, 20, "the next answer")
    assert names.named(process(SIDE)).pod == Pod(UID, "web-0", "shop", "proxy")


def test_nobody_waits_for_a_question_that_hangs(
    names: PodNames, runtime: Runtime, asked_once: None, wait_until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.go.clear()
    assert names.look_up(process(SIDE)) is not None
    wait_until(lambda: runtime.asked == 2, 10, "the question that hangs")
    assert names.look_up(process(SIDE)) is not None, "it may be answered yet"
    now_s = time.monotonic()
    monkeypatch.setattr(pod_names, "time", SimpleNamespace(monotonic=lambda: now_s + 2))
    assert names.look_up(process(SIDE)) is None
    assert names.look_up(process("d" * 64)) is None


def test_a_pod_that_is_gone_keeps_its_name(names: PodNames, runtime: Runtime, asked_once: None, over: Any) -> None:
    other = {SIDE: Pod("0" * 32, "new", "shop", "main")}
    runtime.found = other
    over(names.look_up(process(SIDE, uid="0" * 32)))
    assert names.named(process(WEB)).pod == Pod(UID, "web-0", "shop", "nginx")
    assert names.look_up(process(WEB)) is None


def test_so_many_that_are_gone_are_kept_and_no_more(
    names: PodNames, runtime: Runtime, asked_once: None, over: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pod_names, "MAX_GONE", 10)
    many = {f"{number:064x}": Pod(f"{number:032x}", f"p{number}", "n", "c") for number in range(1, 31)}
    runtime.found = many
    over(names.look_up(process(f"{1:064x}", uid=f"{1:032x}")))
    runtime.found = {SIDE: Pod("f" * 32, "new", "n", "c")}
    over(names.look_up(process(SIDE, uid="f" * 32)))
    assert names.state.known == 11


def test_containers_that_nobody_knows_take_bounded_space(
    names: PodNames, asked_once: None, over: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pod_names, "MAX_MISSING", 10)
    over({names.look_up(process(f"{number:064x}", uid=f"{number:032x}")) for number in range(1, 31)}.pop())
    over(names.look_up(process("e" * 64, uid="e" * 32)))
    assert len(names._missing) == 10


@pytest.mark.parametrize("fails", [True, False])
def test_paths_that_come_while_it_is_asked_take_bounded_space(
    names: PodNames,
    runtime: Runtime,
    asked_once: None,
    wait_until: Any,
    monkeypatch: pytest.MonkeyPatch,
    fails: bool,
) -> None:
    monkeypatch.setattr(pod_names, "MAX_MISSING", 10)
    runtime.go.clear()
    names.look_up(process("e" * 64, uid="e" * 32))
    wait_until(lambda: runtime.asked == 2, 10, "the question")
    for number in range(1, 31):
        names.look_up(process(f"{number:064x}", uid=f"{number:032x}"))
    assert len(names._asked_for) == 10
    if fails:
        runtime.error = SowatchError("gone")
        runtime.go.set()
        wait_until(lambda: names.state.error, 10, "the failure")
        for number in range(31, 61):
            names.look_up(process(f"{number:064x}", uid=f"{number:032x}"))
        assert len(names._asked_for) <= 10


def test_a_container_that_is_known_is_not_asked_for_by_a_path_with_another_pod(
    names: PodNames, runtime: Runtime, asked_once: None, over: Any
) -> None:
    other = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
    assert names.look_up(process(WEB, uid=other)) is None
    runtime.found = {SIDE: Pod("0" * 32, "new", "shop", "main")}
    over(names.look_up(process(SIDE, uid="0" * 32)))
    asked = runtime.asked
    assert names.look_up(process(WEB, uid=other)) is None, "it is gone"
    assert names.named(process(WEB, uid=other)).pod == Pod(other)
    assert runtime.asked == asked


def test_closing_ends_what_waits(names: PodNames, runtime: Runtime, asked_once: None, wait_until: Any) -> None:
    runtime.go.clear()
    lookup = names.look_up(process(SIDE))
    assert lookup is not None
    wait_until(lambda: runtime.asked == 2, 10, "the question")
    names.close(10)
    assert runtime.is_closed.is_set()
    assert lookup.facts is not None
    assert names.look_up(process("d" * 64)) is None
    names.close()


def test_a_runtime_that_did_not_answer_at_the_start_is_asked_again_though_nobody_comes(
    runtime: Runtime, wait_until: Any
) -> None:
    runtime.error = SowatchError("not yet")
    names = PodNames(runtime)
    names.start()
    wait_until(lambda: names.state.error, 10, "the failure")
    runtime.error = None
    wait_until(lambda: names.state.error is None and names.state.known, 20, "the answer")
    assert names.named(process(WEB)).pod == Pod(UID, "web-0", "shop", "nginx")
    names.close(10)
