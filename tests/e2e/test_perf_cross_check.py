"""sowatch and an independent witness see the same (process, file) pairs."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from support.follower import Follower
from support.perf_cross_check import Account, CrossCheck, CrossCheckLostRecords, Seen, perf_is_missing
from support.workload import PYTHON, prepare

pytestmark = [pytest.mark.alone, pytest.mark.timeout(600)]

ROUNDS = int(os.environ.get("SOWATCH_WITNESS_ROUNDS", "1"))

#: How a load comes about that perf writes a record of. A forked child inherits without one.
WITNESSED_CAUSES = frozenset({"mmap", "exec", "repair"})

Pair = tuple[int, tuple[int, int, int, int]]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("workload")
    prepare(directory)
    return directory


@pytest.fixture
def needs_perf():
    if reason := perf_is_missing():
        pytest.skip(reason)


def run_workload(seed: int, directory: Path) -> int:
    script = Path(__file__).parent.parent / "support" / "workload.py"
    workload = subprocess.Popen([PYTHON, script, str(seed), directory, "2"], stdout=subprocess.DEVNULL)
    assert workload.wait() == 0
    return workload.pid


class Comparison:
    """What perf and sowatch say of the processes that came from one."""

    def __init__(self, account: Account, root: int, follower: Follower) -> None:
        self.account = account
        self.follower = follower
        self.pids = account.descendants(root)
        self.witnessed: dict[Pair, Seen] = {}
        for seen in account.mappings:
            if seen.pid in self.pids:
                # A pair seen before and after an exec is one that a load after it must tell of.
                pair = (seen.pid, seen.file)
                self.witnessed[pair] = max(seen, self.witnessed.get(pair, seen), key=lambda one: one.after_exec)

    def missing(self) -> set[Pair]:
        """Pairs that only perf saw. What a child inherited and maps once more is no new load."""
        reported = self._reported(lambda cause: cause in WITNESSED_CAUSES)
        inherited = self._reported(lambda cause: cause == "fork")
        return {
            pair
            for pair, seen in self.witnessed.items()
            if pair not in reported and (seen.after_exec or pair not in inherited)
        }

    def extra(self) -> set[Pair]:
        """Pairs that only sowatch told of."""
        return self._reported(lambda cause: cause in WITNESSED_CAUSES) - self.witnessed.keys()

    def left_over(self) -> set[int]:
        """Processes of which sowatch thinks that they still map something."""
        return {pid for pid in self.pids if self.follower.mapped(pid)}

    def differs(self) -> bool:
        return bool(self.missing() or self.extra() or self.left_over())

    def _reported(self, counts) -> set[Pair]:
        return {
            (pid, (file.major, file.minor, file.inode, file.generation))
            for pid in self.pids
            for event in self.follower.about(pid)
            if event.event == "load" and counts(event.cause)
            for file in [event.library.id]
        }

    def report(self) -> str:
        """The difference, and both records of the processes it is about."""
        missing, extra, left_over = self.missing(), self.extra(), self.left_over()
        lines = [f"{len(self.pids)} processes, {len(self.witnessed)} pairs witnessed:"]
        lines += [f"{len(missing)} missing, {len(extra)} extra, {len(left_over)} processes not emptied"]
        lines += [f"only perf saw {pid} map {file}: {self.witnessed[pid, file].path}" for pid, file in sorted(missing)]
        lines += [f"only sowatch saw {pid} map {file}" for pid, file in sorted(extra)]
        lines += [f"sowatch thinks that {pid} still maps {self.follower.mapped(pid)}" for pid in sorted(left_over)]
        for pid in sorted({pid for pid, _ in missing | extra} | left_over)[:5]:
            lines += [f"-- perf on {pid}:", *self.account.about(pid)[:60], f"-- sowatch on {pid}:"]
            lines += [
                f"{event.t_ns} {event.event} {event.cause} {event.library.id} {event.library.path}"
                for event in self.follower.about(pid)[:60]
            ]
        return "\n".join(lines)


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_sowatch_and_perf_see_the_same_files_in_the_same_processes(seed, prepared, needs_perf, deadline, schema):
    with Follower(timeout_s=deadline(20), check=schema) as follower:
        with CrossCheck() as witness:
            root = run_workload(seed, prepared)
        comparison = Comparison(witness.account, root, follower)
        assert len(comparison.pids) > 500
        assert len(comparison.witnessed) > 1500
        follower.wait_until(lambda: not comparison.differs(), comparison.report)
    assert follower.lost == []


def test_a_witness_that_lost_records_says_so(programs, needs_perf):
    witness = CrossCheck(buffer="4K")
    witness.__enter__()
    os.kill(witness.perf_pid, signal.SIGSTOP)  # it cannot empty its rings: of 4 KB, soon full
    try:
        subprocess.run([programs["storm"], "2", "200", "/bin/true"], check=True, stdout=subprocess.DEVNULL)
    finally:
        os.kill(witness.perf_pid, signal.SIGCONT)
    with pytest.raises(CrossCheckLostRecords):
        witness.__exit__(None, None, None)


def test_the_witness_sees_executable_interpreter_and_libraries(programs, make_library, needs_perf):
    library = make_library()
    with CrossCheck() as witness:
        loader = subprocess.Popen([programs["loader"], library])
        assert loader.wait() == 0
    names = {Path(seen.path).name for seen in witness.account.mappings if seen.pid == loader.pid}
    assert {name for name in names if not name.startswith("ld-")} == {"loader", "libc.so.6", "libtiny.so"}
    assert len(names) == 4
    about = library.stat()
    inodes = {(seen.major, seen.minor, seen.inode) for seen in witness.account.mappings if seen.path == str(library)}
    assert inodes == {(os.major(about.st_dev), os.minor(about.st_dev), about.st_ino)}
