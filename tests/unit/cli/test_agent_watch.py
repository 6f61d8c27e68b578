"""What a client makes of an agent's stream, and of the ways in which an agent fails."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from sowatch import cli
from sowatch.cli import _client
from sowatch.cli._agent_watch import AgentWatch
from sowatch.cli._client import Agent
from sowatch.cli._options import Selection
from sowatch.model.config import Config
from sowatch.model.errors import SowatchError, UsageError
from sowatch.model.events import Event, Load, Lost, Repaired, Stopped, Unload
from sowatch.model.identity import FileId
from sowatch.model.literals import EVENT_KINDS
from sowatch.model.rules import Rule
from support.scripted import PROCESS, READY, SSL, TIME_NS, event
from support.scripted_agent import CUT, HANG, answer, scripted_agent, stream

SELECTION = Selection((Rule(None),), Config(), frozenset(), None, exclude_self=False, snapshot=True)
READYZ = answer({"ready": True, "rules": ["all"], "version": "0.1.0"})
OTHER = replace(SSL, path="/usr/lib/libz.so.1", id=FileId(254, 0, 77))
LOAD = event("load", "snapshot")
SECOND = replace(LOAD, process=replace(PROCESS, pid=PROCESS.pid + 1))
ZLIB = replace(LOAD, library=OTHER)
assert isinstance(LOAD, Load)

Watching = Callable[..., AgentWatch]


@pytest.fixture
def watching(tmp_path: Path) -> Iterator[Watching]:
    """A started watch of an agent whose streams are these, one after the other."""
    opened: list[Any] = []

    def start(*streams: list[bytes], selection: Selection = SELECTION) -> AgentWatch:
        path = tmp_path / f"s{len(opened)}"
        serving = scripted_agent(path, {"/readyz": [READYZ], "/events": list(streams), "/explain": [answer({})]})
        serving.__enter__()
        watch = AgentWatch(Agent(str(path)), selection)
        watch.reader = watch.subscribe(events=EVENT_KINDS)  # type: ignore[attr-defined]
        opened.append((serving, watch))
        watch.start()
        return watch

    yield start
    for serving, watch in opened:
        watch.stop()
        serving.__exit__(None, None, None)


def events(watch: AgentWatch, count: int) -> list[Event]:
    return [found for _ in range(count) if (found := watch.reader.get(20)) is not None]  # type: ignore[attr-defined]


def named(found: list[Event]) -> list[tuple[str, str | None]]:
    return [(one.event, getattr(one, "cause", None)) for one in found]


def test_loads_are_told_with_activations_of_the_first_and_the_last_process(watching: Watching) -> None:
    gone = [Unload(LOAD.rule, LOAD.library, one.process, "exit", 5, TIME_NS) for one in (LOAD, SECOND)]
    watch = watching(stream([LOAD, READY, replace(SECOND, cause="mmap"), *gone], HANG))

    assert named(events(watch, 7)) == [
        ("activate", "snapshot"),
        ("load", "snapshot"),
        ("ready", None),
        ("load", "mmap"),
        ("unload", "exit"),
        ("unload", "exit"),
        ("deactivate", None),
    ]
    watch.stop()
    assert named(events(watch, 1)) == [("stopped", None)]
    assert (watch.stats.loads, watch.stats.unloads, watch.stats.processes) == (2, 2, 0)


def test_what_a_silent_snapshot_has_is_in_nobodys_count(watching: Watching) -> None:
    gone = [Unload(LOAD.rule, LOAD.library, one.process, "exit", 5, TIME_NS) for one in (SECOND, LOAD)]
    script = stream([LOAD, ZLIB, READY, replace(SECOND, cause="mmap"), *gone], HANG)
    watch = watching(script, selection=replace(SELECTION, snapshot=False))

    assert named(events(watch, 5)) == [
        ("ready", None),
        ("activate", "mmap"),
        ("load", "mmap"),
        ("unload", "exit"),
        ("deactivate", None),
    ]
    watch.stop()
    assert named(events(watch, 1)) == [("stopped", None)]


def test_a_stream_that_was_cut_off_is_begun_anew_and_what_was_missed_is_repaired(watching: Watching) -> None:
    first = stream([LOAD, SECOND, READY, Lost(TIME_NS, 20_001, "queue")])
    watch = watching(first, stream([SECOND, ZLIB, READY], HANG))
    found = events(watch, 9)

    assert named(found)[4:] == [
        ("lost", None),
        ("unload", "repair"),
        ("activate", "repair"),
        ("load", "repair"),
        ("repaired", None),
    ]
    repaired = found[-1]
    assert isinstance(repaired, Repaired)
    assert (repaired.loads, repaired.unloads) == (1, 1)
    assert {one.library.path for one in watch.snapshot()} == {SSL.path, OTHER.path}
    assert (watch.stats.lost_queue, watch.is_repaired) == (20_001, True)


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (stream([LOAD, READY], CUT), "ended before its answer was complete"),
        (stream([LOAD, READY]), "has ended, and with it the watch"),
        (stream([LOAD, READY, Stopped(TIME_NS, 1, 0, 0)], HANG), "has ended, and with it the watch"),
    ],
)
def test_what_ends_a_stream_comes_after_its_last_event(watching: Watching, end: list[bytes], said: str) -> None:
    watch = watching(end)
    assert named(events(watch, 3))[-1] == ("ready", None)
    with pytest.raises(SowatchError, match=said):
        watch.reader.get(20)  # type: ignore[attr-defined]
    assert watch.wait(20)
    with pytest.raises(SowatchError, match=r"`sowatch serve`\.$"):
        watch.check()


def test_a_stream_that_falls_silent_is_given_up(watching: Watching, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_client, "SILENCE_TIMEOUT_S", 0.2)
    watch = watching(stream([LOAD, READY], HANG))
    assert watch.wait(20)
    with pytest.raises(SowatchError, match=r"has not answered for 0 s: it hangs, or was stopped"):
        watch.check()


@pytest.mark.parametrize("end", [stream([LOAD], CUT), stream([LOAD])])
def test_an_agent_that_ends_before_it_is_ready_is_an_error_of_the_start(watching: Watching, end: list[bytes]) -> None:
    with pytest.raises(SowatchError, match=r"start it again with `sowatch serve`\.$"):
        watching(end)


def test_a_selection_narrows_down_the_stream(watching: Watching) -> None:
    rules = (Rule("libz", name="z"),)
    watch = watching(stream([LOAD, SECOND, ZLIB, READY], HANG), selection=replace(SELECTION, rules=rules))
    assert [one.library.path for one in watch.snapshot()] == [OTHER.path]
    pids = replace(SELECTION, pids=frozenset([SECOND.process.pid]))
    assert [one.process.pid for one in watching(stream([LOAD, SECOND, READY], HANG), selection=pids).snapshot()] == [
        SECOND.process.pid
    ]


@pytest.mark.parametrize(("peer", "shown"), [(4_000_000, 1), (None, 2)])
def test_this_process_is_left_out_unless_the_agent_has_other_numbers_for_it(
    watching: Watching, monkeypatch: pytest.MonkeyPatch, peer: int | None, shown: int
) -> None:
    monkeypatch.setattr(Agent, "peer_pid", lambda _: peer)
    ours = replace(LOAD, process=replace(PROCESS, pid=os.getpid()))
    watch = watching(stream([ours, SECOND, READY], HANG), selection=replace(SELECTION, exclude_self=True))
    assert len(watch.snapshot()) == shown


def test_an_agent_cannot_be_asked_for_what_files_export(watching: Watching) -> None:
    with pytest.raises(UsageError, match=r"does not say what files export\. Leave that out, or --agent\."):
        watching(stream([READY], HANG), selection=replace(SELECTION, rules=(Rule(None, exports=["SSL_read"]),)))


# ---- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ([b"HTTP/1.1 200 X\r\nContent-Length: 9\r\n\r\n{", CUT], "ended before its answer was complete"),
        ([CUT], "ended before its answer was complete"),
        ([HANG], "has not answered for 0 s: it hangs, or was stopped"),
        (answer({"error": "not now. Later."}, 503), r"^not now\. Later\.$"),
        ([b"HTTP/1.1 200 X\r\nContent-Length: 2\r\n\r\nhi"], "gave no JSON"),
        ([b"HTTP/1.1 404 X\r\nContent-Length: 9\r\n\r\nNot Found"], "has no /audit: it is of another version"),
        ([b"SSH-2.0-OpenSSH\r\n", CUT], "ended before its answer was complete"),
    ],
)
def test_each_way_to_fail_has_its_line(tmp_path: Path, script: list[bytes], said: str) -> None:
    with scripted_agent(tmp_path / "s", {"/audit": [script]}):
        with pytest.raises(SowatchError, match=said) as found:
            Agent(str(tmp_path / "s")).get("/audit", 0.3)
        assert str(found.value).endswith((".", "?"))


def test_another_server_on_the_socket_is_no_agent(tmp_path: Path) -> None:
    with (
        scripted_agent(tmp_path / "s", {"/readyz": [answer([1])]}),
        pytest.raises(SowatchError, match=r"is the socket of another server\. Name that of `sowatch serve`\.$"),
    ):
        Agent(str(tmp_path / "s")).ready()


def test_an_answer_in_another_form_is_that_of_another_version(tmp_path: Path) -> None:
    with (
        scripted_agent(tmp_path / "s", {"/readyz": [READYZ], "/events": [stream([])]}),
        pytest.raises(SowatchError, match="has no /mappings: it is of another version than this command"),
    ):
        Agent(str(tmp_path / "s")).open("/mappings")


# ---- the command line ----------------------------------------------------------------------------

COMMANDS: list[list[str]] = [["list"], ["watch"], ["top", "--once"], ["audit"], ["explain", "1"]]


@pytest.mark.parametrize("words", COMMANDS)
def test_where_no_agent_is_the_line_says_how_to_start_one(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*words, "--agent", str(tmp_path / "none")]) == 1
    out, said = capfd.readouterr()
    assert out == ""
    assert said == (
        f"sowatch: no agent answers on '{tmp_path}/none': No such file or directory. Start it with `sowatch serve`, or "
        "name the socket of another one with --agent.\n"
    )


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["list", "--strategy", "core"], "--strategy"),
        (["watch", "--hooks", "syscall"], "--hooks"),
        (["top", "--proc-root", "/proc/"], "--proc-root"),
        (["explain", "1", "--strategy", "procfs"], "--strategy"),
        (["audit", "--duration", "1"], "--duration"),
        (["audit", "--kind", "all"], "--kind"),
        (["explain", "1", "--rule", "x"], "--rule"),
        (["watch", "--pid", "1", "--follow"], "--follow"),
    ],
)
def test_what_says_how_to_watch_is_refused_beside_an_agent(
    words: list[str], what: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*words, "--agent", "/none"]) == 2
    out, said = capfd.readouterr()
    assert (out, said.count("\n")) == ("", 1)
    assert what in said
    assert said.endswith(("Leave it out, or --agent.\n", "Leave them out, or --agent.\n"))
