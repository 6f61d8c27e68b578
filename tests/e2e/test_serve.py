"""The agent from outside: every route and status, its sockets, and clients that mean no good."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.agent import Agent, Answer, NewAgent, ask, short_directory
from support.programs import Mapper
from support.receivers import free_port

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="BPF programs need root")

RULES = """
stale_interval_s = 1

[[rules]]
name = "mine"
pattern = '/sow-[^/]*/lib[^/]*\\.so$'
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


def over_tcp(port: int, method: str, path: str, **headers: str) -> Answer:
    return ask(http.client.HTTPConnection("127.0.0.1", port, timeout=20), method, path, None, headers)


def has(agent: Agent, path: Path, pid: int) -> bool:
    found = agent.get("/inventory").json
    pids = [process["pid"] for process in found["processes"]]
    return any(one["path"] == str(path) and pid in [pids[at] for at in one["processes"]] for one in found["libraries"])


# ---- routes --------------------------------------------------------------------------------------


def test_health_readiness_and_metrics_are_answered(agent: Agent) -> None:
    assert (agent.get("/healthz").status, agent.get("/healthz").text) == (200, "ok\n")
    ready = agent.get("/readyz")
    assert ready.status == 200
    assert (ready.json["ready"], ready.json["problems"], ready.json["rules"]) == (True, [], ["mine"])
    assert (ready.json["strategy"], ready.json["guarantee"]) == ("core", "exact")
    assert ready.json["config"]["valid"] is True
    metrics = agent.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert 'sowatch_strategy_info{guarantee="exact"' in metrics.text
    assert agent.get("/metrics", Accept="application/openmetrics-text").text.endswith("# EOF\n")


def test_promtool_finds_no_fault_in_the_metrics(agent: Agent) -> None:
    found = subprocess.run(
        ["promtool", "check", "metrics"], input=agent.get("/metrics").body, capture_output=True, check=False
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, b"", b"")


def test_the_inventory_says_who_has_what(agent: Agent, mapper: Mapper, library: Path, wait_until: Any) -> None:
    mapper.map(library)
    wait_until(lambda: has(agent, library, mapper.pid))
    found = agent.get("/inventory").json
    (row,) = [one for one in found["libraries"] if one["path"] == str(library)]
    assert (row["rule"], row["kind"], row["inode"]) == ("mine", "library", library.stat().st_ino)
    (place,) = row["processes"]
    assert found["processes"][place]["pid"] == mapper.pid
    assert found["processes"][place]["libraries"] == 1


def test_the_stream_begins_with_what_is_mapped_and_goes_on_live(
    agent: Agent, mapper: Mapper, library: Path, wait_until: Any, schema: Any
) -> None:
    at = mapper.map(library)
    wait_until(lambda: has(agent, library, mapper.pid))
    stream = agent.events()
    begin = stream.until(lambda event: event["event"] == "ready")
    mapper.unmap(*at)
    mapper.map(library)
    live = stream.until(lambda event: event["event"] == "load" and event["library"]["path"] == str(library))
    stream.close()
    for event in (*begin, *live):
        schema(event)
    assert [event["seq"] for event in (*begin, *live)] == list(range(len(begin) + len(live)))
    causes = [one["cause"] for one in begin if one["event"] == "load" and one["library"]["path"] == str(library)]
    assert causes == ["snapshot"]
    assert [one["event"] for one in live if one["library"]["path"] == str(library)] == [
        "unload",
        "deactivate",
        "activate",
        "load",
    ]


def test_a_replaced_file_is_in_the_stream_the_inventory_and_the_metrics_until_its_process_ends(
    agent: Agent, mapper: Mapper, library: Path, wait_until: Any, schema: Any
) -> None:
    def row() -> dict[str, Any]:
        return next(one for one in agent.get("/inventory").json["libraries"] if one["path"] == str(library))

    mapper.map(library)
    wait_until(lambda: has(agent, library, mapper.pid))
    assert (row()["stale"], row()["stale_processes"]) == (None, [])
    stream = agent.events("?events=stale,renewed&rule=mine&snapshot=0")
    shutil.copyfile(library, library.with_name("new"))
    library.with_name("new").rename(library)
    *_, stale = stream.until(lambda event: event["event"] == "stale")
    assert (stale["staleness"], stale["rule"], stale["process"]["pid"]) == ("replaced", "mine", mapper.pid)
    assert stale["library"]["path"] == str(library)
    assert (row()["stale"], row()["stale_processes"]) == ("replaced", row()["processes"])
    inventory = agent.get("/inventory").json
    (place,) = row()["stale_processes"]
    assert inventory["processes"][place]["stale_libraries"] == 1
    assert inventory["staleness"]["complete"] is True
    assert inventory["staleness"]["compared"] is not None
    assert stale_processes(agent) >= 1
    assert "overflow" not in agent.get("/metrics").text
    mapper.close()
    *_, renewed = stream.until(lambda event: event["event"] == "renewed" and event["process"] == stale["process"])
    assert (renewed["cause"], renewed["library"]["path"]) == ("unmapped", str(library))
    stream.close()
    schema(stale)
    schema(renewed)


def stale_processes(agent: Agent) -> float:
    rows = [line for line in agent.get("/metrics").text.splitlines() if line.startswith("sowatch_stale_processes{")]
    return sum(float(line.rpartition(" ")[2]) for line in rows)


def test_a_client_that_comes_back_goes_on_after_the_last_event_it_had(
    agent: Agent, mapper: Mapper, library: Path
) -> None:
    def is_of(kind: str) -> Callable[[dict[str, Any]], bool]:
        return lambda event: event["event"] == kind and event["library"]["path"] == str(library)

    stream = agent.events("?snapshot=0&events=load,unload&rule=mine")
    assert [event["event"] for event in stream.until(lambda event: event["event"] == "ready")] == ["ready"]
    at = mapper.map(library)
    stream.until(is_of("load"))
    last = stream.last_id
    stream.close()
    mapper.unmap(*at)
    mapper.map(library)
    again = agent.events("?events=load,unload", Last_Event_ID=last)
    found = again.until(is_of("load"))
    again.close()
    assert [event["event"] for event in found if event["library"]["path"] == str(library)] == ["unload", "load"]


@pytest.mark.parametrize("last", ["", "nonsense", "0-5", "-1", "x-99999999999999999999", "é-1"])
def test_a_client_with_an_id_of_another_agent_begins_anew(agent: Agent, last: str) -> None:
    stream = agent.events(Last_Event_ID=last)
    assert stream.until(lambda event: event["event"] == "ready")[-1]["strategy"] == "core"
    stream.close()


def test_a_process_and_a_file_are_explained(agent: Agent, mapper: Mapper, library: Path, wait_until: Any) -> None:
    mapper.map(library)
    wait_until(lambda: has(agent, library, mapper.pid))
    process = agent.get(f"/explain?pid={mapper.pid}").json
    assert (process["target"], process["process"]["pid"]) == ("process", mapper.pid)
    assert str(library) in [one["library"]["path"] for one in process["mappings"]]
    path = agent.get(f"/explain?path={library}").json
    assert [one["process"]["pid"] for one in path["mapped"]] == [mapper.pid]


def test_an_audit_finds_no_difference_and_is_counted(agent: Agent) -> None:
    found = agent.get("/audit").json
    assert found["differences"] == []
    assert found["processes"] > 1
    counts = [one for one in agent.get("/debug/telemetry").json if one["Name"] == "audit.runs"]
    assert counts[0]["Value"] >= 1


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/explain", 400, "say what to explain"),
        ("/explain?pid=1&path=/x", 400, "say what to explain"),
        ("/explain?pid=abc", 400, "is not a process id"),
        ("/explain?pid=-1", 400, "is not a process id"),
        ("/explain?pid=4194303", 404, "no process 4194303"),
        ("/explain?path=relative", 400, "not absolute"),
        ("/explain?path=%00", 400, "not absolute"),
        ("/explain?path=/nothing/here%ff%0a", 404, "/nothing/here"),
        ("/events?events=nonsense", 400, "unknown event 'nonsense'"),
        ("/events?snapshot=maybe", 400, "neither 0 nor 1"),
        ("/events?rule=nosuch", 400, "there is no rule 'nosuch'. Use one of: mine."),
    ],
)
def test_a_wrong_question_gets_a_reason(agent: Agent, path: str, status: int, said: str) -> None:
    answer = agent.get(path)
    assert answer.status == status
    assert said in answer.json["error"]


@pytest.mark.parametrize("path", ["/nothing", "/debug", "/debug/", "//", "/%2e%2e/etc/passwd", "/inventory/x"])
def test_what_is_not_there_is_404(agent: Agent, path: str) -> None:
    assert agent.get(path).status == 404


@pytest.mark.parametrize("path", ["/inventory", "/events", "/metrics", "/readyz", "/debug/traced_programs"])
def test_what_is_only_read_takes_no_orders(agent: Agent, path: str) -> None:
    for method in ("POST", "PUT", "DELETE"):
        assert agent.ask(method, path).status == 405
    assert agent.ask("HEAD", path).status == 200


# ---- the debugger --------------------------------------------------------------------------------


def test_traced_files_are_listed_with_their_processes(
    agent: Agent, mapper: Mapper, library: Path, wait_until: Any
) -> None:
    mapper.map(library)

    def mine() -> list[dict[str, Any]]:
        return [one for one in agent.get("/debug/traced_programs").json or [] if one["FilePath"] == str(library)]

    (one,) = wait_until(mine)
    assert (one["ProgramType"], one["PIDs"]) == ("mine", [mapper.pid])


def test_a_traced_file_whose_name_is_not_utf_8_is_listed_with_its_bytes(
    agent: Agent, mapper: Mapper, library: Path, long_place: Path, wait_until: Any
) -> None:
    hostile = long_place / os.fsdecode(b"libbad-\xff\xed\xa0\x80\x1b[2J.so")
    shutil.copyfile(library, hostile)
    mapper.map(hostile)

    def mine() -> list[dict[str, Any]]:
        return [one for one in agent.get("/debug/traced_programs").json or [] if one["FilePath"] == str(hostile)]

    assert wait_until(mine)
    assert agent.get("/debug/traced_programs").text.isascii()


def test_nothing_is_blocked_where_no_rule_attaches_anything(agent: Agent) -> None:
    assert agent.get("/debug/blocked_processes").json is None
    assert agent.get("/debug/clear_blocked").json == {"cleared": 0}
    assert agent.ask("HEAD", "/debug/clear_blocked").status == 405


def test_a_process_is_detached_and_attached_by_hand(
    agent: Agent, mapper: Mapper, library: Path, wait_until: Any
) -> None:
    mapper.map(library)
    wait_until(lambda: has(agent, library, mapper.pid))
    order = {"pid": mapper.pid, "type": "mine"}
    gone = agent.post("/debug/detach-pid", order)
    assert (gone.status, gone.text) == (200, f"mine successfully detached PID {mapper.pid}\n")
    assert not has(agent, library, mapper.pid)
    again = agent.post("/debug/detach-pid", order)
    assert (again.status, again.text.partition(".")[0]) == (
        500,
        f"Error detaching PID: pid {mapper.pid} is not registered",
    )
    back = agent.post("/debug/attach-pid", order)
    assert (back.status, back.text) == (200, f"mine successfully attached PID {mapper.pid}\n")
    assert has(agent, library, mapper.pid)


@pytest.mark.parametrize("route", ["attach-pid", "detach-pid"])
@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 400, "Error decoding request body: "),
        (b"{", 400, "Error decoding request body: "),
        (b"[]", 400, "it is no object"),
        (b"\xff\xfe", 400, "Error decoding request body: "),
        (b"[" * 10_000, 400, "it is nested too deeply"),
        (b'{"pid":"1","type":"mine"}', 400, '"pid" is no process id'),
        (b'{"pid":true,"type":"mine"}', 400, '"pid" is no process id'),
        (b'{"pid":4294967296,"type":"mine"}', 400, '"pid" is no process id'),
        (b'{"pid":1}', 400, '"type" is no name'),
        (b'{"pid":1,"type":"other"}', 400, 'Module "other" is not enabled'),
        (b'{"pid":1,"type":"\\udcff\\u202e"}', 400, "is not enabled"),
        (b'{"pid":4194303,"type":"mine"}', 500, "taching PID: "),
        (b'{"pid":1,"type":"' + b"x" * 20_000 + b'"}', 413, "it is too large"),
    ],
    ids=range(13),
)
def test_a_wrong_order_gets_the_status_that_the_origin_gives(
    agent: Agent, route: str, body: bytes, status: int, said: str
) -> None:
    answer = agent.post(f"/debug/{route}", body)
    assert answer.status == status
    assert said in answer.text


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_orders_are_only_taken_by_post(agent: Agent, method: str) -> None:
    answer = agent.ask(method, "/debug/attach-pid")
    assert (answer.status, answer.headers["allow"]) == (405, "POST")
    assert answer.text == ("" if method == "HEAD" else "Only POST requests are allowed\n")


# ---- the client ----------------------------------------------------------------------------------


def debug(agent: Agent, *words: str) -> subprocess.CompletedProcess[str]:
    command = [os.fspath(Path(os.sys.executable).parent / "sowatch"), "debug", *words, "--socket", str(agent.socket)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_client_shows_and_orders(agent: Agent, mapper: Mapper, library: Path, wait_until: Any) -> None:
    mapper.map(library)
    wait_until(lambda: has(agent, library, mapper.pid))
    traced = debug(agent, "traced").stdout.splitlines()
    assert traced[0].split() == ["RULE", "STATE", "PROCESSES", "PIDS", "PATH"]
    assert ["mine", "held", "1", str(mapper.pid), str(library)] in [line.split() for line in traced]
    assert debug(agent, "detach", str(mapper.pid)).stdout == f"mine successfully detached PID {mapper.pid}\n"
    refused = debug(agent, "detach", str(mapper.pid))
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "is not registered" in refused.stderr
    assert debug(agent, "attach", str(mapper.pid), "--rule", "mine").returncode == 0
    assert str(library) in debug(agent, "inventory").stdout
    assert debug(agent, "explain", str(mapper.pid)).stdout.startswith(f"process    {mapper.pid} mapper, ")
    assert debug(agent, "explain", str(library), "--json").stdout.startswith('{"schema":1,"event":"explain"')
    assert debug(agent, "audit").stdout.startswith("0 differences; ")
    assert debug(agent, "blocked").stdout == "RULE  PATH  REASON\n"
    assert debug(agent, "clear-blocked").stdout == "0 files are not blocked any more\n"
    assert (
        '{"Name":"watcher.loads' in debug(agent, "telemetry").stdout or '"Name":"' in debug(agent, "telemetry").stdout
    )


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "say what"),
        (["nonsense"], 2, "unknown action 'nonsense'"),
        (["attach"], 2, "takes one PID"),
        (["attach", "x"], 2, "is not a process id"),
        (["traced", "1"], 2, "takes nothing else"),
        (["traced", "--rule", "x"], 2, "--rule says nothing"),
        (["explain", "4194303"], 1, "no process 4194303"),
        (["attach", "1", "--rule", "other"], 1, "the agent has no rule 'other'. Use one of: mine."),
    ],
)
def test_the_client_says_what_is_wrong(agent: Agent, words: list[str], code: int, said: str) -> None:
    done = debug(agent, *words)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_client_says_that_no_agent_answers(agent: Agent, tmp_path: Path) -> None:
    agent = Agent(None, None, tmp_path)
    done = debug(agent, "traced")
    assert done.returncode == 1
    assert "no agent answers" in done.stderr


# ---- the sockets ---------------------------------------------------------------------------------


def test_the_socket_is_its_owners_alone(agent: Agent) -> None:
    found = agent.socket.stat()
    assert stat.filemode(found.st_mode) == "srw-------"
    assert (found.st_uid, found.st_gid) == (0, os.getgid())


@pytest.mark.fresh
def test_the_socket_is_given_to_the_owner_and_group_of_the_configuration(new_agent: NewAgent) -> None:
    agent = new_agent('socket_owner = "nobody"\nsocket_group = "nogroup"\n').start()
    found = agent.socket.stat()
    assert (stat.filemode(found.st_mode), agent.socket.owner(), agent.socket.group()) == (
        "srw-rw----",
        "nobody",
        "nogroup",
    )
    assert found.st_uid == 65534
    assert agent.stop() == 0
    assert not agent.socket.exists()


def test_tcp_answers_what_only_reads_and_nothing_else(agent: Agent, port: int) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/inventory", "/audit", "/debug/traced_programs"):
        assert over_tcp(port, "GET", path).status == 200
    for path in ("/debug/clear_blocked", "/debug/attach-pid", "/debug/detach-pid"):
        assert over_tcp(port, "POST", path).status == 404
        assert over_tcp(port, "GET", path).status == 404


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:80", 200),
        ("127.0.0.1", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example:80", 421),
        ("[::1]", 421),
        ("", 421),
    ],
)
def test_tcp_answers_only_to_names_of_this_host(agent: Agent, port: int, host: str, status: int) -> None:
    answer = over_tcp(port, "GET", "/inventory", Host=host)
    assert answer.status == status
    assert "access-control-allow-origin" not in answer.headers


def refused(agent: Agent) -> str:
    """What an agent that cannot start says."""
    agent.start(wait=False)
    assert agent.process is not None
    assert agent.process.wait(agent.timeout_s) in (1, 2), agent.log
    return agent.log.splitlines()[-1]


def test_a_path_with_a_live_agent_is_refused_and_that_one_goes_on(
    agent: Agent, spawn: Any, wait_until: Any, place: Path
) -> None:
    second = Agent(spawn, wait_until, place, options=["--socket", str(agent.socket)])
    assert "a server is listening on" in refused(second)
    assert agent.get("/healthz").status == 200


def test_a_path_with_another_server_is_refused(new_agent: NewAgent) -> None:
    agent = new_agent()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(os.fspath(agent.socket))
        other.listen(1)
        assert "a server is listening on" in refused(agent)


def test_a_path_that_is_no_socket_is_left_as_it_is(new_agent: NewAgent) -> None:
    agent = new_agent()
    agent.socket.write_text("precious", encoding="utf-8")
    assert "is no socket" in refused(agent)
    assert agent.socket.read_text(encoding="utf-8") == "precious"


def test_a_port_that_is_taken_is_refused(new_agent: NewAgent) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        agent = new_agent(options=["--listen", f"127.0.0.1:{other.getsockname()[1]}"])
        assert "Address already in use" in refused(agent)
        assert not agent.socket.exists()


@pytest.mark.parametrize(
    "listen", ["0.0.0.0:80", "192.0.2.1:80", "example.org:80", "127.0.0.1", "127.0.0.1:99999", ":1"]
)
def test_an_address_beyond_this_host_is_refused(new_agent: NewAgent, listen: str) -> None:
    assert "is no port of the loopback interface" in refused(new_agent(options=["--listen", listen]))


def test_an_agent_that_was_killed_leaves_nothing_in_the_way_of_the_next(new_agent: NewAgent) -> None:
    agent = new_agent().start()
    assert agent.stop(signal.SIGKILL) == -signal.SIGKILL
    assert agent.socket.exists()
    agent.start()
    assert agent.stop() == 0


# ---- clients that mean no good -------------------------------------------------------------------


@contextlib.contextmanager
def raw(agent: Agent, timeout_s: float = 30) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout_s)
        connection.connect(os.fspath(agent.socket))
        yield connection


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\r\n\r\n\r\n",
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 200_000 + b"\r\n",
        b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /debug/attach-pid HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /debug/attach-pid HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
        b"POST /debug/attach-pid HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=range(8),
)
def test_a_malformed_request_is_refused_and_the_connection_closed(agent: Agent, request_bytes: bytes) -> None:
    with raw(agent) as connection:
        answer = b""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(request_bytes)
            while more := connection.recv(4096):
                answer += more
    assert not answer or answer.split()[1] in (b"400", b"431")
    assert agent.get("/healthz").status == 200


def test_a_body_without_end_is_not_kept(agent: Agent) -> None:
    head = b"POST /debug/attach-pid HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000000\r\n\r\n"
    before = rss_bytes(agent)
    with raw(agent) as connection:
        connection.sendall(head)
        sent = 0
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while sent < 64 << 20:
                sent += connection.send(bytes(1 << 16))
    assert rss_bytes(agent) - before < 16 << 20
    assert agent.get("/healthz").status == 200


def rss_bytes(agent: Agent) -> int:
    status = Path(f"/proc/{agent.pid}/status").read_text(encoding="ascii")
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


def test_clients_that_send_their_head_byte_by_byte_are_cut_off_and_delay_nobody(agent: Agent) -> None:
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(raw(agent)) for _ in range(200)]
        for connection in slow:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHo")
        assert agent.get("/healthz").status == 200
        # Cut off after ten seconds, whatever they send meanwhile.
        for connection in slow:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(b"s")
        for connection in slow:
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""
    assert agent.get("/healthz").status == 200


def test_a_body_that_does_not_come_is_not_waited_for(agent: Agent) -> None:
    with raw(agent) as connection:
        connection.sendall(b"POST /debug/attach-pid HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n{")
        assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_more_connections_than_there_may_be_are_refused_until_some_have_gone(agent: Agent, wait_until: Any) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(1100):
            stack.enter_context(raw(agent))
        wait_until(lambda: agent.get("/healthz").status == 503)
    wait_until(lambda: agent.get("/healthz").status == 200)


def test_there_are_only_so_many_streams(agent: Agent, wait_until: Any) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(256):
            stack.callback(agent.events("?snapshot=0").close)
        assert agent.get("/events").status == 503
    wait_until(lambda: agent.ask("HEAD", "/events").status == 200)


def test_the_agent_ends_with_the_last_word_to_every_stream(new_agent: NewAgent) -> None:
    agent = new_agent(RULES).start()
    stream = agent.events()
    stream.until(lambda event: event["event"] == "ready")
    assert agent.stop() == 0
    assert [event["event"] for event in stream][-1] == "stopped"
    stream.close()
    log = [dict(word.partition("=")[::2] for word in line.split()) for line in agent.log.splitlines()]
    assert [line["msg"] for line in log][-2:] == ["stopping", "stopped"]
