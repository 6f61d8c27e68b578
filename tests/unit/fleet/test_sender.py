"""Sender and FleetExporter: what is sent again, what is given up, and when a receiver is asked again."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from sowatch.fleet.exporter import FleetExporter, Refusal
from sowatch.fleet.records import Record
from sowatch.fleet.sender import Sender
from sowatch.model.errors import ConfigError
from support.fleet_receiver import FleetReceiver, fleet_receiver

RESOURCE = {"host.id": "0123", "sowatch.fleet.epoch": "7"}


def record(number: int) -> Record:
    attributes = {"sowatch.fleet.snapshot": 1, "sowatch.fleet.seq": number, "path": f"/lib/{number}", "is_so": True}
    return Record("sowatch.library.state", 1_700_000_000_000_000_000 + number, attributes)


class Source:
    """Records that wait to be taken."""

    def __init__(self, count: int) -> None:
        self.left = [record(number) for number in range(count)]
        self.dropped = 0

    def take(self, limit: int) -> list[Record]:
        taken, self.left = self.left[:limit], self.left[limit:]
        return taken

    def drop(self, count: int) -> None:
        self.dropped += count


class Exporter:
    """Answers by a list of refusals first."""

    def __init__(self, *refusals: Exception) -> None:
        self.refusals = list(refusals)
        self.tries: list[tuple[float, int]] = []
        self.taken: list[Record] = []
        self.has_closed = threading.Event()

    def send(self, records: Sequence[Record]) -> None:
        self.tries.append((time.monotonic(), len(records)))
        if self.refusals:
            raise self.refusals.pop(0)
        self.taken += records

    def close(self) -> None:
        self.has_closed.set()


@pytest.fixture
def receiver() -> Iterator[FleetReceiver]:
    with fleet_receiver() as found:
        yield found


def sender_of(source: Source, exporter: Any) -> Sender:
    made = Sender(source, exporter, linger_s=0.0)
    made.start()
    made.wake()
    return made


def test_a_batch_that_is_refused_is_sent_again_and_nothing_is_dropped(wait_until: Any) -> None:
    source, exporter = Source(700), Exporter(Refusal("busy", retry_after_s=0.0), OSError("broken"))
    sender = sender_of(source, exporter)
    wait_until(lambda: sender.stats.sent == 700, 20, "all records")
    sender.close(1)
    assert [count for _, count in exporter.tries] == [512, 512, 512, 188]
    assert [one.version_ns for one in exporter.taken] == [record(number).version_ns for number in range(700)]
    assert (sender.stats.errors, sender.stats.is_up, source.dropped) == (2, True, 0)


def test_a_receiver_is_asked_again_when_it_says_so(wait_until: Any) -> None:
    exporter = Exporter(Refusal("busy", retry_after_s=3.0))
    sender = sender_of(Source(1), exporter)
    wait_until(lambda: sender.stats.sent == 1, 20, "the record")
    sender.close(1)
    (first, _), (second, _) = exporter.tries
    assert second - first >= 3.0


def test_records_that_are_refused_for_good_are_dropped_and_the_next_ones_sent(wait_until: Any) -> None:
    source, exporter = Source(600), Exporter(Refusal("no such thing", is_final=True))
    sender = sender_of(source, exporter)
    wait_until(lambda: sender.stats.sent == 88, 20, "the second batch")
    sender.close(1)
    assert source.dropped == 512


def test_a_request_that_is_too_large_is_halved_until_it_is_not(wait_until: Any) -> None:
    class Small(Exporter):
        def send(self, records: Sequence[Record]) -> None:
            if len(records) > 100:
                self.tries.append((time.monotonic(), len(records)))
                raise Refusal("too large", is_final=True, is_too_large=True)
            super().send(records)

    source, exporter = Source(512), Small()
    sender = sender_of(source, exporter)
    wait_until(lambda: sender.stats.sent == 512, 20, "all records")
    sender.close(1)
    assert [count for _, count in exporter.tries][:4] == [512, 256, 128, 64]
    assert [one.version_ns for one in exporter.taken] == [record(number).version_ns for number in range(512)]
    assert source.dropped == 0


def test_a_single_record_that_is_too_large_is_given_up_with_its_batch(wait_until: Any) -> None:
    source = Source(3)
    exporter = Exporter(*[Refusal("too large", is_final=True, is_too_large=True)] * 2)
    sender = sender_of(source, exporter)
    wait_until(lambda: source.dropped == 3, 20, "the end of the tries")
    sender.close(1)
    assert [count for _, count in exporter.tries] == [3, 1]


def test_a_source_that_fails_is_asked_again_for_everything(wait_until: Any) -> None:
    class Failing(Source):
        faults = 1

        def take(self, limit: int) -> list[Record]:
            if self.faults:
                self.faults -= 1
                raise ValueError("broken")
            return super().take(limit)

        def drop(self, count: int) -> None:
            assert count == 0
            self.left.append(record(7))

    sender = sender_of(Failing(1), Exporter())
    wait_until(lambda: not sender.stats.is_up, 20, "the fault")
    assert sender.stats.last_error == "records could not be taken: broken"
    wait_until(lambda: sender.stats.sent == 2, 20, "what it had, and everything anew")
    assert (sender.stats.errors, sender.stats.is_up) == (1, True)
    sender.close(1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_sender_whose_thread_has_ended_by_itself_is_not_up(wait_until: Any) -> None:
    class Ending(Source):
        def take(self, limit: int) -> list[Record]:
            raise SystemExit

    sender = Sender(Ending(1), Exporter(), linger_s=0.0)
    assert sender.stats.is_up
    sender.start()
    wait_until(lambda: not sender.stats.is_up, 20, "the end")
    sender.close(1)


def test_the_end_does_not_wait_for_a_receiver_that_is_down(wait_until: Any) -> None:
    exporter = Exporter(*[Refusal("down", retry_after_s=300.0)] * 3)
    sender = sender_of(Source(1), exporter)
    wait_until(lambda: sender.stats.errors == 1, 20, "the first try")
    sender.close(60)
    assert exporter.has_closed.is_set()
    assert not [one for one in threading.enumerate() if one.name == "sowatch-fleet-send"]
    assert sender.stats.waiting == 1


def test_records_arrive_as_logs_with_flat_attributes(receiver: FleetReceiver) -> None:
    exporter = FleetExporter(receiver.url, headers={"X-Scope": "one"}, resource=RESOURCE)
    exporter.send([record(0), record(1)])
    exporter.close()
    assert [(one.event, one.version, one.snapshot, one.seq, one.attributes) for one in receiver.records] == [
        ("sowatch.library.state", record(number).version_ns, 1, number, {"path": f"/lib/{number}", "is_so": True})
        for number in (0, 1)
    ]
    assert receiver.records[0].resource.items() >= {**RESOURCE, "service.name": "sowatch"}.items()
    assert (receiver.headers[0]["content-encoding"], receiver.headers[0]["x-scope"]) == ("gzip", "one")


@pytest.mark.parametrize(
    ("status", "headers", "is_final", "retry_after_s"),
    [
        (429, {"Retry-After": "7"}, False, 7),
        (503, {"Retry-After": "100000"}, False, 300),
        (503, {"Retry-After": "soon"}, False, None),
        (500, {}, False, None),
        (401, {}, False, None),
        (302, {"Location": "http://127.0.0.1:1/"}, False, None),
        (400, {}, True, None),
        (413, {}, True, None),
    ],
)
def test_what_a_receiver_answers_is_what_becomes_of_the_records(
    receiver: FleetReceiver, status: int, headers: dict[str, str], is_final: bool, retry_after_s: float | None
) -> None:
    receiver.answers = [(status, headers)]
    exporter = FleetExporter(receiver.url, resource=RESOURCE)
    with pytest.raises(Refusal, match=str(status)) as refusal:
        exporter.send([record(0)])
    assert (refusal.value.is_final, refusal.value.retry_after_s) == (is_final, retry_after_s)
    assert receiver.requests == 1  # the SDK has not tried again by itself
    exporter.send([record(0)])
    exporter.close()
    assert len(receiver.records) == 1


def test_a_date_to_try_again_at_is_understood(receiver: FleetReceiver) -> None:
    receiver.answers = [(503, {"Retry-After": formatdate(time.time() + 100, usegmt=True)})]
    exporter = FleetExporter(receiver.url, resource=RESOURCE)
    with pytest.raises(Refusal) as refusal:
        exporter.send([record(0)])
    exporter.close()
    assert refusal.value.retry_after_s == pytest.approx(100, abs=10)


def test_a_receiver_that_is_not_there_is_no_final_answer(tmp_path: Path) -> None:
    exporter = FleetExporter("http://127.0.0.1:1", resource=RESOURCE)
    with pytest.raises(Refusal, match="cannot be reached") as refusal:
        exporter.send([record(0)])
    exporter.close()
    assert not refusal.value.is_final


def test_a_token_is_read_for_each_request(receiver: FleetReceiver, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("one\n")
    exporter = FleetExporter(receiver.url, token_file=str(token), resource=RESOURCE)
    exporter.send([record(0)])
    token.write_text("two\n")
    exporter.send([record(1)])
    token.unlink()
    with pytest.raises(Refusal, match="token") as refusal:
        exporter.send([record(2)])
    exporter.close()
    assert not refusal.value.is_final
    assert [one["authorization"] for one in receiver.headers] == ["Bearer one", "Bearer two"]


@pytest.mark.parametrize("text", ["", "two words\n", "ümlaut", "a\x00b"])
def test_a_file_without_a_token_is_refused_at_the_start(receiver: FleetReceiver, tmp_path: Path, text: str) -> None:
    token = tmp_path / "token"
    token.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="token"):
        FleetExporter(receiver.url, token_file=str(token), resource=RESOURCE)
