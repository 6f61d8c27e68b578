"""What the section [fleet] costs an agent, and what it sends: bytes at rest, and CPU time and memory with it on to off.

Bytes are those of bodies of OTLP over HTTP, encoded and compressed. At rest an agent sends heartbeats, and everything
anew four times a day; both are measured and put together. Agents with and without the section take turns. Once the
rules want every library, once only one that nobody has, so that without the section there is next to nothing to do.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import Command, Figure, build, crowd, main, make_libraries, median, short, spread

from support.agent import UnixConnection
from support.fleet_receiver import FleetReceiver, fleet_receiver

#: As they are unless a configuration says otherwise.
INTERVAL_S, SNAPSHOT_INTERVAL_S = 30.0, 21_600.0
RULES = {"every library": "", "a library that nobody has": "[[rules]]\npattern = '/none-of-these$'\n"}


class Cost(NamedTuple):
    """CPU seconds in a storm, CPU seconds of a minute at rest, and resident megabytes after that."""

    storm_s: float
    rest_s: float
    memory_mb: float


def measure(is_quick: bool, directory: Path) -> list[Figure]:
    processes, libraries, rounds, shots, rest_s = (20, 10, 1, 300, 3) if is_quick else (250, 20, 3, 1500, 8)
    made = make_libraries(directory, libraries)
    storm, loader = build("storm", directory), build("loader", directory)
    shot = [storm, "1", str(shots), loader, *made[:3]]
    figures = []
    with crowd(directory, processes, made):
        figures += bytes_at_rest(directory, processes * libraries, 3 if is_quick else 20)
        for name, rules in RULES.items():
            off, on = [], []
            for _ in range(rounds):
                off.append(cost(directory, rules, shot, rest_s))
                with fleet_receiver() as receiver:
                    on.append(cost(directory, rules + section(receiver), shot, rest_s, receiver))
            figures += ratios(name, off, on, shots)
    return figures


def section(receiver: FleetReceiver, interval_s: float = INTERVAL_S) -> str:
    return f"[fleet]\nenabled = true\nendpoint = '{receiver.url}'\ninterval_s = {interval_s}\n"


def bytes_at_rest(directory: Path, mappings: int, beats: int) -> list[Figure]:
    """The size of a snapshot and of a heartbeat, and what both come to in a second."""
    with fleet_receiver() as receiver, agent(directory, section(receiver, 1.0)):
        wait_until(lambda: bool(receiver.of("snapshot_end")), "a snapshot")
        wait_until(lambda: len(receiver.of("heartbeat")) >= beats, f"{beats} heartbeats")
        first = next(place for place, (_, events) in enumerate(receiver.bodies) if "snapshot_end" in events)
        states = len(receiver.of("state"))
        snapshot = sum(size for size, _ in receiver.bodies[: first + 1])
        sizes = heartbeats(receiver)
    beat = median(sizes)
    a_second = beat / INTERVAL_S + snapshot / SNAPSHOT_INTERVAL_S
    what = f"a snapshot of {states} groups ({mappings} mappings of ours)"
    return [
        Figure("heartbeat", beat, "bytes", spread(sizes)),
        Figure(what, snapshot, "bytes", f"{snapshot / states:.0f} for a group"),
        Figure("sent by a host at rest", a_second, "bytes/s", aim=1000),
    ]


def heartbeats(receiver: FleetReceiver) -> list[float]:
    """Sizes of the bodies of heartbeats by themselves: here others keep the host from being at rest."""
    found = []
    for message in receiver.messages:
        logs = message.resource_logs[0].scope_logs[0].log_records
        for record in [one for one in logs if one.event_name == "sowatch.fleet.heartbeat"]:
            single = type(message)()
            single.CopyFrom(message)
            del single.resource_logs[0].scope_logs[0].log_records[:]
            single.resource_logs[0].scope_logs[0].log_records.append(record)
            found.append(float(len(gzip.compress(single.SerializeToString()))))
    return found


def ratios(name: str, off: list[Cost], on: list[Cost], shots: int) -> list[Figure]:
    def ratio(field: str, what: str, unit: str) -> Figure:
        before, after = ([getattr(one, field) for one in costs] for costs in (off, on))
        pairs = [one / max(other, 1e-9) for one, other in zip(after, before, strict=True)]
        values = f"{short(median(before))} to {short(median(after))} {unit}"
        return Figure(f"{what}, rules want {name}: on to off", median(pairs), "", f"{spread(pairs)}; {values}")

    return [
        ratio("storm_s", f"CPU in a storm of {shots} processes", "s"),
        ratio("rest_s", "CPU at rest", "s a minute"),
        ratio("memory_mb", "memory", "MB"),
    ]


def cost(directory: Path, text: str, shot: list[Any], rest_s: float, receiver: FleetReceiver | None = None) -> Cost:
    with agent(directory, text) as running:
        if receiver is not None:
            wait_until(lambda: bool(receiver.of("heartbeat")), "the first heartbeat")
        time.sleep(2)  # what the start has left to do
        before = cpu_s(running.worker)
        subprocess.run(shot, check=True, stdout=subprocess.DEVNULL)
        time.sleep(2)
        after = cpu_s(running.worker)
        time.sleep(rest_s)
        rested = cpu_s(running.worker)
        return Cost(after - before, (rested - after) * 60 / rest_s, running.memory_mb()[0])


def cpu_s(pid: int) -> float:
    """CPU seconds of all its threads, in nanoseconds' precision: at rest there are fewer than ticks show."""
    found = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += int((task / "schedstat").read_text().split()[0])
    return found / 1e9


@contextlib.contextmanager
def agent(directory: Path, text: str) -> Iterator[Command]:
    """A running agent."""
    config, socket = directory / "config.toml", directory / "s.sock"
    config.write_text(text)
    with Command(directory, "serve", "--socket", os.fspath(socket), "--config", os.fspath(config)) as running:
        wait_until(lambda: is_ready(socket), "an agent that is ready")
        yield running


def is_ready(socket: Path) -> bool:
    connection = UnixConnection(socket, 5.0)
    try:
        connection.request("GET", "/readyz")
        return bool(json.loads(connection.getresponse().read())["ready"])
    except OSError:
        return False
    finally:
        connection.close()


def wait_until(is_so: Any, what: str, timeout_s: float = 120.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"waited in vain for {what}")
        time.sleep(0.05)


if __name__ == "__main__":
    main("fleet_agent", measure)
