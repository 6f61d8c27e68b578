"""Which executable mappings take no uprobes, and why a process has no HTTP flows."""

from __future__ import annotations

import re
from importlib import resources
from typing import get_args

import pytest
from msgspec import to_builtins

from sowatch.cli._http_why import why_no_flows
from sowatch.explain.probing import TlsAnswer, tls_answer, tls_line, unprobed
from sowatch.linux.proc_parse import parse_maps
from sowatch.linux.tls_libraries import OtherTls, TlsFile, TlsLook
from sowatch.model.wire_explain import TlsState


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


SSL = TlsFile("/lib/libssl.so.3", ("openssl",))
OTHER_SSL = TlsFile("/venv/libssl-1.so.3", ("openssl", "crypto"))
CRYPTO = TlsFile("/lib/libcrypto.so.3", ("crypto",))
NSPR = TlsFile("/lib/libnspr4.so", ("nspr",))


@pytest.mark.parametrize(
    ("files", "others", "unprobed_paths", "state", "named"),
    [
        ((), (), (), "no_tls", ()),
        ((CRYPTO, NSPR), (), (), "no_tls", ()),
        ((SSL,), (), (), "tappable", (SSL,)),
        ((CRYPTO, SSL), (), (CRYPTO.path,), "tappable", (SSL,)),
        ((SSL, OTHER_SSL), (), (SSL.path,), "tappable", (SSL, OTHER_SSL)),
        ((SSL, OTHER_SSL), (), (SSL.path, OTHER_SSL.path), "kernel_refuses", (SSL, OTHER_SSL)),
        ((SSL,), ("java", "rustls"), (), "tappable", (SSL,)),
        ((CRYPTO,), ("java", "rustls"), (), "java", ()),
        *(((), (one,), (), one, ()) for one in get_args(OtherTls)),
    ],
)
def test_the_files_of_a_process_say_why_it_has_no_flows(
    files: tuple[TlsFile, ...],
    others: tuple[OtherTls, ...],
    unprobed_paths: tuple[str, ...],
    state: TlsState,
    named: tuple[TlsFile, ...],
) -> None:
    answer = tls_answer(TlsLook(files, others), unprobed_paths)
    assert answer == TlsAnswer(state, files=tuple(one.path for one in named))


@pytest.mark.parametrize("state", get_args(TlsState))
def test_each_answer_is_a_sentence_and_an_object(state: TlsState) -> None:
    answer = TlsAnswer(state, "of\nthis", ("/lib/a\x1b.so",), calls=3, flows=1)
    said = why_no_flows(tls_line(answer))
    assert (said.startswith("none")) is (state not in ("tappable", "flows"))
    assert "of\\nthis" in said
    assert "(3 calls, 1 flow)" in said
    assert "\n" not in said
    assert "\x1b" not in said
    assert to_builtins(tls_line(answer)) == {
        "state": state,
        "reason": "of\nthis",
        "libraries": ["/lib/a\x1b.so"],
        "calls": 3,
        "flows": 1,
        "paths": ["/lib/a\x1b.so"],
        "call_count": 3,
        "flow_count": 1,
    }


def test_the_page_has_words_for_each_answer() -> None:
    script = resources.files("sowatch.agent.page").joinpath("assets", "details.js").read_text(encoding="utf-8")
    words = script.partition("const FLOWS = {")[2].partition("};")[0]
    assert set(re.findall(r"^  (\w+):", words, re.MULTILINE)) == set(get_args(TlsState))
