"""Cri: names of pods from a server that speaks the Container Runtime Interface, and from what does not."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sowatch.model.errors import SowatchError, UsageError
from sowatch.model.events import Pod
from sowatch.watcher import cri
from sowatch.watcher.cri import Cri
from support.agent import short_directory
from support.cri_server import CriServer, labels

UID = "0f0e0d0c-1111-2222-3333-444455556666"
SANDBOX, WEB, ALIEN = "a" * 64, "b" * 64, "c" * 64


@pytest.fixture
def answers() -> dict[str, Any]:
    return {
        "sandboxes": {SANDBOX: labels(UID, "web-0", "shop")},
        "containers": {WEB: labels(UID, "web-0", "shop", "nginx"), ALIEN: {"app": "not the kubelet's"}},
    }


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as made:
        yield made


@pytest.fixture
def server(directory: Path, answers: dict[str, Any]) -> Iterator[str]:
    path = str(directory / "cri.sock")
    made = CriServer(path, lambda: answers)
    yield path
    made.close()


@pytest.fixture
def runtime(server: str) -> Iterator[Cri]:
    made = Cri(server)
    yield made
    made.close()


def test_a_runtime_says_the_pod_of_each_sandbox_and_container_that_the_kubelet_started(runtime: Cri) -> None:
    assert runtime.pods(10) == {
        SANDBOX: Pod(UID, "web-0", "shop", None),
        WEB: Pod(UID, "web-0", "shop", "nginx"),
    }


def test_it_is_asked_anew_each_time(runtime: Cri, answers: dict[str, Any]) -> None:
    runtime.pods(10)
    answers["containers"] = {}
    assert runtime.pods(10).keys() == {SANDBOX}


def test_a_thousand_containers_are_one_answer(runtime: Cri, answers: dict[str, Any]) -> None:
    answers["containers"] = {f"{number:064x}": labels(UID, "p" * 253, "n" * 63, "c" * 63) for number in range(1, 1001)}
    assert len(runtime.pods(30)) == 1001


def test_names_that_are_longer_than_kubernetes_has_them_are_cut(runtime: Cri, answers: dict[str, Any]) -> None:
    answers["containers"] = {WEB: labels(UID, "p" * 10_000, "n", "c")}
    assert runtime.pods(10)[WEB].name == "p" * 253


def test_a_runtime_that_does_not_answer_is_given_up(runtime: Cri, answers: dict[str, Any]) -> None:
    answers["hangs"] = True
    with pytest.raises(SowatchError, match="did not answer: deadline_exceeded"):
        runtime.pods(0.2)


def test_a_runtime_that_was_started_again_is_found_by_the_root_of_the_host(
    directory: Path, answers: dict[str, Any]
) -> None:
    dead, root = directory / "cri.sock", directory / "root"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(dead))
    alive = Path(f"{root}{dead}")
    alive.parent.mkdir(parents=True)
    server = CriServer(str(alive), lambda: answers)
    runtime = Cri(str(dead), str(root))
    with pytest.raises(SowatchError, match=f"{dead}' did not answer: unavailable"):
        runtime.pods(10)
    assert runtime.pods(10).keys() == {SANDBOX, WEB}
    runtime.close()
    server.close()


def test_what_it_refuses_is_said(runtime: Cri, answers: dict[str, Any]) -> None:
    answers["refuses"] = True
    with pytest.raises(SowatchError, match="unknown: the runtime is not ready"):
        runtime.pods(10)


def test_a_socket_that_is_not_there_or_takes_no_connection_is_an_answer(directory: Path) -> None:
    for make in (lambda _: None, lambda path: path.touch()):
        path = directory / f"{make.__code__.co_firstlineno}.sock"
        make(path)
        with pytest.raises(SowatchError, match=r"\.sock' did not answer: "):
            Cri(str(path)).pods(2)


@pytest.mark.parametrize("speaks", [False, True])
def test_a_server_that_says_nothing_or_nonsense_is_given_up(directory: Path, speaks: bool) -> None:
    path, done = str(directory / "s"), threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            with listener.accept()[0] as connection:
                if speaks:
                    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                done.wait(30)

        thread = threading.Thread(target=serve)
        thread.start()
        runtime = Cri(path)
        begun_s = time.monotonic()
        with pytest.raises(SowatchError, match="did not answer"):
            runtime.pods(0.5)
        assert time.monotonic() - begun_s < 30
        runtime.close()
        done.set()
        thread.join()


def test_a_question_under_way_ends_when_it_is_closed(runtime: Cri, answers: dict[str, Any]) -> None:
    answers["hangs"] = True
    failure: list[BaseException] = []

    def ask() -> None:
        try:
            runtime.pods(60)
        except BaseException as error:  # noqa: BLE001
            failure.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while runtime._channel is None:
        threading.Event().wait(0.01)
    runtime.close()
    thread.join(20)
    assert not thread.is_alive()
    assert [type(one) for one in failure] == [SowatchError]


def test_without_the_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cri, "_is_installed", lambda module: module != "grpc")
    with pytest.raises(UsageError, match=r"pip install 'sowatch\[kubernetes\]'"):
        Cri("/x")
