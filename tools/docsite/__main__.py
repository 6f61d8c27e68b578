"""Builds the site and checks it: ``python -m docsite DIRECTORY``. A warning, or a link that leads nowhere, fails it."""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.cmd.build import build_main

from docsite.files import ROOT
from docsite.links import problems


def main(words: list[str]) -> int:
    """The exit code."""
    if len(words) != 1:
        print("usage: python -m docsite DIRECTORY", file=sys.stderr)
        return 2
    site = Path(words[0]).resolve()
    # -E: what was read before has no warnings any more.
    options = ["-b", "html", "-W", "--keep-going", "-n", "-q", "-E", "-j", "auto", "-d", str(site / ".doctrees")]
    if code := build_main([*options, str(ROOT / "docs"), str(site)]):
        return code
    found = problems(site)
    for one in found:
        print(one, file=sys.stderr)
    if found:
        print(f"{len(found)} links of the site are wrong. Correct the pages in docs/.", file=sys.stderr)
        return 1
    print(f"{site}/index.html: {len(list(site.rglob('*.html')))} pages")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
