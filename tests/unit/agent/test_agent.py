"""Parts of the agent by themselves: sockets, links, log lines, systemd, the hub."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from sowatch.agent.hub import KEPT_BYTES, KEPT_EVENTS, MAX_WAITING, MAX_WAITING_BYTES, EventHub
from sowatch.agent.reload import directories_of
from sowatch.engine.published_map import Loads
from sowatch.engine.subscription import SubscriberQueue, difference
from sowatch.model.errors import ConfigError, SowatchError
from sowatch.model.events import Event, Library, LibraryEvent, Process, Ready, Stopped
from sowatch.model.identity import FileId
from sowatch.web.logs import _Lines
from sowatch.web.notify import Notifier
from sowatch.web.servers import UnixSocket, parse_listen
from support import scripted, strict

# ---- the socket ----------------------------------------------------------------------------------


def test_a_second_socket_of_one_path_is_refused_until_the_first_is_closed(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    first = UnixSocket(path)
    assert stat.filemode(os.stat(path).st_mode) == "srw-------"
    with pytest.raises(SowatchError, match="is listening on"):
        UnixSocket(path)
    first.close()
    first.close()
    assert not os.path.exists(path)
    UnixSocket(path).close()


def test_a_path_that_somebody_else_has_taken_since_is_left_to_them(tmp_path: Path) -> None:
    ours = UnixSocket(str(tmp_path / "s"))
    (tmp_path / "s").unlink()
    (tmp_path / "s").write_text("theirs", encoding="utf-8")
    ours.close()
    assert (tmp_path / "s").read_text(encoding="utf-8") == "theirs"


@pytest.mark.parametrize("path", ["/nothing/here/at/all", "/proc/version", "/" + "x" * 107])
def test_a_path_that_cannot_be_used_is_an_error_of_the_configuration(path: str) -> None:
    with pytest.raises(ConfigError, match="socket: "):
        UnixSocket(path)


def test_an_owner_that_does_not_exist_is_an_error_of_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="socket_owner: there is no 'nobody-at-all'"):
        UnixSocket(str(tmp_path / "s"), owner="nobody-at-all")


@pytest.mark.parametrize(
    ("text", "found"),
    [("127.0.0.1:0", ("127.0.0.1", 0)), ("[::1]:80", ("::1", 80)), ("localhost:65535", ("127.0.0.1", 65535))],
)
def test_addresses_of_the_loopback_interface_are_taken(text: str, found: tuple[str, int]) -> None:
    assert parse_listen(text) == found


# ---- links ---------------------------------------------------------------------------------------


def test_the_directories_of_a_file_are_those_of_every_link_on_the_way(tmp_path: Path) -> None:
    (tmp_path / "a" / "..1").mkdir(parents=True)
    (tmp_path / "a" / "..1" / "c").touch()
    (tmp_path / "a" / "..data").symlink_to("..1")
    (tmp_path / "a" / "c").symlink_to("..data/c")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").symlink_to("../a/c")
    found = directories_of(str(tmp_path / "b" / "c"))
    assert set(found) == {str(tmp_path / one) for one in ("b", "a", "a/..1")}


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("y")
    (tmp_path / "y").symlink_to("x")
    assert directories_of(str(tmp_path / "x")) == [str(tmp_path)]


# ---- log lines and systemd -----------------------------------------------------------------------


@pytest.mark.parametrize("style", ["logfmt", "json"])
def test_a_log_record_is_one_line_whatever_stands_in_it(style: Any) -> None:
    record = logging.makeLogRecord(
        {
            "name": "x",
            "levelname": "INFO",
            "msg": 'a\n"b" \x1b[31m\udcff',
            "facts": {"path": "/a b\r\n", "n": 5, "e": ""},
        }
    )
    line = _Lines(style).format(record)
    assert line.isascii()
    assert line.isprintable()
    if style == "json":
        found = strict.loads(line)
        assert (found["msg"], found["path"], found["n"]) == ('a\n"b" \x1b[31m\udcff', "/a b\r\n", 5)
    else:
        assert line.endswith(r'msg="a\n\"b\" \u001b[31m\\xff" path="/a b\r\n" n=5 e=""')


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(str(tmp_path / "n"))
        yield made


def test_systemd_is_told_by_a_path_and_by_an_abstract_name(systemd: socket.socket, tmp_path: Path) -> None:
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "n")}).ready("fine")
    assert systemd.recv(100) == b"READY=1\nSTATUS=fine"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as abstract:
        abstract.bind(f"\0sowatch-test-{os.getpid()}")
        Notifier({"NOTIFY_SOCKET": f"@sowatch-test-{os.getpid()}"}).stopping()
        assert abstract.recv(100) == b"STOPPING=1"


def test_without_systemd_nothing_is_told() -> None:
    for environment in ({}, {"NOTIFY_SOCKET": "vsock:2:1"}, {"NOTIFY_SOCKET": "/nothing/here"}):
        Notifier(environment).alive()


def test_the_watchdog_of_another_process_is_not_ours() -> None:
    assert Notifier({"WATCHDOG_USEC": "5000000"}).watchdog_s == 5.0
    assert Notifier({"WATCHDOG_USEC": "5000000", "WATCHDOG_PID": "1"}).watchdog_s is None
    assert Notifier({"WATCHDOG_USEC": "x"}).watchdog_s is None


# ---- the hub -------------------------------------------------------------------------------------


class Origin:
    """What a subscription needs of its publisher."""

    lost_in_queues = 0

    def held_copy(self) -> Loads:
        return {}

    def unsubscribe(self, subscription: SubscriberQueue) -> None:
        pass


def event(kind: str, pid: int = 1, inode: int = 1, rule: str = "r") -> LibraryEvent:
    library, process = Library("/x", FileId(1, 1, inode)), Process(pid, 5)
    return scripted.event(kind, rule=rule, library=library, process=process, ranges=())


READY = Ready(1, "h", None, "core", "exact", None, (), (), 0, 0, 0.0)


class ExplainContext:
    """A hub that is fed by hand."""

    def __init__(self) -> None:
        self.subscription = SubscriberQueue(
            Origin(), events=("load", "unload"), control=True, limit=10**6, limit_bytes=1 << 30
        )
        self.hub = EventHub(self.subscription)
        self.task = asyncio.create_task(self.hub.run())

    async def emit(self, *events: Event) -> None:
        for one in events:
            self.subscription.offer(one)
        self.subscription.hand_over()
        while self.subscription.waiting:  # noqa: ASYNC110 - the hub takes them in turns of its own
            await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def end(self) -> None:
        self.subscription.end()
        await self.task


async def lines(desk: ExplainContext, **options: Any) -> list[tuple[int, str, int | None]]:
    """What a client that joins now is told until the end: seq, event, pid."""
    client = desk.hub.join(**options)
    await desk.end()
    return parsed("".join([text.decode() async for text in desk.hub.stream(client)]))


def parsed(text: str) -> list[tuple[int, str, int | None]]:
    found = [strict.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    return [(one["seq"], one["event"], one.get("process", {}).get("pid")) for one in found]


def test_a_client_is_told_what_is_mapped_when_it_joins_and_then_what_happens() -> None:
    async def story() -> None:
        desk = ExplainContext()
        await desk.emit(event("load", 1), event("load", 2), READY, event("unload", 1))
        client = desk.hub.join()
        await desk.emit(event("load", 3), Stopped(1, 3, 1, 0))
        await desk.end()
        text = "".join([part.decode() async for part in desk.hub.stream(client)])
        assert parsed(text) == [
            (0, "activate", 2),
            (1, "load", 2),
            (2, "ready", None),
            (3, "load", 3),
            (4, "stopped", None),
        ]

    asyncio.run(story())


def test_a_client_gets_only_what_it_asks_for() -> None:
    async def story() -> None:
        desk = ExplainContext()
        await desk.emit(event("load", 1, 1, "a"), event("load", 1, 2, "b"), READY)
        assert await lines(desk, events=("load",), rule="b") == [(0, "load", 1), (1, "ready", None)]

    asyncio.run(story())


def test_a_client_that_comes_back_is_told_what_it_missed_while_that_is_known() -> None:
    async def story() -> None:
        desk = ExplainContext()
        await desk.emit(READY, event("load", 1), event("load", 2), event("load", 3))
        name = desk.hub._name
        assert parsed("".join([t async for t in texts(desk, f"{name}-2")])) == [(0, "load", 2), (1, "load", 3)]
        assert parsed("".join([t async for t in texts(desk, f"{name}-4")])) == []
        for unknown in (f"{name}-5", f"{name}-x", "other-2", name, ""):
            assert (0, "activate", 1) in parsed("".join([t async for t in texts(desk, unknown)]))
        await desk.emit(*(event("load", pid) for pid in range(10, 10 + KEPT_EVENTS)))
        assert (0, "activate", 1) in parsed("".join([t async for t in texts(desk, f"{name}-2")]))
        await desk.end()

    async def texts(desk: ExplainContext, last_id: str) -> Any:
        """Up to the live part."""
        client = desk.hub.join(last_id=last_id)
        stream = desk.hub.stream(client)
        async for part in stream:
            yield part.decode()
            if part.endswith(f"-{client.number}\n\n".encode()):
                break
        await stream.aclose()
        assert desk.hub.clients == 0

    asyncio.run(story())


def test_a_client_that_is_too_many_bytes_behind_is_told_how_much_it_missed_and_cut_off() -> None:
    ranges = tuple((at << 13, (at << 13) + 4096) for at in range(1 << 33, (1 << 33) + 256))

    async def story() -> None:
        desk = ExplainContext()
        await desk.emit(READY)
        client = desk.hub.join()
        big = [replace(event("load", pid), ranges=ranges) for pid in range(1, 4001)]
        await desk.emit(*big)
        assert MAX_WAITING_BYTES <= client._waiting_bytes < MAX_WAITING_BYTES + 10_000
        assert 0 < desk.hub._kept_bytes <= KEPT_BYTES
        parts = [part.decode() async for part in desk.hub.stream(client)]
        assert max(map(len, parts)) < 2 << 20
        last = strict.loads(parts[-1].splitlines()[1][6:])
        reported = len(parsed("".join(parts))) - 2  # ready comes first, lost last
        assert (last["event"], last["count"], last["where"]) == ("lost", 4000 - reported, "queue")
        assert (desk.hub.clients, desk.hub.clients_cut_off, client._waiting_bytes) == (0, 1, 0)

    asyncio.run(story())


def test_a_client_that_is_too_far_behind_is_told_how_much_it_missed_and_cut_off() -> None:
    async def story() -> None:
        desk = ExplainContext()
        await desk.emit(READY)
        client = desk.hub.join()
        await desk.emit(*(event("load", pid) for pid in range(1, MAX_WAITING + 11)))
        parts = [part.decode() async for part in desk.hub.stream(client)]
        last = strict.loads(parts[-1].splitlines()[1][6:])
        assert (last["event"], last["count"], last["where"]) == ("lost", 10, "queue")
        assert (desk.hub.clients, desk.hub.clients_cut_off) == (0, 1)
        await desk.end()

    asyncio.run(story())


# ---- a reader that fell behind while rules changed -----------------------------------------------


def test_a_reader_that_missed_a_change_of_rules_is_told_of_it_by_the_repair() -> None:
    old, new = event("load", 1, 1, "a"), event("load", 1, 1, "b")
    process, file = old.process, old.library.id
    assert process is not None
    found = [
        (one.event, one.cause, one.rule) for one in difference({process.id: {file: old}}, {process.id: {file: new}}, 0)
    ]
    assert found == [
        ("unload", "repair", "a"),
        ("deactivate", None, "a"),
        ("activate", None, "b"),
        ("load", "repair", "b"),
    ]
