"""No message, help text or page has a word that docs/glossary.md has a term for."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest

from support.prose import ROOT, Text, bpf_comments, messages, page_texts, pages, public_docstrings

#: What is not written, and what is instead.
OLD = {
    r"rooms?|floors?|doors?": "package, layer, `__init__`; space",
    r"tells?|told|telling|untold": "reports, shows, distinguishes, determines",
    r"said": "reported, named",
    r"readings|(?:an?|the|no|one|each|every|another|first) reading": "scan",
    r"look(?:s|ed|ing)? (?:at|for|after|around)": "read, check, search",
    r"(?:an?|the|one|each|every|last|first|next|two|few|many) looks?(?!-)|visits?|visited": "scan, poll",
    r"first words?": "introduction record",
    r"facts (?:were )?lost|claim(?:s|ed|ing)?": "authoritative record, tentative record",
    r"in doubt|doubt(?:s|ed)?|dirty|owed": "needs rescan",
    r"alone|in company": "single-user mm, shared mm; only, by itself",
    r"strangers?": "untracked sharers",
    r"holders?": "process that shares the mm, or has the file mapped",
    r"narrow": "compat (32-bit)",
    r"touch(?:es|ed)": "activity generation",
    r"(?:is|are|was|not|be) followed(?! by)|settle(?:s|d)?": "tracked, untrack, sync",
    r"keeper|tracker|sketch": "reconciler, mapping table, range snapshot",
    r"hurry|hurries|rhythm": "expedite, poll timer",
    r"ladder|rungs?|climb(?:s|ed)?": "strategy selection, candidate, select",
    r"desk|aside": "explain context, timeout worker",
    r"pictures?": "view of the inventory",
    r"orders": "commands",
    r"odd ways?|baits?|witness(?:es)?": "edge cases, decoys, perf cross-check",
    r"whoever": "the noun it stands for",
}
_OLD = re.compile(rf"\b(?:{'|'.join(OLD)})\b", re.IGNORECASE)

#: Stands for other things here. A name in backquotes, a test's or a key's, is no prose.
ALLOWED = {
    r"`+[^`\n]*`+": "names of tests, keys and files",
    r"\b\w+_(?:told|look|looks|looked|holders?|reading|touch)\b|\b(?:told|look|holder)_\w+\b": "names",
    r"\bexplain\.looks\b": "a module",
    r"followed, touches, range_count, ranges, dirty, shares_vm|^    untold ": "keys of JSON",
    r"nothing_wanted, narrow,": "values of JSON",
    r"(?<=numbers of )\w+|\bholders: numbers": "an attribute",
    r"what (?:is|was) followed|that is followed": "methods of a sampler",
    r"decisions/[\w-]+": "names of files",
    r"/orders/|\(void\); // said": "examples",
    r"\.holders\b|\bholders\.\w+|\"holders\"|Math\.floor": "names in the page's code",
    r"times and orders": "which came first",
}
_ALLOWED = re.compile("|".join(ALLOWED), re.MULTILINE)


def old_words(texts: Iterable[Text]) -> list[str]:
    found = []
    for one in texts:
        text = _ALLOWED.sub(lambda match: "~" * len(match.group()), one.text)
        for match in _OLD.finditer(text):
            around = " ".join(text[max(0, match.start() - 40) : match.end() + 40].split())
            found.append(
                f"{one.path}:{one.line + text[: match.start()].count(chr(10))}: {match.group()!r} in {around!r}"
            )
    return found


@pytest.mark.parametrize("text", ["an answer it is told", "Readings are taken", "two\nholders", "is in doubt; alone"])
def test_an_old_word_is_found_wherever_it_stands(text: str) -> None:
    assert old_words([Text("a.md", 1, text)])


@pytest.mark.parametrize(
    "text", ["followed by another", "look up a name", "`test_it_is_told`", "while reading the file"]
)
def test_other_uses_and_names_are_not_found(text: str) -> None:
    assert old_words([Text("a.md", 1, text)]) == []


def test_messages_and_help_have_the_terms_of_the_glossary() -> None:
    texts = list(messages())
    assert len(texts) > 500
    assert old_words(texts) == []


def test_the_pages_have_the_terms_of_the_glossary() -> None:
    texts = [one for one in pages() if not (one.path == "docs/glossary.md" and "*" in one.text)]
    assert len(texts) > 1000
    assert old_words(texts) == []


def test_public_docstrings_have_the_terms_of_the_glossary() -> None:
    texts = list(public_docstrings())
    assert len(texts) > 1000
    assert old_words(texts) == []


def test_the_agents_page_has_the_terms_of_the_glossary() -> None:
    texts = list(page_texts())
    assert len(texts) > 200
    assert old_words(texts) == []


def test_comments_of_the_bpf_programs_have_the_terms_of_the_glossary() -> None:
    texts = list(bpf_comments())
    assert len(texts) > 300
    assert old_words(texts) == []


def test_decisions_name_who_reports_and_to_whom() -> None:
    for path in sorted((ROOT / "docs" / "decisions").glob("*.md")):
        text = _ALLOWED.sub("~", path.read_text(encoding="utf-8"))
        assert re.findall(r"\b(?:un)?told\b|\bwhoever\b", text, re.IGNORECASE) == [], path.name
