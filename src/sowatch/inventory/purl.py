"""Package URLs: one text that names a package wherever it comes from (https://github.com/package-url/purl-spec).

Written here, as the agent has no need of a parser; a test compares every text with the one of packageurl-python.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote

__all__ = ["purl"]


def purl(kind: str, namespace: str, name: str, version: str, qualifiers: Mapping[str, str] | None = None) -> str:
    """``pkg:KIND/NAMESPACE/NAME@VERSION?KEY=VALUE``; what is empty is left out.

    Args:
        kind: as the specification has it: ``deb``, ``rpm``, ``apk``, ``pypi``, ``npm``, ``maven``.
        namespace: parts with slashes.
        name: of the package.
        version: as its manager writes it.
        qualifiers: what else distinguishes it.

    >>> purl("deb", "debian", "libstdc++6", "12.2.0-14", {"arch": "amd64", "distro": "debian-12"})
    'pkg:deb/debian/libstdc%2B%2B6@12.2.0-14?arch=amd64&distro=debian-12'
    """
    parts = [f"pkg:{kind}", *(_quoted(part) for part in namespace.split("/") if part), _quoted(name)]
    text = "/".join(parts) + (f"@{_quoted(version)}" if version else "")
    pairs = sorted((key, value) for key, value in (qualifiers or {}).items() if value)
    return text + ("?" if pairs else "") + "&".join(f"{key}={_quoted(value)}" for key, value in pairs)


def _quoted(text: str) -> str:
    return quote(text, safe=":", errors="replace")
