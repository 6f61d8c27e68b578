"""The documentation site, as somebody reads it without a network: from files, in a real browser, on a telephone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.doc_blocks import ROOT
from support.pages import chromium

WIDTH = 400

#: Whichever test is the first has the build of the site, which takes its time beside others.
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `scripts/docs` does, with no network but loopback."""
    made = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-m", "docsite", made],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tools")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return made


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as one:
        yield one


@pytest.fixture
def page(browser: Any, deadline: Any) -> Iterator[Any]:
    """A page as wide as a telephone; what it asks for, and what its scripts complain of, fails the test."""
    context = browser.new_context(viewport={"width": WIDTH, "height": 800})
    context.set_default_timeout(deadline(20) * 1000)
    faults: list[str] = []
    one = context.new_page()
    one.on("request", lambda request: request.url.startswith(("file:", "data:")) or faults.append(request.url))
    one.on("requestfailed", lambda request: faults.append(f"{request.url}: {request.failure}"))
    one.on("console", lambda message: message.type == "error" and faults.append(message.text))
    one.on("pageerror", lambda error: faults.append(str(error)))
    yield one
    context.close()
    assert faults == []


def test_every_page_fits_a_telephone(site: Path, page: Any) -> None:
    pages = sorted(path for path in site.rglob("*.html") if path.parent.name != "decisions")
    assert len(pages) > 30
    wide = []
    for path in pages:
        page.goto(path.as_uri(), wait_until="domcontentloaded")
        width = page.evaluate("document.documentElement.scrollWidth")
        if width > WIDTH:
            wide.append((str(path.relative_to(site)), width))
    assert wide == []


@pytest.mark.parametrize(
    ("words", "leads_to"),
    [
        ("tentative", "concepts.html"),
        ("ring_bytes", "reference/configuration.html"),
        ("on_activate", "how-to/callbacks.html"),
        ("sowatch_watcher_repaired", "metrics.html"),
    ],
)
def test_a_search_finds_the_page_without_a_server(words: str, leads_to: str, site: Path, page: Any) -> None:
    page.goto(f"{(site / 'search.html').as_uri()}?q={words}")
    page.wait_for_selector("#search-results li a")
    page.wait_for_function(
        "page => [...document.querySelectorAll('#search-results li a')].some(a => a.href.includes(page))", arg=leads_to
    )


def test_the_first_page_leads_to_the_start(site: Path, page: Any) -> None:
    page.goto((site / "index.html").as_uri())
    page.locator("article").get_by_role("link", name="Start in five minutes").first.click()
    assert page.locator("h1").first.inner_text().startswith("Start in five minutes")
    assert "sudo sowatch watch" in page.locator("pre").all_inner_texts()[1]


def test_a_function_links_to_the_types_that_it_takes(site: Path, page: Any) -> None:
    page.goto((site / "reference" / "python.html").as_uri())
    page.locator("dt#sowatch\\.watch").first.get_by_role("link", name="Rule").first.click()
    assert page.url.endswith("#sowatch.Rule")
