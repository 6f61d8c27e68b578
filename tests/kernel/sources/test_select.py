"""The ladder climbed for real: what a candidate needs is taken away, and the next one is reached, or none."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from sowatch import Config, Mapped, Rule, Watcher
from sowatch.bpf.binding import Tracefs
from sowatch.bpf.compile import PROGRAMS, find_compiler, run_compiler
from sowatch.linux.proc import ProcFs
from sowatch.model.errors import BpfError, LoadError
from sowatch.sources.base import EventSource
from sowatch.sources.core import BpfSource
from sowatch.sources.prebuilt import PrebuiltSource
from sowatch.sources.select import open_scan, open_source, plan
from support import bpfsys
from support.kernel import TAG, Ledger
from support.programs import Mapper

pytestmark = pytest.mark.fresh

#: Everything as configured by default, but no polling: what fails has to say so.
BPF_ONLY = {"allow_procfs_fallback": False}


@contextlib.contextmanager
def opened(**config: Any) -> Iterator[EventSource]:
    source = open_source(Config(**config))
    try:
        yield source
    finally:
        source.close()


def tried(source: EventSource) -> list[tuple[str, bool]]:
    return [(attempt.strategy, attempt.ok) for attempt in source.attempts]


def how_much_is_held() -> Counter[str]:
    """How many programs, maps and links this process has in the kernel, by kind."""
    return Counter(kind for kind, _ in bpfsys.held_ids("self"))


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No clang on PATH, and no wheel."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CLANG", raising=False)
    monkeypatch.setitem(sys.modules, "ziglang", None)


@pytest.fixture
def bad_btf(tmp_path: Path) -> str:
    """A file that is no BTF."""
    made = tmp_path / "bad.btf"
    made.write_bytes(b"\x9f\xeb\x01" + bytes(5))
    return str(made)


@pytest.fixture
def compile_changed(tmp_path: Path, deadline: Any) -> Callable[[str, str], str]:
    """``compile_changed(old, new)`` is an object of the shipped programs with one text changed in them."""

    def make(old: str, new: str) -> str:
        sources = tmp_path / "programs"
        shutil.copytree(PROGRAMS, sources, ignore=shutil.ignore_patterns("*.o"))
        (changed,) = (path for path in sources.glob("*.h") if old in path.read_text(encoding="utf-8"))
        changed.write_text(changed.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
        compiler = find_compiler()
        includes = ["-idirafter", "headers"]
        target = {"x86_64": "x86", "aarch64": "arm64"}[os.uname().machine]
        command = [*compiler.command, "-target", compiler.bpf_target, "-O2", "-g", "-mcpu=v3"]
        command += [f"-D__TARGET_ARCH_{target}", "-I.", *includes, "-c", "watch.bpf.c", "-o", str(tmp_path / "made.o")]
        run_compiler(command, directory=sources, workshop=tmp_path, timeout_s=deadline(60))
        return str(tmp_path / "made.o")

    return make


def test_the_best_strategy_is_the_first_that_is_tried() -> None:
    with opened() as source:
        assert tried(source) == [("core", True)]


def test_without_core_a_compiler_that_is_enabled_is_used(tmp_path: Path) -> None:
    with opened(enable_core=False, enable_runtime_compiler=True, runtime_compiler_output_dir=str(tmp_path)) as source:
        assert tried(source) == [("runtime", True)]


def test_without_core_and_without_a_compiler_prebuilt_is_left(no_compiler: None) -> None:
    with opened(enable_core=False, enable_runtime_compiler=True) as source:
        assert tried(source) == [("runtime", False), ("prebuilt", True)]
        assert source.attempts[0].error == "no compiler found"


def test_with_nothing_enabled_prebuilt_is_left() -> None:
    with opened(enable_core=False) as source:
        assert tried(source) == [("prebuilt", True)]


def test_btf_that_is_corrupt_leads_past_what_needs_it(bad_btf: str, tmp_path: Path) -> None:
    with opened(strategy="prebuilt") as alone:
        expected = how_much_is_held()
        assert tried(alone) == [("prebuilt", True)]
    with opened(btf_path=bad_btf, runtime_compiler_output_dir=str(tmp_path)) as source:
        assert tried(source) == [("core", False), ("runtime", False), ("prebuilt", True)]
        assert how_much_is_held() == expected


def test_btf_of_this_kernel_in_a_file_serves_as_well_as_its_own(tmp_path: Path) -> None:
    copy = tmp_path / "vmlinux.btf"
    shutil.copyfile("/sys/kernel/btf/vmlinux", copy)
    with opened(btf_path=str(copy), **BPF_ONLY) as source:
        assert tried(source) == [("core", True)]


@pytest.mark.parametrize(
    ("old", "new", "refused"),
    [
        ('SEC("tp_btf/sched_process_exit")', 'SEC("tp_btf/sched_process_no_such_hook")', "process_exits"),
        ('SEC("iter/task_vma")', 'SEC("iter/no_such_iterator")', "read_mappings"),
    ],
)
def test_a_kernel_that_refuses_one_hook_refuses_the_rung_and_nothing_of_it_stays(
    compile_changed: Callable[[str, str], str], old: str, new: str, refused: str
) -> None:
    made = compile_changed(old, new)
    before = bpfsys.held_ids("self"), set(os.listdir("/proc/self/fd"))

    with pytest.raises(BpfError, match=f"'{refused}': failed to (load|prepare)"):
        BpfSource(Config(), objects=[made])

    assert (bpfsys.held_ids("self"), set(os.listdir("/proc/self/fd"))) == before


def test_a_tracepoint_that_is_refused_when_the_others_are_attached_takes_them_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # No tracepoint has this id, which the kernel says only when it is asked to attach; it comes last.
    monkeypatch.setattr(
        Tracefs,
        "tracepoint_id",
        lambda self, category, name, ask=Tracefs.tracepoint_id: (
            0x7FFFFFFF if name == "sys_enter_shmdt" else ask(self, category, name)
        ),
    )
    before = bpfsys.held_ids("self"), set(os.listdir("/proc/self/fd"))

    for candidate in (BpfSource, PrebuiltSource):
        with pytest.raises(BpfError, match=r"attaching \w+_shmdt failed"):
            candidate(Config())

    assert (bpfsys.held_ids("self"), set(os.listdir("/proc/self/fd"))) == before


@pytest.mark.parametrize("damage", ["truncated", "no object"])
def test_an_object_that_is_damaged_is_an_error_of_its_rung(tmp_path: Path, damage: str) -> None:
    whole = (PROGRAMS / "watch.bpf.o").read_bytes()
    made = tmp_path / "damaged.bpf.o"
    made.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"no object at all")

    with pytest.raises(BpfError, match=r"opening damaged\.bpf\.o failed"):
        BpfSource(Config(), objects=[str(made)])


def test_what_was_damaged_in_the_cache_is_compiled_again_and_works(
    tmp_path: Path, open_ledger: Callable[..., Ledger], start: Any, library: Any
) -> None:
    config = {"strategy": "runtime", "runtime_compiler_output_dir": str(tmp_path / "cache")}
    with opened(**config):
        pass
    for kept in (tmp_path / "cache").iterdir():
        kept.write_bytes(kept.read_bytes()[:1000])

    ledger = open_ledger(Rule(rf"{TAG}\.so$"), config=Config(**config))
    mapper, file = start(), library()
    mapper.map(file)

    assert ledger.wait_load(mapper.pid, file.stat().st_ino).cause == "mmap"


@pytest.mark.parametrize(
    ("trouble", "said"),
    [("fails", "error: it is Monday"), ("hangs", "did not end within 0.5 s"), ("foreign", "belongs to user 65534")],
)
def test_a_compiler_in_trouble_leads_to_prebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str, said: str
) -> None:
    cache, compiler = tmp_path / "cache", tmp_path / "clang"
    cache.mkdir(mode=0o700)
    compiler.write_text(
        "#!/bin/sh\n" + ("sleep 1000" if trouble == "hangs" else "echo 'error: it is Monday' >&2; false")
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CLANG", str(compiler))
    if trouble == "foreign":
        os.chown(cache, 65534, 65534)

    with opened(
        enable_core=False,
        enable_runtime_compiler=True,
        runtime_compiler_output_dir=str(cache),
        compile_timeout_s=0.5,
    ) as source:
        assert tried(source) == [("runtime", False), ("prebuilt", True)]
        assert said in (source.attempts[0].error or "")


def test_ready_lists_what_was_tried(no_compiler: None, open_ledger: Callable[..., Ledger], bad_btf: str) -> None:
    ledger = open_ledger(Rule(rf"{TAG}\.so$"), config=Config(btf_path=bad_btf))

    assert [(one.strategy, one.ok) for one in ledger.ready.attempts] == [
        ("core", False),
        ("runtime", False),
        ("prebuilt", True),
    ]
    assert "counted as lost" in " ".join(ledger.ready.limits)


def test_prebuilt_tells_the_end_of_a_process_whose_address_space_is_still_there(
    open_ledger: Callable[..., Ledger], start: Any, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = open_ledger(Rule(rf"{TAG}\.so$"), config=Config(strategy="prebuilt"))
    mapper, file = start(), library()
    mapper.map(file)
    ledger.wait_load(mapper.pid, file.stat().st_ino)
    with Tracefs() as tracefs:
        is_told_before = tracefs.field_offset("sched", "sched_process_exit", "group_dead") is not None
    if is_told_before:  # from 6.16 on; the last thread then needs its time to give it up
        monkeypatch.setattr(ProcFs, "live_thread", lambda self, pid: pid)
    mapper.exit()

    ledger.wait_unload(mapper.pid, file.stat().st_ino)


def test_the_error_of_a_ladder_without_a_rung_lists_every_attempt(no_compiler: None, bad_btf: str) -> None:
    config = Config(btf_path=bad_btf, allow_prebuilt_fallback=False, **BPF_ONLY)

    with pytest.raises(LoadError) as failed:
        open_source(config)

    assert [(one.strategy, one.ok) for one in failed.value.attempts] == [("core", False), ("runtime", False)]
    assert "core: loading the BPF programs failed" in str(failed.value)
    assert "runtime: no compiler found" in str(failed.value)
    assert plan(config).attempts == failed.value.attempts


# -- a kernel without BTF --------------------------------------------------------------------

#: Runs a command where the kernel shows no BTF: in a mount namespace of its own, the file is covered.
WITHOUT_BTF = ["unshare", "--mount", "sh", "-c", 'mount --bind /dev/null /sys/kernel/btf/vmlinux && exec "$@"', "sh"]


ASK_FOR_THE_PLAN = """
import json
from sowatch import Config
from sowatch.sources.select import plan

found = plan(Config(allow_procfs_fallback=False))
print(json.dumps([found.strategy, [attempt[:2] for attempt in found.attempts], found.guarantee]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_where_the_kernel_shows_no_btf_prebuilt_is_reached() -> None:
    command = [*WITHOUT_BTF, sys.executable, "-c", ASK_FOR_THE_PLAN]
    done = subprocess.run(
        command, env={**os.environ, "CLANG": "/nonexistent"}, capture_output=True, text=True, check=True
    )

    assert json.loads(done.stdout) == [
        "prebuilt",
        [["core", False], ["runtime", False], ["prebuilt", True]],
        PrebuiltSource.guarantee,
    ]


# ---- one scan -----------------------------------------------------------------------------------


def test_one_scan_finds_what_a_watch_finds_and_attaches_nothing(
    start: Callable[..., Mapper], library: Callable[..., Path]
) -> None:
    mapper, new, gone = start(), library(), library(f"libgone{TAG}.so")
    for one in (new, gone, gone):
        mapper.map(one)
    gone.unlink()

    def found(watcher: Watcher) -> list[Mapped]:
        return sorted((structs.replace(one, time_ns=0) for one in watcher.snapshot()), key=lambda one: one.library.path)

    rule = Rule(kind=("library", "executable", "interpreter"))
    with Watcher(rule, pids=[mapper.pid]) as watcher:
        expected = found(watcher)
    held_before = how_much_is_held()
    with Watcher(rule, pids=[mapper.pid], open_source=open_scan) as watcher:
        assert watcher.ready is not None
        assert (watcher.ready.strategy, watcher.ready.guarantee, watcher.ready.hooks) == ("core", "one scan", None)
        assert how_much_is_held()["link"] == held_before["link"]
        assert found(watcher) == expected
    assert {str(new), str(gone)} <= {one.library.path.removesuffix(" (deleted)") for one in expected}


@pytest.mark.parametrize(
    "config", [{"strategy": "prebuilt"}, {"strategy": "procfs"}, {"hooks": "syscall"}], ids=lambda one: next(iter(one))
)
def test_one_scan_takes_what_is_asked_for(config: dict[str, Any]) -> None:
    source = open_scan(Config(**config))
    try:
        assert source.strategy == config.get("strategy", "core")
        assert source.guarantee != "one scan"
    finally:
        source.close()
