"""What bad input gets from the installed command: one clear line, the exit code of the contract, nothing left behind.

That nothing stays attached, pinned or open is looked after for every test here by conftest's ``_clean``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from support import strict

#: The command as it was installed, beside the interpreter of its environment.
SOWATCH = Path(sysconfig.get_path("scripts")) / "sowatch"
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]


def run(words: Sequence[str], *, prefix: Sequence[str] = (), **options: Any) -> subprocess.CompletedProcess[str]:
    options.setdefault("stdout", subprocess.PIPE)
    return subprocess.run(
        [*prefix, os.fspath(SOWATCH), *words],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        cwd="/",
        timeout=100,
        **options,
    )


def only_line(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line on stderr; nothing else was said, and the exit code is ``code``."""
    assert all(line.startswith("sowatch: ") for line in done.stderr.splitlines()), done.stderr
    # Other processes of the host may send more than a busy machine can take.
    (line,) = [line for line in done.stderr.splitlines() if "the watch falls behind" not in line]
    assert "Traceback" not in done.stderr
    assert not done.stdout
    assert done.returncode == code
    return line


@pytest.mark.parametrize("command", ["watch", "list"])
@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("lib(ssl", "at position 3"),
        ("libssl[", "at position 6"),
        ("*", "nothing to repeat at position 0"),
        ("(?P<a>x)(?P<a>y)", "position 12"),
        ("a\nb(", "bad pattern 'a\\nb(': missing ), unterminated subpattern at position 3"),
        ("(" * 3000 + ")" * 3000, "too large or too deeply nested"),
    ],
)
def test_a_bad_pattern_is_refused_with_the_position_of_the_fault(command: str, pattern: str, said: str) -> None:
    assert said in only_line(run([command, pattern]), 2)


@pytest.mark.parametrize("command", ["watch", "list", "doctor"])
def test_an_unknown_strategy_is_refused_with_those_there_are(command: str) -> None:
    line = only_line(run([command, "--strategy", "magic"]), 2)

    assert "unknown strategy 'magic'" in line
    assert "auto, core, runtime, prebuilt, procfs" in line


@pytest.mark.parametrize("command", ["watch", "list"])
def test_an_unknown_kind_is_refused_with_those_there_are(command: str) -> None:
    line = only_line(run([command, "--kind", "plugin"]), 2)

    assert "unknown kind 'plugin'" in line
    assert "library, executable, interpreter" in line


def test_a_list_without_a_snapshot_is_refused() -> None:
    assert "--no-snapshot" in only_line(run(["list", "--no-snapshot"]), 2)


@pytest.mark.parametrize("command", ["watch", "list", "doctor"])
@pytest.mark.parametrize("where", ["/", "/dev/null", "/nonexistent", "/sys", ""])
def test_a_proc_root_that_is_none_is_refused(command: str, where: str) -> None:
    assert "is not a proc file system" in only_line(run([command, "--proc-root", where]), 2)


@pytest.mark.parametrize("words", [[], ["whatch"], ["watch", "--evens", "load"], ["list", "--pid", "self"]])
def test_words_that_mean_nothing_are_refused(words: list[str]) -> None:
    only_line(run(words), 2)


@pytest.mark.parametrize("command", ["watch", "list"])
def test_a_process_that_does_not_exist_cannot_be_watched(command: str) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()

    assert f"there is no process {gone.pid}" in only_line(run([command, "--pid", str(gone.pid)]), 1)


@pytest.mark.parametrize("words", [["watch"], ["list"], ["doctor"], ["--help"]])
def test_a_stdout_that_is_closed_is_an_error(words: list[str]) -> None:
    line = only_line(run(words, stdout=None, preexec_fn=lambda: os.close(1)), 1)

    assert "standard output is closed" in line


def test_a_stdout_that_is_full_is_an_error() -> None:
    with Path("/dev/full").open("w") as full:
        line = only_line(run(["watch", "--duration", "0"], stdout=full), 1)

    assert "No space left on device" in line


@pytest.mark.parametrize("words", [["watch"], ["watch", "--format", "text"], ["list"]])
def test_a_pipe_whose_reader_has_gone_ends_the_command_quietly(words: list[str]) -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    done = run(words, stdout=write_fd)
    os.close(write_fd)

    assert (done.returncode, done.stderr) == (0, "")


# --- permission ---------------------------------------------------------------------------------

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")


@pytest.mark.fresh
@needs_root
@pytest.mark.parametrize("words", [["watch", "--strategy", "core"], ["list", "--strategy", "core"]])
def test_nobody_is_told_the_missing_capability_and_the_command_that_would_work(words: list[str]) -> None:
    line = only_line(run(words, prefix=NOBODY), 3)

    assert "CAP_BPF" in line
    assert "sudo sowatch" in line


@pytest.mark.fresh
@needs_root
def test_nobody_gets_a_whole_report_from_doctor_and_the_exit_code_for_permission() -> None:
    done = run(["doctor", "--json"], prefix=NOBODY)
    report = strict.loads(done.stdout)

    assert report["facts"]["uid"] == 65534
    assert report["facts"]["capabilities"] == []
    assert report["facts"]["may_load_programs"] is False
    assert done.returncode == (3 if report["decision"]["strategy"] is None else 0)
    assert done.stderr.count("\n") == (1 if done.returncode else 0)
    assert "Traceback" not in done.stderr


# --- kernels and machines that cannot -----------------------------------------------------------


def refuse_bpf(number: int) -> None:
    """Have bpf(2) fail in this process and its children, as on a kernel without it or one that is locked."""
    load, jump_if_equal, answer = 0x20, 0x15, 0x06  # BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K
    call = {"x86_64": 321, "aarch64": 280, "riscv64": 280}[os.uname().machine]
    program = b"".join(
        struct.pack("=HBBI", *line)
        for line in (
            (load, 0, 0, 0),  # seccomp_data.nr
            (jump_if_equal, 0, 1, call),
            (answer, 0, 0, 0x00050000 | number),  # SECCOMP_RET_ERRNO
            (answer, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
        )
    )
    lines = ctypes.create_string_buffer(program)
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(lines))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, header):  # PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP
        raise OSError(ctypes.get_errno(), "prctl")


@pytest.mark.parametrize("command", ["watch", "list"])
def test_a_kernel_without_bpf_is_named_as_the_reason(command: str) -> None:
    line = only_line(run([command, "--strategy", "core"], preexec_fn=lambda: refuse_bpf(errno.ENOSYS)), 1)

    assert "core: " in line
    assert re.search(r"bpf\(2\)|Function not implemented", line)


@pytest.mark.parametrize("command", ["watch", "list"])
def test_a_kernel_that_refuses_bpf_to_root_is_an_error_with_the_kernels_word(command: str) -> None:
    done = run([command, "--strategy", "core"], preexec_fn=lambda: refuse_bpf(errno.EPERM))

    assert done.returncode in (1, 3)
    assert "Operation not permitted" in only_line(done, done.returncode)


def test_doctor_finds_something_that_can_watch_where_the_kernel_offers_bpf(needs_bpf: None) -> None:
    done = run(["doctor", "--json"])
    report = strict.loads(done.stdout)

    assert (done.returncode, done.stderr) == (0, "")
    assert report["decision"]["strategy"] is not None
    assert {probe["answer"] for probe in report["probes"]} <= {"yes", "no", "unknown"}


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM])
def test_doctor_reports_on_a_kernel_that_refuses_bpf(number: int) -> None:
    done = run(["doctor", "--strategy", "core", "--json"], preexec_fn=lambda: refuse_bpf(number))
    report = strict.loads(done.stdout)

    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert report["decision"]["strategy"] is None
    assert report["facts"]["seccomp"] == "filter"


@pytest.fixture
def without_libbpf() -> list[str]:
    """What to put before a command so that it finds no libbpf."""
    import sowatch.bpf._libbpf as binding

    linked = subprocess.run(["ldd", binding.__file__], capture_output=True, text=True, check=True).stdout
    library = re.search(r"libbpf\.so\.\d+ => (\S+)", linked)
    if library is None:
        pytest.skip("libbpf is part of the binding here")
    return ["unshare", "--mount", "sh", "-c", f'mount --bind /dev/null {library[1]} && exec "$@"', "sh"]


@needs_root
@pytest.mark.parametrize("command", ["watch", "list"])
def test_a_machine_without_libbpf_is_told_what_to_install(command: str, without_libbpf: list[str]) -> None:
    line = only_line(run([command, "--strategy", "core"], prefix=without_libbpf), 1)

    assert "cannot load libbpf" in line
    assert "Install libbpf" in line


@needs_root
def test_a_machine_without_libbpf_is_looked_at_and_its_files_are_read(without_libbpf: list[str]) -> None:
    done = run(["list", "--json", r"/libc\.so\.6$"], prefix=without_libbpf)
    # The last line may say that the answer is incomplete: whom /proc does not show depends on the machine.
    entries = [entry for line in done.stdout.splitlines() if "library" in (entry := strict.loads(line))]

    assert done.returncode == 0
    assert done.stderr.count("\n") == 1
    assert "watching with procfs (sampled) because core: cannot load libbpf" in done.stderr
    assert "Install libbpf" in done.stderr
    assert entries
    assert all(entry["library"]["build_id"] for entry in entries)


# --- endings ------------------------------------------------------------------------------------


def started(spawn: Any, *words: str, **options: Any) -> Any:
    """A watch that has said ``ready``; its stdout is a pipe."""
    process = spawn([SOWATCH, "watch", "--json", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    for line in process.stdout:
        if strict.loads(line)["event"] == "ready":
            return process
    pytest.fail(f"the watch ended before it was ready: {process.stderr.read()!r}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_watch_with_stopped_as_its_last_line(spawn: Any, number: signal.Signals, deadline: Any) -> None:
    process = started(spawn)

    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=deadline(20))

    assert strict.loads(stdout.splitlines()[-1])["event"] == "stopped"
    assert stderr == b""
    assert process.returncode == 0


def test_sigint_ends_a_watch_in_the_background_of_a_script(spawn: Any, deadline: Any) -> None:
    # There the shell has it ignored.
    process = started(spawn, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))

    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=deadline(20))

    assert strict.loads(stdout.splitlines()[-1])["event"] == "stopped"
    assert process.returncode == 0


def worker_of(process: Any) -> int | None:
    """The process that does the work of a command."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(found[0]) if found else None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_a_watch_has_begun_ends_it_with_stopped_too(
    spawn: Any, wait_until: Any, number: signal.Signals, deadline: Any
) -> None:
    process = spawn([SOWATCH, "watch", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until(lambda: worker_of(process), what="the worker")

    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=deadline(20))

    assert strict.loads(stdout.splitlines()[-1])["event"] == "stopped"
    assert (stderr, process.returncode) == (b"", 0)


def test_an_audit_that_was_interrupted_is_not_one_that_found_differences(
    spawn: Any, wait_until: Any, deadline: Any
) -> None:
    process = spawn([SOWATCH, "audit", "--duration", "600"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def watches() -> bool:
        worker = worker_of(process)
        if not worker:
            return False
        with suppress(FileNotFoundError):  # it closes descriptors meanwhile
            return any("bpf_link" in os.readlink(fd) for fd in Path(f"/proc/{worker}/fd").iterdir())
        return False

    wait_until(watches, what="the watch")
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=deadline(20))

    assert (stdout, stderr) == (b"", b"sowatch: interrupted before it was done.\n")
    assert process.returncode == 130


def test_a_watch_whose_reader_stops_reading_still_ends_on_a_signal(spawn: Any, deadline: Any) -> None:
    process = started(spawn)
    write_fd = os.open(f"/proc/{process.pid}/fd/1", os.O_WRONLY | os.O_NONBLOCK)
    try:
        while True:
            os.write(write_fd, b"x" * 4096)
    except BlockingIOError:
        pass
    finally:
        os.close(write_fd)

    process.send_signal(signal.SIGTERM)
    process.wait(deadline(20))
    stderr = process.stderr.read().decode()

    assert process.returncode == 1
    assert stderr.startswith("sowatch: the reader of standard output does not read")
    assert stderr.count("\n") == 1


def test_a_killed_watch_leaves_nothing_in_the_kernel(spawn: Any, deadline: Any) -> None:
    process = started(spawn)

    process.kill()

    assert process.wait(deadline(20)) == -signal.SIGKILL


def test_the_python_that_runs_the_tests_is_the_one_the_command_was_installed_for() -> None:
    assert SOWATCH.exists(), f"install the package for {sys.executable} first"
    assert shutil.which("setpriv") or os.geteuid() != 0
