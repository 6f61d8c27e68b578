"""Which cgroup a process is said to be in, on a host that has hierarchies of versions 1 and 2, under every strategy."""

from __future__ import annotations

import os
import re
import subprocess
import time
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


# More than a host needs, which has one for each of the 14 controllers and systemd's; the programs walk 64.
MANY = 30


def hierarchies(names: list[str]) -> list[str]:
    """Those that the kernel still has."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return [name for name in names if any(line.split(":")[1] == f"name={name}" for line in lines)]


def mount_named(name: str, at: Path) -> None:
    subprocess.run(["mount", "-t", "cgroup", "-o", f"none,name={name}", "none", at], check=True)


def unmount(at: Path) -> None:
    subprocess.run(["umount", at], check=True)


class Hierarchies:
    """Mounted hierarchies of version 1 without controllers, the test's own, each below a directory of its name."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._names: list[str] = []

    def add(self) -> Path:
        """Where the new hierarchy is mounted. The kernel lists the newest last."""
        name = f"sowatch-{os.getpid()}.{len(self._names)}"
        at = self._directory / name
        at.mkdir()
        mount_named(name, at)
        self._names.append(name)
        return at

    def close(self, wait_until: Callable[..., Any]) -> None:
        """Unmounts all and waits until the kernel has none of them; they have no cgroups any more.

        The kernel keeps a hierarchy that is unmounted while cgroups in it are being released, which happens some time
        after rmdir(2) (``cgroup_kill_sb``): such a one is mounted and unmounted again.
        """
        for name in self._names:
            unmount(self._directory / name)
        last = time.monotonic()

        def are_gone() -> bool:
            nonlocal last
            left = hierarchies(self._names)
            # One that ends is listed for a moment, too, and would be made anew by each attempt.
            if left and time.monotonic() - last > 0.5:
                for name in left:
                    mount_named(name, self._directory / name)
                    unmount(self._directory / name)
                last = time.monotonic()
            return not left

        wait_until(are_gone, 30, f"the end of the hierarchies {self._names}")


def unmount_those_of_killed_tests() -> None:
    """With what a killed test left mounted there may be more hierarchies than the programs walk."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, at, _, options = line.split()[:4]
        found = re.search(r"\bname=sowatch-(\d+)\.", options)
        if found and not Path("/proc", found[1]).exists():
            unmount(Path(at))


@pytest.fixture
def named(scratch: Path, wait_until: Callable[..., Any]) -> Iterator[Hierarchies]:
    unmount_those_of_killed_tests()
    made = Hierarchies(scratch)
    yield made
    made.close(wait_until)


@pytest.fixture
def groups(scratch: Path, named: Hierarchies) -> Iterator[Callable[[str, str], Path]]:
    """``groups(hierarchy, path)`` makes a cgroup that is gone after the test.

    Hierarchies are ``v2``, and ``v1``, which is the newest of ``named`` when it is used first.
    """
    made: list[Path] = []
    roots = {"v2": scratch / "v2"}

    def make(hierarchy: str, path: str) -> Path:
        if hierarchy not in roots:
            roots[hierarchy] = named.add()
        at = roots[hierarchy]
        for part in f"sowatch-test-{os.getpid()}/{path}".split("/"):
            at /= part
            if not at.exists():
                at.mkdir()
                made.append(at)
        return at

    roots["v2"].mkdir()
    subprocess.run(["mount", "-t", "cgroup2", "none", roots["v2"]], check=True)
    yield make
    for at in reversed(made):
        at.rmdir()
    unmount(roots["v2"])


@pytest.mark.parametrize("others", [0, MANY])
@pytest.mark.parametrize("strategy", CONFIGS)
def test_a_container_that_only_one_hierarchy_of_version_1_names_is_told(
    open_ledger: Callable[..., Ledger],
    start: Callable[..., Mapper],
    library: Callable[..., Path],
    named: Hierarchies,
    groups: Callable[[str, str], Path],
    scratch: Path,
    programs: Any,
    strategy: str,
    others: int,
) -> None:
    for _ in range(others):
        named.add()
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
