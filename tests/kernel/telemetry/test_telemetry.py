"""Metrics and sinks of a real watch: they say what happened, and nothing that hangs holds it up."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sowatch import Rule
from sowatch.telemetry import FileSink, MetricRegistry, PrometheusExporter, Sampler, SinkRunner, StdoutSink
from support import strict
from support.kernel import TAG, Ledger
from support.programs import Mapper
from support.prometheus import Prometheus
from support.receivers import serve

Start = Callable[..., Mapper]
NewLibrary = Callable[..., Path]
OpenLedger = Callable[..., Ledger]

NEW = rf"/libnew{TAG}\.so$"


def own(**callbacks: Any) -> Rule:
    """A rule for the library that ``library()`` makes."""
    return Rule(NEW, name="own", **callbacks)


def rounds(mapper: Mapper, library: Path, count: int) -> None:
    """Maps and unmaps it."""
    for _ in range(count):
        mapper.unmap(*mapper.map(library))


def lines(path: Path) -> list[dict[str, Any]]:
    return [strict.loads(line) for line in path.read_bytes().splitlines()]


def test_a_real_prometheus_has_what_the_watch_has_counted(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, spawn: Any, wait_until: Any, tmp_path: Path
) -> None:
    new, mapper, registry = library(), start(), MetricRegistry()
    ledger = open_ledger(own(on_load=lambda event: None, on_activate=lambda file: None))
    end = Sampler(registry, version="1").follow_watcher(ledger.watcher)
    exporter = PrometheusExporter(registry)
    rounds(mapper, new, 3)
    mapper.map(new)
    ledger.wait_for(lambda: len(ledger.of(mapper.pid)) == 7, "four loads and three unloads")
    assert ledger.watcher.audit().differences == ()
    wait_until(lambda: ledger.watcher.timings["own"].callbacks["on_load"].read().count == 4)

    with serve(lambda request: (200, *exporter.render(request.headers.get("Accept")))) as url:
        prometheus = Prometheus(spawn, wait_until, tmp_path, url.removeprefix("http://"))
        prometheus.wait_for("sowatch_watcher_matches_total", {(): 4})
        prometheus.wait_for("sowatch_watcher_unloads_total", {(): 3})
        prometheus.wait_for("sowatch_watcher_mappings", {(): 1})
        prometheus.wait_for("sum(sowatch_watcher_lost_total)", {(): 0})
        prometheus.wait_for("sowatch_audit_runs_total", {(): 1})
        prometheus.wait_for("sowatch_audit_differences", {(): 0})
        prometheus.wait_for("sowatch_file_registry_total_files", {(): 1})
        # Each of the four loads was the first of its kind, so the file was attached four times.
        prometheus.wait_for("sowatch_attach_duration_seconds_count", {("rule=own",): 4})
        delays = {("callback=on_activate", "rule=own"): 4.0, ("callback=on_load", "rule=own"): 4.0}
        prometheus.wait_for("sowatch_load_to_callback_seconds_count", delays)
        (hits,) = prometheus.query("sowatch_watcher_hits_total").values()
        assert hits >= 4
    end()


def test_what_the_snapshot_finds_is_no_delay_of_callbacks(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, wait_until: Any
) -> None:
    new, mapper = library(), start()
    mapper.map(new)
    ledger = open_ledger(own(on_load=lambda event: None))
    timings = ledger.watcher.timings["own"]
    wait_until(lambda: timings.callbacks["on_load"].read().count == 1)
    assert timings.delays["on_load"].read().count == 0
    start().map(new)
    wait_until(lambda: timings.delays["on_load"].read().count == 1)


def test_a_file_gets_every_event_of_the_watch_from_ready_to_stopped(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, tmp_path: Path, schema: Any
) -> None:
    new, mapper = library(), start()
    ledger = open_ledger(own())
    with SinkRunner(FileSink(tmp_path / "events"), ledger.watcher.subscribe()) as runner:
        rounds(mapper, new, 5)
        ledger.wait_for(lambda: len(ledger.of(mapper.pid)) == 10, "five loads and unloads")
        ledger.stop()
        runner.close()

    found = [schema(line) for line in (tmp_path / "events").read_bytes().splitlines()]
    assert [one["event"] for one in found] == [*["activate", "load", "unload", "deactivate"] * 5, "stopped"]
    assert {one["library"]["path"] for one in found[:-1]} == {str(new)}


@pytest.fixture
def tiny_disk(scratch: Path, spawn: Any) -> Path:
    """A tmpfs of 64 KiB in a mount namespace of its own, as this process can reach it."""
    mounted = scratch / "disk"
    mounted.mkdir()
    script = f"mount -t tmpfs -o size=64k none {mounted} && echo ready && exec cat"
    helper = spawn(["unshare", "--mount", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert helper.stdout.readline() == "ready\n"
    return Path(f"/proc/{helper.pid}/root{mounted}")


def test_a_full_disk_costs_no_event_of_anybody_and_the_file_has_all_once_there_is_room(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, tiny_disk: Path, wait_until: Any
) -> None:
    new, mapper = library(), start()
    ledger = open_ledger(own())
    path, ballast = tiny_disk / "events", tiny_disk / "ballast"
    with SinkRunner(FileSink(path, max_bytes=0), ledger.watcher.subscribe()) as runner:
        ballast.write_bytes(b"x" * (56 << 10))
        rounds(mapper, new, 20)
        ledger.wait_for(
            lambda: len(ledger.of(mapper.pid)) == 40, "twenty loads and unloads, told while the disk is full"
        )
        wait_until(lambda: runner.stats.errors)
        assert "No space left" in (runner.stats.last_error or "")
        assert [one["seq"] for one in lines(path)] == list(range(runner.stats.events))
        ballast.unlink()
        wait_until(lambda: runner.stats.events == 80, what="the rest in the file")
        assert runner.stats.lost == 0
    assert [one["seq"] for one in lines(path)] == list(range(80))


def test_a_sink_that_nobody_reads_loses_its_own_events_only_and_is_repaired_when_somebody_does(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, wait_until: Any
) -> None:
    new, mapper = library(), start()
    ledger = open_ledger(own())
    read, write = os.pipe()
    runner = SinkRunner(StdoutSink(write), ledger.watcher.subscribe(limit=20))
    with runner, os.fdopen(read, "rb") as reader:
        rounds(mapper, new, 400)
        mapper.map(new)
        ledger.wait_for(lambda: len(ledger.of(mapper.pid)) == 801, "every load and unload for the other reader")
        assert ledger.controls() == ["ready"]
        assert ledger.watcher.stats.lost_kernel == 0
        lost = runner.stats.lost
        assert lost > 500
        found = []
        while not found or found[-1]["event"] != "repaired":
            found.append(strict.loads(reader.readline()))
        held = 0
        for one in found:
            held += {"load": 1, "unload": -1}.get(one["event"], 0)
            assert held in (0, 1)
        assert held == 1
        assert [(one["count"], one["where"]) for one in found if one["event"] == "lost"] == [(lost, "queue")]
        runner.close()
    os.close(write)
