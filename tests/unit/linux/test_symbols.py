"""Functions are found in every symbol table, by pattern and C++ name, and refused with a reason."""

from __future__ import annotations

import doctest
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from sowatch.linux import symbols
from sowatch.linux.symbols import SymbolError, is_go, list_functions, native_machine_error, resolve
from support.programs import build

Open = Callable[[Path], int]

CPP = """
namespace ns {
__attribute__((noinline)) int f(int a) { return a + 1; }
struct S { int g(int a); };
__attribute__((noinline)) int S::g(int a) { return a + 2; }
__attribute__((noinline)) int twice(int a) { return a; }
__attribute__((noinline)) long twice(long a) { return a; }
}
"""


@pytest.fixture
def opened() -> Iterator[Open]:
    fds: list[int] = []

    def run(path: Path) -> int:
        fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        return fds[-1]

    yield run
    for fd in fds:
        os.close(fd)


@pytest.fixture(scope="session")
def probed_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ["-shared", "-fPIC", "-O1", "-g0", "-Wl,--build-id"]
    return build("probed", tmp_path_factory.mktemp("symbols"), flags=flags, output="libprobed.so")


def nm(path: Path, *options: str) -> dict[str, int]:
    """Addresses of functions by binutils, which equal file offsets in the tests' libraries only by their segment."""
    lines = subprocess.run(["nm", *options, path], capture_output=True, text=True, check=True).stdout.splitlines()
    return {parts[2]: int(parts[0], 16) for line in lines if len(parts := line.split()) == 3 and parts[1] in "Tt"}


def test_an_exported_function_and_a_local_one_are_found_where_nm_says(probed_file: Path, opened: Open) -> None:
    fd = opened(probed_file)
    addresses = nm(probed_file)
    for name in ("plain", "hidden"):
        (found,) = resolve(fd, name)
        assert found.name == name
        # Code segments of such libraries are mapped from the offset that equals their address.
        assert found.offset == addresses[name]


def test_a_stripped_library_has_its_exports_only(probed_file: Path, opened: Open, tmp_path: Path) -> None:
    stripped = tmp_path / "stripped.so"
    subprocess.run(["strip", "-o", stripped, probed_file], check=True)
    fd = opened(stripped)
    assert [one.name for one in resolve(fd, "plain")] == ["plain"]
    with pytest.raises(SymbolError, match="there is no such function"):
        resolve(fd, "hidden")


def test_a_pattern_gives_each_function_once_by_offset(probed_file: Path, opened: Open) -> None:
    found = resolve(opened(probed_file), "*e*")
    names = [one.name for one in found]
    assert {"recursive", "nested", "leaves"} <= set(names)
    assert [one.offset for one in found] == sorted({one.offset for one in found})


def test_a_place_in_a_function_lies_within_it(probed_file: Path, opened: Open) -> None:
    fd = opened(probed_file)
    (whole,) = resolve(fd, "nested")
    (inside,) = resolve(fd, "nested+0x1")
    assert (inside.name, inside.offset) == ("nested+0x1", whole.offset + 1)
    with pytest.raises(SymbolError, match=rf"nested has {whole.size} bytes only"):
        resolve(fd, f"nested+{whole.size}")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("indirect", "it is indirect"),
        ("longjmp", "it is imported here; probe the library that defines it .*libc"),
        ("data", "it is no function"),
        ("nothing_like_it_at_all", "there is no such function"),
    ],
)
def test_what_cannot_be_probed_is_refused_with_the_reason(
    probed_file: Path, opened: Open, name: str, reason: str
) -> None:
    with pytest.raises(SymbolError, match=reason):
        resolve(opened(probed_file), name)


def test_a_mistyped_name_gets_its_neighbours(probed_file: Path, opened: Open) -> None:
    with pytest.raises(SymbolError) as caught:
        resolve(opened(probed_file), "recursiv")
    assert caught.value.near[0] == "recursive"


def test_cpp_functions_are_found_by_their_qualified_name(tmp_path: Path, opened: Open) -> None:
    source = tmp_path / "a.cc"
    source.write_text(CPP, encoding="utf-8")
    library = tmp_path / "liba.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    fd = opened(library)
    assert [one.name for one in resolve(fd, "cpp:ns::f")] == ["_ZN2ns1fEi"]
    assert [one.name for one in resolve(fd, "cpp:ns::S::g")] == ["_ZN2ns1S1gEi"]
    with pytest.raises(SymbolError) as caught:
        resolve(fd, "cpp:ns::twice")
    assert caught.value.near == ("_ZN2ns5twiceEi", "_ZN2ns5twiceEl")


def test_the_functions_of_a_library_are_those_that_nm_lists(probed_file: Path, opened: Open) -> None:
    listed = {one.name for one in list_functions(opened(probed_file))}
    assert {"plain", "hidden", "only_return", "calls_hidden"} <= listed
    assert "data" not in listed
    assert "indirect" not in listed


def test_this_interpreter_is_for_this_machine_and_not_built_by_go(opened: Open) -> None:
    fd = opened(Path(os.path.realpath("/proc/self/exe")))
    assert native_machine_error(fd) is None
    assert not is_go(fd)


def test_text_is_no_elf_file(tmp_path: Path, opened: Open) -> None:
    text = tmp_path / "libtext.so"
    text.write_text("GROUP ( libc.so.6 )", encoding="ascii")
    with pytest.raises(SymbolError, match="it is no ELF file"):
        resolve(opened(text), "f")


@hypothesis.settings(max_examples=200)
@hypothesis.given(data=st.data())
def test_a_file_that_lies_gives_an_answer_or_a_symbol_error(probed_file: Path, data: st.DataObject) -> None:
    content = bytearray(probed_file.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        # The headers, or anywhere: section headers stand at the end.
        where = data.draw(st.sampled_from([range(64, 0x400), range(len(content) - 0x800, len(content))]))
        content[data.draw(st.sampled_from(where))] = data.draw(st.integers(0, 255))
    fd = os.memfd_create("lies")
    try:
        os.write(fd, content)
        for pattern in ("plain", "*", "cpp:a::b", "nothing"):
            try:
                found = resolve(fd, pattern)
            except SymbolError:
                continue
            assert all(0 <= one.offset < len(content) for one in found)
    finally:
        os.close(fd)


def test_the_examples_of_docstrings_are_right() -> None:
    assert doctest.testmod(symbols).failed == 0
