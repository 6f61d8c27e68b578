"""Which cgroup a process is said to be in, on a host that has hierarchies of versions 1 and 2, under every strategy."""

from __future__ import annotations

import contextlib
import os
import subprocess
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
if FORCED:
    CONFIGS = {"forced": dict(FORCED)}


@pytest.fixture
def groups(scratch: Path) -> Iterator[Callable[[str, str], Path]]:
    """``groups(hierarchy, path)`` makes a cgroup that is gone after the test.

    Hierarchies are ``v2`` and ``v1``, which is the test's own, without controllers.
    """
    made: list[Path] = []

    def make(hierarchy: str, path: str) -> Path:
        at = scratch / hierarchy
        for part in f"sowatch-test-{os.getpid()}/{path}".split("/"):
            at /= part
            if not at.exists():
                at.mkdir()
                made.append(at)
        return at

    words = {"v2": ["-t", "cgroup2"], "v1": ["-t", "cgroup", "-o", f"none,name=sowatch{TAG}"]}
    with contextlib.ExitStack() as stack:
        for name, options in words.items():
            (scratch / name).mkdir()
            subprocess.run(["mount", *options, "none", scratch / name], check=True)
            stack.callback(subprocess.run, ["umount", scratch / name], check=True)
        yield make
        for at in reversed(made):
            at.rmdir()


@pytest.mark.parametrize("strategy", CONFIGS)
def test_a_container_that_only_one_hierarchy_of_version_1_names_is_told(
    open_ledger: Callable[..., Ledger],
    start: Callable[..., Mapper],
    library: Callable[..., Path],
    groups: Callable[[str, str], Path],
    scratch: Path,
    programs: Any,
    strategy: str,
) -> None:
    options = dict(CONFIGS[strategy])
    more = {"open_source": options.pop("open_source")} if "open_source" in options else {}
    ledger = open_ledger(Rule(TAG, name="mine"), config=Config(**options), **more)  # type: ignore[arg-type]
    inside = groups("v1", f"docker/{HEX}")
    outside = groups("v2", "system.slice/containerd.service")
    commands = "".join(f'echo $$ > "{group}/cgroup.procs"\n' for group in (inside, outside))
    mapper, file = start(with_prelude(scratch, programs["mapper"], commands)), library()
    mapper.map(file)
    load = ledger.wait_load(mapper.pid, file.stat().st_ino)
    by_proc = parse_cgroup(Path(f"/proc/{mapper.pid}/cgroup").read_bytes())
    mapper.exit()
    assert load.process.container == HEX
    assert load.process.cgroup == by_proc == f"/sowatch-test-{os.getpid()}/docker/{HEX}"
