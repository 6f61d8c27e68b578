"""The feed of the section [fleet]: losses make a host lossy until they are repaired, and what happens is sent."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from sowatch.agent.fleet_feed import Feed
from sowatch.agent.fleet_settings import FleetSettings
from sowatch.inventory.packages import Packages
from sowatch.inventory.staleness import StaleAnswer, Staleness
from sowatch.linux.proc import ProcFs
from sowatch.model.events import Event, Library, Load, Lost, Origin, Process, Repaired, Stale, Unload
from sowatch.model.identity import FileId
from sowatch.model.stats import Mapped
from support.fleet_receiver import FleetReceiver, fleet_receiver

HOST = Origin("web-1", "0123456789abcdef0123456789abcdef", "a-boot", "1.0")
NGINX = Process(2**22 + 1, 1, exe="/usr/sbin/nginx", cgroup="/system.slice/nginx.service")


def library(number: int) -> Library:
    return Library(f"/nowhere/lib{number}.so", FileId(0, 0, number), build_id=f"{number:040x}")


class Watcher:
    """Publishes what a test gives it, as `sowatch.watcher.watcher.Watcher` does."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self.has_ended = False
        self.lost = 0
        self.is_repaired = True
        self.ready = SimpleNamespace(strategy="core", guarantee="exact", limits=())
        self.stats = SimpleNamespace(lost_kernel=0, repairs=0, unread=0)
        self.mapped: list[Mapped] = []
        self.stale: list[tuple[Mapped, StaleAnswer]] = []

    def subscribe(self, *, events: Any, with_hidden: bool) -> Watcher:
        assert with_hidden
        assert set(events) == {"load", "unload", "stale", "renewed"}
        return self

    @property
    def waiting(self) -> int:
        return self.queue.qsize()

    def get(self, timeout_s: float) -> Event | None:
        try:
            event = self.queue.get(timeout=timeout_s) if timeout_s else self.queue.get_nowait()
        except queue.Empty:
            return None
        self.has_ended = event is None
        return event

    def close(self) -> None:
        self.queue.put(None)

    def snapshot(self, *, with_ranges: bool, with_hidden: bool) -> list[Mapped]:
        assert (with_ranges, with_hidden) == (False, True)
        return self.mapped


@pytest.fixture
def watcher() -> Watcher:
    return Watcher()


@pytest.fixture
def receiver() -> Iterator[FleetReceiver]:
    with fleet_receiver() as found:
        yield found


@pytest.fixture
def start(watcher: Watcher, receiver: FleetReceiver) -> Iterator[Callable[[], Feed]]:
    feeds: list[Feed] = []
    packages = Packages(ProcFs())

    def make() -> Feed:
        settings = FleetSettings(enabled=True, endpoint=receiver.url, interval_s=1)
        stale = SimpleNamespace(stale=lambda: watcher.stale, compared_ns=9)
        feeds.append(Feed(settings, watcher, HOST, ProcFs(), stale=stale, packages=packages))  # type: ignore[arg-type]
        feeds[-1].start()
        return feeds[-1]

    yield make
    for feed in feeds:
        feed.close()
    packages.close()


def load(number: int) -> Load:
    return Load("fleet", library(number), NGINX, "mmap", 1, 1)


def known(receiver: FleetReceiver) -> dict[str, int]:
    rows = receiver.replica().in_force.values()
    return {row.attributes["sowatch.library.path"]: row.attributes["sowatch.library.processes"] for row in rows}


def test_what_is_mapped_already_and_what_happens_reaches_the_receiver(
    watcher: Watcher, receiver: FleetReceiver, start: Callable[[], Feed], wait_until: Any
) -> None:
    watcher.mapped = [Mapped(NGINX, library(1), "fleet", ())]
    start()
    wait_until(lambda: known(receiver) == {"/nowhere/lib1.so": 1}, 30, "the snapshot")
    watcher.queue.put(load(2))
    watcher.queue.put(Stale("fleet", library(2), NGINX, "replaced", None, 5))  # type: ignore[arg-type]
    watcher.queue.put(Unload("fleet", library(1), NGINX, "munmap", 1, 1))
    wait_until(lambda: known(receiver) == {"/nowhere/lib2.so": 1}, 30, "the change")
    (row,) = receiver.replica().in_force.values()
    assert (row.attributes["sowatch.library.stale"], row.attributes["sowatch.library.stale_since"]) == ("replaced", 5)
    assert row.attributes["sowatch.unit"] == "nginx.service"
    resource = row.resource
    assert (resource["host.id"], resource["host.name"], resource["sowatch.boot.id"]) == (
        HOST.host_id,
        "web-1",
        "a-boot",
    )


def test_a_host_is_lossy_from_a_loss_to_its_repair(
    watcher: Watcher, receiver: FleetReceiver, start: Callable[[], Feed], wait_until: Any
) -> None:
    start()
    wait_until(lambda: not receiver.replica().is_lossy, 30, "a host of which all is known")
    # Its own queue has lost events, which it has not been given as an event yet.
    watcher.lost = 3
    wait_until(lambda: receiver.replica().is_lossy, 30, "a host that is lossy")
    for event in (Lost(1, 3, "queue"), load(1), Repaired(1, 1, 0, 0.1)):
        watcher.queue.put(event)
    wait_until(lambda: not receiver.replica().is_lossy, 30, "the repair")
    watcher.stats = SimpleNamespace(lost_kernel=5, repairs=1, unread=0)
    watcher.queue.put(Lost(1, 5, "kernel"))
    wait_until(lambda: receiver.replica().is_lossy, 30, "a loss in the kernel")
    watcher.queue.put(Repaired(1, 0, 0, 0.1))
    wait_until(lambda: not receiver.replica().is_lossy, 30, "its repair")
    watcher.is_repaired = False
    wait_until(lambda: receiver.replica().is_lossy, 30, "a watch that is not repaired")


def test_what_became_stale_or_was_renewed_in_a_loss_is_known_after_the_repair(
    watcher: Watcher, receiver: FleetReceiver, start: Callable[[], Feed], wait_until: Any
) -> None:
    watcher.mapped = [Mapped(NGINX, library(number), "fleet", ()) for number in (1, 2)]
    watcher.stale = [(watcher.mapped[0], StaleAnswer(Staleness.REPLACED, None))]
    feed = start()
    wait_until(lambda: len(known(receiver)) == 2 and bool(receiver.of("heartbeat")), 30, "the snapshot")

    def stale() -> dict[str, int]:
        feed.drop(0)  # everything is sent anew, so that it is no minute
        feed.sender.wake()
        rows = receiver.replica().in_force.values()
        found = {row.attributes["sowatch.library.path"]: row.attributes for row in rows}
        return {
            path: one["sowatch.library.stale_since"] for path, one in found.items() if "sowatch.library.stale" in one
        }

    assert stale() == {"/nowhere/lib1.so": 9}
    watcher.stale = [(watcher.mapped[1], StaleAnswer(Staleness.DELETED, None))]
    # No loss of the queue: all that happened is in events.
    for event in (Lost(1, 3, "kernel"), Repaired(1, 1, 0, 0.1)):
        watcher.queue.put(event)
    watcher.queue.put(load(3))
    wait_until(lambda: len(known(receiver)) == 3, 30, "what came after")
    assert stale() == {"/nowhere/lib1.so": 9}
    for event in (Lost(1, 3, "queue"), Repaired(1, 1, 0, 0.1)):
        watcher.queue.put(event)
    wait_until(lambda: stale() == {"/nowhere/lib2.so": 9}, 30, "what is stale by now")


def test_a_feed_that_fails_is_down_until_it_has_sent_everything_anew(
    watcher: Watcher, receiver: FleetReceiver, start: Callable[[], Feed], wait_until: Any
) -> None:
    watcher.mapped = [Mapped(NGINX, library(1), "fleet", ())]
    feed = start()
    wait_until(lambda: bool(receiver.of("heartbeat")), 30, "a heartbeat")
    # What ends meanwhile is in no event.
    watcher.mapped = [Mapped(NGINX, library(2), "fleet", ())]
    watcher.queue.put(Load("fleet", None, NGINX, "mmap", 1, 1))  # type: ignore[arg-type]
    wait_until(lambda: feed.figures()["up"] == 0, 30, "the failure")
    assert feed.failure is not None
    assert feed.failure.startswith("the feed has failed: ")
    wait_until(lambda: feed.figures()["up"] == 1, 30, "the new begin")
    assert (feed.faults, feed.figures()["errors"]) == (1, 1)
    wait_until(lambda: known(receiver) == {"/nowhere/lib2.so": 1}, 30, "what is mapped by now")
    assert not receiver.replica().is_lossy
    watcher.queue.put(load(3))
    wait_until(lambda: len(known(receiver)) == 2, 30, "what comes after it")


def test_more_is_not_settled_than_was_published_by_then(
    watcher: Watcher, receiver: FleetReceiver, start: Callable[[], Feed], wait_until: Any
) -> None:
    watcher.mapped = [Mapped(NGINX, library(1), "fleet", ())]
    start()
    wait_until(lambda: bool(receiver.of("heartbeat")), 30, "a heartbeat")
    for pid in range(1, 5001):
        short = Process(2**22 + 1 + pid, 1, exe="/usr/bin/short")
        watcher.queue.put(Load("fleet", library(2), short, "mmap", 1, 1))
        watcher.queue.put(Unload("fleet", library(2), short, "exit", 1, 1))
    beats = len(receiver.of("heartbeat"))
    wait_until(lambda: watcher.waiting == 0 and len(receiver.of("heartbeat")) > beats + 2, 30, "two more heartbeats")
    assert known(receiver) == {"/nowhere/lib1.so": 1}
    assert receiver.of("mapped") == []
