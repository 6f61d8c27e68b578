"""LIB:SYMBOL is parted where both sides make sense, and matches libraries by path or build id."""

from __future__ import annotations

import pytest

from sowatch.model.events import Library
from sowatch.model.identity import FileId
from sowatch.uprobes.trace import parse_target


@pytest.mark.parametrize(
    ("text", "library", "symbol"),
    [
        ("lib(?:ssl|crypto):SSL_*", "lib(?:ssl|crypto)", "SSL_*"),
        ("libx:cpp:ns::f", "libx", "cpp:ns::f"),
        ("/srv/a:b/libx.so:f(str:8, int) -> int", "/srv/a:b/libx.so", "f"),
        ("libstdc++:f", "libstdc++", "f"),
        ("libx:write(int, str:64, size) -> ssize", "libx", "write"),
    ],
)
def test_library_and_function_are_parted_where_both_make_sense(text: str, library: str, symbol: str) -> None:
    target = parse_target(text)
    assert (target.library, target.symbol) == (library, symbol)


def test_a_target_matches_by_path_or_by_the_beginning_of_a_build_id() -> None:
    library = Library("/usr/lib/libz.so.1", FileId(8, 1, 42), build_id="0123456789abcdef")
    matching = ["libz:f", "/usr/lib/libz.so.1:f", "01234567:f", "lib[xz]:f"]
    other = ["libzz:f", "/usr/lib/libz.so:f", "fedcba98:f"]
    assert [parse_target(text).matches(library) for text in matching + other] == [True] * 4 + [False] * 3
