"""The inventory page in a real Chromium, of a real watch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import unicodedata
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

from sowatch import Rule
from sowatch.model.encoding import dumps
from sowatch.model.escape import visible
from support.callers import Caller
from support.kernel import TAG, Ledger
from support.pages import PageServer, Visit, chromium
from support.programs import Mapper, build

Start = Callable[..., Mapper]
NewLibrary = Callable[..., Path]
OpenLedger = Callable[..., Ledger]
OpenPage = Callable[..., Visit]

PAGE_READERS = Path(__file__).resolve().parents[2] / "support/page_readers.py"

#: In a path that a process maps, none of these may be more than text.
HOSTILE = (
    b"lib<script>document.title='hacked'<script>.so",
    b"lib<img src=x onerror=\"document.title='hacked'\">.so",
    b"lib\"'><svg onload=document.title='hacked'>.so",
    b"lib&lt;b&gt;.so",
    b"lib${document.title='hacked'}.so",
    b"lib\x1b]0;hacked\x07\x1b[2J.so",
    b"lib\n\r\tlines.so",
    b"lib\xff\xfe\x80.so",
    "lib\u202egnp.so".encode(),
    "lib\u05d0\u05d1\u0645.so".encode(),
    "lib\u200b\u2028\ufeff.so".encode(),
    "lib\U0001f512\U000e0041.so".encode(),
    rb"lib\x1b\n.so",
    b"  lib  .so ",
    b"x" * 252 + b".so",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def serve(closing: Any, deadline: Any) -> Callable[..., PageServer]:
    """``serve(ledger)`` serves the page of its watcher until the test ends."""
    return lambda ledger: closing.enter_context(PageServer(ledger.watcher, deadline(20)))


@pytest.fixture
def visit(browser: Any, serve: Any, closing: Any, deadline: Any) -> OpenPage:
    """``visit(ledger)`` is the page of its watcher in the browser."""
    return lambda ledger, **options: closing.enter_context(Visit(browser, serve(ledger).url, deadline(20), **options))


def own() -> Rule:
    return Rule(TAG, name="own")


def test_a_library_appears_when_it_is_loaded_and_goes_with_its_last_process(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, visit: OpenPage
) -> None:
    new, kept, mapper = library(), library(f"libkept{TAG}.so"), start()
    start().map(kept)
    page = visit(open_ledger(own()))
    page.wait_for_paths(str(kept))
    mapper.map(new)
    page.wait_for_paths(str(kept), str(new))
    mapper.exit()
    page.wait_for_paths(str(kept))
    assert page.faults == []


def test_a_row_that_changes_between_the_press_of_a_button_and_its_release_is_still_clicked(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, visit: OpenPage
) -> None:
    new, kept, mapper = library(), library(f"libkept{TAG}.so"), start()
    mapper.map(kept)
    page = visit(open_ledger(own()))
    page.wait_for_paths(str(kept))
    page.hover(str(kept))
    page.page.mouse.down()
    mapper.map(new)
    page.wait_for_total("libraries", "value === 2")
    page.page.mouse.up()
    assert str(kept) in page.details()
    page.close_details()
    page.wait_for_paths(str(kept), str(new))
    assert page.faults == []


def test_hostile_names_are_shown_as_the_terminal_shows_them_and_are_never_more_than_text(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, visit: OpenPage, scratch: Path, programs: Any
) -> None:
    hostile_program = scratch / "<b onclick=x>\u202e\x1b["
    shutil.copy(programs["mapper"], hostile_program)
    mapper = start(hostile_program)
    paths = []
    for name in HOSTILE:
        made = library(f"at{TAG}/{os.fsdecode(name)}")
        mapper.map(made)
        paths.append(str(made))
    page = visit(open_ledger(own()), viewport={"width": 1280, "height": 1200})
    page.wait_for_paths(*map(visible, paths))
    for path in paths:
        page.open(visible(path))
        details = page.details()
        assert visible(path) in details
        assert visible(hostile_program.name[:15]) in details
        assert "yes: rule own, cause snapshot" in details
        page.close_details()
        page.search(visible(path).rpartition("/")[2])
        page.wait_for_link(visible(path))
        # Words are looked for one by one.
        if " " not in path:
            page.wait_for_paths(visible(path))
        page.search("")
    shown = page.page.content()
    assert not re.search(r"<(b|img|svg) [^>]*on\w+=", shown)
    assert page.page.title() == "sowatch"
    assert page.faults == []


def test_what_is_stale_is_marked_and_can_be_chosen(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, visit: OpenPage
) -> None:
    mapper = start()
    same, gone, replaced = (library(f"lib{word}{TAG}.so") for word in ("same", "gone", "replaced"))
    for one in (same, gone, replaced):
        mapper.map(one)
    gone.unlink()
    library("fresh").rename(replaced)
    page = visit(open_ledger(own()))
    page.page.wait_for_selector(".badge >> text=deleted")
    page.page.check("#only")
    page.wait_for_paths(str(gone), str(replaced))
    page.search("replaced")
    page.wait_for_paths(str(replaced))
    page.open(str(replaced))
    assert "replaced since it was mapped" in page.details()
    assert page.faults == []


def test_the_details_of_a_library_name_its_processes_and_lead_to_what_each_has(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, visit: OpenPage
) -> None:
    shared, other = library(f"libshared{TAG}.so"), library(f"libother{TAG}.so")
    first, second = start(), start()
    for mapper in (first, second):
        mapper.map(shared)
    second.map(other)
    page = visit(open_ledger(own()))
    page.open(str(shared))
    assert "Who has it (2)" in page.details()
    page.open(str(second.pid))
    page.page.wait_for_selector("text=What it has mapped (2)")
    page.page.wait_for_selector("#explained h3 >> text=libother")
    assert page.page.locator("#facts tbody a").all_inner_texts() == [str(other), str(shared)]
    second.exit()
    page.page.wait_for_selector("#details-title >> text=This process has ended")
    page.close_details()
    assert page.page.get_attribute("#show-libraries", "aria-current") == "page"
    assert page.faults == []


def test_the_page_says_why_a_process_or_a_path_is_not_there(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, visit: OpenPage, scratch: Path
) -> None:
    unwanted, mapper = library("libunwanted.so"), start()
    mapper.map(unwanted)
    page = visit(open_ledger(own()))
    for target, expected in (
        (str(mapper.pid), "no: its pattern is not found in the path"),
        (str(unwanted), "no: no rule wants it"),
        (str(1 << 22), "there is no process"),
        (f"{scratch}/<i>none", "<i>none"),
    ):
        page.page.fill("#target", target)
        page.page.click("#why button")
        page.page.wait_for_selector("#details[open]")
        assert expected in page.details()
        page.close_details()
    refused = [fault for fault in page.faults if "404" not in fault]
    assert refused == []


def test_the_page_comes_back_when_the_agent_does_and_shows_what_happened_meanwhile(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, browser: Any, serve: Any, closing: Any, deadline: Any
) -> None:
    ledger, mapper = open_ledger(own()), start()
    server = serve(ledger)
    page = closing.enter_context(Visit(browser, server.url, deadline(30)))
    server.stop()
    page.page.wait_for_selector("#state[data-state=reconnecting]")
    new = library()
    mapper.map(new)
    server.start()
    page.page.wait_for_selector("#state[data-state=live]")
    page.wait_for_paths(str(new))


def test_losses_are_shown(open_ledger: OpenLedger, start: Start, library: NewLibrary, visit: OpenPage) -> None:
    new, mapper, ledger = library(), start(), open_ledger(own())
    page = visit(ledger)
    page.wait_for_total("lost", "value === 0")
    with ledger.watcher.subscribe(limit=1):
        for _ in range(20):
            mapper.unmap(*mapper.map(new))
        page.wait_for_total("lost", "value > 10")
    assert page.faults == []


def test_of_thousands_of_rows_only_those_in_sight_are_in_the_page(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, visit: OpenPage
) -> None:
    mapper = start()
    paths = [str(library(f"libmany-{number:04d}{TAG}.so")) for number in range(2000)]
    for path in paths:
        mapper.map(path)
    scanned = visit(open_ledger(own()))
    page = scanned.page
    page.wait_for_selector("text=2000 of 2000")
    page.click("th[data-key=path] button")
    page.wait_for_selector("th[data-key=path][aria-sort=ascending]")
    assert page.get_attribute("#table table", "aria-rowcount") == "2001"
    scanned.wait_for_link(paths[0])
    assert scanned.links() < 100
    page.evaluate("document.querySelector('#table .scroller').scrollTop = 1e9")
    scanned.wait_for_link(paths[-1])
    assert scanned.links() < 100
    page.click("th[data-key=path] button")
    page.evaluate("document.querySelector('#table .scroller').scrollTop = 0")
    scanned.wait_for_link(paths[-1])
    scanned.search("many-0777")
    scanned.wait_for_paths(paths[777])
    assert scanned.faults == []


def test_everything_can_be_reached_with_the_keyboard(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, visit: OpenPage
) -> None:
    new, mapper = library(), start()
    mapper.map(new)
    page = visit(open_ledger(own()))
    page.wait_for_paths(str(new))
    keyboard = page.page.keyboard
    seen = set()
    for _ in range(30):
        keyboard.press("Tab")
        seen.add(page.page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        if str(new) in seen:
            break
    assert {"show-libraries", "show-processes", "search", "only", "target", "Path", str(new)} <= seen
    keyboard.press("Enter")
    assert "Who has it (1)" in page.details()
    keyboard.press("Escape")
    page.page.wait_for_selector("#details:not([open])", state="attached")


@pytest.mark.alone
def test_a_hundred_pages_see_all_of_a_storm_and_the_watch_loses_nothing(
    open_ledger: OpenLedger, library: NewLibrary, serve: Any, spawn: Any, programs: Any, deadline: Any, visit: OpenPage
) -> None:
    new, ledger = library(), open_ledger(own())
    server = serve(ledger)
    readers = spawn([sys.executable, PAGE_READERS, str(server.port), "100"], stdin=PIPE, stdout=PIPE, text=True)
    assert readers.stdout.readline() == "100 pages are open\n"
    page = visit(ledger)
    storm = spawn([programs["storm"], "2", "3000", programs["loader"], str(new)], stdout=subprocess.DEVNULL)
    assert storm.wait(deadline(60)) == 0
    ledger.wait_for(lambda: ledger.watcher.stats.unloads == 3000, "the last unload")
    readers.stdin.write("3000\n")
    readers.stdin.flush()
    assert readers.stdout.readline() == "100 pages know of 3000 loads\n"
    page.wait_for_total("loads", "value === 3000")
    stats = ledger.watcher.stats
    assert (stats.loads, stats.unloads, stats.lost_kernel, stats.lost_queue) == (3000, 3000, 0, 0)
    assert ledger.watcher.audit().differences == ()
    assert page.faults == []


def test_every_answer_of_the_page_forbids_all_that_it_does_not_need(open_ledger: OpenLedger, serve: Any) -> None:
    server = serve(open_ledger(own()))
    for path in ("/", "/page/page.js", "/page/page.css", "/page/updates"):
        with urllib.request.urlopen(server.url + path.removeprefix("/")) as answer:
            policy = dict(
                part.strip().partition(" ")[::2] for part in answer.headers["Content-Security-Policy"].split(";")
            )
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert (
            policy["default-src"]
            == policy["base-uri"]
            == policy["form-action"]
            == policy["frame-ancestors"]
            == "'none'"
        )
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    for path in ("", "page/page.js", "page/updates"):
        with pytest.raises(urllib.error.HTTPError, match="405"):
            urllib.request.urlopen(server.url + path, data=b"x")
    for path in ("page/", "page/index.html", "page/../feed.py", "page/%2e%2e/feed.py"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(server.url + path)


def test_names_look_the_same_on_the_page_as_in_the_terminal(open_ledger: OpenLedger, visit: OpenPage) -> None:
    names = [os.fsdecode(name) for name in HOSTILE]
    names += [chr(code) for code in (*range(0x500), *range(0x2000, 0x2100), 0xAD, 0xE000, 0xFEFF, 0xFFFD, 0x1F512)]
    # What a newer Unicode than Python's has given a meaning to may be shown as it is.
    names = [name for name in names if "Cn" not in map(unicodedata.category, name)]
    page = visit(open_ledger(own())).page
    shown = page.evaluate(
        """async text => {
            const { restored, visible } = await import('/page/text.js');
            return JSON.parse(text, restored).map(({ name }) => visible(name));
        }""",
        dumps([{"name": name} for name in names]),
    )
    assert shown == [visible(name) for name in names]


def test_the_agent_serves_the_page_and_explains_on_it(
    start: Start, library: NewLibrary, scratch: Path, spawn: Any, browser: Any, closing: Any, deadline: Any
) -> None:
    new, mapper = library(), start()
    words = ["serve", "--socket", scratch / "socket", "--listen", "127.0.0.1:0"]
    agent = spawn([sys.executable, "-m", "sowatch", *words], stderr=PIPE, text=True)
    (port,) = next(found for line in agent.stderr if (found := re.findall(r"listening.*port=(\d+)", line)))
    next(line for line in agent.stderr if re.search(r"\bready\b", line))
    page = closing.enter_context(Visit(browser, f"http://127.0.0.1:{port}/", deadline(20)))
    page.search(TAG)
    mapper.map(new)
    page.wait_for_paths(str(new))
    page.open(str(new))
    assert "yes: rule" in page.details()
    agent.terminate()
    page.page.wait_for_selector("#state[data-state=reconnecting]", state="attached")
    agent.stderr.read()
    assert agent.wait(deadline(20)) == 0
    assert [fault for fault in page.faults if "ERR_" not in fault] == []


def test_calls_that_a_rule_counts_are_shown_by_library_and_function(
    programs: Any, scratch: Path, spawn: Any, browser: Any, closing: Any, deadline: Any, tmp_path: Path
) -> None:
    flags = ["-shared", "-fPIC", "-O1", "-g0", "-Wl,--build-id"]
    counted = Path(shutil.copyfile(build("probed", tmp_path, flags=flags, output="l.so"), scratch / "libcounted.so"))
    caller = Caller(spawn, programs["caller"], counted)
    config = scratch / "config.toml"
    rule = (
        f"[[rules]]\nname = 'counted'\npattern = '^{re.escape(str(counted))}$'\ncount = ['plain', 'nested', 'plan']\n"
    )
    config.write_text(f"{rule}[[rules]]\nname = 'rest'\n", encoding="utf-8")
    words = ["serve", "--config", config, "--socket", scratch / "socket", "--listen", "127.0.0.1:0"]
    agent = spawn([sys.executable, "-m", "sowatch", *words], stderr=PIPE, text=True)
    (port,) = next(found for line in agent.stderr if (found := re.findall(r"listening.*port=(\d+)", line)))
    next(line for line in agent.stderr if re.search(r"\bready\b", line))
    page = closing.enter_context(Visit(browser, f"http://127.0.0.1:{port}/", deadline(20)))
    page.search(str(counted))
    page.wait_for_paths(str(counted))
    cell = page.page.locator("#table tbody tr[data-row] td").nth(2)
    while not cell.text_content():  # until it is attached
        caller.call("nested")
    caller.call("nested", times=1500)  # which calls plain
    page.open(str(counted))
    page.page.wait_for_function(
        """() => {
            const texts = (row) => [...row.cells].map(cell => cell.textContent);
            const rows = [...document.querySelectorAll('#facts tbody tr')].map(texts);
            const counts = rows.filter(([symbol]) => ['plain', 'nested'].includes(symbol)).map(([, calls]) => calls);
            return counts.length === 2 && counts[0] === counts[1] && Number(counts[0].replaceAll(',', '')) >= 1500;
        }"""
    )
    details = page.details()
    (plain, nested) = (re.search(rf"{symbol}\s+([\d,]+)\s", details) for symbol in ("plain", "nested"))
    assert plain
    assert nested
    assert plain[1] == nested[1]
    assert cell.text_content() == f"{2 * int(plain[1].replace(',', '')):,}"
    assert re.search(r"probes of counted\s+attached, 4 of 6", details)
    assert re.search(r"probes of counted\s+plan: failed: there is no such function .*near: plain", details)
    agent.terminate()
    agent.stderr.read()
    assert agent.wait(deadline(20)) == 0
