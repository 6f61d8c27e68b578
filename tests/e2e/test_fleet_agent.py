"""The section [fleet] of the agent: what a receiver has of real processes, also after either of both went away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sowatch.linux.content_hash import htlhash
from support import strict
from support.agent import Agent, NewAgent
from support.fleet_receiver import FleetReceiver, Sent, fleet_receiver, receiving
from support.programs import Mapper, build
from support.receivers import free_port, grpc_collector

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="BPF programs need root")

#: A rule that wants nothing of what is mapped here: the fleet sees it all the same.
NOTHING = "[[rules]]\nname = 'ours'\npattern = '/sow-none-of-these/'\n"


def fleet(url: str, *more: str) -> str:
    return "\n".join([NOTHING, "[fleet]", "enabled = true", f"endpoint = '{url}'", "interval_s = 1", *more, ""])


def rows(receiver: FleetReceiver, path: Path) -> list[Sent]:
    """What is in force of a file."""
    return [
        one for one in receiver.replica().in_force.values() if one.attributes["sowatch.library.path"] == os.fspath(path)
    ]


def is_known(receiver: FleetReceiver, path: Path, processes: int) -> bool:
    return [one.attributes["sowatch.library.processes"] for one in rows(receiver, path)] == [processes]


def output(agent: Agent) -> dict[str, Any]:
    (found,) = (one for one in agent.get("/readyz").json["output_states"] if one["kind"] == "fleet")
    return dict(found)


def test_a_library_that_comes_and_goes_is_mapped_and_unmapped(
    new_agent: NewAgent, mapper: Mapper, make_library: Any, wait_until: Any
) -> None:
    before, later = make_library("libbefore.so"), make_library("liblater.so")
    mapper.map(before)
    with fleet_receiver() as receiver:
        agent = new_agent(fleet(receiver.url)).start()
        wait_until(lambda: is_known(receiver, before, 1), 60, "the first snapshot")
        at = mapper.map(later)
        wait_until(lambda: is_known(receiver, later, 1), 60, "the library that came")
        (row,) = rows(receiver, later)
        assert row.event == "sowatch.library.mapped"
        assert row.attributes["sowatch.library.soname"] == "liblater.so"
        assert row.attributes["sowatch.library.pids"] == str(mapper.pid)
        assert row.attributes["process.executable.path"] == os.readlink(f"/proc/{mapper.pid}/exe")
        assert len(row.attributes["process.executable.build_id.gnu"]) == 40
        executable = Path(row.attributes["process.executable.path"])
        assert rows(receiver, executable)[0].attributes["sowatch.library.kind"] == "executable"
        mapper.unmap(*at)
        wait_until(lambda: is_known(receiver, later, 0) or not rows(receiver, later), 60, "the library that went")
        assert [one.attributes["sowatch.library.path"] for one in receiver.of("unmapped")].count(str(later)) == 1
        wait_until(lambda: not receiver.replica().is_lossy, 60, "a host of which all is known")
        assert receiver.records[0].resource["service.name"] == "sowatch"
        assert receiver.headers[0]["content-encoding"] == "gzip"
        assert output(agent)["up"] is True
        # Its rule is nobody else's business.
        assert agent.get("/inventory").json["libraries"] == []
        assert agent.stop() == 0


@pytest.mark.alone
def test_two_thousand_short_processes_make_no_record(
    new_agent: NewAgent, make_library: Any, tmp_path: Path, wait_until: Any
) -> None:
    library = make_library("libshot.so", exports=("shot",))
    storm, oneshot = build("storm", tmp_path), build("oneshot", tmp_path)
    with fleet_receiver() as receiver:
        agent = new_agent(fleet(receiver.url)).start()
        wait_until(lambda: receiver.replica().heartbeat is not None, 60, "the first heartbeat")
        subprocess.run([storm, "1", "2000", oneshot, library, "shot"], check=True, stdout=subprocess.DEVNULL)
        beats = len(receiver.of("heartbeat"))
        wait_until(lambda: len(receiver.of("heartbeat")) >= beats + 3, 60, "three more heartbeats")
        assert [one for one in receiver.records if is_of(one, oneshot)] == []
        assert agent.stop() == 0


def is_of(one: Sent, program: Path) -> bool:
    return one.attributes.get("process.executable.path") == os.fspath(program)


def test_a_receiver_that_was_away_has_everything_once_it_is_back(
    new_agent: NewAgent, mapper: Mapper, make_library: Any, wait_until: Any
) -> None:
    port, receiver = free_port(), FleetReceiver()
    agent = new_agent(fleet(f"http://127.0.0.1:{port}")).start()
    wait_until(lambda: output(agent)["up"] is False, 60, "a receiver that is down")
    library = make_library("libaway.so")
    at = mapper.map(library)
    with receiving(receiver, port):
        wait_until(lambda: is_known(receiver, library, 1), 90, "what was mapped meanwhile")
        wait_until(lambda: not receiver.replica().is_lossy, 60, "a host of which all is known")
    mapper.unmap(*at)
    with receiving(receiver, port):
        wait_until(lambda: not rows(receiver, library), 90, "what went while the receiver was away")
        wait_until(lambda: not receiver.replica().is_lossy, 60, "a host of which all is known")
        assert agent.stop() == 0


def test_what_an_agent_that_was_killed_never_ended_goes_with_the_next_one(
    new_agent: NewAgent, mapper: Mapper, make_library: Any, wait_until: Any
) -> None:
    library, stays = make_library("libkilled.so"), make_library("libstays.so")
    at = mapper.map(library)
    mapper.map(stays)
    with fleet_receiver() as receiver:
        first = new_agent(fleet(receiver.url)).start()
        wait_until(lambda: is_known(receiver, library, 1), 60, "the first snapshot")
        first.stop(signal.SIGKILL)
        mapper.unmap(*at)
        second = new_agent(fleet(receiver.url)).start()
        wait_until(lambda: not rows(receiver, library), 60, "a snapshot without it")
        assert is_known(receiver, stays, 1)
        wait_until(lambda: not receiver.replica().is_lossy, 60, "a host of which all is known")
        assert len(receiver.replica().ends) == 2
        assert second.stop() == 0


def test_a_receiver_that_is_busy_is_asked_again_and_misses_nothing(
    new_agent: NewAgent, mapper: Mapper, make_library: Any, wait_until: Any
) -> None:
    library = make_library("libbusy.so")
    mapper.map(library)
    with fleet_receiver() as receiver:
        receiver.answers = [(503, {"Retry-After": "1"}), (429, {}), (502, {})]
        agent = new_agent(fleet(receiver.url)).start()
        wait_until(lambda: is_known(receiver, library, 1), 90, "the snapshot after three refusals")
        wait_until(lambda: not receiver.replica().is_lossy, 60, "a host of which all is known")
        assert (output(agent)["errors"], output(agent)["lost"]) == (3, 0)
        assert agent.stop() == 0


def test_records_that_are_refused_for_good_are_counted_and_sent_anew(
    new_agent: NewAgent, mapper: Mapper, make_library: Any, wait_until: Any
) -> None:
    library = make_library("librefused.so")
    mapper.map(library)
    with fleet_receiver() as receiver:
        receiver.answers = [(400, {})]
        agent = new_agent(fleet(receiver.url)).start()
        wait_until(lambda: is_known(receiver, library, 1), 90, "a second snapshot")
        wait_until(lambda: not receiver.replica().is_lossy, 60, "a host of which all is known")
        assert output(agent)["lost"] > 0
        assert min(one.snapshot for one in receiver.records) == 2
        assert agent.stop() == 0


def test_the_section_takes_effect_and_ends_without_a_restart(
    new_agent: NewAgent, mapper: Mapper, make_library: Any, wait_until: Any, place: Path
) -> None:
    library = make_library("liblive.so")
    mapper.map(library)
    token = place / "token"
    token.write_text("one\n", encoding="ascii")
    with fleet_receiver() as receiver:
        agent = new_agent(NOTHING).start()
        agent.config_path.write_text(fleet(receiver.url, f"token_file = '{token}'"), encoding="utf-8")
        wait_until(lambda: is_known(receiver, library, 1), 60, "the section to take effect")
        assert receiver.headers[-1]["authorization"] == "Bearer one"
        token.write_text("two\n", encoding="ascii")
        wait_until(lambda: receiver.headers[-1]["authorization"] == "Bearer two", 60, "the token to be read anew")
        agent.config_path.write_text(NOTHING, encoding="utf-8")
        wait_until(lambda: agent.get("/readyz").json["output_states"] == [], 60, "the section to end")
        assert "fleet" not in agent.get("/readyz").json["rules"]
        assert agent.stop() == 0


def test_records_go_over_grpc_too(new_agent: NewAgent, mapper: Mapper, make_library: Any, wait_until: Any) -> None:
    library = make_library("libgrpc.so")
    mapper.map(library)
    with grpc_collector() as collector:
        agent = new_agent(fleet(collector.url, "protocol = 'grpc'", "headers = { x-one = '1' }")).start()

        def paths() -> set[str]:
            return {
                attribute.value.string_value
                for record in collector.records()
                for attribute in record.attributes
                if attribute.key == "sowatch.library.path"
            }

        wait_until(lambda: os.fspath(library) in paths(), 60, "the snapshot")
        assert collector.headers[0]["x-one"] == "1"
        assert agent.stop() == 0


def test_what_rules_let_go_is_mapped_all_the_same_and_its_events_are_nobody_elses(
    new_agent: NewAgent, mapper: Mapper, make_library: Any, wait_until: Any, place: Path
) -> None:
    library = make_library("libruled.so")
    mapper.map(library)
    sink = f"[[sinks]]\ntype = 'file'\npath = '{place}/events'\n"
    with fleet_receiver() as receiver:
        text = fleet(receiver.url) + sink
        agent = new_agent(text.replace("/sow-none-of-these/", "libruled")).start()
        wait_until(lambda: is_known(receiver, library, 1), 60, "the first snapshot")
        agent.config_path.write_text(text, encoding="utf-8")
        wait_until(lambda: agent.get("/inventory").json["libraries"] == [], 60, "other rules")
        answer = agent.post("/debug/detach-pid", {"pid": mapper.pid, "type": "fleet"})
        assert answer.status == 200, answer.text
        beats = len(receiver.of("heartbeat"))
        wait_until(lambda: len(receiver.of("heartbeat")) >= beats + 3, 60, "three more heartbeats")
        assert is_known(receiver, library, 1)
        paths = [one.attributes["sowatch.library.path"] for one in receiver.of("unmapped")]
        assert os.fspath(library) not in paths
        mapper.close()
        wait_until(lambda: not rows(receiver, library), 60, "the end of its process")
        assert agent.stop() == 0
    events = [strict.loads(line) for line in (place / "events").read_text(encoding="utf-8").splitlines()]
    assert {one["rule"] for one in events if "rule" in one} == {"ours"}


def test_a_file_without_a_build_id_is_named_by_its_content_and_a_server_by_its_port(
    new_agent: NewAgent, make_library: Any, tmp_path: Path, wait_until: Any, spawn: Any
) -> None:
    library = build("tiny_library", tmp_path, flags=["-shared", "-fPIC", "-Wl,--build-id=none"], output="libplain.so")
    port = free_port()
    code = (
        f"import ctypes, socket; ctypes.CDLL({os.fspath(library)!r}); s = socket.create_server(('127.0.0.1', {port})); "
        "s.accept()"
    )
    spawn([sys.executable, "-c", code])
    with library.open("rb") as file:
        name = htlhash(file.fileno())
    with fleet_receiver() as receiver:
        agent = new_agent(fleet(receiver.url)).start()
        wait_until(lambda: is_known(receiver, library, 1), 60, "the first snapshot")
        (row,) = rows(receiver, library)
        assert row.attributes["sowatch.library.build_id"] == name
        wait_until(
            lambda: rows(receiver, library)[0].attributes.get("sowatch.process.listen") == f"tcp:{port}", 90, "its port"
        )
        assert agent.stop() == 0
