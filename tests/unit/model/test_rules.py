"""rules: which mapped files are wanted, and what a bad rule is told."""

from __future__ import annotations

import dataclasses
import doctest
import functools
import os
import pickle
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sowatch.model import rules
from sowatch.model.errors import PatternError, UsageError
from sowatch.model.literals import KINDS
from sowatch.model.rules import Decision, Rule, RuleSet

LIBSSL = "/usr/lib/x86_64-linux-gnu/libssl.so.3"


def test_examples_in_docstrings_hold() -> None:
    assert doctest.testmod(rules).failed == 0


# -- Rule ------------------------------------------------------------------------------------


def test_a_pattern_is_searched_anywhere_in_the_path() -> None:
    assert Rule(r"libssl\.so").matches_path(LIBSSL)
    assert Rule(r"^/usr").matches_path(LIBSSL)
    assert not Rule(r"^libssl").matches_path(LIBSSL)
    assert not Rule(r"libssl\.so").matches_path("/usr/lib/libsslXso")


@pytest.mark.parametrize("pattern", [None, ""])
def test_no_pattern_matches_every_path_and_is_called_all(pattern: str | None) -> None:
    rule = Rule(pattern)

    assert rule.matches_path("")
    assert rule.matches_path("/any\nthing")
    assert rule.name == "all"


def test_a_rule_is_named_by_its_pattern_unless_it_has_a_name() -> None:
    assert Rule("libz").name == "libz"
    assert Rule("libz", name="zip").name == "zip"


def test_a_path_that_is_not_utf_8_is_matched_by_its_other_parts() -> None:
    assert Rule(r"lib.\.so$").matches_path(os.fsdecode(b"/x/lib\xff.so"))
    assert Rule("\udcff").matches_path(os.fsdecode(b"/x/lib\xff.so"))


@pytest.mark.parametrize(
    ("pattern", "position"),
    [("lib(ssl", 3), ("*ssl", 0), ("lib[a-", 3), ("(?P<1>x)", 4), ("\\", 0), ("x(?i)", 1)],
)
def test_a_bad_pattern_is_refused_with_the_place_of_the_fault(pattern: str, position: int) -> None:
    with pytest.raises(PatternError) as caught:
        Rule(pattern)

    assert (caught.value.pattern, caught.value.position, caught.value.exit_code) == (pattern, position, 2)
    assert f"at position {position}" in str(caught.value)
    assert repr(pattern) in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("pattern", ["(" * 5000 + ")" * 5000, "x{99999999999999999999}"])
def test_a_pattern_that_is_too_much_for_the_compiler_is_refused_like_a_bad_one(pattern: str) -> None:
    with pytest.raises(PatternError):
        Rule(pattern)


@given(st.text(max_size=30))
def test_a_text_is_a_rule_exactly_if_it_is_a_regular_expression(text: str) -> None:
    try:
        expected = re.compile(text)
    except (re.error, OverflowError, RecursionError):
        with pytest.raises(PatternError):
            Rule(text)
    except FutureWarning:  # an error in this suite; the expression itself is in order
        pass
    else:
        assert Rule(text).matches_path("/lib/libz.so.1") == bool(expected.search("/lib/libz.so.1"))


def test_a_pattern_of_bytes_is_refused_because_paths_are_text() -> None:
    with pytest.raises(UsageError, match="must be a str, not bytes"):
        Rule(b"libz")  # type: ignore[arg-type]


def test_a_rule_looks_at_libraries_unless_it_says_otherwise() -> None:
    assert Rule().kind == {"library"}
    assert Rule(kind="executable").kind == {"executable"}
    assert Rule(kind=("library", "other")).kind == {"library", "other"}


@pytest.mark.parametrize(("kind", "said"), [("lib", "'lib'"), (["library", "exe"], "'exe'"), ((), "at least one kind")])
def test_an_unknown_kind_is_refused_with_the_known_ones(kind: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        Rule(kind=kind)

    assert str(caught.value).endswith(f"Use one of: {', '.join(KINDS)}.")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"exports": "SSL_read"}, r"Write exports=\('SSL_read',\)\.$"),
        ({"exports": [b"SSL_read"]}, "must be a str, not bytes. Give the symbol's name.$"),
        ({"on_load": 3}, "on_load must be a function, not int. Pass what is to be called.$"),
        ({"on_deactivate": "detach"}, "on_deactivate must be a function, not str"),
    ],
)
def test_what_cannot_work_is_refused_at_once(options: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Rule("x", **options)


@pytest.mark.parametrize("name", ["on_load", "on_unload", "on_activate", "on_deactivate"])
def test_a_coroutine_function_is_refused_because_nobody_would_await_it(name: str) -> None:
    async def callback(_: object) -> None: ...

    class Callback:
        async def __call__(self, _: object) -> None: ...

    for one in (callback, Callback(), functools.partial(callback)):
        with pytest.raises(UsageError, match=f"{name} is an `async def`.*Iterate `awatch`"):
            Rule("x", **{name: one})


def test_exports_are_any_collection_of_names() -> None:
    assert Rule(exports=["SSL_read", "SSL_write"]).exports == {"SSL_read", "SSL_write"}


def test_a_rule_needs_a_worker_only_for_its_callbacks() -> None:
    assert not Rule("x").has_callbacks
    for name in ("on_load", "on_unload", "on_activate", "on_deactivate"):
        assert Rule("x", **{name: print}).has_callbacks


def test_a_rule_cannot_be_changed_and_is_only_equal_to_itself() -> None:
    rule = Rule("x")
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.name = "y"  # type: ignore[misc]

    assert len({rule, rule, Rule("x")}) == 2


# -- RuleSet ---------------------------------------------------------------------------------


def test_the_first_rule_that_matches_wins() -> None:
    first, second = Rule("libssl", name="tls"), Rule("lib", name="rest")

    assert RuleSet([first, second]).match(LIBSSL, "library") is first
    assert RuleSet([second, first]).match(LIBSSL, "library") is second
    assert RuleSet([first, second]).match("/lib/libz.so", "library") is second
    assert RuleSet([first, second]).match("/bin/ls", "library") is Decision.NO_MATCH


def test_no_rules_want_every_library_and_nothing_else() -> None:
    everything = RuleSet()

    assert len(everything) == 1
    assert [rule.name for rule in everything] == ["all"]
    assert isinstance(everything.match("/x", "library"), Rule)
    assert [everything.match("/x", kind) for kind in KINDS[1:]] == [Decision.NO_MATCH] * 3


def test_a_rule_of_another_kind_is_passed_over() -> None:
    main, library = Rule("python", name="main", kind="executable"), Rule("python", name="lib")
    both = RuleSet([main, library])

    assert both.match("/lib/libpython3.so", "library") is library
    assert both.match("/bin/python3", "executable") is main
    assert both.match("/bin/python3", "interpreter") is Decision.NO_MATCH


def test_exports_decide_whatever_the_name_of_the_file() -> None:
    rule = Rule(exports=("SSL_read", "SSL_write"), name="tls")

    assert RuleSet([rule]).match("/app/libx.so", "library", frozenset({"SSL_read", "SSL_write", "more"})) is rule
    assert RuleSet([rule]).match("/app/libx.so", "library", frozenset({"SSL_read"})) is Decision.NO_MATCH
    assert RuleSet([rule]).match("/app/libx.so", "library") is Decision.NEEDS_EXPORTS


def test_unknown_exports_are_asked_for_only_if_the_rule_could_win() -> None:
    plain, exporting = Rule("libssl", name="plain"), Rule(exports=("SSL_read",), name="exporting")

    assert RuleSet([plain, exporting]).match(LIBSSL, "library") is plain
    assert RuleSet([exporting, plain]).match(LIBSSL, "library") is Decision.NEEDS_EXPORTS
    assert RuleSet([exporting, plain]).match(LIBSSL, "library", frozenset()) is plain
    assert RuleSet([exporting, plain]).match(LIBSSL, "executable") is Decision.NO_MATCH
    assert RuleSet([Rule("libz", exports=("x",), name="z"), plain]).match(LIBSSL, "library") is plain


def test_what_a_set_needs_is_what_one_of_its_rules_needs() -> None:
    assert not RuleSet([Rule("a")]).needs_exports
    assert RuleSet([Rule("a"), Rule("b", exports=("x",))]).needs_exports
    assert not RuleSet([Rule("a", kind=("library", "other"))]).wants_images
    assert RuleSet([Rule("a"), Rule("b", kind="executable")]).wants_images
    assert RuleSet([Rule("a"), Rule("b", kind=("library", "interpreter"))]).wants_images


words = st.sampled_from(["libssl", "lib", "z", r"\.so$", "^/app", "python", None])
some_rules = st.lists(
    st.tuples(words, st.sets(st.sampled_from(KINDS), min_size=1), st.sets(st.sampled_from("abc"))),
    min_size=1,
    max_size=4,
).map(lambda all_: [Rule(p, name=f"r{n}", kind=kind, exports=names) for n, (p, kind, names) in enumerate(all_)])
some_paths = st.sampled_from([LIBSSL, "/app/libz.so", "/bin/python3", "/x\ny", ""])
some_exports = st.none() | st.frozensets(st.sampled_from("abc"))


@given(some_rules, some_paths, st.sampled_from(KINDS), some_exports)
def test_a_file_that_could_not_match_never_does(
    given_rules: list[Rule], path: str, kind: str, exports: frozenset[str] | None
) -> None:
    # The kernel drops for good what could_match denies, whatever is learnt of the file later.
    both = RuleSet(given_rules)

    assert both.could_match(path) or both.match(path, kind, exports) is Decision.NO_MATCH


@given(some_rules, some_paths, st.sampled_from(KINDS), st.frozensets(st.sampled_from("abc")))
def test_a_match_is_the_first_of_the_rules_that_match_alone(
    given_rules: list[Rule], path: str, kind: str, exports: frozenset[str]
) -> None:
    alone = [rule for rule in given_rules if RuleSet([rule]).match(path, kind, exports) is rule]

    assert RuleSet(given_rules).match(path, kind, exports) is (alone[0] if alone else Decision.NO_MATCH)


@given(some_rules, some_paths, st.sampled_from(KINDS), st.frozensets(st.sampled_from("abc")))
def test_what_was_decided_without_exports_stands_when_they_are_known(
    given_rules: list[Rule], path: str, kind: str, exports: frozenset[str]
) -> None:
    both = RuleSet(given_rules)
    early = both.match(path, kind)

    assert early in (Decision.NEEDS_EXPORTS, both.match(path, kind, exports))


def test_two_rules_of_one_name_are_refused() -> None:
    with pytest.raises(UsageError, match="two rules are named 'libz'"):
        RuleSet([Rule("libz"), Rule("libssl", name="libz")])


def test_a_set_takes_rules_not_patterns() -> None:
    with pytest.raises(UsageError, match=r"Write Rule\('libz'\)"):
        RuleSet(["libz"])  # type: ignore[list-item]
