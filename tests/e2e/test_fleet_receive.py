"""`sowatch fleet receive` as agents, collectors and others meet it: answers, bounds, tokens, one process a store."""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import (
    ExportLogsServiceRequest,
    ExportLogsServiceResponse,
)

from sowatch.fleet.receive import MAX_BODY_BYTES
from sowatch.model.errors import SowatchError
from support.agent import SOWATCH
from support.fleet_store import JSON, PROTOBUF, HostRecords, Receiving, group, numbered, otlp, store_rows

NewReceiver = Callable[..., Receiving]


@pytest.fixture
def new_receiver(place: Path, spawn: Any, wait_until: Any, deadline: Any) -> NewReceiver:
    """``new_receiver(options=(), ...)`` is a receiver with its store in ``place`` that is not started yet."""
    return lambda **more: Receiving(spawn, wait_until, more.pop("directory", place), timeout_s=deadline(60), **more)


@pytest.fixture
def receiver(new_receiver: NewReceiver) -> Receiving:
    return new_receiver().start()


def packed(body: bytes) -> bytes:
    return gzip.compress(body)


def message(*events: str) -> bytes:
    request = ExportLogsServiceRequest()
    scope = request.resource_logs.add().scope_logs.add()
    for event in events:
        scope.log_records.add(event_name=event, time_unix_nano=time.time_ns())
    return bytes(request.SerializeToString())


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SOWATCH, *words], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


# ---- what is taken --------------------------------------------------------------------------------


def test_records_of_an_agent_are_in_the_tables_once_they_are_answered(receiver: Receiving) -> None:
    host = HostRecords("machine-1", "web1", time.time_ns())
    answer = receiver.post(otlp([*host.snapshot_of([group(1), group(2)]), host.heartbeat()]))

    assert (answer.status, answer.body, answer.headers["content-type"]) == (200, b"{}", "application/json")
    assert receiver.rows("SELECT host_id, path FROM fleet_state FINAL ORDER BY path") == [
        {"host_id": "machine-1", "path": "/usr/lib/lib1.so.1"},
        {"host_id": "machine-1", "path": "/usr/lib/lib2.so.1"},
    ]
    assert receiver.rows("SELECT host_name FROM fleet_hosts") == [{"host_name": "web1"}]
    now = str(time.time_ns())
    assert receiver.rows("SELECT state FROM fleet_coverage(now = {now:UInt64})", now=now) == [{"state": "answered"}]


def test_both_encodings_are_taken_with_and_without_gzip_and_answered_in_their_own(receiver: Receiving) -> None:
    body = numbered(0, 1, time.time_ns(), "json")
    unpacked = {"Content-Encoding": "gzip"}
    answers = [
        receiver.post(body),
        receiver.post(packed(body), JSON | unpacked),
        receiver.post(message("protobuf")),  # not JSON
        receiver.post(message("protobuf"), PROTOBUF),
        receiver.post(packed(message("protobuf")), PROTOBUF | unpacked),
        receiver.post(packed(message("a"))[:-5], PROTOBUF | unpacked),
        receiver.post(packed(body) + packed(b"  "), JSON | unpacked),
    ]
    assert [one.status for one in answers] == [200, 200, 400, 200, 200, 400, 200]
    assert answers[3].body == b""
    assert [one.headers["content-type"].partition("/x-")[2] for one in answers[2:6]] == ["", *["protobuf"] * 3]
    assert receiver.rows("SELECT EventName AS event, count() AS n FROM otel_logs GROUP BY event ORDER BY event") == [
        {"event": "json", "n": 3},
        {"event": "protobuf", "n": 2},
    ]


def test_a_record_that_cannot_be_taken_is_reported_and_the_others_of_its_request_are_stored(
    receiver: Receiving,
) -> None:
    request = json.loads(numbered(0, 3, time.time_ns()))
    request["resourceLogs"][0]["scopeLogs"][0]["logRecords"][1]["traceId"] = "no id"
    answer = receiver.post(json.dumps(request).encode())

    assert answer.status == 200
    assert answer.json == {"partialSuccess": {"rejectedLogRecords": "1", "errorMessage": "an id is not in hexadecimal"}}
    assert receiver.rows("SELECT LogAttributes['number'] AS n FROM otel_logs ORDER BY n") == [{"n": "0"}, {"n": "2"}]
    as_message = ExportLogsServiceRequest()
    as_message.resource_logs.add().scope_logs.add().log_records.add(trace_id=b"short")
    partial = ExportLogsServiceResponse.FromString(receiver.post(as_message.SerializeToString(), PROTOBUF).body)
    assert partial.partial_success.rejected_log_records == 1


NAMES = [
    "'); DROP TABLE otel_logs; --",
    "\\'; SELECT 1",
    "{x:String}",
    "a\0b",
    "\u202e\x1b[31m",
    "\ufffd",
    "x" * 60_000,
]


def test_whatever_text_a_record_has_is_stored_as_it_is(receiver: Receiving) -> None:
    for text in NAMES:
        value = {"stringValue": text}
        record = {"eventName": text, "body": value, "attributes": [{"key": "k", "value": value}]}
        body = {"resourceLogs": [{"scopeLogs": [{"scope": {"name": text}, "logRecords": [record]}]}]}
        assert receiver.post(json.dumps(body).encode()).status == 200

    columns = "EventName AS a, Body AS b, LogAttributes['k'] AS c, ScopeName AS d"
    found = {row["a"]: row for row in receiver.rows(f"SELECT {columns} FROM otel_logs")}
    assert found == {text: dict.fromkeys("abcd", text) for text in NAMES}


def test_records_of_an_agent_that_make_no_sense_are_stored_and_change_nothing_of_others(receiver: Receiving) -> None:
    good = HostRecords("good", "good", time.time_ns())
    bad = HostRecords("bad", "bad", time.time_ns())
    records = []
    for record in bad.snapshot_of([group(number) for number in range(8)]):
        junk = ["", "-1", "99999999999999999999999", "x" * 300, "\0", "1e5", "nan", "[1,2]"]
        attributes = {key: junk[number % len(junk)] for number, key in enumerate(record.attributes)}
        records.append(record._replace(attributes=attributes))
    resource = dict.fromkeys(bad.heartbeat().resource, "\\N") | {"host.id": "bad"}
    records.append(bad.heartbeat()._replace(resource=resource))
    bodies = [otlp(records), otlp(good.snapshot_of([group(1)]))]
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda body=body: statuses.append(receiver.post(body).status)) for body in bodies
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert statuses == [200, 200]
    assert receiver.rows("SELECT count() AS n FROM fleet_state FINAL WHERE host_id = 'good'") == [{"n": 1}]
    assert receiver.count() == len(records) + 3


HEAD = b"POST /v1/logs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


# ---- what is refused ------------------------------------------------------------------------------

BAD = b'{"resourceLogs": 5}'
REFUSED: dict[str, tuple[str, str, dict[str, str], bytes, int, str]] = {
    "no json": ("POST", "/v1/logs", JSON, b"{", 400, "this is no request for logs"),
    "another json": ("POST", "/v1/logs", JSON, BAD, 400, "Expected `array | null`, got `int`"),
    "no protobuf": ("POST", "/v1/logs", PROTOBUF, b"\xff\xff", 400, "cannot be parsed"),
    "no gzip": ("POST", "/v1/logs", JSON | {"Content-Encoding": "gzip"}, b"{}", 400, "not compressed by gzip"),
    "zstd": ("POST", "/v1/logs", JSON | {"Content-Encoding": "zstd"}, b"{}", 415, "send Content-Encoding: gzip"),
    "text": ("POST", "/v1/logs", {"Content-Type": "text/plain"}, b"{}", 415, "send application/x-protobuf or"),
    "no type": ("POST", "/v1/logs", {}, b"{}", 415, "send application/x-protobuf or"),
    "too large": ("POST", "/v1/logs", JSON, b" " * (MAX_BODY_BYTES + 1), 413, "has more than 8 MiB"),
    "traces": ("POST", "/v1/traces", JSON, b"{}", 404, "this receiver takes logs, not traces"),
    "metrics": ("POST", "/v1/metrics", PROTOBUF, b"", 404, "this receiver takes logs, not metrics"),
    "another place": ("POST", "/v2/logs", JSON, b"{}", 404, ""),
    "another method": ("GET", "/v1/logs", {}, b"", 405, ""),
    "a name": ("POST", "/v1/logs", JSON | {"Host": "evil.example"}, b"{}", 421, "this name is not served here"),
}


def test_what_cannot_be_taken_is_refused_with_the_reason(receiver: Receiving) -> None:
    for name, (method, path, headers, body, status, reason) in REFUSED.items():
        answer = receiver.ask(method, path, body, headers)
        assert (answer.status, reason in answer.body.decode("utf-8", "replace")) == (status, True), (name, answer.body)
    assert receiver.count() == 0
    assert receiver.post(numbered(0, 1, time.time_ns())).status == 200


def test_a_body_that_grows_when_it_is_unpacked_is_refused_before_it_is_in_memory(receiver: Receiving) -> None:
    receiver.post(numbered(0, 1, time.time_ns()))
    before = receiver.rss_mb()
    bomb = gzip.compress(b" " * (1 << 29), 1)
    assert len(bomb) < MAX_BODY_BYTES
    answers = [receiver.post(bomb, JSON | {"Content-Encoding": "gzip"}).status for _ in range(3)]

    assert answers == [413] * 3
    assert receiver.rss_mb() - before < 200


def test_small_messages_without_number_do_not_take_much_memory(receiver: Receiving) -> None:
    receiver.post(message("first"), PROTOBUF)
    before = receiver.rss_mb()
    many = b"\x0a\x00" * (MAX_BODY_BYTES // 2)  # each an empty ResourceLogs
    assert receiver.post(many, PROTOBUF).status == 400
    assert receiver.rss_mb() - before < 1500


def test_a_body_whose_length_is_given_in_two_ways_is_refused(receiver: Receiving) -> None:
    head = HEAD
    both = head + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    assert receiver.raw(both).startswith(b"HTTP/1.1 400 ")
    chunked = head + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    assert receiver.raw(chunked).startswith(b"HTTP/1.1 200 ")
    endless = (
        head + b"Transfer-Encoding: chunked\r\n\r\n" + (b"100000\r\n" + b" " * (1 << 20) + b"\r\n") * 8 + b"1\r\n \r\n"
    )
    assert receiver.raw(endless).startswith(b"HTTP/1.1 413 ")


# ---- who may send ---------------------------------------------------------------------------------


@pytest.mark.parametrize("is_file", [True, False])
def test_with_a_token_only_who_sends_it_is_heard(new_receiver: NewReceiver, place: Path, is_file: bool) -> None:
    (place / "token").write_text("s3cret\n", encoding="ascii")
    given: dict[str, Any] = {"environment": {"SOWATCH_FLEET_TOKEN": "s3cret"}}
    if is_file:
        given = {"options": ["--token-file", os.fspath(place / "token")]}
    receiver = new_receiver(listen="0.0.0.0:0", **given).start()
    body = numbered(0, 1, time.time_ns())

    def status(value: str | None) -> int:
        return receiver.post(body, JSON if value is None else JSON | {"Authorization": value}).status

    wrong = [None, "", "Bearer", "Bearer s3cre", "Bearer s3crets", "Basic s3cret", "s3cret", "Bearer \xe9"]
    assert [status(one) for one in wrong] == [401] * len(wrong)
    refused = receiver.post(body)
    assert (refused.headers["www-authenticate"], refused.json["code"]) == ("Bearer", 16)
    assert [status(one) for one in ("Bearer s3cret", "bearer s3cret")] == [200, 200]
    assert receiver.ask("GET", "/healthz").text == "ok\n"
    assert receiver.count() == 2
    assert "s3cret" not in receiver.log
    assert "s3cret" not in Path(f"/proc/{receiver.process.pid}/cmdline").read_text(encoding="utf-8")


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0"])
def test_a_port_that_others_reach_needs_a_token_or_a_word_that_none_is_wanted(
    new_receiver: NewReceiver, place: Path, listen: str
) -> None:
    done = run("fleet", "receive", "--store", os.fspath(place / "store"), "--listen", listen)
    assert (done.returncode, done.stdout) == (2, "")
    assert "can be reached by others" in done.stderr
    assert "--no-token" in done.stderr
    assert not (place / "store").exists()
    receiver = new_receiver(listen=listen, options=["--no-token"]).start()
    assert receiver.post(numbered(0, 1, time.time_ns())).status == 200


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--no-token"], "--no-token contradicts the token"),
        (["--listen", "nowhere"], "is no address with a port"),
        (["--tls-cert", "a.pem"], "--tls-cert and --tls-key belong together"),
        (["--tls-cert", "/nowhere.pem", "--tls-key", "/nowhere.pem"], "cannot use the certificate"),
        (["--token-file", "/nowhere"], "cannot read the token in '/nowhere': No such file"),
        (["--store", "/proc/nowhere"], "cannot use '/proc/nowhere' for a store"),
        (["more"], "receive takes no 'more'"),
    ],
)
def test_wrong_options_are_refused_in_one_line(place: Path, words: list[str], reason: str) -> None:
    done = run(
        "fleet",
        "receive",
        "--store",
        os.fspath(place / "s"),
        "--listen",
        "127.0.0.1:0",
        *words,
        SOWATCH_FLEET_TOKEN="t",
    )
    assert done.returncode in (1, 2)
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


def test_https_is_served_with_a_certificate(new_receiver: NewReceiver, place: Path) -> None:
    words = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-subj",
        "/CN=h",
    ]
    subprocess.run([*words, "-keyout", place / "key", "-out", place / "cert"], check=True, capture_output=True)
    options = ["--tls-cert", os.fspath(place / "cert"), "--tls-key", os.fspath(place / "key")]
    receiver = new_receiver(options=options).start()
    address = f"https://127.0.0.1:{receiver.port}/v1/logs"
    done = subprocess.run(
        ["curl", "-sk", "-H", "Content-Type: application/json", "-d", numbered(0, 1, time.time_ns()), address],
        capture_output=True,
        check=False,
    )
    assert (done.stdout, receiver.count()) == (b"{}", 1)


# ---- the store ------------------------------------------------------------------------------------


def test_one_process_has_a_store_and_another_is_refused_with_its_name(receiver: Receiving, place: Path) -> None:
    done = run("fleet", "receive", "--store", os.fspath(receiver.store), "--listen", "127.0.0.1:0")
    assert done.returncode == 1
    assert f"is in use by process {receiver.process.pid} (" in done.stderr


def test_others_ask_the_receiver_while_it_runs_and_the_store_when_it_has_ended(receiver: Receiving) -> None:
    assert receiver.post(numbered(0, 5, time.time_ns())).status == 200
    question = "SELECT count() AS n FROM otel_logs"
    assert store_rows(receiver.store, question) == [[{"n": 5}]]
    assert receiver.stop() == 0
    assert not (receiver.store / "receive.sock").exists()
    assert store_rows(receiver.store, question) == [[{"n": 5}]]


def test_a_question_can_only_read(receiver: Receiving) -> None:
    receiver.post(numbered(0, 5, time.time_ns()))
    for sql in (
        "DROP TABLE otel_logs",
        "INSERT INTO otel_logs (Body) VALUES ('x')",
        "SET readonly = 0",
        "SELECT 1 SETTINGS readonly = 0",
        "SELECT * FROM file('/etc/hostname', 'RawBLOB')",
        "SELECT * FROM url('http://127.0.0.1:1/', 'RawBLOB')",
        "SELECT 1 INTO OUTFILE '/tmp/nowhere'",
        "SYSTEM STOP MERGES",
        "SELECT 1; SYSTEM STOP MERGES",
        "KILL QUERY WHERE 1",
        "",
    ):
        with pytest.raises(Exception, match="a question to the store"):
            receiver.rows(sql)
    assert receiver.count() == 5
    assert receiver.rows("WITH 'INTO' AS a SELECT a || {b:String} AS b -- c", b="it's\\t") == [{"b": "INTOit's\t"}]
    mode = (receiver.store / "receive.sock").stat().st_mode & 0o777
    assert (mode, receiver.store.stat().st_mode & 0o777) == (0o600, 0o700)


def test_a_store_of_a_later_version_is_refused_and_left_as_it_is(receiver: Receiving) -> None:
    assert receiver.stop() == 0
    (receiver.store / "schema").write_text("99\n", encoding="ascii")
    done = run("fleet", "receive", "--store", os.fspath(receiver.store), "--listen", "127.0.0.1:0")
    assert done.returncode == 1
    assert "has tables of version '99'" in done.stderr


def test_without_its_extra_a_receiver_names_what_to_install(place: Path) -> None:
    (place / "chdb").mkdir()
    (place / "chdb" / "__init__.py").write_text("raise ImportError('no', name='chdb')\n", encoding="ascii")
    words = ("fleet", "receive", "--store", os.fspath(place / "s"), "--listen", "127.0.0.1:0")
    done = run(*words, PYTHONPATH=os.fspath(place))
    assert done.returncode == 2
    assert "chdb is not installed, and a store needs it. Install it: pip install 'sowatch[fleet]'." in done.stderr


def test_what_was_accepted_before_sigterm_is_stored(receiver: Receiving) -> None:
    answers: list[tuple[int, int]] = []
    is_over = threading.Event()

    def send(first: int) -> None:
        number = first
        while not is_over.is_set():
            try:
                answers.append((number, receiver.post(numbered(number, 1, time.time_ns())).status))
            except OSError:
                return
            number += 1

    threads = [threading.Thread(target=send, args=(place * 1_000_000,)) for place in range(6)]
    for thread in threads:
        thread.start()
    receiver.wait_until(lambda: len(answers) > 30, 60, "some requests are answered")
    code = receiver.stop()
    is_over.set()
    for thread in threads:
        thread.join()

    accepted = {str(number) for number, status in answers if status == 200}
    ((*rows,),) = store_rows(receiver.store, "SELECT LogAttributes['number'] AS n FROM otel_logs")
    assert code == 0
    assert accepted - {row["n"] for row in rows} == set()


def test_a_question_that_takes_minutes_does_not_keep_a_receiver_from_its_end(receiver: Receiving) -> None:
    assert receiver.post(numbered(0, 5, time.time_ns())).status == 200
    refusals: list[str] = []

    def ask(sql: str) -> None:
        try:
            receiver.rows(sql)
        except SowatchError as error:
            refusals.append(str(error))

    # It ends after the two minutes of a question; the other one waits for its turn.
    asked = [threading.Thread(target=ask, args=("SELECT sum(sleepEachRow(0.00004)) FROM system.numbers",))]
    asked[0].start()

    def is_busy() -> bool:
        asked.append(threading.Thread(target=ask, args=("SELECT 1",)))
        asked[-1].start()
        asked[-1].join(2)
        return asked[-1].is_alive()

    receiver.wait_until(is_busy, 60, "a question waits for its turn")
    receiver.process.send_signal(signal.SIGTERM)
    # systemd's patience: TimeoutStopSec of the unit.
    assert receiver.process.wait(60) == 0
    for thread in asked:
        thread.join()
    assert len(refusals) == 2
    assert "a question was under way at the end" in receiver.log
    assert not (receiver.store / "receive.sock").exists()
    assert store_rows(receiver.store, "SELECT count() AS n FROM otel_logs") == [[{"n": 5}]]


def test_any_user_may_run_a_receiver(new_receiver: NewReceiver, place: Path) -> None:
    own = place / "own"
    own.mkdir()
    os.chown(own, 65534, 65534)
    prefix = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
    receiver = new_receiver(directory=own, prefix=prefix, environment={"HOME": os.fspath(own)}).start()
    assert receiver.post(numbered(0, 1, time.time_ns())).status == 200
    assert receiver.store.stat().st_uid == 65534
    ask = ("fleet", "coverage", "--store", os.fspath(receiver.store), "--json")
    assert run(*ask).returncode == 0
    assert receiver.stop() == 0
    # Files of root's would keep the receiver out.
    refused = run(*ask)
    assert refused.returncode == 3
    assert "it is of user 65534, and this is user 0. Start its receiver" in refused.stderr
    assert {path.stat().st_uid for path in receiver.store.rglob("*")} == {65534}


def test_metrics_say_what_was_taken_and_what_was_not(receiver: Receiving) -> None:
    assert "sowatch_receiver_last_insert_seconds -1.0\n" in receiver.ask("GET", "/metrics").text
    assert receiver.post(numbered(0, 5, time.time_ns())).status == 200
    assert receiver.post(json.dumps({"resourceLogs": [{"scopeLogs": [{"logRecords": [{"traceId": "x"}]}]}]}).encode())
    assert receiver.post(b"{").status == 400
    found = {}

    def are_new() -> bool:
        lines = receiver.ask("GET", "/metrics").text.splitlines()
        found.update(line.rsplit(" ", 1) for line in lines if line.startswith("sowatch_receiver_"))
        return found.get('sowatch_receiver_requests_total{status="400"}') == "1.0"

    receiver.wait_until(are_new, 20, "new figures")
    assert found['sowatch_receiver_requests_total{status="200"}'] == "2.0"
    assert found["sowatch_receiver_records_total"] == "5.0"
    assert found["sowatch_receiver_rejected_total"] == "1.0"
    assert found["sowatch_receiver_inserts_total"] == "1.0"
    assert found["sowatch_receiver_waiting_records"] == "0.0"
    assert 0 <= float(found["sowatch_receiver_last_insert_seconds"]) < 120


# ---- many -----------------------------------------------------------------------------------------


def test_a_thousand_clients_at_once_are_all_answered(receiver: Receiving) -> None:
    body = numbered(0, 3, time.time_ns())
    request = HEAD + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body
    connections = [socket.create_connection(("127.0.0.1", receiver.port), receiver.timeout_s) for _ in range(1000)]
    try:
        for connection in connections:
            connection.sendall(request)
        answers = []
        for connection in connections:
            found = b""
            while piece := connection.recv(4096):
                found += piece
            answers.append(found.split(b" ", 2)[1])
    finally:
        for connection in connections:
            connection.close()

    assert set(answers) == {b"200"}
    assert receiver.count() == 3000
    # Those that came together were few inserts.
    parts = receiver.rows("SELECT uniqExact(_part) AS n FROM otel_logs")
    assert parts[0]["n"] < 200


def test_who_sends_a_head_or_a_body_byte_by_byte_keeps_nobody_else_waiting(receiver: Receiving) -> None:
    head = HEAD + b"Content-Length: 100000\r\n\r\n{"
    slow = [socket.create_connection(("127.0.0.1", receiver.port)) for _ in range(200)]
    try:
        for number, connection in enumerate(slow):
            connection.sendall(head if number % 2 else head[:20])
        assert [receiver.post(numbered(one, 1, time.time_ns())).status for one in range(20)] == [200] * 20
    finally:
        for connection in slow:
            connection.close()
    assert receiver.ask("GET", "/healthz").status == 200


def test_an_address_that_takes_all_connections_that_it_can_leaves_the_others_theirs(
    new_receiver: NewReceiver,
) -> None:
    receiver = new_receiver(listen="0.0.0.0:0", options=["--no-token"]).start()
    where = ("127.0.0.1", receiver.port)
    held = [socket.create_connection(where, receiver.timeout_s) for _ in range(1100)]
    try:
        with socket.create_connection(where, receiver.timeout_s, ("127.0.0.2", 0)) as other:
            other.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert other.recv(4096).startswith(b"HTTP/1.1 200 ")
    finally:
        for one in held:
            one.close()


def test_the_schema_is_printed_without_any_extra(place: Path) -> None:
    for name in ("chdb", "starlette", "uvicorn"):
        (place / name).mkdir()
        (place / name / "__init__.py").write_text("raise ImportError('no')\n", encoding="ascii")
    done = run("fleet", "schema", PYTHONPATH=os.fspath(place))
    assert done.returncode == 0
    assert done.stdout.startswith("-- The table of logs of the OpenTelemetry Collector")
    for name in ("otel_logs", "fleet_state", "fleet_coverage"):
        assert f" {name}" in done.stdout


def test_another_user_may_not_ask_a_store_and_is_shown_why(receiver: Receiving) -> None:
    command = [sys.executable, "-m", "sowatch", "fleet", "coverage", "--store", os.fspath(receiver.store)]
    prefix = ["setpriv", "--reuid=65533", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
    done = subprocess.run([*prefix, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "its directory is for the user that filled it" in done.stderr
    assert done.stderr.count("\n") == 1
