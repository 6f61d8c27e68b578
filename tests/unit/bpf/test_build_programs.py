"""Objects that an sdist brings: taken for the sources that they were made of, and only whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from sowatch.bpf import _build_programs
from sowatch.bpf._build_programs import BuildError, compile_programs, copy_prebuilt
from sowatch.bpf.binding import PROGRAMS

HEADERS = [str(PROGRAMS / "headers")]


@pytest.fixture(scope="module", autouse=True)
def _sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The smallest of the programs, in the place of all: they take a second each."""
    directory = tmp_path_factory.mktemp("sources")
    for path in [*PROGRAMS.glob("*.h"), PROGRAMS / "probes.bpf.c"]:
        shutil.copy(path, directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_build_programs, "SOURCES", directory)
        yield


@pytest.fixture(scope="module")
def prebuilt(_sources: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program for one of the machines, which need not be this one."""
    made = tmp_path_factory.mktemp("prebuilt")
    compile_programs("aarch64", HEADERS, made)
    return made


def copy(prebuilt: Path, place: Path) -> Path:
    copy_prebuilt(prebuilt, place)
    return place


def test_what_is_compiled_is_listed_with_its_hash_and_taken_over_whole(prebuilt: Path, tmp_path: Path) -> None:
    made = copy(prebuilt, tmp_path / "made")
    manifest = json.loads((made / "objects.json").read_text())

    assert list(manifest["objects"]) == [path.name for path in made.glob("*.bpf.o")] == ["probes.bpf.o"]
    assert (manifest["machine"], len(manifest["sources"])) == ("aarch64", 64)
    for header in ("bpf/bpf_helpers.h", "linux/bpf.h", "asm/types.h"):
        assert (made / "headers" / header).is_file()


def test_compiling_again_gives_the_same_objects(prebuilt: Path, tmp_path: Path) -> None:
    compile_programs("aarch64", HEADERS, tmp_path)

    assert (tmp_path / "objects.json").read_text() == (prebuilt / "objects.json").read_text()


def test_no_path_of_this_machine_is_in_an_object(prebuilt: Path) -> None:
    places = [str(_build_programs.SOURCES), str(prebuilt), *HEADERS]

    assert [place for place in places if place.encode() in (prebuilt / "probes.bpf.o").read_bytes()] == []


def test_a_damaged_object_is_refused(prebuilt: Path, tmp_path: Path) -> None:
    damaged = copy(prebuilt, tmp_path / "damaged")
    (damaged / "probes.bpf.o").write_bytes(b"\x7fELF")

    with pytest.raises(BuildError, match=r"probes\.bpf\.o is not what objects\.json names"):
        copy(damaged, tmp_path / "made")


def test_a_missing_object_is_refused(prebuilt: Path, tmp_path: Path) -> None:
    damaged = copy(prebuilt, tmp_path / "damaged")
    (damaged / "probes.bpf.o").unlink()

    with pytest.raises(BuildError, match=r"probes\.bpf\.o cannot be read: No such file"):
        copy(damaged, tmp_path / "made")


def test_objects_of_other_sources_are_refused(prebuilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "programs"
    other.mkdir()
    (other / "watch.bpf.c").write_text("int changed;\n")
    monkeypatch.setattr(_build_programs, "SOURCES", other)

    with pytest.raises(BuildError, match=r"was made of other sources.*Install clang"):
        copy(prebuilt, tmp_path / "made")


def test_a_machine_without_register_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no BPF register layout is known for riscv64"):
        compile_programs("riscv64", HEADERS, tmp_path)
