"""What goes where: said by the caller, by sections, or by names as in Datadog's agent."""

from __future__ import annotations

import doctest

import pytest

from sowatch.bpf.probe_object import ProgramSpec
from sowatch.model.errors import UsageError
from sowatch.uprobes import calls, trace
from sowatch.uprobes.probes import Probe, probes_of
from sowatch.uprobes.trace import parse_target


@pytest.mark.parametrize(
    ("name", "section", "expected"),
    [
        ("a", "uprobe/SSL_write", Probe("SSL_write", "a", is_return=False)),
        ("a", "uretprobe/SSL_write", Probe("SSL_write", "a", is_return=True)),
        ("a", "uprobe.multi/SSL_*", Probe("SSL_*", "a", is_return=False)),
        ("a", "uprobe.s//usr/lib/libssl.so.3:SSL_write+0x10", Probe("SSL_write+0x10", "a", is_return=False)),
        ("uprobe__SSL_write", "uprobe", Probe("SSL_write", "uprobe__SSL_write", is_return=False)),
        ("uprobe__SSL_write__return", "uprobe", Probe("SSL_write", "uprobe__SSL_write__return", is_manual=True)),
        ("uretprobe__SSL_write", "uretprobe", Probe("SSL_write", "uretprobe__SSL_write", is_return=True)),
    ],
)
def test_a_program_says_by_section_or_name_where_it_goes(name: str, section: str, expected: Probe) -> None:
    assert probes_of([ProgramSpec(name, section)], None, "x.bpf.o") == (expected,)


def test_programs_that_say_nothing_are_left_out() -> None:
    programs = [ProgramSpec("a", "uprobe"), ProgramSpec("b", "uprobe/f")]
    assert probes_of(programs, None, "x.bpf.o") == (Probe("f", "b", is_return=False),)


def test_no_program_that_says_where_it_goes_is_a_usage_error_with_an_example() -> None:
    with pytest.raises(UsageError, match=r'SEC\("uprobe/SSL_write"\)'):
        probes_of([ProgramSpec("a", "uprobe")], None, "x.bpf.o")


def test_a_mapping_takes_returns_from_the_programs_section() -> None:
    programs = [ProgramSpec("a", "uprobe"), ProgramSpec("b", "uretprobe")]
    found = probes_of(programs, {"f": "a", "g": "b"}, "x.bpf.o")
    assert found == (Probe("f", "a", is_return=False), Probe("g", "b", is_return=True))


@pytest.mark.parametrize(("symbol", "program"), [("", "a"), ("f", "")])
def test_a_probe_without_symbol_or_program_is_refused(symbol: str, program: str) -> None:
    with pytest.raises(UsageError, match="a probe needs a symbol and a program"):
        Probe(symbol, program)


def test_the_return_of_a_place_inside_a_function_is_refused() -> None:
    with pytest.raises(UsageError, match="a return has no offset"):
        Probe("f+4", "a", is_return=True)


@pytest.mark.parametrize(
    ("library", "is_found", "path"),
    [
        ("libz", True, "/usr/lib/x86_64-linux-gnu/libz.so.1"),
        ("libz", True, "/site-packages/x.libs/libz-3e69114b.so.1.2.11"),
        ("libz", True, "/lib/libz.so"),
        ("libc", True, "/lib/libc-2.31.so"),
        ("libz", False, "/usr/lib/libzstd.so.1"),
        ("libz", False, "/usr/lib/mylibz.so.1"),
        ("libssl.so.3", True, "/usr/lib/libssl.so.3"),
        ("libssl.so", True, "/usr/lib/libssl.so.1.1"),
        ("libssl.so.1", False, "/usr/lib/libssl.so.3"),
        ("/opt/a+b/libz.so.1", True, "/opt/a+b/libz.so.1"),
        ("/opt/libz.so.1", False, "/opt/libz.so.1.2"),
        ("(ssl|crypto)", True, "/usr/lib/libcrypto.so.3"),
    ],
)
def test_a_library_is_found_by_path_stem_or_expression(library: str, *, is_found: bool, path: str) -> None:
    import re

    pattern = parse_target(f"{library}:f").pattern
    assert pattern is not None
    assert bool(re.search(pattern, path)) is is_found


def test_a_build_id_is_no_path() -> None:
    target = parse_target("0123456789abcdef:f")
    assert (target.pattern, target.build_id) == (None, "0123456789abcdef")


def test_a_cpp_function_keeps_its_colons() -> None:
    assert parse_target("libx:cpp:ns::f").symbol == "cpp:ns::f"


@pytest.mark.parametrize("text", ["libz", "libz:", ":deflate", ""])
def test_what_is_no_target_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="is no LIB:SYMBOL"):
        parse_target(text)


@pytest.mark.parametrize("module", [calls, trace])
def test_the_examples_of_docstrings_are_right(module: object) -> None:
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]
