"""elf: every library of the system, beside pyelftools, nm and the loader."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from elftools.common.exceptions import ELFError as CrossCheckError
from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import NoteSegment

from sowatch.linux.elf import read_facts
from sowatch.linux.elf_symbols import read_exports, symbol_offsets
from sowatch.linux.proc import ProcFs


def shared_objects() -> list[Path]:
    """Every file below /usr/lib that is called a library."""
    return sorted(
        path
        for directory, _, names in os.walk("/usr/lib")
        for path in (Path(directory, name) for name in names if ".so" in name)
        if path.is_file() and not path.is_symlink()
    )


def cross_checked_facts(elf: ELFFile) -> tuple[str | None, str | None]:
    build_id = soname = None
    for segment in elf.iter_segments():
        if isinstance(segment, NoteSegment):
            ids = [note["n_desc"] for note in segment.iter_notes() if note["n_type"] == "NT_GNU_BUILD_ID"]
            build_id = build_id or (ids[0] if ids else None)
        elif isinstance(segment, DynamicSegment):
            soname = next((tag.soname for tag in segment.iter_tags() if tag.entry.d_tag == "DT_SONAME"), None)
    return build_id, soname


def cross_checked_exports(elf: ELFFile) -> set[str]:
    section = elf.get_section_by_name(".dynsym")
    return {
        symbol.name
        for symbol in section.iter_symbols()
        if symbol["st_shndx"] != "SHN_UNDEF"
        and symbol["st_info"]["bind"] in ("STB_GLOBAL", "STB_WEAK", "STB_LOOS")
        and symbol["st_other"]["visibility"] in ("STV_DEFAULT", "STV_PROTECTED")
        and (symbol["st_value"] or symbol["st_shndx"] == "SHN_ABS" or symbol["st_info"]["type"] == "STT_TLS")
    }


def test_build_id_and_soname_are_what_pyelftools_says_of_every_library_of_the_system() -> None:
    checked, differences = 0, []
    for path in shared_objects():
        with path.open("rb") as file:
            found = read_facts(file.fileno())
            assert found is not None
            try:
                witness = cross_checked_facts(ELFFile(file))
            except CrossCheckError:
                assert not found.is_elf
                continue
        checked += 1
        if (found.build_id, found.soname) != witness or found.is_partial:
            differences.append((path, found, witness))

    assert differences == []
    assert checked > 20


def test_exports_are_what_pyelftools_says_of_the_libraries_of_the_system() -> None:
    checked, differences = 0, []
    for path in shared_objects():
        with path.open("rb") as file:
            elf = ELFFile(file) if read_facts(file.fileno()).is_elf else None  # type: ignore[union-attr]
            section = elf.get_section_by_name(".dynsym") if elf else None
            # pyelftools takes 20 us a symbol; the largest ones have their own test.
            if elf is None or section is None or section.num_symbols() > 200:
                continue
            found, witness = read_exports(file.fileno()), cross_checked_exports(elf)
            one_by_one = read_exports(file.fileno(), [*witness, "no_such_name"])
        checked += 1
        if not found == witness == one_by_one:
            differences.append((path, found ^ witness, one_by_one ^ witness))

    assert differences == []
    assert checked > 20


def test_exports_of_the_largest_libraries_are_what_nm_says() -> None:
    for path in sorted(shared_objects(), key=lambda path: path.stat().st_size)[-8:]:
        done = subprocess.run(
            ["nm", "-D", "--defined-only", "--format=posix", path], capture_output=True, text=True, check=False
        )
        if done.returncode:  # another machine's
            continue
        rows = [line.split(" ") for line in done.stdout.splitlines()]
        # A symbol with "@" is a name and its version; of an absolute one nm shows versions as well.
        names = {row[0].partition("@")[0] for row in rows if row[1] not in "tdrb"}
        with path.open("rb") as file:
            assert read_exports(file.fileno()) == names, path


def test_the_offset_of_a_function_is_where_the_loader_put_it() -> None:
    # The loader maps the file; where it found the function, minus where the file begins, is its offset.
    library = ctypes.CDLL(None)
    rows = ProcFs().executable_maps(os.getpid()) or []
    for name in ("getpid", "fopen", "qsort"):
        address = ctypes.cast(library[name], ctypes.c_void_p).value or 0
        (row,) = [row for row in rows if row.start <= address < row.end]
        with open(row.path, "rb") as file:
            assert address - row.start + row.offset_bytes in symbol_offsets(file.fileno(), name)


def test_a_compiled_library_is_read_through_the_mapping_of_its_deleted_file(make_library: Callable[..., Path]) -> None:
    path = make_library("libmade.so", exports=("first", "second"))
    with path.open("rb") as file:
        before = read_facts(file.fileno())
        with mmap.mmap(file.fileno(), mmap.PAGESIZE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC):
            inode = path.stat().st_ino
            path.unlink()
            (row,) = [row for row in ProcFs().executable_maps(os.getpid()) or () if row.inode == inode]
            try:
                link = os.open(f"/proc/self/map_files/{row.start:x}-{row.end:x}", os.O_RDONLY | os.O_NONBLOCK)
            except PermissionError:
                pytest.skip("opening map_files needs CAP_CHECKPOINT_RESTORE")
    try:
        assert read_facts(link) == before
        assert read_exports(link) >= {"first", "second"}
    finally:
        os.close(link)
    assert before is not None
    assert before.soname == "libmade.so"
    assert len(before.build_id or "") == 40
