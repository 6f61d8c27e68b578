"""The agent under load: what it tells is complete whatever clients, reloads and kills do meanwhile."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import pytest

from support.agent import Agent, NewAgent
from support.perf_cross_check import CrossCheck, perf_is_missing
from support.programs import Mapper
from support.prometheus import Prometheus
from support.receivers import free_port

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(os.geteuid() != 0, reason="BPF programs need root"),
    pytest.mark.timeout(300),
]

Event = dict[str, Any]

TINY = "[[rules]]\nname = 'tiny'\npattern = '/sow-[^/]*/libtiny[^/]*\\.so$'\n"
#: Room for what other processes of the machine do beside a test that allows no loss.
ROOM = "[watch]\nring_bytes = 67108864\n"
MORE = TINY + "[[rules]]\nname = 'libc'\npattern = '/libc\\.so\\.6$'\n"


@pytest.fixture
def new_agent(new_agent: NewAgent, deadline: Any) -> NewAgent:
    """A loaded one may take its time."""
    return functools.partial(new_agent, timeout_s=deadline(60))


@pytest.fixture
def library(make_library: Any, place: Path) -> Path:
    return Path(shutil.copyfile(make_library(), place / "libtiny.so"))


class Reader:
    """Reads a stream of events on a thread of its own, until it ends or one is the last that counts."""

    def __init__(self, agent: Agent, query: str = "") -> None:
        self.events: list[Event] = []
        self._stream = agent.events(query)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            for event in self._stream:
                self.events.append(event)

    def of(self, pid: int) -> list[Event]:
        return [event for event in list(self.events) if event.get("process", {}).get("pid") == pid]

    def controls(self) -> list[str]:
        kinds = {"load", "unload", "activate", "deactivate"}
        return [event["event"] for event in list(self.events) if event["event"] not in kinds]

    def join(self) -> None:
        """After the agent's end."""
        self._thread.join(20)
        assert not self._thread.is_alive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stream.hang_up()
        self._thread.join()
        self._stream.close()


def held(agent: Agent) -> dict[str, set[int]]:
    """Pids by path, by the inventory."""
    found = agent.get("/inventory").json
    pids = [process["pid"] for process in found["processes"]]
    return {one["path"]: {pids[at] for at in one["processes"]} for one in found["libraries"]}


def test_a_changed_file_under_load_loses_no_event(
    new_agent: NewAgent,
    programs: Any,
    library: Path,
    spawn: Any,
    wait_until: Any,
    deadline: Any,
    closing: contextlib.ExitStack,
) -> None:
    if reason := perf_is_missing():
        pytest.skip(reason)
    agent = new_agent(ROOM + TINY).start()
    reader = closing.enter_context(Reader(agent, "?events=load,unload&rule=tiny"))
    wait_until(lambda: "ready" in reader.controls())
    loaded = []

    def load_until_rules_are(names: list[str]) -> bool:
        loader = spawn([programs["loader"], library], stdout=subprocess.DEVNULL)
        assert loader.wait(deadline(20)) == 0
        loaded.append(loader.pid)
        return bool(agent.get("/readyz").json["rules"] == names)

    with CrossCheck() as witness:
        for turn in range(10):
            new = agent.config_path.with_name("new")
            new.write_text(ROOM + (MORE, TINY)[turn % 2], encoding="utf-8")
            new.rename(agent.config_path)
            wait_until(lambda turn=turn: load_until_rules_are([["tiny", "libc"], ["tiny"]][turn % 2]), 30)
    inode = library.stat().st_ino
    witnessed = {seen.pid for seen in witness.account.mappings if seen.inode == inode}
    assert witnessed == set(loaded)
    assert len(loaded) > 50

    def reported(kind: str) -> set[int]:
        return {event["process"]["pid"] for event in list(reader.events) if event["event"] == kind}

    wait_until(lambda: reported("load") >= witnessed and reported("unload") >= witnessed, 30, "every load and unload")
    ready = agent.get("/readyz").json
    assert (ready["lost"], ready["config"]["valid"]) == ({"kernel": 0, "queue": 0}, True)
    # Counted when all of it is in force, not just the rules.
    wait_until(lambda: 'sowatch_config_loads_total{result="ok"} 11.0' in agent.get("/metrics").text, what="the count")
    assert agent.get("/audit").json["differences"] == []
    agent.stop()
    reader.join()
    assert reader.controls() == ["ready", "stopped"]


def test_hundreds_of_scrapes_and_streams_during_a_storm_cost_no_event(
    new_agent: NewAgent,
    programs: Any,
    library: Path,
    tmp_path: Path,
    spawn: Any,
    wait_until: Any,
    closing: contextlib.ExitStack,
) -> None:
    port = free_port()
    agent = new_agent(TINY, options=["--listen", f"127.0.0.1:{port}"]).start()
    prometheus = Prometheus(spawn, wait_until, tmp_path, f"127.0.0.1:{port}")
    readers = [closing.enter_context(Reader(agent)) for _ in range(100)]
    with Mapper(programs["mapper"], tmp_path) as mapper, ThreadPoolExecutor(50) as pool:
        scrapes = [pool.submit(agent.get, "/metrics") for _ in range(500)]
        storm = spawn([programs["storm"], "2", "500", "/bin/true"], stdout=subprocess.DEVNULL)
        for _ in range(500):
            mapper.unmap(*mapper.map(library))
        mapper.map(library)
        assert [scrape.result().status for scrape in scrapes] == [200] * 500
        assert storm.wait(60) == 0
        for reader in readers:
            wait_until(lambda reader=reader: len(reader.of(mapper.pid)) >= 1502, 60, "every event at every client")
            kinds = [(event["event"], event.get("cause")) for event in reader.of(mapper.pid)]
            assert kinds[:3] == [("activate", None), ("load", "mmap"), ("unload", "munmap")]
            assert kinds == kinds[:3] * 500 + kinds[:2]
        assert agent.get("/readyz").json["lost"] == {"kernel": 0, "queue": 0}
        prometheus.wait_for("sowatch_watcher_matches_total", {(): 501})
        prometheus.wait_for("sum(sowatch_watcher_lost_total)", {(): 0})
    agent.stop()
    for reader in readers:
        reader.join()
        assert reader.controls() == ["ready", "stopped"]


def test_an_agent_that_was_killed_under_load_is_right_again_after_its_start(
    new_agent: NewAgent, programs: Any, library: Path, place: Path, tmp_path: Path, spawn: Any
) -> None:
    agent = new_agent(TINY).start()
    with contextlib.ExitStack() as stack:
        mappers = [stack.enter_context(Mapper(programs["mapper"], tmp_path)) for _ in range(5)]
        spawn([programs["storm"], "1", "1000000", "/bin/true"], stdout=subprocess.DEVNULL)
        for count, mapper in enumerate(mappers):
            at = mapper.map(library)
            agent.stop(signal.SIGKILL)
            if count % 2:
                mapper.unmap(*at)
            agent.start()
            expected = {one.pid for number, one in enumerate(mappers[: count + 1]) if number % 2 == 0}
            assert held(agent).get(str(library), set()) == expected
            assert agent.get("/audit").json["differences"] == []
    agent.stop()


def test_a_client_that_does_not_read_is_cut_off_and_delays_nobody(
    new_agent: NewAgent, programs: Any, library: Path, tmp_path: Path, wait_until: Any, closing: contextlib.ExitStack
) -> None:
    agent = new_agent(TINY).start()
    deaf = agent.events()
    deaf.until(lambda event: event["event"] == "ready")
    reader = closing.enter_context(Reader(agent))
    with Mapper(programs["mapper"], tmp_path) as mapper:
        for _ in range(6_000):
            mapper.unmap(*mapper.map(library))
        wait_until(lambda: len(reader.events) >= 1 + 4 * 6_000, 60, "every event at the client that reads")
        assert len(reader.of(mapper.pid)) == 3 * 6_000
    found = list(deaf)
    deaf.close()
    assert found[-1]["event"] == "lost"
    assert found[-1]["where"] == "queue"
    assert found[-1]["count"] > 0
    assert agent.get("/readyz").json["lost"] == {"kernel": 0, "queue": 0}
    assert "\nsowatch_agent_clients_cut_off_total 1.0\n" in agent.get("/metrics").text
    agent.stop()
    reader.join()
