"""Strategy ``procfs``: the installed command and `Watcher` without BPF, as root and as nobody."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from sowatch import Config, ProcessMonitor, Rule, Watcher
from sowatch.model.process_events import ProcessEvent
from sowatch.sources.process_feeds import PolledProcessFeed
from support.hostile import deep_path
from support.programs import Mapper, compile_library, make_libraries

SOWATCH = Path(sysconfig.get_path("scripts")) / "sowatch"
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
OFTEN = Config(strategy="procfs", poll_interval_s=0.05, poll_cpu_percent=100)
LIBC = r"/libc\.so\.6$"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")


@pytest.fixture
def sleeper(spawn: Any, wait_until: Any) -> Callable[[], Any]:
    """Starts a process of nobody's and waits until its program runs."""

    def start() -> Any:
        process = spawn([*NOBODY, "sleep", "300"])
        maps = Path(f"/proc/{process.pid}/maps")
        wait_until(lambda: {"/sleep", "/libc.so.6"} <= set(re.findall(r"/[^/\n]+$", maps.read_text(), re.MULTILINE)))
        return process

    return start


class Feed:
    """A running ``sowatch watch --json``, as nobody."""

    def __init__(self, spawn: Any, words: Sequence[str], said: Path) -> None:
        self._said = said
        with said.open("wb") as errors:
            command = [*NOBODY, os.fspath(SOWATCH), "watch", "--json", *words]
            self.process = spawn(command, stdout=subprocess.PIPE, stderr=errors, cwd="/")
        self.events: list[dict[str, Any]] = []

    def take_until(self, is_it: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The next event that is it; the test's own time limit ends a wait for nothing."""
        for line in self.process.stdout:
            self.events.append(json.loads(line))
            if is_it(self.events[-1]):
                return self.events[-1]
        raise AssertionError(f"the watch ended: {self._said.read_text()}")

    def stderr(self) -> str:
        return self._said.read_text()


def event(kind: str, pid: int | None = None) -> Callable[[dict[str, Any]], bool]:
    return lambda one: one["event"] == kind and (pid is None or one["process"]["pid"] == pid)


# -- without root ----------------------------------------------------------------------------


@pytest.mark.fresh
@needs_root
def test_nobody_watches_its_own_processes_and_is_told_in_one_line_what_is_lost(
    spawn: Any, sleeper: Any, tmp_path: Path, schema: Any
) -> None:
    before = sleeper()
    of_root = spawn(["sleep", "300"])
    feed = Feed(spawn, [LIBC], tmp_path / "said")
    feed.take_until(event("ready"))
    after = spawn([*NOBODY, "sleep", "300"])
    feed.take_until(event("load", after.pid))
    after.send_signal(signal.SIGKILL)
    ended = feed.take_until(event("unload", after.pid))
    feed.process.send_signal(signal.SIGTERM)
    feed.take_until(event("stopped"))

    for one in feed.events:
        schema(one)
    (ready,) = (one for one in feed.events if one["event"] == "ready")
    assert (ready["strategy"], ready["guarantee"], ready["hooks"]) == ("procfs", "sampled", None)
    assert [(one["strategy"], one["ok"]) for one in ready["attempts"]][-1] == ("procfs", True)
    assert "CAP_BPF" in ready["attempts"][0]["error"]
    snapshot = {one["process"]["pid"] for one in feed.events if one.get("cause") == "snapshot"}
    assert before.pid in snapshot
    assert all(one["process"]["uid"] == 65534 for one in feed.events if one["event"] == "load")
    assert of_root.pid not in {one["process"]["pid"] for one in feed.events if one["event"] == "load"}
    assert ended["cause"] == "exit"
    assert feed.process.wait() == 0
    line = feed.stderr()
    assert line.count("\n") == 1
    assert line.startswith("sowatch: watching with procfs (sampled) because core: missing ")
    assert "is not seen" in line
    assert "processes that this user may not read: " in line
    assert "sudo sowatch" in line


def as_nobody(*words: str) -> subprocess.CompletedProcess[str]:
    command = [*NOBODY, os.fspath(SOWATCH), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", timeout=100)


@needs_root
def test_nobody_lists_its_own_processes(sleeper: Any) -> None:
    own = sleeper()
    done = as_nobody("list", "--json", "--pid", str(own.pid), LIBC)

    assert done.returncode == 0
    assert done.stderr.count("\n") == 1
    head, entry = map(json.loads, done.stdout.splitlines())
    assert (head["event"], head["source"], head["strategy"]) == ("head", "watch", "procfs")
    assert entry["process"]["exe"].endswith("/sleep")
    assert entry["library"]["build_id"]
    assert entry["library"]["host_path"] == entry["library"]["path"]


@needs_root
def test_nobody_audits_what_it_may_read(sleeper: Any) -> None:
    sleeper()
    done = as_nobody("audit", "--json", "--duration", "0")
    report = json.loads(done.stdout)

    assert (done.returncode, report["differences"]) == (0, [])
    assert report["processes"] >= 2
    assert report["unreadable"] > 0


@needs_root
def test_nobody_is_told_by_doctor_what_will_be_used_and_how_to_get_more() -> None:
    done = as_nobody("doctor", "--json")
    decision = json.loads(done.stdout)["decision"]

    assert done.returncode == 0
    assert (decision["strategy"], decision["guarantee"]) == ("procfs", "sampled")


@needs_root
def test_nobody_gets_an_explanation_of_its_own_process(sleeper: Any) -> None:
    own = sleeper()
    done = as_nobody("explain", "--json", str(own.pid))
    report = json.loads(done.stdout)

    assert done.returncode == 0
    (libc,) = (one for one in report["mappings"] if one["library"]["path"].endswith("/libc.so.6"))
    assert libc["seen"]["cause"] == "snapshot"
    assert libc["verdict"]["verdict"] == "match"
    assert report["extra"] == []


@pytest.mark.fresh
@needs_root
def test_without_the_fallback_nobody_is_not_permitted() -> None:
    code = (
        "from sowatch import Config, Watcher; from sowatch.model.errors import NotPermitted\n"
        "try:\n    Watcher(config=Config(allow_procfs_fallback=False)).start()\n"
        "except NotPermitted as error:\n    print(error.exit_code)\n"
    )
    done = subprocess.run([*NOBODY, sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")

    assert done.stdout == "3\n"


# -- the whole chain -------------------------------------------------------------------------


def test_a_watcher_that_polls_activates_and_deactivates_and_its_map_is_right(
    mapper: Mapper, tmp_path: Path, wait_until: Any
) -> None:
    calls: list[tuple[str, str]] = []
    (library,) = make_libraries(tmp_path, 1, prefix="polled")
    rule = Rule(
        f"^{library}$",
        name="polled",
        on_activate=lambda file: calls.append(("activate", os.readlink(file.path))),
        on_deactivate=lambda file: calls.append(("deactivate", file.library.soname or "")),
    )
    with Watcher(rule, config=OFTEN) as watcher:
        assert watcher.ready is not None
        assert watcher.ready.guarantee == "sampled"
        at, length = mapper.map(library)
        wait_until(lambda: calls)
        assert calls == [("activate", str(library))]
        assert [one.process.pid for one in watcher.snapshot()] == [mapper.pid]
        assert watcher.stats.poll_interval_s is not None
        mapper.unmap(at, length)
        wait_until(lambda: len(calls) == 2)
        assert calls[1][0] == "deactivate"


def test_an_audit_does_not_wait_for_the_next_look(mapper: Mapper, tmp_path: Path) -> None:
    (library,) = make_libraries(tmp_path, 1, prefix="audited")
    with Watcher(Rule(f"^{library}$"), config=OFTEN.replace(poll_interval_s=3600)) as watcher:
        mapper.map(library)
        report = watcher.audit()
        assert report.differences == ()
        assert report.mappings == 1


# -- processes -------------------------------------------------------------------------------


def test_a_monitor_that_polls_tells_forks_execs_and_exits(mapper: Mapper, spawn: Any, wait_until: Any) -> None:
    seen: list[ProcessEvent] = []
    with ProcessMonitor(PolledProcessFeed(OFTEN), scan=False) as monitor:
        for subscribe in (monitor.on_fork, monitor.on_exec, monitor.on_exit):
            subscribe(seen.append)

        def story(pid: int) -> list[str]:
            return [one.kind for one in seen if one.process.pid == pid]

        sleeper = spawn(["sleep", "300"])
        wait_until(lambda: story(sleeper.pid)[-1:] == ["exec"])
        child = mapper.fork()
        wait_until(lambda: story(child.pid) == ["fork"])
        assert next(one.parent for one in seen if one.process.pid == child.pid).pid == mapper.pid  # type: ignore[union-attr]
        child.exec()
        wait_until(lambda: story(child.pid) == ["fork", "exec"])
        child.exit()
        wait_until(lambda: story(child.pid) == ["fork", "exec", "exit"])
        sleeper.kill()
        wait_until(lambda: story(sleeper.pid)[-1:] == ["exit"])
        assert story(sleeper.pid)[0] == "fork"
        assert monitor.stats.feed_errors == 0


@pytest.mark.fresh
@needs_root
def test_the_monitor_of_nobody_polls_and_says_so() -> None:
    code = (
        "import logging, sys; logging.basicConfig(stream=sys.stdout, format='%(message)s')\n"
        "from sowatch import process_monitor; monitor = process_monitor()\n"
        "print(monitor.is_running); monitor.stop()\n"
    )
    done = subprocess.run([*NOBODY, sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    line, is_running = done.stdout.splitlines()

    assert line.startswith("processes are found by polling /proc every 1 s: ")
    assert is_running == "True"


# -- what could not be read is counted ---------------------------------------------------------


@needs_root
def test_nobody_is_told_that_stale_files_may_run_where_it_could_not_look_and_how_many(sleeper: Any) -> None:
    own = sleeper()
    done = as_nobody("list", "--stale", "--format", "table", r"/sowatch-none-has-this-name\.so$")
    said = done.stderr.splitlines()[-1]

    assert done.returncode == 3
    assert "nothing runs on deleted or replaced files." not in done.stderr
    found = re.fullmatch(
        r"sowatch: nothing that can be seen runs on deleted or replaced files, but (\d+) processes could not be read\. "
        r"To read all of them takes CAP_SYS_PTRACE: run it as root, `sudo sowatch list --stale`\.",
        said,
    )
    assert found, said
    lines = [json.loads(line) for line in as_nobody("list", "--stale", "--json", LIBC).stdout.splitlines()]
    assert lines[-1]["event"] == "coverage"
    assert lines[-1]["processes"]["unreadable"] > 0
    assert lines[-1]["processes"]["hidden"] is False
    assert as_nobody("list", "--stale", "--json", "--pid", str(own.pid), LIBC).returncode == 0


@needs_root
def test_nobody_behind_hidepid_is_told_that_processes_are_hidden(tmp_path: Path) -> None:
    script = 'mount -t proc -o hidepid=2 proc /proc && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", *NOBODY, SOWATCH, "list", "--stale", "--format", "table"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", timeout=100)

    assert done.returncode == 3, done.stderr
    assert "/proc hides processes of other users (hidepid), nobody knows how many" in done.stderr
    assert "processes of other users are hidden: /proc is mounted with hidepid" in done.stderr


@needs_root
def test_a_process_whose_program_has_a_path_too_long_for_proc_is_listed_without_it(
    spawn: Any, tmp_path: Path, programs: Any, wait_until: Any
) -> None:
    tmp_path.chmod(0o755)
    path = deep_path(tmp_path, 4300, "mapper")
    directory = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    for component in Path(path).relative_to(tmp_path).parts[:-1]:
        deeper = os.open(component, os.O_PATH | os.O_DIRECTORY, dir_fd=directory)
        os.close(directory)
        directory = deeper
    fd = os.open("mapper", os.O_WRONLY | os.O_CREAT, 0o755, dir_fd=directory)
    os.write(fd, programs["mapper"].read_bytes())
    os.close(fd)
    # As the process sees it: /proc/self/fd leads there without a path.
    process = spawn([f"/proc/self/fd/{directory}/mapper"], stdin=-1, stdout=-1, pass_fds=[directory])
    os.close(directory)
    assert process.stdout.readline()
    with pytest.raises(OSError, match="too long"):
        os.readlink(f"/proc/{process.pid}/exe")

    done = subprocess.run(
        [SOWATCH, "list", "--json", "--strategy", "procfs", "--pid", str(process.pid), LIBC],
        capture_output=True,
        text=True,
        check=True,
    )

    _, entry = map(json.loads, done.stdout.splitlines())
    assert (entry["process"]["pid"], entry["process"]["exe"]) == (process.pid, None)


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that nobody may look into, unlike pytest's."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory


@needs_root
def test_nobody_is_not_told_that_a_file_is_not_mapped_where_it_could_not_look(
    mapper: Mapper, open_directory: Path
) -> None:
    closed = open_directory / "closed"
    closed.mkdir(mode=0o700)
    libraries = [compile_library(directory / "libshut.so") for directory in (open_directory, closed)]
    for library in libraries:
        mapper.map(library)
    report = json.loads(as_nobody("explain", "--json", str(libraries[0])).stdout)
    shut = as_nobody("explain", "--json", str(libraries[1]))

    assert (report["mapped"], report["notes"][0]) == ([], "mapped_unknown")
    assert report["unreadable"] > 0
    assert shut.returncode == 1
    said = r"Permission denied; and no process has .* mapped, of those that could be read: \d+ could not"
    assert re.search(said, shut.stderr)
    text = as_nobody("explain", "--format", "text", str(libraries[0])).stdout
    assert "no process that could be read has this file mapped executable" in text
    assert re.search(r"note +\d+ processes could not be read\.", text)


@needs_root
def test_nobody_is_not_told_that_its_own_mapping_is_of_another_file_where_it_could_not_look(
    spawn: Any, open_directory: Path
) -> None:
    """It was opened before its directory was closed."""
    library = compile_library(open_directory / "shut" / "libshut.so")
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1]); print(flush=True); sys.stdin.read()"
    process = spawn([*NOBODY, "/usr/bin/python3", "-c", code, library], stdin=-1, stdout=-1)
    assert process.stdout.readline() == b"\n"
    library.parent.chmod(0o700)

    report = json.loads(as_nobody("explain", "--json", str(library)).stdout)

    assert (report["type"], report["error"]) == (None, "Permission denied")
    assert [(one["process"]["pid"], one["relation"]) for one in report["mapped"]] == [(process.pid, "unknown")]
    assert "mapped_unknown" in report["notes"]
