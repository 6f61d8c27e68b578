"""What the agent answers over TCP, where every local user may ask: nothing that its load events do not say."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sowatch.web.bounds import MAX_CONNECTIONS_OF_ONE
from sowatch.web.limits import COSTLY_BURST, COSTLY_S, STREAMS
from support.agent import Agent, Answer, NewAgent, ask, short_directory
from support.programs import Mapper
from support.receivers import free_port

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="BPF programs need root")

RULES = """
[[rules]]
name = "mine"
pattern = '/sow-[^/]*/lib[^/]*\\.so$'
"""
NOBODY = 65534
#: Gives up its rights; the interpreter may lie where only root may look, so what is imported later is imported before.
AS_NOBODY = f"""
import encodings.idna, http.client, json, os, socket, sys, time
os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})
port = int(sys.argv[1])
"""
#: Asks for each path on its command line, on one connection each; prints a list of status and body.
ASKER = """
found = []
for path in sys.argv[2:]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path)
    answer = connection.getresponse()
    found.append([answer.status, answer.read().decode()])
    connection.close()
print(json.dumps(found))
"""
#: Asks again and again; prints how often it got an answer, how often it was refused, and the seconds that it took.
LOOP = """
begun, statuses = time.monotonic(), []
connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
for _ in range(150):
    connection.request("GET", sys.argv[2])
    answer = connection.getresponse()
    answer.read()
    statuses.append(answer.status)
print(json.dumps([statuses.count(200), statuses.count(429), time.monotonic() - begun]))
"""
#: Opens connections and keeps them; prints how many of them answer, and waits.
HOLDER = """
held, answers = [socket.create_connection(("127.0.0.1", port)) for _ in range(300)], 0
for one in held:
    try:
        one.sendall(b"GET /healthz HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
        answers += one.recv(100).startswith(b"HTTP/1.1 200")
    except OSError:
        pass
print(answers, flush=True)
sys.stdin.read()
"""
#: Follows streams; prints the status of each, and waits.
FOLLOWER = """
held, statuses = [], []
for _ in range(70):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/events?snapshot=0")
    held.append(connection)
    statuses.append(connection.getresponse().status)
print(json.dumps(statuses), flush=True)
sys.stdin.read()
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
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY + ASKER, str(port), *paths], stdout=subprocess.PIPE, check=True, cwd="/"
    )
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


# ---- limits of one client ----------------------------------------------------------------------------


def nobody(spawn: Any, port: int, code: str, *words: str) -> Any:
    """A program of nobody's; gives what it prints."""
    process = spawn([sys.executable, "-c", AS_NOBODY + code, str(port), *words], stdin=-1, stdout=-1, cwd="/")
    return json.loads(process.stdout.readline())


@pytest.mark.parametrize("path", ["/explain?pid=1", "/inventory", "/audit", "/debug/traced_programs"])
def test_one_users_loop_is_answered_now_and_then_and_takes_nothing_from_the_others(
    agent: Agent, port: int, spawn: Any, path: str
) -> None:
    answered, refused, seconds = nobody(spawn, port, LOOP, path)
    assert answered + refused == 150
    assert answered <= COSTLY_BURST + COSTLY_S * seconds + 1
    assert over_tcp(port, path).status == 200
    assert agent.get(path).status == 200


def test_a_refusal_says_when_to_ask_again(agent: Agent, port: int) -> None:
    answers = [over_tcp(port, "/explain?pid=1") for _ in range(int(COSTLY_BURST) + 20)]
    refused = next(one for one in answers if one.status != 200)
    assert (refused.status, refused.headers["retry-after"]) == (429, "1")
    assert "you ask too often" in refused.json["error"]
    assert over_tcp(port, "/healthz").status == 200


def test_one_user_may_not_hold_all_streams(agent: Agent, port: int, spawn: Any) -> None:
    assert nobody(spawn, port, FOLLOWER) == [200] * STREAMS + [429] * (70 - STREAMS)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/events?snapshot=0")
    assert connection.getresponse().status == 200
    connection.close()


def test_one_user_may_not_hold_all_connections(agent: Agent, port: int, spawn: Any) -> None:
    assert nobody(spawn, port, HOLDER) <= MAX_CONNECTIONS_OF_ONE
    assert over_tcp(port, "/healthz").status == 200


@pytest.mark.parametrize("place", ["tcp", "socket"])
@pytest.mark.parametrize(
    "head",
    [
        "POST /healthz HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked",
        "POST /healthz HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 0",
        "GET /healthz HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 44",
        "POST /healthz HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6",
        "POST /healthz HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        "POST /healthz HTTP/1.0\r\nTransfer-Encoding: chunked",
    ],
    ids=range(6),
)
def test_a_request_whose_length_is_said_in_two_ways_is_refused_and_nothing_after_it_is_read(
    agent: Agent, port: int, place: str, head: str
) -> None:
    address = (str(agent.socket), socket.AF_UNIX) if place == "socket" else (("127.0.0.1", port), socket.AF_INET)
    with socket.socket(address[1]) as client:
        client.settimeout(20)
        client.connect(address[0])
        smuggled = "GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        client.sendall(f"{head}\r\nHost: localhost\r\n\r\n0\r\n\r\n{smuggled}".encode())
        reported = b"".join(iter(lambda: client.recv(1 << 16), b""))
    assert reported.startswith(b"HTTP/1.1 400 ")
    assert reported.count(b"HTTP/1.1 ") == 1


def test_out_of_descriptors_one_line_says_so(
    new_agent: NewAgent, wait_until: Any, closing: contextlib.ExitStack
) -> None:
    agent = new_agent(RULES).start()
    before = closing.enter_context(contextlib.closing(agent.connect()))
    before.request("GET", "/healthz")
    before.getresponse().read()
    limit = len(os.listdir(f"/proc/{agent.pid}/fd")) + 3
    hard = resource.prlimit(agent.pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(agent.pid, resource.RLIMIT_NOFILE, (limit, hard))
    for _ in range(20):
        client = closing.enter_context(socket.socket(socket.AF_UNIX))
        client.connect(str(agent.socket))
    wait_until(lambda: "cannot take connections" in agent.log, what="the line")
    before.request("GET", "/healthz")
    assert before.getresponse().read() == b"ok\n"
    assert agent.log.count("cannot take connections: Too many open files") == 1
    assert "socket.accept()" not in agent.log
    closing.close()
    resource.prlimit(agent.pid, resource.RLIMIT_NOFILE, (limit + 100, hard))
    wait_until(agent.is_ready, what="it answers again")
