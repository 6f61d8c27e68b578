"""A fleet in a store: is every answer right, and how long does one take?

  python -m benchmarks.fleet [--quick]           10,000 hosts with 5,000 mappings each, on chdb with two threads
  python -m benchmarks.fleet check [HOSTS [SEED [SAMPLES]]]

`check` is the simulator: hosts whose processes come and go, agents with the real coalescer, a network that loses,
doubles, delays and mixes up. It compares every answer with what the hosts really had mapped, and ends with 1 if one
differs. The large form has its rows made by SQL; what is asked of it is compared with a truth that Python reckons.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import Figure, main, median, quantile, spread
from benchmarks.fleet_check import Check
from benchmarks.fleet_volume import HOT, Volume, build_id
from benchmarks.fleet_world import World

from sowatch.fleet.log_requests import decode
from sowatch.fleet.questions import Fleet
from sowatch.fleet.schema import schema_sql
from sowatch.fleet.store import Store
from sowatch.fleet.targets import Target
from sowatch.model.wire_fleet import FleetMapping, HostAnswer
from support.fleet_records import Record, otlp

#: Records of one request, as a Collector makes them.
_BATCH = 20_000
#: Aims of the fleet: seconds for who maps a build.
_WHO_S = 1.0


def check(hosts: int, seed: int, samples: int) -> int:
    """Compares all answers; prints what was compared, and what differs."""
    world = World(hosts, seed, time.time_ns())
    with tempfile.TemporaryDirectory(prefix="sowatch-fleet-") as directory, Store(directory) as store:
        records = _take(store, world)
        checked = Check(world, store, samples)
        checked.run()
    for one in checked.differences[:50]:
        print(one[:600], file=sys.stderr)
    summary = {"hosts": len(world.hosts), "records": records, "compared": checked.compared}
    print(json.dumps({**summary, "differences": len(checked.differences)}))
    return 1 if checked.differences else 0


def _take(store: Store, world: World) -> int:
    """As a receiver does."""
    waiting: list[Record] = []
    total = 0

    def commit() -> None:
        decoded = decode(otlp(waiting), is_json=True, now_ns=world.end_ns)
        assert not decoded.rejected, decoded.reason
        store.insert(decoded.rows)
        waiting.clear()

    for batch in world.run():
        waiting += batch
        total += len(batch)
        if len(waiting) > _BATCH:
            commit()
    commit()
    return total


class _Engine:
    """chdb with the tables, without the limits of a receiver."""

    def __init__(self, directory: Path) -> None:
        from chdb.session import Session

        self._session = Session(str(directory))
        self.query("SET max_threads = 2, max_insert_threads = 2, max_memory_usage = 4000000000")
        self.query(schema_sql())

    def query(self, sql: str) -> Any:
        return self._session.query(sql)

    def ask(self, sql: str, parameters: Mapping[str, str]) -> Iterable[bytes]:
        return (bytes(self._session.query(sql, "JSONEachRow", params=dict(parameters)).bytes()),)

    def rows(self, sql: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in b"".join(self.ask(sql, {})).splitlines()]


def measure(is_quick: bool, directory: Path) -> list[Figure]:
    """The large form."""
    engine = _Engine(directory / "store")
    volume = Volume(engine.query, 200 if is_quick else 10_000, time.time_ns())
    begun_s, begun_cpu_s = time.monotonic(), time.process_time()
    volume.fill()
    figures = [
        Figure("rows of mappings", volume.rows, ""),
        Figure("... made in", time.monotonic() - begun_s, "s"),
        Figure("... CPU time of that", time.process_time() - begun_cpu_s, "s"),
    ]
    engine.query("SYSTEM STOP MERGES")  # they are the same process, and its CPU time
    figures += disk(engine, volume)
    figures += questions(engine, volume, rounds=3 if is_quick else 15)
    return figures


def disk(engine: _Engine, volume: Volume) -> list[Figure]:
    sizes = {
        one["table"]: int(one["bytes"])
        for one in engine.rows(
            "SELECT table, sum(bytes_on_disk) AS bytes FROM system.parts "
            "WHERE active AND table LIKE 'fleet_%' GROUP BY table"
        )
    }
    total = sum(sizes.values())
    return [
        Figure("bytes on disk a mapping, all tables", total / volume.rows, "B"),
        Figure("... of the state", sizes["fleet_state"] / volume.rows, "B"),
        Figure("... of the history", sizes["fleet_history"] / volume.rows, "B"),
        Figure("bytes on disk a host", total / volume.hosts / 1e3, "kB"),
    ]


def questions(engine: _Engine, volume: Volume, rounds: int) -> list[Figure]:
    """How long they take, each compared with the truth."""
    old = [build_id(distribution, HOT, 0) for distribution in range(10)]
    check_who(engine, volume, old[0])
    figures = []
    for what, ask in (
        ("who maps a build", lambda at: Fleet(engine, volume.now_ns).who(Target("build_id", old[at % 10])).head),
        ("... with all its rows", lambda at: _all(engine, volume, Target("build_id", old[at % 10]))),
        ("who maps a soname", lambda _: Fleet(engine, volume.now_ns).who(Target("soname", HOT)).head),
        ("coverage of all hosts", lambda _: Fleet(engine, volume.now_ns)),
        ("versions of a library", lambda _: list(Fleet(engine, volume.now_ns).versions(Target("soname", HOT)).lines)),
        (
            "history of a build",
            lambda at: list(Fleet(engine, volume.now_ns).history(Target("build_id", old[at % 10])).lines),
        ),
        ("stale on all hosts", lambda _: sum(1 for _ in Fleet(engine, volume.now_ns).stale_groups())),
    ):
        walls, cpus = [], []
        for at in range(rounds):
            wall_s, cpu_s = time.monotonic(), time.process_time()
            ask(at)
            walls.append(time.monotonic() - wall_s)
            cpus.append(time.process_time() - cpu_s)
        aim = _WHO_S if what == "who maps a build" else None
        figures += [
            Figure(f"{what}, the first time", walls[0], "s"),
            Figure(f"{what}, p50", median(walls), "s", spread(walls), aim=aim),
            Figure(f"{what}, p95", quantile(walls, 0.95), "s"),
            Figure(f"{what}, CPU time", median(cpus), "s", spread(cpus)),
        ]
    return figures


def _all(engine: _Engine, volume: Volume, target: Target) -> int:
    return sum(1 for _ in Fleet(engine, volume.now_ns).who(target).lines)


def check_who(engine: _Engine, volume: Volume, build: str) -> None:
    """Each host's answer, its groups and processes, and what is stale."""
    fleet = Fleet(engine, volume.now_ns)
    answer = fleet.who(Target("build_id", build))
    right = Counter(volume.answers(build).values())
    head = answer.head
    found: dict[HostAnswer, int] = {
        "mapped": head.mapped_host_count,
        "not mapped": head.not_mapped_host_count,
        "not observed": head.not_observed_host_count,
    }
    assert found == {word: right[word] for word in found}, (found, right)
    groups: dict[str, tuple[int, int]] = {}
    for line in answer.lines:
        if isinstance(line, FleetMapping):
            known = groups.get(line.host_name, (0, 0))
            groups[line.host_name] = known[0] + 1, known[1] + line.process_count
    truth = {volume.name(host): some for host, some in volume.mapped(build).items()}
    assert groups == truth
    assert {one.host_name: one.state for one in fleet.hosts} == {
        volume.name(host): volume.state(host) for host in range(volume.hosts)
    }
    stale = sum(1 for _ in fleet.stale_groups())
    assert stale == volume.stale_rows(), (stale, volume.stale_rows())


if __name__ == "__main__":
    if sys.argv[1:2] == ["check"]:
        numbers = [int(word) for word in sys.argv[2:5]]
        sys.exit(check(*[*numbers, *(200, 1, 0)[len(numbers) :]]))
    main("fleet", measure)
