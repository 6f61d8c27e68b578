"""What a question is about: a build id, purl, soname, path or CVE, found by the form of the text. Pure."""

from __future__ import annotations

import re
from typing import Final, NamedTuple
from urllib.parse import unquote

from sowatch.model.errors import UsageError
from sowatch.model.wire_fleet import TargetKind

__all__ = ["KINDS", "Target", "purl_matches", "purl_name", "target_of"]

KINDS: Final[tuple[TargetKind, ...]] = ("build_id", "purl", "soname", "path", "cve")

#: Shorter prefixes are those of many builds.
_SHORTEST_ID: Final = 8
_BUILD_ID: Final = re.compile(r"(?:htlhash:)?[0-9a-f]+", re.IGNORECASE)
#: Ids of OSV: CVE-2024-5535, GHSA-..., DSA-5764-1, ALSA-2024:1234, USN-6986-1.
_VULNERABILITY: Final = re.compile(
    r"(?:(?:[A-Z]+-)?CVE-\d{4}-\d{4,}|GHSA(?:-[0-9a-z]{4}){3}|(?:DSA|DLA|USN|LSN|RHSA|ALSA|ALBA|RLSA|ELSA|OSV)-[\w:.-]+)",
    re.IGNORECASE,
)


class Target(NamedTuple):
    """What is asked for."""

    kind: TargetKind
    text: str


def target_of(text: str, kind: str | None = None) -> Target:
    """The target that a word of the command line names.

    Args:
        text: the word.
        kind: as what it is taken. Default: by its form.

    Raises:
        UsageError: it is empty, or none of that kind.

    >>> [target_of(one).kind for one in ("7c1d8a4e", "libssl.so.3", "/lib/a.so", "pkg:deb/x", "CVE-2024-5535")]
    ['build_id', 'soname', 'path', 'purl', 'cve']
    """
    if not text:
        raise UsageError("an empty word names nothing. Give a build id, purl, soname, path or CVE.")
    if kind is not None and kind not in KINDS:
        raise UsageError(f"unknown --kind {kind!r}. Use one of: {', '.join(KINDS)}.")
    found: TargetKind = _form(text) if kind is None else kind
    if found == "build_id":
        if not _BUILD_ID.fullmatch(text) or len(text.rpartition(":")[2]) < _SHORTEST_ID:
            raise UsageError(
                f"{text!r} is no build id: they are hexadecimal, or `htlhash:` and hexadecimal, and a prefix has at "
                f"least {_SHORTEST_ID} digits. `sowatch list --json` shows them."
            )
        text = text.lower()
    if found == "purl" and not re.fullmatch(r"pkg:[^/@]+/.+", text):
        raise UsageError(f"{text!r} is no package URL. Write pkg:deb/debian/openssl, with @VERSION for only that one.")
    if found == "path" and not text.startswith("/"):
        raise UsageError(f"{text!r} is no absolute path. Write it as the process sees it, from / on.")
    return Target(found, text.upper() if found == "cve" and text.upper().startswith("CVE-") else text)


def _form(text: str) -> TargetKind:
    if text.startswith("pkg:"):
        return "purl"
    if text.startswith("/"):
        return "path"
    if _VULNERABILITY.fullmatch(text):
        return "cve"
    if _BUILD_ID.fullmatch(text) and len(text.rpartition(":")[2]) >= _SHORTEST_ID:
        return "build_id"
    return "soname"


def purl_matches(asked: str, purl: str) -> bool:
    """Whether a purl is one of those that are asked for: all versions if none is given, all qualifiers but those given.

    >>> purl_matches("pkg:deb/debian/openssl", "pkg:deb/debian/openssl@3.0.11-1?arch=amd64")
    True
    >>> purl_matches("pkg:deb/debian/openssl@3.0.11-1?arch=arm64", "pkg:deb/debian/openssl@3.0.11-1?arch=amd64")
    False
    """
    base, _, qualifiers = asked.partition("#")[0].partition("?")
    name = purl_name(base)
    version = base[len(name) + 1 :]
    have_base, _, have_qualifiers = purl.partition("#")[0].partition("?")
    have_name, _, have_version = have_base.rpartition("@") if _has_version(have_base) else (have_base, "", "")
    if unquote(name) != unquote(have_name) or (version and unquote(version) != unquote(have_version)):
        return False
    return set(filter(None, unquote(qualifiers).split("&"))) <= set(unquote(have_qualifiers).split("&"))


def purl_name(asked: str) -> str:
    """The same without version, qualifiers and subpath.

    >>> purl_name("pkg:npm/@scope/a@1.0?os=linux"), purl_name("pkg:npm/@scope/a")
    ('pkg:npm/@scope/a', 'pkg:npm/@scope/a')
    """
    base = asked.partition("#")[0].partition("?")[0]
    return base.rpartition("@")[0] if _has_version(base) else base


def _has_version(base: str) -> bool:
    # The scope of npm is %40, but people write @scope/name.
    return "@" in base.rpartition("/")[2]
