"""Whether a file is stale that was copied up in an overlay while it was mapped: real overlays, running and cold."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sowatch import Config, Rule
from sowatch.inventory.staleness import Disk
from sowatch.model.events import Library
from sowatch.model.literals import KINDS
from support.hostile import SOWATCH
from support.kernel import IN_OWN_MOUNTS, Ledger, with_prelude
from support.programs import Mapper

TAG = f"sow-copied-{os.getpid()}-"
STRATEGIES = ["core", "prebuilt", "procfs"]
#: left: as it was. touched: chmod copied it up. written: its copy has another program. upper: never was in a lower
#: layer, and chmod changed it.
NAMES = ("left", "touched", "written", "upper")

Start = Callable[..., Mapper]
Answers = dict[tuple[int, str], str | None]


@pytest.fixture
def scratch() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix=TAG, dir="/var/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def without_build_id(content: bytes) -> bytes:
    """A library whose note is of another type."""
    note, other = (struct.pack("=3I4s", 4, 20, kind, b"GNU") for kind in (3, 99))
    assert content.count(note) == 1
    return content.replace(note, other)


@pytest.fixture(params=[True, False], ids=["build-id", "no-build-id"])
def has_build_id(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def contents(make_library: Any, has_build_id: bool) -> tuple[bytes, bytes]:
    old, new = make_library("libone.so").read_bytes(), make_library("libtwo.so").read_bytes()
    return (old, new) if has_build_id else (without_build_id(old), without_build_id(new))


@pytest.fixture
def mapper(start: Start, scratch: Path, programs: Any, contents: tuple[bytes, bytes]) -> Mapper:
    """It has mapped all of `NAMES`, and nothing has happened to them yet."""
    for name in ("lower", "rw", "m"):
        (scratch / name).mkdir()
    (scratch / "new").write_bytes(contents[1])
    (scratch / "old").write_bytes(contents[0])
    for name in NAMES[:3]:
        (scratch / f"lower/{name}.so").write_bytes(contents[0])
    commands = f"""mount -t tmpfs none {scratch}/rw; mkdir {scratch}/rw/u {scratch}/rw/w
    mount -t overlay -o lowerdir={scratch}/lower,upperdir={scratch}/rw/u,workdir={scratch}/rw/w none {scratch}/m
    cp {scratch}/old {scratch}/m/upper.so"""
    mapper = start(with_prelude(scratch, programs["mapper"], commands, launcher=IN_OWN_MOUNTS))
    for name in NAMES:
        mapper.map(scratch / f"m/{name}.so")
    return mapper


def change(mapper: Mapper, scratch: Path) -> None:
    enter = ["nsenter", "-m", "-t", str(mapper.pid), "sh", "-ec"]
    commands = f"cd {scratch}/m; chmod 700 touched.so upper.so; cp ../new written.so"
    subprocess.run([*enter, commands], check=True)


def reported(ledger: Ledger, pids: list[int]) -> Answers:
    """The answers in a running watch, once it has all the files."""

    def look() -> Answers | None:
        ledger.catch_up()
        shown = [
            one for one in ledger.watcher.snapshot() if one.process.pid in pids and one.library.path.endswith(".so")
        ]
        ours = [one for one in shown if TAG in one.library.path]
        if len(ours) < len(NAMES) * len(pids):
            return None
        with Disk() as disk:
            return {
                (one.process.pid, Path(one.library.path).stem): disk.staleness(
                    one.process, one.library, one.ranges
                ).stale
                for one in ours
            }

    found = ledger.wait_for(look, "not all of the files are shown")
    assert isinstance(found, dict)
    return found


def listed(strategy: str) -> Answers:
    """The same of a new `sowatch list`, which shows the stale ones only."""
    command = [SOWATCH, "list", "--stale", "--json", "--strategy", strategy, TAG]
    done = subprocess.run(command, capture_output=True, check=False)
    # 3: another process on this host cannot be read, which a last object says.
    assert done.returncode in (0, 3), done.stderr
    rows = [row for row in map(json.loads, done.stdout.splitlines()) if row["event"] == "mapping"]
    return {(one["process"]["pid"], Path(one["library"]["path"]).stem): one["stale"] for one in rows}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_file_that_was_copied_up_and_changed_while_it_is_mapped_is_replaced(
    open_ledger: Callable[..., Ledger],
    start: Start,
    mapper: Mapper,
    scratch: Path,
    programs: Any,
    has_build_id: bool,
    strategy: str,
) -> None:
    config = Config(strategy=strategy, poll_interval_s=0.05, poll_cpu_percent=100)
    ledger = open_ledger(Rule(TAG, kind=KINDS), config=config)
    # Without a change time from the kernel and a build id, what the upper layer has may be a copy.
    can_tell = strategy == "core" or has_build_id
    open_question = None if can_tell else "unknown"
    before = dict.fromkeys(((mapper.pid, name) for name in NAMES), None)
    wanted: dict[tuple[int, str], str | None] = {**before, (mapper.pid, "upper"): open_question}
    assert reported(ledger, [mapper.pid]) == wanted
    assert listed(strategy) == {key: stale for key, stale in wanted.items() if stale}

    change(mapper, scratch)
    # Who maps them now has the copies.
    inside = f'exec nsenter -m -t {mapper.pid} "$0" "$@"'
    later = start(with_prelude(scratch, programs["mapper"], inside))
    for name in NAMES:
        later.map(scratch / f"m/{name}.so")
    pids = [mapper.pid, later.pid]
    wanted = {(pid, name): None if name == "left" else open_question for pid in pids for name in NAMES}
    wanted[mapper.pid, "written"] = "replaced" if can_tell else "unknown"
    assert reported(ledger, pids) == wanted
    assert listed(strategy) == {key: stale for key, stale in wanted.items() if stale}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_file_on_an_overlay_that_nobody_changed_is_told_with_all_its_facts(
    open_ledger: Callable[..., Ledger], mapper: Mapper, scratch: Path, strategy: str
) -> None:
    config = Config(strategy=strategy, poll_interval_s=0.05, poll_cpu_percent=100)
    ledger = open_ledger(Rule(f"{TAG}.*/left", kind=KINDS), config=config)

    def look() -> Library | None:
        ledger.catch_up()
        shown = [one.library for one in ledger.watcher.snapshot() if one.process.pid == mapper.pid]
        return next((one for one in shown if one.path == f"{scratch}/m/left.so"), None)

    found = ledger.wait_for(look, "it is not shown")
    assert isinstance(found, Library)
    assert found.soname == "libone.so"
    assert found.host_path is not None
    assert Path(found.host_path).read_bytes() == (scratch / "old").read_bytes()
