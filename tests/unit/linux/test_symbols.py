"""Functions are found in every symbol table, by pattern and C++ name, and refused with a reason."""

from __future__ import annotations

import contextlib
import doctest
import os
import re
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from sowatch.linux import mangled, symbols
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
        ("longjmp", r"it is imported here, defined in libc\.so\.6: use that"),
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


def test_constructors_templates_and_operators_are_found_by_their_qualified_names(tmp_path: Path, opened: Open) -> None:
    source = tmp_path / "a.cc"
    source.write_text(
        """
        namespace ns {
        struct S { int x; S(int a); ~S(); bool operator==(const S &other) const; };
        __attribute__((noinline)) S::S(int a) { x = a; }
        __attribute__((noinline)) S::~S() { x = 0; }
        __attribute__((noinline)) bool S::operator==(const S &other) const { return x == other.x; }
        template <class T> __attribute__((noinline)) T same(T a) { return a; }
        template int same<int>(int);
        }
        namespace std { __attribute__((noinline)) int ours(int a) { return a; } }
        """,
        encoding="utf-8",
    )
    library = tmp_path / "liba.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    fd = opened(library)
    # The complete and the base constructor are one function with two symbols.
    found = {name: [one.name for one in resolve(fd, f"cpp:{name}")] for name in ("ns::S::S", "ns::S::~S")}
    assert {name: len(names) for name, names in found.items()} == {"ns::S::S": 1, "ns::S::~S": 1}
    assert [one.name for one in resolve(fd, "cpp:ns::S::operator==")] == ["_ZNK2ns1SeqERKS0_"]
    assert [one.name for one in resolve(fd, "cpp:ns::same")] == ["_ZN2ns4sameIiEET_S1_"]
    assert [one.name for one in resolve(fd, "cpp:std::ours")] == ["_ZSt4oursi"]
    with pytest.raises(SymbolError) as caught:
        resolve(fd, "cpp:ns::sam")
    assert caught.value.near == ("cpp:ns::same",)


def test_qualified_names_are_those_that_binutils_gives(opened: Open) -> None:
    asked = ["g++", "-print-file-name=libstdc++.so.6"]
    library = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    # Not thunks and clones (_ZT, _ZG), which are no functions of the source.
    names = [one.name for one in list_functions(opened(Path(library))) if re.match("_Z[^TG]", one.name)]
    said = subprocess.run(
        ["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    known = [(plain, text) for name, text in zip(names, said, strict=True) if (plain := mangled.qualified_name(name))]
    # Conversion operators have none.
    assert len(known) > 0.99 * len(names) > 1000
    # Their template arguments may have comparisons in them, so only names without any are compared letter by letter.
    wrong = [(plain, text) for plain, text in known if "<" not in text and "[abi" not in text and plain != text]
    assert wrong == []


def test_a_file_without_section_headers_is_searched_as_ld_so_does(
    probed_file: Path, opened: Open, tmp_path: Path
) -> None:
    bare = tmp_path / "bare.so"
    content = bytearray(probed_file.read_bytes())
    content[40:48] = bytes(8)  # e_shoff
    content[58:64] = bytes(6)  # e_shentsize, e_shnum, e_shstrndx
    bare.write_bytes(content)
    fd, whole = opened(bare), opened(probed_file)
    assert resolve(fd, "plain") == resolve(whole, "plain")
    assert [one.name for one in resolve(fd, "plai[n]")] == ["plain"]
    with pytest.raises(SymbolError, match="there is no such function"):
        resolve(fd, "hidden")


def test_a_copy_of_a_file_is_not_searched_again(
    probed_file: Path, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy.so"
    copy.write_bytes(probed_file.read_bytes())
    first = resolve(opened(probed_file), "*lain")
    searched: list[str] = []
    monkeypatch.setattr(symbols, "_search", lambda *_: searched.append("again"))
    assert resolve(opened(copy), "*lain") == first
    assert searched == []


def test_a_file_that_has_the_build_id_of_another_gets_its_own_answer(
    probed_file: Path, opened: Open, tmp_path: Path
) -> None:
    liar = tmp_path / "liar.so"
    (hidden,) = resolve(opened(probed_file), "hidden")
    content = probed_file.read_bytes()
    # The same notes; its .symtab puts the function eight bytes further.
    old = struct.pack("<Q", hidden.offset)
    at = content.index(old, 0x2000)
    liar.write_bytes(content[:at] + struct.pack("<Q", hidden.offset + 8) + content[at + 8 :])
    (moved,) = resolve(opened(liar), "hidden")
    assert moved.offset == hidden.offset + 8
    (still,) = resolve(opened(probed_file), "hidden")
    assert still.offset == hidden.offset


def test_searches_that_are_kept_are_bounded(probed_file: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = symbols._Searches()
    monkeypatch.setattr(symbols, "_SEARCHES", kept)
    monkeypatch.setattr(symbols, "_KEPT_SEARCHES", 3)
    fd = opened(probed_file)
    for name in ("plai[n]", "*ested", "no_such_*", "hidden"):
        with contextlib.suppress(SymbolError):
            resolve(fd, name)
    assert [name for _, name in kept._found] == ["*ested", "no_such_*", "hidden"]


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
    assert doctest.testmod(symbols).failed == doctest.testmod(mangled).failed == 0
