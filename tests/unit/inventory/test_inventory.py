"""Rows for people who look, and the feed that the page gets, from maps that a test writes down."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from sowatch.agent.page.feed import Feed
from sowatch.inventory import inventory as inventory_module
from sowatch.inventory.inventory import Inventory, InventoryView
from sowatch.model.events import Process, Ready
from sowatch.model.identity import FileId
from sowatch.model.stats import Mapped
from support import strict
from support.scripted import PROCESS, READY, SSL

#: Pids that no process has, so that nothing is found on disk.
NGINX = replace(PROCESS, pid=(1 << 22) - 1)
CURL = Process(pid=(1 << 22) - 2, start_ns=7, comm="curl", container=None)
ZLIB = replace(SSL, path="/usr/lib/libz.so.1", id=FileId(254, 0, 100))


@dataclass
class Stats:
    loads: int = 0
    unloads: int = 0
    lost_kernel: int = 0
    lost_queue: int = 0


@dataclass
class Map:
    """A watched map that a test changes."""

    mapped: list[Mapped] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    ready: Ready | None = READY
    is_repaired: bool = True

    def snapshot(self, *, with_ranges: bool = True) -> Sequence[Mapped]:
        return list(self.mapped)


def mapped(process: Process = NGINX, library: Any = SSL, cause: str = "mmap", time_ns: int = 100) -> Mapped:
    return Mapped(process, library, "all", ((0x1000, 0x2000),), cause, time_ns)


def rows(picture: InventoryView) -> dict[str, Any]:
    return {row.library.path: row for row in picture.libraries.values()}


def test_a_library_has_its_holders_and_their_containers() -> None:
    picture = Inventory(Map([mapped(), mapped(CURL), mapped(CURL, ZLIB)])).look()
    processes = {row.process.comm: row for row in picture.processes.values()}
    ssl, zlib = rows(picture)[SSL.path], rows(picture)[ZLIB.path]
    assert ssl.holders == (processes["nginx"].number, processes["curl"].number)
    assert zlib.holders == (processes["curl"].number,)
    assert (ssl.containers, zlib.containers) == (("3f2a9c8b1d0e4455",), ())
    assert (processes["nginx"].libraries, processes["curl"].libraries) == (1, 2)
    assert (picture.mappings, picture.left_out) == (3, 0)


def test_one_file_under_two_paths_is_two_rows_and_two_files_under_one_path_as_well() -> None:
    other_path = replace(SSL, path="/opt/libssl.so.3")
    other_file = replace(SSL, id=FileId(254, 0, 101))
    picture = Inventory(Map([mapped(), mapped(CURL, other_path), mapped(CURL, other_file)])).look()
    assert len(picture.libraries) == 3


def test_a_row_keeps_its_number_and_its_beginning_while_it_is_there_and_a_new_one_has_others() -> None:
    watched = Map([mapped(time_ns=100), mapped(CURL, time_ns=200)])
    inventory = Inventory(watched)
    first = rows(inventory.look())[SSL.path]
    watched.mapped = [mapped(CURL, time_ns=200)]
    second = rows(inventory.look())[SSL.path]
    assert (second.number, second.since_ns) == (first.number, 100)
    watched.mapped = []
    assert inventory.look() == InventoryView({}, {}, 0, 0)
    watched.mapped = [mapped(time_ns=300)]
    third = rows(inventory.look())[SSL.path]
    assert third.number > first.number
    assert third.since_ns == 300


def test_what_the_watch_found_is_older_than_what_it_saw_being_loaded() -> None:
    picture = Inventory(Map([mapped(cause="snapshot"), mapped(CURL, ZLIB)])).look()
    assert {path: row.is_older for path, row in rows(picture).items()} == {SSL.path: True, ZLIB.path: False}


def test_mappings_beyond_the_limit_are_told_as_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory_module, "MAX_MAPPINGS", 2)
    picture = Inventory(Map([mapped(), mapped(CURL), mapped(CURL, ZLIB)])).look()
    assert (len(picture.libraries), picture.mappings, picture.left_out) == (1, 3, 1)


def test_a_process_is_described_by_the_event_that_knows_most_of_it() -> None:
    picture = Inventory(Map([mapped(), mapped(replace(NGINX, exe=None), ZLIB)])).look()
    (row,) = picture.processes.values()
    assert row.process.exe == "/usr/sbin/nginx"


def test_each_second_says_what_it_brought(wait_until: Any) -> None:
    watched = Map()
    with Inventory(watched, sample_s=0.01) as inventory:
        wait_until(inventory.history)
        watched.stats.loads, watched.stats.lost_queue = 5, 2
        wait_until(lambda: any(second.loads > 0 and second.lost > 0 for second in inventory.history()))
        watched.stats.unloads = 3
        wait_until(lambda: any(second.unloads > 0 for second in inventory.history()))
        wait_until(lambda: inventory.history()[-1].loads == 0)


def test_closing_ends_both_threads_and_may_be_repeated() -> None:
    inventory = Inventory(Map())
    inventory.start()
    inventory.close()
    inventory.close()
    assert {"sowatch-history", "sowatch-stale"}.isdisjoint(thread.name for thread in threading.enumerate())


# ---- the feed -----------------------------------------------------------------------------------


def reported(frame: bytes) -> tuple[str, int, dict[str, Any]]:
    """Event, id and data of a server-sent event."""
    event, number, data, *rest = frame.decode("ascii").split("\n")
    assert rest == ["", ""]
    return event.removeprefix("event: "), int(number.removeprefix("id: ")), strict.loads(data.removeprefix("data: "))


def fed(watched: Map, script: Any) -> None:
    """Runs ``script(feed)`` with a client that has entered; each look comes when the script asks for it."""

    async def run() -> None:
        feed = Feed(Inventory(watched))
        feed.clients = 1
        async with asyncio.timeout(30):
            await script(feed)

    asyncio.run(run())


def test_a_client_gets_everything_first_and_then_only_what_changed() -> None:
    watched = Map([mapped()])

    async def script(feed: Feed) -> None:
        await feed._look()
        event, number, data = reported((await feed.next(0))[1])
        assert (event, number) == ("everything", 1)
        assert [row["path"] for row in data["libraries"]] == [SSL.path]
        assert [row["pid"] for row in data["processes"]] == [NGINX.pid]
        watched.mapped = [mapped(), mapped(library=ZLIB)]
        await feed._look()
        event, number, data = reported((await feed.next(1))[1])
        assert (event, number) == ("change", 2)
        assert [row["path"] for row in data["libraries"]] == [ZLIB.path]
        assert [row["libraries"] for row in data["processes"]] == [2]
        watched.mapped = []
        await feed._look()
        event, _, data = reported((await feed.next(2))[1])
        assert (event, data["libraries"], data["gone_libraries"], data["gone_processes"]) == ("change", [], [1, 2], [1])

    fed(watched, script)


def test_a_client_that_is_late_gets_the_changes_it_missed_and_one_that_is_very_late_everything() -> None:
    async def script(feed: Feed) -> None:
        for _ in range(6):
            await feed._look()
        assert reported((await feed.next(4))[1])[:2] == ("change", 5)
        assert reported((await feed.next(2))[1])[:2] == ("change", 3)
        assert reported((await feed.next(1))[1])[:2] == ("everything", 6)

    fed(Map(), script)


def test_everything_is_encoded_once_for_all_clients() -> None:
    async def script(feed: Feed) -> None:
        await feed._look()
        frames = await asyncio.gather(*(feed.next(0) for _ in range(50)))
        assert len({id(frame) for _, frame in frames}) == 1

    fed(Map([mapped()]), script)


def test_a_frame_is_ascii_on_one_line_whatever_is_in_the_names() -> None:
    path = "/lib\n\ndata: {}\r\u2028\udcff\x00.so"

    async def script(feed: Feed) -> None:
        await feed._look()
        _, _, data = reported((await feed.next(0))[1])
        assert data["libraries"][0]["path"] == path

    fed(Map([mapped(library=replace(SSL, path=path))]), script)


def test_a_process_has_the_name_of_its_user_and_its_unit() -> None:
    cgroup = "/system.slice/nginx.service/workers"

    async def script(feed: Feed) -> None:
        await feed._look()
        _, _, data = reported((await feed.next(0))[1])
        assert [(row["user"], row["unit"]) for row in data["processes"]] == [("root", "nginx.service"), (None, None)]

    host = replace(CURL, uid=0, cgroup=cgroup)
    in_container = replace(NGINX, uid=0, container="c" * 64, cgroup=f"/system.slice/docker-{'c' * 64}.scope")
    fed(Map([mapped(process=host), mapped(process=in_container)]), script)


def test_clients_are_let_go_when_the_inventory_is_closed() -> None:
    async def run() -> None:
        inventory = Inventory(Map())
        feed = Feed(inventory)
        feed.enter()
        async with asyncio.timeout(30):
            version, _ = await feed.next(0)
            waiting = asyncio.create_task(feed.next(version))
            inventory.close()
            while (found := await waiting) is not None:
                waiting = asyncio.create_task(feed.next(found[0]))
        feed.leave()
        assert feed.clients == 0

    asyncio.run(run())


def test_a_look_that_fails_is_not_the_end_of_the_feed(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Map):
        failures = 1

        def snapshot(self, *, with_ranges: bool = True) -> Sequence[Mapped]:
            if self.failures:
                self.failures -= 1
                raise RuntimeError("not now")
            return super().snapshot(with_ranges=with_ranges)

    async def run() -> None:
        feed = Feed(Inventory(Failing()))
        feed.enter()
        async with asyncio.timeout(30):
            assert reported((await feed.next(0))[1])[0] == "everything"
        feed.leave()

    asyncio.run(run())
    assert "not now" in caplog.text


def test_the_files_of_the_page_ship_and_name_nothing_from_elsewhere() -> None:
    import re

    from sowatch.agent import page

    assets = Path(page.__file__).parent / "assets"
    assert {path.name for path in assets.iterdir()} == set(page._FILES.values())
    for path in assets.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text), path
        assert not re.search(r'<[^>]* (on\w+|style)="|<script>|<style', text), path
