"""Compiling on the target: the compiler is found, bounded and quoted; what came out is kept safely."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from sowatch.bpf.compile import Cache, cache_key, compile_programs, find_compiler, first_diagnostic
from sowatch.model.config import Config
from sowatch.model.errors import CompileError

NAME = "probes.bpf.c"


def config(cache: Path, **more: float) -> Config:
    return Config(runtime_compiler_output_dir=str(cache), **more)  # type: ignore[arg-type]


def content(cache: Path) -> bytes:
    with compile_programs(config(cache), [NAME]) as (path,):
        return Path(path).read_bytes()


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``compiler(script)`` puts a shell script in the place of clang."""

    def put(script: str) -> Path:
        made = tmp_path / "our-clang"
        made.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        made.chmod(0o755)
        monkeypatch.setenv("CLANG", str(made))
        return made

    return put


# -- the compiler ----------------------------------------------------------------------------


def test_what_is_compiled_is_a_bpf_object_with_btf(tmp_path: Path) -> None:
    made = content(tmp_path / "cache")

    assert made[:4] == b"\x7fELF"
    assert int.from_bytes(made[18:20], "little") == 247  # EM_BPF
    assert b".BTF\0" in made


def test_without_clang_and_without_zig_there_is_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CLANG", raising=False)
    # None there makes find_spec say that there is no such module.
    monkeypatch.setitem(sys.modules, "ziglang", None)

    with pytest.raises(CompileError, match=r"no compiler found.*pip install") as refused:
        find_compiler()

    assert refused.value.reason == "no compiler found"


def test_without_clang_the_ziglang_wheel_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "site" / "ziglang"
    wheel.mkdir(parents=True)
    (wheel / "__init__.py").touch()
    (wheel / "zig").touch()
    monkeypatch.syspath_prepend(wheel.parent)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CLANG", raising=False)
    monkeypatch.delitem(sys.modules, "ziglang", raising=False)

    assert find_compiler()[:2] == ((str(wheel / "zig"), "cc"), "bpfel-freestanding")


def test_a_compiler_that_fails_is_quoted_with_its_first_diagnostic(tmp_path: Path, compiler) -> None:
    compiler("echo 'a.h:1: note: here' >&2; echo 'a.c:2: error: first' >&2; echo 'a.c:3: error: second' >&2; exit 1")

    with pytest.raises(CompileError) as refused, compile_programs(config(tmp_path / "cache"), [NAME]):
        pass

    assert refused.value.reason.endswith("our-clang failed: a.c:2: error: first")


def test_a_compiler_that_hangs_is_ended_with_all_its_children(tmp_path: Path, compiler, wait_until) -> None:
    compiler(f"sleep 1000 & echo $! > {tmp_path}/child; wait")

    with pytest.raises(CompileError, match=r"did not end within 0\.5 s") as refused:  # noqa: SIM117
        with compile_programs(config(tmp_path / "cache", compile_timeout_s=0.5), [NAME]):
            pass

    assert "compile_timeout_s" in str(refused.value)
    child = int((tmp_path / "child").read_text())
    wait_until(lambda: not is_running(child), what="the end of the compiler's child")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_compiler_that_cannot_be_run_is_an_error(tmp_path: Path, compiler) -> None:
    compiler("").write_bytes(b"\x7fELF and nothing more")

    with pytest.raises(CompileError, match="cannot run"), compile_programs(config(tmp_path / "cache"), [NAME]):
        pass


def test_a_compiler_that_makes_nothing_is_an_error(tmp_path: Path, compiler) -> None:
    compiler("exit 0")

    with pytest.raises(CompileError, match="made nothing"), compile_programs(config(tmp_path / "cache"), [NAME]):
        pass


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it ended without any output"),
        ("\n\n", "it ended without any output"),
        ("killed\n", "killed"),
        ("a\nb: error: x\nc", "b: error: x"),
    ],
)
def test_the_first_diagnostic_is_the_first_error_else_the_last_line(text: str, said: str) -> None:
    assert first_diagnostic(text) == said


# -- what is kept ----------------------------------------------------------------------------


def test_the_second_time_nothing_is_compiled(tmp_path: Path, compiler) -> None:
    calls = tmp_path / "calls"
    compiler(f'echo >> {calls}; exec clang "$@"')

    first, second = content(tmp_path / "cache"), content(tmp_path / "cache")

    assert first == second
    assert calls.read_text() == "\n"


def test_another_compiler_compiles_anew(tmp_path: Path, compiler) -> None:
    calls = tmp_path / "calls"
    for comment in ("one", "another"):
        compiler(f'# {comment}\necho >> {calls}; exec clang "$@"')
        content(tmp_path / "cache")

    assert calls.read_text() == "\n\n"


@pytest.mark.parametrize("damage", [b"", b"\x7fELF", b"\0" * 100_000])
def test_what_was_damaged_is_compiled_again(tmp_path: Path, damage: bytes) -> None:
    whole = content(tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(damage)

    assert content(tmp_path / "cache") == whole


def test_a_link_in_the_place_of_what_was_kept_is_not_followed(tmp_path: Path) -> None:
    whole = content(tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    kept.rename(tmp_path / "elsewhere")
    kept.symlink_to(tmp_path / "elsewhere")

    assert content(tmp_path / "cache") == whole
    assert not kept.is_symlink()


def test_the_directory_is_made_for_its_owner_alone_and_nothing_else_stays_in_it(tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "cache"
    content(cache)

    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    (kept,) = cache.iterdir()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o720])
def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)

    with pytest.raises(CompileError, match=f"others may write to it.*{mode:04o}.*runtime_compiler_output_dir"):
        Cache(str(tmp_path / "cache"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o700)
    os.chown(tmp_path / "cache", 65534, 65534)

    with pytest.raises(CompileError, match="belongs to user 65534, not to 0"):
        Cache(str(tmp_path / "cache"))


@pytest.mark.parametrize("what", ["file", "link", "below a file"])
def test_what_is_no_directory_is_refused(tmp_path: Path, what: str) -> None:
    cache = tmp_path / "cache"
    if what == "link":
        (tmp_path / "real").mkdir()
        cache.symlink_to(tmp_path / "real")
    else:
        cache.touch()

    with pytest.raises(CompileError, match="cannot use the cache directory"):
        Cache(str(cache / "deeper" if what == "below a file" else cache))


def test_the_key_changes_with_every_part() -> None:
    assert len({cache_key("a", "b"), cache_key("ab"), cache_key("a", "b", ""), cache_key("b", "a")}) == 4
