"""Package URLs are those that packageurl-python writes."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st
from packageurl import PackageURL

from sowatch.inventory.purl import purl

# What `packages` lets into one: printable ASCII, and of the databases any text of UTF-8.
TEXTS = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zs", "Zl", "Zp")), min_size=1, max_size=20
)
WORDS = TEXTS.filter(lambda text: text.strip("/") == text and "//" not in text)
KINDS = st.sampled_from(["deb", "rpm", "apk", "maven", "generic"])
KEYS = st.sampled_from(["arch", "distro", "epoch", "upstream"])


@given(KINDS, WORDS, TEXTS, st.dictionaries(KEYS, TEXTS))
def test_text_is_what_packageurl_reads_back(kind: str, name: str, version: str, qualifiers: dict[str, str]) -> None:
    text = purl(kind, "debian", name, version, qualifiers)

    found = PackageURL.from_string(text)

    assert (found.type, found.namespace, found.version) == (kind, "debian", version)
    assert found.qualifiers == qualifiers


@given(
    KINDS,
    st.from_regex(r"[a-z0-9][a-z0-9+.\-]{0,20}", fullmatch=True),
    st.from_regex(r"([0-9]:)?[A-Za-z0-9.+~\-^]{1,20}", fullmatch=True),
    st.dictionaries(KEYS, st.from_regex(r"[A-Za-z0-9.+~@\-_]{1,20}", fullmatch=True)),
)
def test_text_is_the_one_that_packageurl_writes(kind: str, name: str, version: str, qualifiers: dict[str, str]) -> None:
    expected = PackageURL(kind, "debian", name, version, qualifiers).to_string()
    # It lowers names of apk after it has encoded them: %2b, which the specification writes as %2B.
    expected = re.sub("%[0-9a-f]{2}", lambda match: match.group().upper(), expected)

    assert purl(kind, "debian", name, version, qualifiers) == expected


def test_scoped_name_of_npm_has_its_scope_as_namespace() -> None:
    expected = PackageURL("npm", "@img", "sharp-linux-x64", "0.33.5").to_string()

    assert purl("npm", "@img", "sharp-linux-x64", "0.33.5") == expected
