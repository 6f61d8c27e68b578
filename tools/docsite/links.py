"""What was built, as a browser without a network sees it: every link and anchor is there, nothing is fetched."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

__all__ = ["problems"]

#: Attributes whose files a browser fetches by itself.
_FETCHED: Final = {
    ("script", "src"),
    ("img", "src"),
    ("link", "href"),
    ("iframe", "src"),
    ("source", "src"),
    ("video", "src"),
}
#: Relations of ``<link>`` that are only named.
_NAMED_ONLY: Final = {"canonical", "next", "prev", "search", "index", "alternate"}
_CSS: Final = re.compile(r"@import\s+(?:url\()?[\"']?([^\"')\s;]+)|url\(\s*[\"']?([^\"')]+)")


class _Page(HTMLParser):
    """Ids of a page, and where it leads: (line, what it leads to, whether it is fetched)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids = {"", "top"}
        self.targets: list[tuple[int, str, bool]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Takes down one tag."""
        found = dict(attrs)
        self.ids |= {value for key in ("id", "name") if (value := found.get(key))}
        is_named_only = bool(_NAMED_ONLY & set((found.get("rel") or "").split()))
        for key in ("href", "src"):
            if (value := found.get(key)) is not None:
                self.targets.append((self.getpos()[0], value, (tag, key) in _FETCHED and not is_named_only))


def problems(site: Path) -> list[str]:
    """Sentences about links that lead nowhere, and about what would be fetched from elsewhere."""
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    return [
        f"{path.relative_to(site)}:{text}" for path, page in pages.items() for text in _of_page(path, page, pages)
    ] + [
        f"{path.relative_to(site)}: fetches {target}"
        for path in sorted(site.rglob("*.css"))
        for target in _of_css(path)
    ]


def _of_page(path: Path, page: _Page, pages: dict[Path, _Page]) -> Iterator[str]:
    for line, target, is_fetched in page.targets:
        parts = urlsplit(target)
        if parts.scheme or parts.netloc:
            if is_fetched and parts.scheme != "data":
                yield f"{line}: fetches {target}"
            continue
        file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        if not file.is_file():
            yield f"{line}: {target} leads to no file"
        elif file in pages and unquote(parts.fragment) not in pages[file].ids:
            yield f"{line}: {target} leads to no place on that page"


def _of_css(path: Path) -> Iterator[str]:
    for found in _CSS.finditer(path.read_text(encoding="utf-8")):
        target = found[1] or found[2]
        if urlsplit(target).netloc or target.startswith("http"):
            yield target
