"""The BPF programs for machines that the suite does not run on: they compile, and name the right functions."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import sowatch.bpf
from sowatch.bpf.compile import ARCHITECTURES, FLAGS
from sowatch.bpf.hooks import FUNCTION_PREFIX

PROGRAMS = Path(sowatch.bpf.__file__).parent / "programs"
SOURCES = sorted(path.name for path in PROGRAMS.glob("*.bpf.c"))


def includes() -> list[str]:
    multiarch = subprocess.run(["cc", "-print-multiarch"], check=True, capture_output=True, text=True).stdout.strip()
    return ["-idirafter", "/usr/include", "-idirafter", f"/usr/include/{multiarch}"]


@pytest.mark.parametrize("machine", sorted(ARCHITECTURES))
@pytest.mark.parametrize("source", SOURCES)
def test_every_program_compiles_for_every_architecture_with_the_layouts_that_python_reads(
    machine: str, source: str, tmp_path: Path
) -> None:
    """The sizes of the records are asserted in records.h, so a compiler that lays them out otherwise fails."""
    made = tmp_path / "made.o"
    target = f"-D__TARGET_ARCH_{ARCHITECTURES[machine]}"
    command = ["clang", "-target", "bpf", *FLAGS, target, "-Wall", "-Werror", *includes(), "-c", source, "-o", made]
    done = subprocess.run(command, cwd=PROGRAMS, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    if source.startswith("watch"):
        readelf = shutil.which("llvm-readelf") or "readelf"
        sections = subprocess.run([readelf, "-SW", made], check=True, capture_output=True, text=True).stdout
        assert f"?fentry/{FUNCTION_PREFIX[machine]}mmap" in sections


def test_each_architecture_that_is_built_for_has_its_names_of_system_calls() -> None:
    assert set(FUNCTION_PREFIX) == set(ARCHITECTURES)
