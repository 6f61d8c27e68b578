"""Which executable mappings take no uprobes."""

from __future__ import annotations

import pytest

from sowatch.explain.probing import unprobed
from sowatch.linux.proc_parse import parse_maps


@pytest.mark.parametrize(
    ("perms", "is_hugetlb", "why"),
    [
        (["r-xp"], False, ()),
        (["--xp"], False, ()),
        (["r-xs"], False, ("shared",)),
        (["rwxp"], False, ("writable",)),
        (["rwxs", "r-xp"], False, ("shared", "writable")),
        (["r-xp"], True, ("hugetlb",)),
        (["r-xs"], True, ("shared", "hugetlb")),
    ],
)
def test_a_mapping_takes_probes_if_it_is_private_not_writable_and_of_small_pages(
    perms: list[str], is_hugetlb: bool, why: tuple[str, ...]
) -> None:
    text = "".join(f"{place}000-{place}fff {one} 00000000 08:01 7 /x.so\n" for place, one in enumerate(perms, 1))
    rows = list(parse_maps(text.encode()))
    assert len(rows) == len(perms)
    assert unprobed(rows, is_hugetlb=is_hugetlb) == why
