"""The fleet page of a receiver in a real Chromium: two thousand hosts, hostile names, small screens, the keyboard."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from support.doc_blocks import Block, blocks
from support.fleet_records import SECOND, Group, HostRecords, Record, otlp
from support.pages import Visit, chromium
from support.receivers import free_port
from support.sample_fleet import LIBSSL_NEW, LIBSSL_OLD, NGINX, OLD_SSL, Sample
from support.sessions import Shell, missing_lines, steps_of

HOSTS = 2000
LARGE = {"width": 1400, "height": 900}
SMALL = {"width": 400, "height": 800}
TOKEN = "b7d4e1f09a"
#: Markup, a control that turns the direction, one that is not shown, and more letters than fit anywhere.
EVIL = '<img src=x onerror="alert(1)"><script>alert(2)</script>\u202egnp.\x07\u2028' + "x" * 60_000
EVIL_BUILD = "ee" * 20
BATCH = 3000

Open = Callable[..., Visit]

pytestmark = pytest.mark.timeout(300)


@dataclass
class Receiver:
    """`sowatch fleet receive` with a sample of a fleet in its store."""

    process: subprocess.Popen[bytes]
    url: str
    store: Path
    sample: Sample
    evil: HostRecords

    def send(self, records: Iterable[Record]) -> None:
        """As an agent does."""
        body = otlp(list(records))
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/v1/logs", body, headers), timeout=60) as answer:
            assert answer.status == 200


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory, deadline: Any) -> Iterator[Receiver]:
    place = tmp_path_factory.mktemp("fleet")
    (place / "token").write_text(f"{TOKEN}\n", encoding="ascii")
    port = free_port()
    command = [sys.executable, "-m", "sowatch", "fleet", "receive", "--store", str(place / "store")]
    command += ["--listen", f"127.0.0.1:{port}", "--token-file", str(place / "token")]
    log = place / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stderr=output)
    evil = HostRecords("evil", EVIL[:200], time.time_ns() - 3600 * SECOND, interval_s=600)
    made = Receiver(process, f"http://127.0.0.1:{port}", place / "store", Sample(HOSTS, time.time_ns()), evil)
    try:
        deadline.wait_until(lambda: b"receiving on" in log.read_bytes(), 60, "the receiver")
        batch: list[Record] = []
        for records in made.sample.records():
            batch += records
            if len(batch) > BATCH:
                made.send(batch)
                batch.clear()
        made.send([*batch, *hostile(evil)])
        yield made
    finally:
        process.terminate()
        assert process.wait(60) == 0, log.read_text()


def hostile(host: HostRecords) -> list[Record]:
    """It calls everything by a name that attacks."""
    group = Group(
        f"/{EVIL}", EVIL_BUILD, EVIL, exe=f"/{EVIL}", unit=EVIL, container=EVIL[:300], listen=EVIL, stale="<b>replaced"
    )
    records = host.snapshot_of([group])
    host.now_ns = time.time_ns()
    return [*records, host.heartbeat()]


@pytest.fixture
def visit(receiver: Receiver, browser: Any, deadline: Any) -> Iterator[Open]:
    """``visit(address, viewport)`` is the page in the browser, logged in; nothing may go wrong in it."""
    with ExitStack() as stack:
        made: list[Visit] = []

        def visit(address: str = "", viewport: dict[str, int] = LARGE, **options: Any) -> Visit:
            options = {"http_credentials": {"username": "", "password": TOKEN}, **options}
            url = f"{receiver.url}/{address}"
            made.append(stack.enter_context(Visit(browser, url, deadline(60), viewport=viewport, **options)))
            settle(made[-1])
            return made[-1]

        yield visit
        assert [fault for one in made for fault in one.faults] == []


def settle(page: Visit) -> None:
    """Waits until what is asked for is shown."""
    page.page.wait_for_function("() => document.getElementById('shown').getAttribute('aria-busy') === 'false'")


def rows(page: Visit) -> list[list[str]]:
    return page.page.evaluate(
        "[...document.querySelectorAll('#shown tbody tr')]"
        ".map(row => [...row.cells].map(cell => cell.innerText.trim()))"
    )


def go(page: Visit, address: str) -> None:
    page.page.evaluate(
        """hash => new Promise(done => {
            addEventListener("hashchange", () => setTimeout(done), { once: true });
            location.hash = hash;
        })""",
        address,
    )
    settle(page)


def holds(page: Visit) -> str:
    return page.page.inner_text("#holds")


def test_hosts_stand_with_their_states_first_those_of_which_something_is_not_known(
    receiver: Receiver, visit: Open
) -> None:
    page = visit()
    assert holds(page) == "This holds for 1,921 of 2,001 hosts: 40 silent, 20 lossy, 20 unsupported."
    shown = rows(page)
    assert len(shown) == 100
    assert [row[1] for row in shown[:81]] == ["silent"] * 40 + ["lossy"] * 20 + ["unsupported"] * 20 + ["answered"]
    assert shown[40][2] == "records are missing"
    assert page.page.inner_text("#range") == "1 to 100 of 2,001"


def test_rows_are_paged_and_found(receiver: Receiver, visit: Open) -> None:
    page = visit()
    page.page.click("#next")
    page.page.wait_for_selector("#range >> text=101 to 200")
    page.page.click("#back")
    page.page.wait_for_selector("#range >> text=1 to 100 of")
    page.page.fill("#search", "-01234.")
    page.page.wait_for_selector("#range >> text=1 to 1 of 1")
    assert [row[0] for row in rows(page)] == [receiver.sample.name(1234)]
    page.page.fill("#search", "")
    page.page.select_option("#state-of", "unsupported")
    page.page.wait_for_selector("#range >> text=1 to 20 of 20")
    assert page.page.url.endswith("#hosts&state=unsupported")


def test_a_search_leads_to_who_maps_it_and_says_for_how_many_hosts_that_holds(receiver: Receiver, visit: Open) -> None:
    page = visit()
    page.page.keyboard.press("/")
    page.page.keyboard.type(LIBSSL_OLD[:12])
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector(".verdict >> text=build id")
    # Of each hundred: two silent and one lossy host reported it, one that polls and 16 others have it.
    assert "mapped 340 hosts" in page.page.inner_text(".figures").replace("\n", " ")
    assert "not observed 60 hosts" in page.page.inner_text(".figures").replace("\n", " ")
    shown = rows(page)
    names = set(receiver.sample.with_old_libssl())
    assert {row[0] for row in shown} <= names
    assert {row[1] for row in shown} == {"mapped", "not observed"}
    stale = next(row for row in shown if "replaced" in row)
    assert stale[2:7] == ["nginx.service", "nginx", "5", "812, 813, 814, 815, 816", "tcp:443, tcp:80"]


def test_a_build_that_nobody_has_is_not_observed_where_hosts_do_not_answer(visit: Open) -> None:
    page = visit(f"#who={'0' * 40}")
    assert page.page.inner_text(".verdict").startswith("not observed")
    assert "not mapped 1921 hosts" in page.page.inner_text(".figures").replace("\n", " ").replace(",", "")
    assert {row[1] for row in rows(page)} == {"not observed"}


def test_libraries_lead_to_their_builds_and_builds_to_who_maps_them(visit: Open) -> None:
    page = visit("#libraries")
    by_name = {row[0]: row for row in rows(page)}
    assert by_name["libssl.so.3"][1:5] == ["2", "1,940", "9,700", "160 hosts"]
    page.page.get_by_role("link", name="libssl.so.3", exact=True).click()
    page.page.wait_for_selector("#shown >> text=libssl3 3.0.15-1~deb12u1")
    new, old = rows(page)
    assert (new[0], new[3], old[0], old[3], old[4]) == (LIBSSL_NEW[:12], "1,600", LIBSSL_OLD[:12], "340", "60")
    page.page.get_by_role("link", name=LIBSSL_OLD[:12]).click()
    page.page.wait_for_selector(".verdict >> text=build id")


def test_the_upgrade_is_drawn_over_time(visit: Open) -> None:
    page = visit("#time=libssl.so.3")
    assert page.page.locator("#shown polyline").count() == 2
    key = page.page.inner_text(".series-key")
    assert "libssl3 3.0.11-1~deb12u2 400" in key
    assert "libssl3 3.0.15-1~deb12u1 1,600" in key
    words = page.page.get_attribute("#shown figure svg", "aria-label")
    assert words == "libssl3 3.0.11-1~deb12u2: 400 hosts now; libssl3 3.0.15-1~deb12u1: 1600 hosts now"


def test_coverage_counts_hosts_by_reason_and_leads_to_them(visit: Open) -> None:
    page = visit("#coverage")
    assert ["lossy", "records are missing", "20"] in rows(page)
    page.page.get_by_role("link", name="lossy").click()
    page.page.wait_for_selector("#range >> text=1 to 20 of 20")
    assert {row[1] for row in rows(page)} == {"lossy"}


def test_stale_files_stand_with_what_has_them(receiver: Receiver, visit: Open) -> None:
    page = visit("#stale")
    page.page.wait_for_selector("#range >> text=of 161")  # eight of each hundred, and the hostile one


def test_what_arrives_is_shown_without_a_reload(receiver: Receiver, visit: Open, deadline: Any) -> None:
    patience_ms = 1000 * deadline(120)  # what takes long is asked for the more seldom
    page = visit("#who=libnew.so.1")
    assert page.page.inner_text(".verdict").startswith("not observed")
    group = replace(OLD_SSL, path="/usr/lib/libnew.so.1", soname="libnew.so.1", build_id="dd" * 20, **NGINX)
    receiver.send([receiver.evil.mapped(group)])
    page.page.wait_for_selector(".verdict >> text=soname libnew.so.1", timeout=patience_ms)
    page.page.wait_for_function(
        "() => document.querySelector('.verdict').innerText.startsWith('mapped')", timeout=patience_ms
    )
    receiver.send([receiver.evil.unmapped(group)])
    gone = "() => document.querySelector('.verdict').innerText.startsWith('not observed')"
    page.page.wait_for_function(gone, timeout=patience_ms)


# ---- names that attack, screens, keys ------------------------------------------------------------


@pytest.mark.parametrize(
    "address", ["#who=" + EVIL_BUILD, "#libraries", "#stale", "#hosts&search=onerror", "#host=evil"]
)
@pytest.mark.parametrize("viewport", [LARGE, SMALL], ids=["large", "small"])
def test_hostile_names_are_shown_as_text_and_take_no_more_than_their_place(
    visit: Open, address: str, viewport: dict[str, int]
) -> None:
    page = visit(address, viewport)
    page.page.wait_for_function("() => document.getElementById('shown').textContent.includes('<img src=x')")
    text = page.page.evaluate("document.getElementById('shown').textContent")
    assert "\\u202egnp.\\x07\\u2028" in text or address.startswith(("#hosts", "#host="))
    assert not set("\u202e\x07\u2028") & set(text)
    assert page.page.locator("#shown img, #shown script, #shown b").count() == 0
    assert is_within(page)
    cells = "[...document.querySelectorAll('#shown td > div, #shown dd, .verdict')]"
    assert page.page.evaluate(f"Math.max(...{cells}.map(one => one.clientHeight))") < 250


def is_within(page: Visit) -> bool:
    """Whether nothing of the page lies beside the screen."""
    return bool(page.page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [LARGE, SMALL], ids=["large", "small"])
def test_every_tab_fits_the_screen_and_can_be_read(
    visit: Open, viewport: dict[str, int], scheme: str, tmp_path: Path
) -> None:
    page = visit("", viewport, color_scheme=scheme)
    for tab in ("hosts", "libraries", "builds=libssl.so.3", "who=libssl.so.3", "time=libssl.so.3", "stale", "coverage"):
        go(page, f"#{tab}&search=")
        assert is_within(page), tab
        # Given a path, playwright would leave a thread.
        (tmp_path / f"{tab.partition('=')[0]}.png").write_bytes(page.page.screenshot())
        # Of the text that is most quiet: 4.5 to 1, as WCAG 2 wants it.
        assert contrast(page, "#range") >= 4.5
        assert contrast(page, "#holds") >= 4.5


def contrast(page: Visit, selector: str) -> float:
    colours = page.page.evaluate(
        "selector => [getComputedStyle(document.querySelector(selector)).color, "
        "getComputedStyle(document.body).backgroundColor]",
        selector,
    )
    first, second = (luminance(one) for one in colours)
    return (max(first, second) + 0.05) / (min(first, second) + 0.05)


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_nothing_jumps_when_an_answer_comes_again(visit: Open) -> None:
    page = visit("#hosts")
    page.page.evaluate(
        """() => {
            window.shifts = 0;
            new PerformanceObserver(list => list.getEntries().forEach(one => (window.shifts += one.value)))
                .observe({ type: "layout-shift" });
        }"""
    )
    page.page.locator("#shown tbody tr:nth-child(60) a").focus()
    scrolled = page.page.evaluate("document.querySelector('.scroller').scrollTop")
    assert scrolled > 100
    before = page.page.evaluate("document.activeElement.getAttribute('href')")
    for _ in range(2):
        with page.page.expect_response(lambda answer: "/api/coverage" in answer.url):
            pass
    assert page.page.evaluate("document.activeElement.getAttribute('href')") == before
    assert page.page.evaluate("document.querySelector('.scroller').scrollTop") == scrolled
    assert page.page.evaluate("window.shifts") < 0.02


def test_the_keyboard_goes_through_rows_and_back(receiver: Receiver, visit: Open) -> None:
    page = visit("#hosts")
    for _ in range(3):
        page.page.keyboard.press("ArrowDown")
    page.page.keyboard.press("ArrowUp")
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector("#shown .facts")
    assert page.page.inner_text("#shown h2") == rows_of_silent(receiver)[1]
    page.page.keyboard.press("Escape")
    page.page.wait_for_selector("#range >> text=1 to 100")


def rows_of_silent(receiver: Receiver) -> list[str]:
    names = (receiver.sample.name(number) for number in range(HOSTS) if number % 100 < 2)
    return sorted(names)


def test_an_address_shows_what_it_showed_to_another(visit: Open) -> None:
    page = visit("#hosts&state=silent&from=20")
    page.page.wait_for_selector("#range >> text=21 to 40 of 40")
    assert page.page.input_value("#state-of") == "silent"


def test_the_page_asks_for_nothing_from_elsewhere(receiver: Receiver, visit: Open) -> None:
    page = visit("#time=libssl.so.3")
    asked = page.page.evaluate("performance.getEntriesByType('resource').map(one => one.name)")
    assert asked
    assert all(one.startswith(f"{receiver.url}/") for one in asked)


def test_without_the_token_there_is_nothing_to_see(receiver: Receiver, browser: Any) -> None:
    context = browser.new_context(http_credentials={"username": "", "password": "wrong"})
    try:
        answer = context.new_page().goto(receiver.url)
        assert answer.status == 401
        assert "libssl" not in answer.text()
    finally:
        context.close()


def test_a_receiver_that_ends_is_said_to_be_gone(
    tmp_path: Path, spawn: Any, browser: Any, wait_until: Any, deadline: Any
) -> None:
    port = free_port()
    command = [sys.executable, "-m", "sowatch", "fleet", "receive", "--store", str(tmp_path / "store")]
    process = spawn([*command, "--listen", f"127.0.0.1:{port}"], stderr=subprocess.PIPE)
    assert b"receiving on" in process.stderr.readline()
    with Visit(browser, f"http://127.0.0.1:{port}/", deadline(60), viewport=LARGE) as page:
        page.page.wait_for_selector("#shown >> text=No host has sent anything.")
        process.terminate()
        page.page.wait_for_selector("#holds >> text=The receiver does not answer; it is asked again.")
        assert page.page.get_attribute("#state", "data-state") == "connecting"


# ---- the pages of the documentation --------------------------------------------------------------

SHOWN = [
    block
    for block in blocks()
    if block.marker == "run by: test_a_fleet_of_any_size_answers_as_the_pages_show" and block.language == "console"
]


def test_the_pages_show_a_fleet() -> None:
    assert {block.page for block in SHOWN} >= {"README.md", "docs/fleet.md", "docs/how-to/who-maps-on-the-fleet.md"}


@pytest.mark.parametrize("block", SHOWN, ids=str)
def test_a_fleet_of_any_size_answers_as_the_pages_show(
    receiver: Receiver, block: Block, tmp_path: Path, deadline: Any
) -> None:
    with Shell(tmp_path, deadline(60)) as shell:
        # Where the pages have the default store.
        command = f'exec {sys.executable} -m sowatch "$@" --store {receiver.store}'
        (tmp_path / ".bin" / "sowatch").write_text(f"#!/bin/sh\n{command}\n", encoding="ascii")
        for step in steps_of([block._replace(marker=None)]):
            output = shell.type(step.typed)
            assert missing_lines(step.shown, output) == [], f"{step} wrote:\n{output}"
