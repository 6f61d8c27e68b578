"""polling: what polls of ``/proc`` report, of real processes."""

from __future__ import annotations

import errno
import logging
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sowatch.linux.cpu_clock import CpuClocks
from sowatch.linux.proc import ProcFs, ProcReadError
from sowatch.model.config import Config
from sowatch.model.errors import SowatchError
from sowatch.model.events import Process
from sowatch.sources.poll_timer import PollTimer
from sowatch.sources.polling import REREAD_LOOKS, ProcfsSource
from sowatch.sources.unread import PatientProcFs, ScanTimeout
from support.poller import Poller, mapped
from support.programs import Mapper, make_libraries

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("polled")


@pytest.fixture(scope="module")
def libraries(place: Path) -> list[Path]:
    return make_libraries(place, 3)


@pytest.fixture
def start(programs: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Mapper]]:
    started: list[Mapper] = []

    def start_it() -> Mapper:
        started.append(Mapper(programs["mapper"], tmp_path_factory.mktemp("s")))
        return started[-1]

    yield start_it
    for mapper in started:
        mapper.close()


@pytest.fixture
def poller(libraries: list[Path]) -> Iterator[Poller]:
    with Poller(f"^{libraries[0].parent}/") as poller:
        yield poller
        poller.check_alternation()


# -- what a look tells -----------------------------------------------------------------------


def test_what_was_mapped_and_unmapped_since_the_last_look_is_told(
    poller: Poller, start: Any, libraries: list[Path]
) -> None:
    mapper = start()
    at, length = mapper.map(libraries[0])
    assert poller.look() == [f"+{mapper.pid} libtiny0.so mmap"]
    assert poller.look() == []
    mapper.unmap(at, length)
    assert poller.look() == [f"-{mapper.pid} libtiny0.so munmap"]


def test_what_is_there_at_the_first_look_is_a_snapshot(start: Any, libraries: list[Path]) -> None:
    mapper = start()
    mapper.map(libraries[0])
    with Poller(f"^{libraries[0].parent}/") as poller:
        assert poller.reported(poller.snapshot) == [f"+{mapper.pid} libtiny0.so snapshot"]
        assert poller.look() == []


def test_what_comes_and_goes_between_two_looks_is_not_told(poller: Poller, start: Any, libraries: list[Path]) -> None:
    mapper = start()
    mapper.map(libraries[1])
    poller.look()
    mapper.unmap(*mapper.map(libraries[0]))
    start().exit()

    assert poller.look() == []


def test_a_file_that_only_moved_is_no_news(poller: Poller, start: Any, libraries: list[Path]) -> None:
    mapper = start()
    at, length = mapper.map(libraries[0])
    poller.look()
    elsewhere, _ = mapper.map(libraries[0])
    mapper.unmap(at, length)
    assert elsewhere != at
    assert poller.look() == []
    mapper.unmap(elsewhere, length)
    assert poller.look() == [f"-{mapper.pid} libtiny0.so munmap"]


def test_a_change_that_keeps_every_size_is_seen(poller: Poller, start: Any, libraries: list[Path]) -> None:
    mapper = start()
    at, length = mapper.map(libraries[0])
    poller.look()
    mapper.protect(at, length, "r")
    assert poller.look() == [f"-{mapper.pid} libtiny0.so munmap"]
    mapper.protect(at, length, "rx")
    assert poller.look() == [f"+{mapper.pid} libtiny0.so mmap"]


def test_a_file_that_is_renamed_or_deleted_while_it_is_mapped_is_no_news(start: Any, make_library: Any) -> None:
    library = make_library("libmoved.so")
    with Poller(f"^{library}$") as poller:
        mapper = start()
        at, length = mapper.map(library)
        assert poller.look() == [f"+{mapper.pid} libmoved.so mmap"]
        library.rename(library.with_name("other.so"))
        mapper.map(library.with_name("other.so"), "noexec")  # it has to run to be read again
        assert poller.look() == []
        mapper.unmap(at, length)
        assert poller.look() == [f"-{mapper.pid} libmoved.so munmap"]


def test_a_child_has_what_its_parent_had_and_what_it_mapped_itself(
    poller: Poller, start: Any, libraries: list[Path]
) -> None:
    mapper = start()
    mapper.map(libraries[0])
    poller.look()
    child = mapper.fork()
    child.map(libraries[1])
    assert poller.look() == [f"+{child.pid} libtiny0.so fork", f"+{child.pid} libtiny1.so mmap"]
    child.exit()
    poller.look()
    assert poller.held(mapper.pid) == {libraries[0].stat().st_ino}


def test_a_child_whose_parent_was_never_seen_is_told_by_what_it_has(
    poller: Poller, start: Any, libraries: list[Path]
) -> None:
    mapper = start()
    mapper.map(libraries[0])
    child = mapper.fork()
    assert sorted(poller.look()) == sorted([f"+{mapper.pid} libtiny0.so mmap", f"+{child.pid} libtiny0.so fork"])
    child.exit()


def test_exec_unloads_what_was_mapped_and_keeps_the_process(poller: Poller, start: Any, libraries: list[Path]) -> None:
    mapper = start()
    mapper.map(libraries[0])
    poller.look()
    mapper.exec()
    mapper.map(libraries[1])
    assert poller.look() == [f"-{mapper.pid} libtiny0.so exec", f"+{mapper.pid} libtiny1.so mmap"]


def test_a_process_that_has_ended_but_was_not_waited_for_has_nothing_mapped(
    poller: Poller, start: Any, libraries: list[Path], wait_until: Any
) -> None:
    mapper = start()
    mapper.map(libraries[0])
    poller.look()
    mapper.send("exit", 0)
    wait_until(lambda: (found := ProcFs().stat(mapper.pid)) and found.state == "Z")
    assert poller.look() == [f"-{mapper.pid} libtiny0.so exit"]
    mapper.close()
    assert poller.look() == []


def test_a_process_whose_leader_is_dead_is_followed_to_its_end(
    poller: Poller, start: Any, libraries: list[Path], wait_until: Any
) -> None:
    mapper = start()
    mapper.map(libraries[0])
    poller.look()
    mapper.emit("leaderexit")
    wait_until(lambda: (found := ProcFs().stat(mapper.pid)) and found.is_dead)
    assert poller.look() == []
    mapper.map(libraries[1])
    assert poller.look() == [f"+{mapper.pid} libtiny1.so mmap"]
    mapper.exit()
    assert sorted(poller.look()) == [f"-{mapper.pid} libtiny0.so exit", f"-{mapper.pid} libtiny1.so exit"]


def test_who_shares_the_memory_of_another_is_read_again_although_it_does_not_run(
    poller: Poller, start: Any, libraries: list[Path]
) -> None:
    mapper = start()
    child = mapper.fork(how="clonevm")
    poller.look()
    mapper.map(libraries[0])
    poller.look(REREAD_LOOKS)
    assert poller.held(mapper.pid) == poller.held(child.pid) == {libraries[0].stat().st_ino}
    child.exit()


def test_program_and_interpreter_have_their_kinds_and_their_cause(start: Any, wait_until: Any) -> None:
    with Poller("") as poller:
        mapper = start()
        poller.look()
        of_it = [change for change in poller.changes if change.process.pid == mapper.pid]
        kinds = {Path(change.name.path).name.partition(".")[0]: (change.kind, change.cause) for change in of_it}
        assert kinds["mapper"] == ("executable", "exec")
        assert kinds["ld-linux-x86-64" if "ld-linux-x86-64" in kinds else "ld-linux-aarch64"] == ("interpreter", "exec")
        assert kinds["libc"] == ("library", "mmap")


def test_who_is_told_is_who_proc_shows(poller: Poller, start: Any, libraries: list[Path]) -> None:
    mapper = start()
    mapper.map(libraries[0])
    poller.look()
    expected = ProcFs().process(mapper.pid)
    assert expected is not None
    reported = poller.changes[-1].process
    assert reported == Process(**{name: getattr(expected, name) for name in Process.__struct_fields__})


def test_a_file_that_nobody_had_mapped_for_a_while_may_be_another_one_and_is_looked_into_again(
    poller: Poller, start: Any, libraries: list[Path]
) -> None:
    mapper = start()
    at, length = mapper.map(libraries[0])
    poller.look()
    child = start()
    child.map(libraries[0])
    poller.look()
    child.exit()
    mapper.unmap(at, length)
    poller.look()
    mapper.map(libraries[0])
    poller.look()
    first, second, _, _, third = (change.name.changed_ns for change in poller.changes)

    assert third < first == second < 0  # no change time of a file, which overlays are asked for


def test_a_process_of_which_nothing_was_wanted_introduces_itself_later(
    poller: Poller, start: Any, libraries: list[Path]
) -> None:
    mapper = start()
    poller.look()
    assert poller.table.get(mapper.pid) is None
    assert poller.source.tracked(mapper.pid) is None
    mapper.map(libraries[0])
    poller.look()
    assert poller.changes[-1].process.uid == os.getuid()
    tracked = poller.source.tracked(mapper.pid)
    assert tracked is not None
    assert tracked.range_count > 1


# -- what cannot be read ----------------------------------------------------------------------


@pytest.fixture
def without_leader(start: Any, wait_until: Any) -> Callable[[], Mapper]:
    """A process whose other thread goes on: a live one has to be searched for, which may hang."""

    def start_it() -> Mapper:
        mapper = start()
        mapper.emit("leaderexit")
        wait_until(lambda: (found := ProcFs().stat(mapper.pid)) and found.is_dead)
        return mapper

    return start_it


def hang_after(calls: int, pid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process answers so many searches for a live thread, and then none."""
    left = [calls]

    def live_thread(self: PatientProcFs, asked: int) -> Any:
        if asked == pid:
            if not left[0]:
                raise ScanTimeout(pid)
            left[0] -= 1
        return ProcFs.live_thread(self, asked)

    monkeypatch.setattr(PatientProcFs, "live_thread", live_thread)


def test_one_that_hangs_after_its_maps_were_read_holds_up_nobody(
    poller: Poller, start: Any, without_leader: Any, libraries: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hung, honest = without_leader(), start()
    hung.map(libraries[0])
    poller.look(2)
    hang_after(0, hung.pid, monkeypatch)
    honest.map(libraries[1])
    poller.source._processes[hung.pid].cpu_ns = None  # it is read
    assert poller.look() == [f"+{honest.pid} libtiny1.so mmap"]
    monkeypatch.undo()
    hung.map(libraries[2])
    assert poller.look() == [f"+{hung.pid} libtiny2.so mmap"]


@pytest.mark.parametrize("is_known", [True, False])
def test_one_that_hangs_while_it_is_introduced_is_reported_when_it_answers(
    poller: Poller,
    start: Any,
    without_leader: Any,
    libraries: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    is_known: bool,
) -> None:
    hung, honest = without_leader(), start()
    if is_known:
        poller.look()
    hung.map(libraries[0])
    hang_after(1, hung.pid, monkeypatch)
    honest.map(libraries[1])
    assert poller.look() == [f"+{honest.pid} libtiny1.so mmap"]
    monkeypatch.undo()
    assert poller.look() == [f"+{hung.pid} libtiny0.so mmap"]


def test_a_scan_leaves_out_who_hangs_while_it_is_introduced(
    without_leader: Any, start: Any, libraries: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hung, honest = without_leader(), start()
    hang_after(1, hung.pid, monkeypatch)
    source = ProcfsSource(Config())
    try:
        scans, _ = source.scan_all()
    finally:
        source.close()
    pids = {scan.tgid for scan in scans}
    assert honest.pid in pids
    assert hung.pid not in pids


def test_what_a_poll_found_before_a_read_failed_is_reported(
    poller: Poller, start: Any, libraries: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, mapper = start(), start()
    gone.map(libraries[0])
    poller.look()
    gone.exit()
    mapper.map(libraries[1])

    def read(targets: object) -> Any:
        raise ProcReadError("/proc/1/maps", errno.EMFILE)

    monkeypatch.setattr(poller.source._reads, "read", read)
    assert poller.look() == [f"-{gone.pid} libtiny0.so exit"]
    monkeypatch.undo()
    assert poller.look() == [f"+{mapper.pid} libtiny1.so mmap"]


def test_what_could_not_be_introduced_is_reported_by_the_next_poll(
    poller: Poller, start: Any, libraries: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    mapper = start()
    poller.look()
    mapper.map(libraries[0])

    def status(self: ProcFs, pid: int) -> Any:
        raise ProcReadError(f"/proc/{pid}/status", errno.EMFILE)

    monkeypatch.setattr(ProcFs, "status", status)
    assert poller.look() == []
    monkeypatch.undo()
    assert poller.look() == [f"+{mapper.pid} libtiny0.so mmap"]


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["map", "map", "unmap", "protect", "fork", "exec", "exit", "look"]),
            st.integers(0, 3),
            st.integers(0, 3),
        ),
        max_size=25,
    )
)
def test_after_any_history_the_map_is_what_is_mapped(
    steps: list[tuple[str, int, int]], programs: Mapping[str, Path], libraries: list[Path], tmp_path_factory: Any
) -> None:
    below = libraries[0].parent
    with Poller(f"^{below}/") as poller, Mapper(programs["mapper"], tmp_path_factory.mktemp("s")) as first:
        actors = [first]
        ranges: dict[int, list[tuple[int, int]]] = {first.pid: []}
        for what, who, which in steps:
            if what == "look":
                poller.look()
                continue
            actor = actors[who % len(actors)]
            own = ranges[actor.pid]
            if what == "map":
                own.append(actor.map(libraries[which % len(libraries)]))
            elif what == "unmap" and own:
                actor.unmap(*own.pop(which % len(own)))
            elif what == "protect" and own:
                actor.protect(*own[which % len(own)], "r" if which % 2 else "rx")
            elif what == "fork" and len(actors) < 4:
                actors.append(child := actor.fork())
                ranges[child.pid] = list(own)
            elif what == "exec" and actor is first:
                actor.exec()
                own.clear()
            elif what == "exit" and actor is not first:
                actors.remove(actor)
                actor.exit()
        poller.look()
        for actor in actors:
            assert poller.held(actor.pid) == mapped(actor.pid, below)
        for actor in actors[1:]:
            actor.exit()
        poller.check_alternation()


# -- what a look costs -----------------------------------------------------------------------


class Counting(ProcFs):
    """Notes whose mappings are read."""

    __slots__ = ("read",)

    def new_executable_maps(self, pid: int, *args: Any) -> Any:
        self.read.append(pid)
        return super().new_executable_maps(pid, *args)


@pytest.fixture
def rest(wait_until: Any) -> Callable[[int], int]:
    """Waits until a process has gone to sleep, and gives what its clock shows then."""

    def rest_it(pid: int) -> int:
        seen: list[int | None] = []

        def is_still() -> bool:
            seen.append(CpuClocks(ProcFs()).read_ns(pid))
            return len(seen) > 3 and len(set(seen[-3:])) == 1

        wait_until(is_still)
        assert seen[-1] is not None
        return seen[-1]

    return rest_it


def test_only_a_process_that_ran_is_read(poller: Poller, start: Any, libraries: list[Path], rest: Any) -> None:
    idle, busy = start(), start()
    rest(idle.pid)
    poller.look()
    proc = Counting()
    proc.read = []
    poller.source._reads.proc = proc
    poller.source._looks = 1 - idle.pid  # not its turn to be read anyway
    busy.map(libraries[0])
    poller.look()
    assert busy.pid in proc.read
    assert idle.pid not in proc.read


def test_the_clock_of_a_process_stands_still_while_it_waits_and_goes_when_it_runs(start: Any, rest: Any) -> None:
    mapper = start()
    before = rest(mapper.pid)
    mapper.unmap(*mapper.map("/proc/self/exe"))
    after = rest(mapper.pid)
    assert after > before > 0


def test_a_process_that_is_gone_has_no_clock(start: Any) -> None:
    mapper = start()
    mapper.exit()
    assert CpuClocks(ProcFs()).read_ns(mapper.pid) is None


@needs_root
def test_below_the_proc_of_another_pid_namespace_everything_is_read_and_nothing_mistaken() -> None:
    code = (
        "import os; from sowatch.model.config import Config\n"
        "from sowatch.sources.polling import *; from sowatch.linux.cpu_clock import *\n"
        "from sowatch.linux.proc import ProcFs\n"
        "from sowatch.linux.pid_namespaces import own_pid\n"
        "source = ProcfsSource(Config()); reading = source.scan_process(own_pid(ProcFs()))\n"
        "print(os.getpid(), CpuClocks(ProcFs()).read_ns(1), reading.tgid == int(os.readlink('/proc/self')))\n"
    )
    # Its /proc is still that of the namespace outside.
    command = ["unshare", "--pid", "--fork", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unshare failed" in done.stderr:
        pytest.skip(f"no pid namespace: {done.stderr.strip()}")
    assert (done.stdout, done.stderr) == ("1 None True\n", "")


def burn(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_looks_that_take_too_much_become_rarer_and_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    timer = PollTimer(Config(poll_interval_s=0.01, poll_cpu_percent=10), "looking")
    try:
        with caplog.at_level(logging.WARNING, "sowatch"):
            for _ in range(2):
                with timer.look():
                    burn(0.02)
        assert timer.interval_s >= 0.2
        assert len(caplog.messages) == 1
        assert "poll_cpu_percent" in caplog.text
        with timer.look():
            pass
        assert timer.interval_s == pytest.approx(0.01, abs=0.01)
        with timer.look(counts=False):
            burn(0.02)
        assert timer.interval_s < 0.2
    finally:
        timer.close()
        timer.close()


def test_it_is_time_when_the_descriptor_says_so_or_when_asked(deadline: Any) -> None:
    timer = PollTimer(Config(poll_interval_s=0.01), "looking")
    try:
        assert not timer.is_due()
        with timer.look():
            pass
        assert select.select([timer.fileno()], [], [], deadline(10))[0]
        assert timer.is_due()
        assert not timer.is_due()
        timer.ask()
        assert timer.is_due()
    finally:
        timer.close()


def test_without_a_descriptor_the_error_says_what_to_look_at() -> None:
    code = (
        "import resource; from sowatch.model.config import Config; from sowatch.model.errors import SowatchError\n"
        "from sowatch.sources.poll_timer import PollTimer\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
        "try:\n    PollTimer(Config(), 'x')\nexcept SowatchError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip().endswith("Check the limits of this process (`ulimit -n`).")
    assert issubclass(SowatchError, Exception)
