"""Which cgroup a process is said to be in, on a host that has hierarchies of versions 1 and 2, under every strategy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sowatch import Config, Rule
from sowatch.linux.cgroups import parse_cgroup
from sowatch.sources.legacy import OldKernelSource
from support.forced import FORCED
from support.kernel import TAG, Ledger, with_prelude
from support.programs import Mapper

HEX = os.urandom(32).hex()
CONFIGS = {
    "core": {"strategy": "core"},
    "core of old kernels": {"strategy": "core", "open_source": OldKernelSource},
    "runtime": {"strategy": "runtime"},
    "prebuilt": {"strategy": "prebuilt"},
    "procfs": {"strategy": "procfs", "poll_interval_s": 0.05, "poll_cpu_percent": 100},
}
pytestmark = pytest.mark.skipif(bool(FORCED), reason="the strategies are chosen here")


def hierarchies() -> dict[str, Path]:
    """Where a group can be made: ``v2`` and the names of version 1."""
    found = {}
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        left, _, right = line.partition(" - ")
        root, at = left.split()[3:5]
        kind, _, options = right.split()[:3]
        if root == "/" and kind == "cgroup2":
            found["v2"] = Path(at)
        elif root == "/" and kind == "cgroup":
            name = next((one for one in options.split(",") if one.startswith("name=")), options.split(",")[-1])
            found[name] = Path(at)
    return found


@pytest.fixture
def groups() -> Iterator[Callable[[str, str], Path]]:
    """``groups(hierarchy, path)`` makes a cgroup; it is gone after the test."""
    made: list[Path] = []

    def make(hierarchy: str, path: str) -> Path:
        at = hierarchies()[hierarchy]
        for part in f"sowatch-test-{os.getpid()}/{path}".split("/"):
            at /= part
            if not at.exists():
                at.mkdir()
                made.append(at)
        return at

    yield make
    for at in reversed(made):
        at.rmdir()


@pytest.mark.skipif(
    not {"v2", "name=systemd", "freezer"} <= hierarchies().keys(), reason="no host of both versions of cgroups"
)
@pytest.mark.parametrize("where", ["name=systemd", "freezer"])
@pytest.mark.parametrize("strategy", CONFIGS)
def test_a_container_that_only_one_hierarchy_of_version_1_names_is_told(
    open_ledger: Callable[..., Ledger],
    start: Callable[..., Mapper],
    library: Callable[..., Path],
    groups: Callable[[str, str], Path],
    scratch: Path,
    programs: Any,
    strategy: str,
    where: str,
) -> None:
    options = dict(CONFIGS[strategy])
    more = {"open_source": options.pop("open_source")} if "open_source" in options else {}
    ledger = open_ledger(Rule(TAG, name="mine"), config=Config(**options), **more)  # type: ignore[arg-type]
    inside = groups(where, f"docker/{HEX}")
    outside = groups("v2", "system.slice/containerd.service")
    commands = "".join(f'echo $$ > "{group}/cgroup.procs"\n' for group in (inside, outside))
    mapper, file = start(with_prelude(scratch, programs["mapper"], commands)), library()
    mapper.map(file)
    load = ledger.wait_load(mapper.pid, file.stat().st_ino)
    by_proc = parse_cgroup(Path(f"/proc/{mapper.pid}/cgroup").read_bytes())
    mapper.exit()
    assert load.process.container == HEX
    assert load.process.cgroup == by_proc == f"/sowatch-test-{os.getpid()}/docker/{HEX}"
