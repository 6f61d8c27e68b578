"""What the agent answers over TCP, where every local user may ask: nothing that its load events do not say."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.agent import Agent, Answer, ask, short_directory
from support.programs import Mapper
from support.receivers import free_port

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="BPF programs need root")

RULES = """
[[rules]]
name = "mine"
pattern = '/sow-[^/]*/lib[^/]*\\.so$'
"""
NOBODY = 65534
#: Gives up its rights (the interpreter may lie where only root may look), asks for each path on its command line,
#: on one connection each; prints a list of status and body.
ASKER = f"""
import encodings.idna, http.client, json, os, sys
os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})
found = []
for path in sys.argv[2:]:
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=20)
    connection.request("GET", path)
    answer = connection.getresponse()
    found.append([answer.status, answer.read().decode()])
    connection.close()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def long_place() -> Iterator[Path]:
    with short_directory() as made:
        yield made


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def agent(long_place: Path, port: int, deadline: Any) -> Iterator[Agent]:
    """An agent for all tests that leave it as it is."""
    options = ["--listen", f"127.0.0.1:{port}"]
    running = Agent(subprocess.Popen, deadline.wait_until, long_place, RULES, options, timeout_s=deadline(20)).start()
    yield running
    assert running.stop() == 0, running.log


@pytest.fixture
def library(make_library: Any, long_place: Path) -> Iterator[Path]:
    made = long_place / f"libours-{os.urandom(4).hex()}.so"
    shutil.copyfile(make_library(), made)
    yield made
    made.unlink()


def as_nobody(port: int, *paths: str) -> list[tuple[int, str]]:
    """Status and body of each question, asked by a user who owns nothing."""
    done = subprocess.run([sys.executable, "-c", ASKER, str(port), *paths], stdout=subprocess.PIPE, check=True, cwd="/")
    return [(status, body) for status, body in json.loads(done.stdout)]


def over_tcp(port: int, path: str, **headers: str) -> Answer:
    return ask(http.client.HTTPConnection("127.0.0.1", port, timeout=20), "GET", path, None, headers)


def has(agent: Agent, path: Path, pid: int) -> bool:
    found = agent.get("/inventory").json
    pids = [process["pid"] for process in found["processes"]]
    return any(one["path"] == str(path) and pid in [pids[at] for at in one["processes"]] for one in found["libraries"])


# ---- who may ask what ------------------------------------------------------------------------------


def test_nobody_learns_over_tcp_what_is_in_a_directory_that_is_closed_to_them(
    agent: Agent, port: int, long_place: Path, make_library: Any, mapper: Mapper
) -> None:
    closed = long_place / "closed"
    closed.mkdir(mode=0o700)
    (closed / "file").write_bytes(b"secret")
    shutil.copyfile(make_library(), closed / "unpublished")
    (closed / "link").symlink_to("/etc/shadow")
    (closed / "directory").mkdir()
    os.mkfifo(closed / "fifo")
    mapper.map(closed / "unpublished")
    with socket.socket(socket.AF_UNIX) as listening, (closed / "file").open("rb") as open_file:
        listening.bind(str(closed / "socket"))
        there = [closed / name for name in ("file", "unpublished", "link", "directory", "fifo", "socket", "link/..")]
        there += [
            Path(f"/proc/{os.getpid()}/fd/{open_file.fileno()}"),
            Path(f"/proc/{mapper.pid}/exe"),
            Path("/dev/tty"),
        ]
        missing = closed / "nothing-by-this-name"
        answers = as_nobody(port, *(f"/explain?path={path}" for path in (missing, *there)))
    status, body = answers[0]
    assert status == 404
    for path, answer in zip(there, answers[1:], strict=True):
        assert answer == (404, body.replace(str(missing), str(path)))
    # The same question on the socket, which only root may use, is answered.
    assert agent.get(f"/explain?path={closed / 'unpublished'}").json["file"]["elf"] == "elf"


def test_over_tcp_a_process_is_explained_by_what_is_published_of_it_alone(
    agent: Agent, port: int, mapper: Mapper, library: Path, make_library: Any, long_place: Path, wait_until: Any
) -> None:
    unwanted = long_place / "unwanted.bin"
    shutil.copyfile(make_library(), unwanted)
    mapper.map(library)
    mapper.map(unwanted)
    wait_until(lambda: has(agent, library, mapper.pid))
    ((status, body),) = as_nobody(port, f"/explain?pid={mapper.pid}")
    found = json.loads(body)
    assert (status, found["target"], found["process"]["pid"]) == (200, "process", mapper.pid)
    assert [one["library"]["path"] for one in found["mappings"]] == [str(library)]
    (mapping,) = found["mappings"]
    assert (mapping["seen"]["rule"], mapping["file"]["elf"], mapping["file"]["tries"]) == ("mine", "skipped", [])
    assert "published_only" in found["notes"]
    assert str(unwanted) not in body
    assert str(unwanted) in agent.get(f"/explain?pid={mapper.pid}").text


def test_over_tcp_a_published_file_is_explained_by_its_path_and_by_its_build_id(
    agent: Agent, port: int, mapper: Mapper, library: Path, make_library: Any, wait_until: Any
) -> None:
    shutil.copyfile(make_library("libmine.so", (f"mine_{os.urandom(4).hex()}",)), library)
    mapper.map(library)
    wait_until(lambda: has(agent, library, mapper.pid))
    (build_id,) = {one["build_id"] for one in agent.get("/inventory").json["libraries"] if one["path"] == str(library)}
    answers = as_nobody(port, f"/explain?path={library}", f"/explain?build_id={build_id.upper()}")
    for status, body in answers:
        found = json.loads(body)
        assert (status, found["path"], found["rule"]) == (200, str(library), "mine")
        assert [(one["process"]["pid"], one["relation"]) for one in found["mapped"]] == [(mapper.pid, "same")]
        assert [one["inode"] for one in found["ids"]] == [library.stat().st_ino]
    assert agent.get(f"/explain?build_id={build_id}").json["path"] == str(library)


@pytest.mark.parametrize(
    ("query", "status", "said"),
    [
        ("build_id=", 400, "the build id is none"),
        ("build_id=xyz", 400, "the build id is none"),
        ("build_id=abcd", 404, "no process has 'build id abcd' mapped"),
        ("build_id=ab&pid=1", 400, "say what to explain"),
        ("pid=4194303", 404, "no process 4194303"),
        ("path=relative", 400, "not absolute"),
        ("path=/nothing/here%ff%0a", 404, "no process has '/nothing/here"),
    ],
)
def test_a_wrong_question_over_tcp_gets_a_reason(agent: Agent, port: int, query: str, status: int, said: str) -> None:
    answer = over_tcp(port, f"/explain?{query}")
    assert answer.status == status
    assert said in answer.json["error"]
