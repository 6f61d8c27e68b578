"""The tests' own ground: leaks are seen, skips are judged, processes are reaped, libraries differ."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from support import bpfsys, leaks
from support.cgroups import memory_of

TESTS = Path(__file__).resolve().parents[1]


def left_over(before, timeout_s=0):
    """Without BPF objects: one that a process of somebody else has just closed is held by nobody for a moment."""
    return [line for line in leaks.settle(before, timeout_s) if not line.startswith(("map ", "prog ", "link "))]


def test_an_open_descriptor_is_a_leak(tmp_path):
    before = leaks.take()
    fd = os.open(tmp_path, os.O_RDONLY)
    left = left_over(before)
    os.close(fd)

    assert left == [f"fd {fd} -> {tmp_path} was left open"]
    assert left_over(before) == []


def test_closing_a_descriptor_of_somebody_else_is_a_fault(tmp_path):
    fd = os.open(tmp_path, os.O_RDONLY)
    before = leaks.take()
    os.close(fd)

    assert left_over(before) == [f"fd {fd} -> {tmp_path} was closed, but was not the test's"]


def test_a_running_thread_is_a_leak():
    end = threading.Event()
    before = leaks.take()
    thread = threading.Thread(target=end.wait)
    thread.start()
    left = left_over(before)
    end.set()
    thread.join()

    assert len(left) == 1
    assert f"thread {thread.native_id}" in left[0]
    assert left_over(before, 5) == []


@pytest.mark.parametrize("is_earlier", [True, False])
def test_a_thread_that_an_earlier_thread_started_is_no_leak_of_the_test(is_earlier):
    """The pools of a watcher that several tests share grow when they have to."""
    orders, grown, end = threading.Event(), threading.Event(), threading.Event()
    found = []

    def grow():
        orders.wait()
        found.append(threading.Thread(target=end.wait, name="grown"))
        found[0].start()
        grown.set()
        end.wait()

    starter = threading.Thread(target=grow, name="starter")
    before = leaks.take()
    starter.start()
    if is_earlier:
        before = leaks.take()
    orders.set()
    grown.wait()
    left = left_over(before)
    end.set()
    starter.join()
    found[0].join()

    assert [line.rpartition(": ")[2] for line in left] == ([] if is_earlier else ["starter", "grown"])


def test_a_zombie_is_a_leak(wait_until):
    before = leaks.take()
    child = subprocess.Popen(["true"])
    wait_until(lambda: b" Z " in Path(f"/proc/{child.pid}/stat").read_bytes(), what="the child's end")
    left = left_over(before)
    child.wait()

    assert left == [f"child {child.pid} (true) was not reaped"]
    assert left_over(before) == []


def test_spawned_processes_are_ended_and_reaped_with_their_children(spawn, wait_until):
    before = leaks.take()
    process = spawn(["sh", "-c", "sleep 1000 & echo $!; trap '' TERM; wait; wait"], stdout=subprocess.PIPE)
    grandchild = int(process.stdout.readline())
    spawn.close()

    assert process.returncode is not None
    wait_until(lambda: not Path(f"/proc/{grandchild}/exe").exists(), what="the end of the grandchild")
    assert leaks.settle(before, 5) == []


def test_made_libraries_have_their_soname_and_exports(make_library):
    made = make_library("deep/libours.so.1", exports=("ours_open", "ours_close"))
    said = subprocess.run(
        ["readelf", "--wide", "--dynamic", "--dyn-syms", made], capture_output=True, text=True, check=True
    )

    assert "Library soname: [libours.so.1]" in said.stdout
    assert " ours_open\n" in said.stdout
    assert " ours_close\n" in said.stdout


@pytest.fixture
def run_suite(tmp_path):
    """Runs one kernel test file with this suite's conftest; gives the exit status and the output."""
    suite = tmp_path / "tests"
    (suite / "kernel").mkdir(parents=True)
    shutil.copy(TESTS / "conftest.py", suite)
    shutil.copytree(TESTS / "support", suite / "support")

    def run(body: str, **environment: str) -> tuple[int, str]:
        (suite / "kernel" / "test_it.py").write_text(body, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "-p", "no:cacheprovider"]
        command += [
            "-W",
            "error",
            "-o",
            f"pythonpath={suite}",
            "-o",
            "markers=kernel",
            f"--rootdir={suite}",
            str(suite),
        ]
        known = {name: value for name, value in os.environ.items() if not name.startswith("SOWATCH_")}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=known | environment)
        return done.returncode, done.stdout + done.stderr

    return run


# The kernel's "no such call", which only a program without bpf(2) can otherwise see.
NO_BPF = """
from support import bpfsys
import errno
def refuse(*_):
    raise OSError(errno.{code}, "refused")
bpfsys._bpf = refuse
def test_it(needs_bpf): pass
"""


def test_without_bpf_a_kernel_test_is_skipped_with_the_kernels_reason(run_suite):
    code, output = run_suite(NO_BPF.format(code="EPERM"))

    assert code == 0
    assert "1 skipped" in output


def test_under_the_force_switch_a_refused_bpf_call_is_a_failure(run_suite):
    code, output = run_suite(NO_BPF.format(code="EPERM"), SOWATCH_FORCE_KERNEL_TESTS="1")

    assert code == 1
    assert "no kernel test may skip" in output


def test_under_the_force_switch_a_kernel_without_bpf_may_still_skip(run_suite):
    code, output = run_suite(NO_BPF.format(code="ENOSYS"), SOWATCH_FORCE_KERNEL_TESTS="1")

    assert code == 0
    assert "1 skipped" in output


def needs_real_bpf() -> pytest.MarkDecorator:
    return pytest.mark.skipif(bpfsys.why_no_bpf() is not None, reason="bpf(2) cannot create a map")


@needs_real_bpf()
@pytest.mark.parametrize(
    "skip",
    [
        "import pytest\npytest.skip('at once', allow_module_level=True)",
        "import pytest\ndef test_it(): pytest.skip('later')",
    ],
)
def test_under_the_force_switch_any_skipped_kernel_test_is_a_failure(run_suite, skip):
    assert "1 skipped" in run_suite(skip)[1]
    code, output = run_suite(skip, SOWATCH_FORCE_KERNEL_TESTS="1")

    assert code != 0
    assert "no kernel test may skip" in output


@needs_real_bpf()
def test_a_bpf_map_left_open_fails_the_kernel_test_that_left_it(run_suite):
    body = """
from support import bpfsys
def test_it():
    bpfsys._bpf(bpfsys._MAP_CREATE, bpfsys._MapCreate(bpfsys._MAP_TYPE_ARRAY, 4, 8, 1))
"""
    code, output = run_suite(body, SOWATCH_DEADLINE_SCALE="0.01")

    assert code == 1
    assert "the test left something behind" in output
    assert "anon_inode:bpf-map was left open" in output
    assert "is still loaded" in output


@needs_real_bpf()
def test_what_was_left_to_the_garbage_collector_before_is_not_the_kernel_tests(run_suite):
    body = """
import gc, os
class Left:
    def __init__(self):
        self.fd, self.itself = os.open("/", os.O_RDONLY), self
    def __del__(self):
        os.close(self.fd)
gc.disable()
Left()
def test_it(): pass
"""
    code, output = run_suite(body, SOWATCH_DEADLINE_SCALE="0.01")

    assert code == 0, output


#: Makes a BPF map for each line, closes the one before, and says its id.
MAPS = """
import os, sys
from support import bpfsys
fd = None
for line in sys.stdin:
    new = bpfsys.create_map()
    if fd is not None:
        os.close(fd)
    fd = new
    print(max(number for kind, number in bpfsys._ids_of(f"/proc/self/fdinfo/{fd}")), flush=True)
"""


@pytest.fixture
def maker(spawn):
    """Starts a process that makes maps as MAPS does; one that is not our descendant with ``is_other``."""

    def start(is_other):
        command = [sys.executable, "-c", MAPS]
        if is_other:
            # Its parent ends at once, so that it belongs to whoever adopts orphans.
            command = ["sh", "-c", 'exec 3<&0; "$@" <&3 3<&- &', "sh", *command]
        process = spawn(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(TESTS)},
        )
        if is_other:
            process.wait()

        def make():
            process.stdin.write("\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        return make

    return start


@needs_real_bpf()
def test_a_bpf_map_of_another_process_is_not_the_tests(maker, deadline):
    make = maker(is_other=True)
    before = leaks.take()
    number = make()

    assert ("map", number) in bpfsys.all_ids()
    assert leaks.settle(before, deadline(10)) == []


@needs_real_bpf()
def test_a_bpf_map_of_a_child_is_the_tests(maker):
    make = maker(is_other=False)
    before = leaks.take()
    number = make()

    assert f"map {number} is still loaded" in leaks.settle(before, 0)


@needs_real_bpf()
def test_bpf_maps_that_others_make_and_close_all_the_time_are_not_the_tests(monkeypatch, maker, deadline):
    """Whoever looks first at what exists and then at what is held sees some that nobody holds."""
    make = maker(is_other=True)
    real = bpfsys.all_ids

    def then_replaced():
        make()
        found = real()
        make()
        return found

    before = leaks.take()
    monkeypatch.setattr(bpfsys, "all_ids", then_replaced)

    assert leaks.settle(before, deadline(10)) == []


@pytest.mark.fresh
@needs_real_bpf()
def test_a_pinned_map_that_no_process_holds_is_a_leak(tmp_path):
    """In a mount namespace of its own, so that no bpffs of this machine is used."""
    body = """
import os, subprocess, sys
from support import bpfsys, leaks
root = sys.argv[1]
subprocess.run(["mount", "-t", "bpf", "bpf", root], check=True)
before = leaks.take()
fd = bpfsys.create_map()
(kind, number), = bpfsys._ids_of(f"/proc/self/fdinfo/{fd}")
bpfsys.pin(fd, root + "/ours")
os.close(fd)
assert leaks.settle(before, 0) == [f"map {number} is still loaded", f"{root}/ours pins map {number}"]
os.unlink(root + "/ours")
assert leaks.settle(before, 10) == []
print("both")
"""
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", body, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
    )

    assert (done.returncode, done.stdout) == (0, "both\n"), done.stderr


@pytest.mark.parametrize(
    ("filesystem", "cgroup", "files"),
    [
        (
            "cgroup cgroup rw,memory",
            "3:cpu:/other\n4:memory:/pod/agent\n0::/\n",
            ("max_usage_in_bytes", "limit_in_bytes"),
        ),
        ("cgroup2 none rw", "0::/pod/agent\n", ("peak", "max")),
        ("cgroup2 none rw", "0::/pod/agent\n", ("current", "max")),
    ],
    ids=["version-1", "version-2", "version-2-before-5.19"],
)
def test_the_memory_of_a_cgroup_is_read_in_both_versions(tmp_path, filesystem, cgroup, files):
    place = tmp_path / "mounted" / "pod" / "agent"
    place.mkdir(parents=True)
    for name, value in zip(files, (7, 11), strict=True):
        (place / f"memory.{name}").write_text(f"{value}\n")
    if files[0] == "peak":
        (place / "memory.current").write_text("5\n")
    (tmp_path / "self").mkdir()
    mounted = f"31 23 0:28 / {tmp_path}/mounted rw,relatime - {filesystem}\n"
    other = f"30 23 0:27 / {tmp_path}/cpu rw - cgroup cgroup rw,cpu\n"
    (tmp_path / "self" / "mountinfo").write_text(other + mounted)
    (tmp_path / "42").mkdir()
    (tmp_path / "42" / "cgroup").write_text(cgroup)

    assert memory_of(42, tmp_path) == (7, 11)
