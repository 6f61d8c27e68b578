"""What was answered with 200 is in the store: after SIGKILL at any moment, and on a disk that became full."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.fleet_store import JSON, Receiving, store_rows

NewReceiver = Callable[..., Receiving]


@pytest.fixture
def new_receiver(place: Path, spawn: Any, wait_until: Any, deadline: Any) -> NewReceiver:
    return lambda **more: Receiving(spawn, wait_until, more.pop("directory", place), timeout_s=deadline(60), **more)


def states(numbers: range, ballast_bytes: int = 0) -> bytes:
    """A request of an agent with a state for each number: its key and its build; with text that does not pack."""
    now_ns = time.time_ns()

    def pairs(**values: str) -> list[dict[str, Any]]:
        return [{"key": key.replace("__", "."), "value": {"stringValue": value}} for key, value in values.items()]

    records = [
        {
            "timeUnixNano": str(now_ns + number),
            "eventName": "sowatch.library.state",
            "body": {"stringValue": random.Random(number).randbytes(ballast_bytes).hex()},
            "attributes": pairs(
                sowatch__library__key=f"{number:016x}",
                sowatch__library__build_id=f"{number:040x}",
                sowatch__library__path=f"/lib/{number}.so",
                sowatch__library__processes="1",
                sowatch__fleet__snapshot="1",
                sowatch__fleet__seq=str(number),
            ),
        }
        for number in numbers
    ]
    scope = {"scope": {"name": "sowatch.fleet"}, "logRecords": records}
    resource = {"attributes": pairs(host__id="h", host__name="h", sowatch__fleet__epoch=str(now_ns))}
    return json.dumps({"resourceLogs": [{"resource": resource, "scopeLogs": [scope]}]}).encode()


LOGS = "SELECT DISTINCT toUInt64(LogAttributes['sowatch.fleet.seq']) AS n FROM otel_logs"
STATE = "SELECT key AS n FROM fleet_state FINAL"
HISTORY = "SELECT DISTINCT key AS n FROM fleet_history"


def numbers(rows: list[dict[str, Any]]) -> set[int]:
    return {int(row["n"]) for row in rows}


def test_what_was_accepted_is_there_after_the_receiver_was_killed_at_any_moment(new_receiver: NewReceiver) -> None:
    receiver = new_receiver()
    accepted: set[int] = set()
    next_number = iter(range(0, 10**9, 20))
    lock = threading.Lock()
    draw = random.Random(7)

    def send() -> None:
        """Sends until the receiver is gone."""
        with contextlib.closing(receiver.connect()) as connection:
            while send_once(connection):
                pass

    def send_once(connection: http.client.HTTPConnection) -> bool:
        with lock:
            first = next(next_number)
        sent = range(first, first + 20)
        try:
            connection.request("POST", "/v1/logs", states(sent), JSON)
            answer = connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException):
            return False
        assert answer.status == 200
        with lock:
            accepted.update(sent)
        return True

    for round_number in range(3):
        receiver.start()
        before = len(accepted)
        threads = [threading.Thread(target=send) for _ in range(4)]
        for thread in threads:
            thread.start()
        wanted = before + 20 * draw.randrange(1, 40)
        receiver.wait_until(lambda wanted=wanted: len(accepted) >= wanted, 60, f"round {round_number}: answers")
        receiver.process.kill()
        receiver.process.wait()
        for thread in threads:
            thread.join()
    logs, state, history = map(numbers, store_rows(receiver.store, LOGS, STATE, HISTORY))

    assert len(accepted) >= 3 * 20
    assert [accepted - found for found in (logs, state, history)] == [set()] * 3
    # It goes on with the same store.
    receiver.start()
    assert receiver.post(states(range(10**9, 10**9 + 1))).status == 200


_ON_TMPFS = 'mount -t tmpfs -o size=40m,mode=700 tmpfs "$0" && exec "$@"'


def test_a_full_disk_refuses_records_and_loses_none_that_were_accepted(new_receiver: NewReceiver, place: Path) -> None:
    disk = place / "disk"
    disk.mkdir()
    in_own_mounts = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _ON_TMPFS, os.fspath(disk)]
    receiver = new_receiver(prefix=in_own_mounts)
    receiver.store = disk / "store"

    def on_disk(*words: str) -> None:
        subprocess.run(["nsenter", "-t", str(receiver.process.pid), "-m", *words], check=True)

    def post(first: int) -> Any:
        answer = receiver.post(states(range(first, first + 20), 50_000))
        if answer.status == 200:
            accepted.update(range(first, first + 20))
        return answer

    accepted: set[int] = set()
    # Questions go through /proc: the socket is on a disk that only the receiver has.
    start_on_disk(receiver)
    on_disk("fallocate", "-l", "24m", os.fspath(disk / "ballast"))
    answers = []
    for first in range(0, 20 * 100, 20):
        answers.append(post(first))
        if answers[-1].status != 200:
            break
    refused = answers[-1]

    assert len(answers) > 1
    assert refused.status == 503
    assert int(refused.headers["retry-after"]) > 0
    assert (refused.json["code"], "is full" in refused.json["message"]) == (14, True)
    assert receiver.ask("GET", "/healthz").status == 503
    assert "Traceback" not in receiver.log
    on_disk("rm", os.fspath(disk / "ballast"))
    receiver.wait_until(lambda: post(10**6).status == 200, 60, "records are taken again")
    assert receiver.ask("GET", "/healthz").status == 200
    logs, state = numbers(receiver.rows(LOGS)), numbers(receiver.rows(STATE))
    assert [accepted - found for found in (logs, state)] == [set()] * 2


def start_on_disk(receiver: Receiving) -> None:
    """Starts a receiver in mounts of its own, and names its store as we reach it."""
    receiver.start()
    own = receiver.store
    receiver.store = Path(f"/proc/{receiver.process.pid}/root{own}")
