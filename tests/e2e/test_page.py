"""The agent's page in a real Chromium: its HTTP tab with real TLS traffic, small and large screens, keyboard only."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.agent import Agent, NewAgent, short_directory
from support.cgroups import Cgroups
from support.pages import Visit, chromium
from support.programs import Mapper, compile_library
from support.receivers import free_port
from support.tls import ASYNCIO_SERVER, LIBRARIES, SERVE_BY_ASYNCIO, Server, Tls, find

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="BPF programs need root")

LARGE = {"width": 1400, "height": 900}
SMALL = {"width": 400, "height": 800}
#: TLS that is not HTTP: a server and a client.
ECHO_SERVER = f"""
import asyncio, ssl, sys
async def serve(reader, writer):
    while data := await reader.read(100):
        writer.write(data)
        await writer.drain()
{SERVE_BY_ASYNCIO}
"""
ECHO_CLIENT = """
import socket, ssl, sys
context = ssl.create_default_context()
with context.wrap_socket(socket.create_connection(("127.0.0.1", int(sys.argv[1]))), server_hostname="127.0.0.1") as tls:
    for _ in range(3):
        tls.sendall(b"\\0\\1\\2" * 30)
        assert tls.recv(100)
"""
#: Of a real extension module, and the longest that has no letter left out on a small screen.
LONG = "_elementtree_x.cpython-311-x86_64-linux-gnu-1.so"
DEEP = "site-packages/a-directory-with-a-rather-long-name/and-another-one-within-it/_vendor/native"

#: Whether all of a base name can be seen: nothing of it is cut off, and it lies within the table.
_IS_WHOLE = """name => {
    const found = [...document.querySelectorAll('#table a')].find(one => one.textContent.endsWith('/' + name));
    if (!found) return false;
    const base = found.querySelector('.base'), box = base.getBoundingClientRect();
    const row = found.closest('td').getBoundingClientRect();
    const isWithin = box.left >= row.left && box.right <= row.right + 0.5 && box.bottom <= row.bottom + 0.5;
    const isCut = base.scrollWidth > base.clientWidth || base.scrollHeight > base.clientHeight + 1;
    return box.width > 0 && isWithin && !isCut;
}"""

Open = Callable[..., Visit]


@dataclass
class Host:
    """An agent that knows the files of one directory, and what runs there."""

    agent: Agent
    port: int
    tls: Tls
    held: int
    nginx: Server
    memory: Server
    echo: Server
    python: Server
    ask: Callable[[str], None]
    place: Path
    maps: Path

    def config(self, more: str = "") -> str:
        rule = f"stale_interval_s = 1\n[[rules]]\nname = 'mine'\npattern = '^{re.escape(str(self.maps))}/'\n"
        return f"{rule}[http]\nenabled = true\nlibraries = '^{re.escape(str(self.tls.libraries))}/'\n{more}"

    def reload(self, config: str) -> None:
        loaded = self.agent.get("/readyz").json["config"]["loaded"]
        self.agent.config_path.write_text(config, encoding="utf-8")
        assert self.agent.process is not None
        self.agent.process.send_signal(signal.SIGHUP)
        self.tls.wait_until(lambda: self.agent.get("/readyz").json["config"]["loaded"] != loaded, what="a reload")

    def is_tapped(self) -> bool:
        state = self.agent.get("/readyz").json["http"]
        return state is not None and state["files"] >= LIBRARIES


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, module_spawn: Any, deadline: Any) -> Iterator[Host]:
    """Its server and client have a connection before the agent starts: that one is joined in the middle."""
    tls = Tls(tmp_path_factory.mktemp("tls"), module_spawn, deadline.wait_until)
    held = tls.hold()
    nginx, server, memory, echo = tls.nginx(), tls.python(), tls.python(ASYNCIO_SERVER), tls.python(ECHO_SERVER)
    _, ask = tls.keep_alive(server)
    ask("/before")
    with short_directory() as place:
        port = free_port()
        agent = Agent(subprocess.Popen, deadline.wait_until, place, "", ["--listen", f"127.0.0.1:{port}"])
        made = Host(agent, port, tls, held, nginx, memory, echo, server, ask, place, tmp_path_factory.mktemp("maps"))
        agent.config_path.write_text(made.config(), encoding="utf-8")
        agent.start()
        deadline.wait_until(made.is_tapped, 20, "tapped")
        yield made
        assert agent.stop() == 0, agent.log


@pytest.fixture
def visit(host: Host, browser: Any, deadline: Any) -> Iterator[Open]:
    """``visit(address, viewport)`` is the agent's page in the browser; nothing may go wrong in it."""
    with ExitStack() as stack:
        made: list[Visit] = []

        def visit(address: str = "", viewport: dict[str, int] = LARGE) -> Visit:
            url = f"http://127.0.0.1:{host.port}/{address}"
            made.append(stack.enter_context(Visit(browser, url, deadline(20), viewport=viewport)))
            return made[-1]

        yield visit
        # What has ended meanwhile cannot be explained.
        assert [fault for one in made for fault in one.faults if "404" not in fault] == []


@pytest.fixture
def mapper(programs: Any, tmp_path: Path) -> Iterator[Mapper]:
    with Mapper(programs["mapper"], tmp_path) as running:
        yield running


@pytest.fixture
def library(host: Host) -> Iterator[Callable[[str], Path]]:
    """``library(name)`` is a library of its own below what the agent's rule wants."""
    yield lambda name: compile_library(host.maps / name, ())
    for left in host.maps.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def endpoints(page: Visit) -> dict[tuple[str, str], list[str]]:
    """The rows of the HTTP tab by side and endpoint: the texts of all cells."""
    rows = page.page.evaluate(
        "[...document.querySelectorAll('#table tr[data-row]')].map(row => [...row.cells].map(cell => cell.textContent))"
    )
    return {(row[2], row[0]): row for row in rows}


def figures(page: Visit) -> dict[str, int]:
    """What stands above them."""
    found = page.page.evaluate(
        "[...document.querySelectorAll('#about .figures div')].map(one => [...one.children].map(it => it.textContent))"
    )
    return {title: int(value.replace(",", "")) for title, value in found}


# ---- HTTP ----------------------------------------------------------------------------------------


def test_the_http_tab_before_the_first_flow_says_what_is_attached(host: Host, visit: Open) -> None:
    visit("#http").page.wait_for_selector("#about >> text=No flow yet: 3 TLS libraries are attached")


@pytest.fixture(scope="module")
def memory_flows(host: Host) -> None:
    """Over memory no socket is seen in a call, and of the first flow it is not known yet.

    From then on the agent compares what is sent with what was encrypted, by programs that it attaches for the rest of
    its capture. So this is no test's.
    """
    address = f"https://127.0.0.1:{host.memory.port}/memory"
    host.tls.run(find("curl"), "-sS", "--cacert", str(host.tls.certificate), address)
    host.tls.wait_until(lambda: host.agent.get("/http").json["stats"]["unknown_peers"] >= 1, what="a flow over memory")


@pytest.mark.usefixtures("memory_flows")
def test_the_http_tab_shows_endpoints_their_percentiles_and_what_is_not_known(
    host: Host, visit: Open, wait_until: Any
) -> None:
    page = visit("#http")
    host.ask("/late")  # its request was being read when the probes came
    urls = [f"https://127.0.0.1:{host.nginx.port}{path}" for path in ("/users/1", "/users/2?secret=1", "/missing")]
    host.tls.run(find("curl"), "-sS", "-o", "/dev/null", "--cacert", str(host.tls.certificate), *urls)
    # TLS need not be HTTP.
    host.tls.run(sys.executable, "-c", ECHO_CLIENT, str(host.echo.port))
    here = f"127.0.0.1:{host.nginx.port}"
    page.page.wait_for_selector(f"#table >> text={here}/missing >> nth=1")
    wait_until(lambda: len(endpoints(page)) >= 5, 20, "all endpoints")
    found = endpoints(page)
    for side, errors in (("server", ""), ("client", "1")):
        assert found[side, f"{here}/users/*"][1:6] == ["GET", side, "2", "", ""]
        assert found[side, f"{here}/missing"][3:6] == ["1", errors, ""]
        assert all(re.fullmatch(r"\d+ µs|\d+\.\d ms", cell) for cell in found[side, f"{here}/users/*"][6:])
    wait_until(lambda: figures(page)["flows"] == host.agent.get("/http").json["flows_seen"] > 8, 20, "all flows")
    wait_until(lambda: figures(page)["undecoded"] >= 1, 20, "what is not HTTP")
    stats, shown = host.agent.get("/http").json["stats"], figures(page)
    assert shown["joined late"] == stats["joined_late"] >= 1
    assert shown["incomplete"] == stats["incomplete"] >= 1
    assert shown["unknown peers"] == stats["unknown_peers"] >= 1
    assert shown == {
        "flows": host.agent.get("/http").json["flows_seen"],
        "incomplete": stats["incomplete"],
        "undecoded": stats["undecoded"],
        "truncated": stats["gaps"],
        "joined late": stats["joined_late"],
        "unknown peers": stats["unknown_peers"],
        "unknown fields": stats["unknown_fields"],
        "resyncs": stats["resyncs"],
        "lost: ring": stats["lost"],
        "lost: unreadable": stats["unreadable"],
        "lost: connections": stats["no_room"],
        "lost: ends": stats["lost_ends"],
        "lost: table": stats["dropped"],
        "lost: stream": stats["unpublished"],
    }
    page.page.check("#only")
    wait_until(lambda: set(endpoints(page)) == {("client", f"{here}/missing")}, 20, "those with errors")
    page.page.uncheck("#only")
    page.search("users server")
    wait_until(lambda: set(endpoints(page)) == {("server", f"{here}/users/*")}, 20, "those that are searched")
    page.open(f"{here}/users/*")
    assert "Single flows are not shown over TCP" in page.page.inner_text("#details")
    assert "secret" not in page.page.content()
    # The address means the same in another browser, on a small screen.
    other = visit(page.page.evaluate("location.hash"), SMALL)
    other.page.wait_for_selector("#details dd >> text=server: the process answers")
    assert other.page.inner_text("#details-title") == f"GET {here}/users/*"
    other.page.keyboard.press("Escape")
    other.page.wait_for_function("() => location.hash === '#http'")
    assert len(endpoints(other)) == len(host.agent.get("/http").json["endpoints"])
    assert other.page.evaluate("document.documentElement.scrollWidth") <= SMALL["width"]
    assert other.page.evaluate(_IS_WHOLE, "users/*")


def test_single_flows_are_on_the_page_where_the_configuration_says_so(host: Host, visit: Open) -> None:
    page = visit("#flows")
    page.page.wait_for_selector("#details >> text=Set flows_over_tcp = true")
    host.reload(host.config("flows_over_tcp = true\n"))
    host.ask("/one/7")
    page.page.wait_for_selector(f"#details tbody tr >> text=127.0.0.1:{host.python.port}/one/7 >> nth=1")
    (row,) = page.page.evaluate(
        "pid => [...document.querySelectorAll('#details tbody tr')].map(row => [...row.cells].map(c => c.textContent))"
        ".filter(row => row[3].endsWith('/one/7') && row[4].endsWith(pid))",
        str(host.python.process.pid),
    )
    assert row[1] == "200"
    assert re.fullmatch(r"127\.0\.0\.1:\d+", row[5])
    assert row[6:] == ["0 / 10", "yes"]
    assert "unknown" in page.page.locator("#details tbody tr:has-text('/memory') td:nth-child(6)").all_inner_texts()
    page.page.keyboard.press("Escape")
    page.search("one/")
    page.page.locator("#table tbody a").first.click()
    page.page.wait_for_selector("#details h3 >> text=Last flows (1)")
    for pid, expected in ((host.python.process.pid, "it has some (calls: "), (host.held, "none yet: its TLS library")):
        why = visit(f"#why={pid}")
        why.page.wait_for_selector(f"#explained dd >> text={expected}")
        why.page.context.close()
    host.reload(host.config())
    page.page.wait_for_selector("#details >> text=Set flows_over_tcp = true")


def test_the_http_tab_of_an_agent_that_captures_none_says_how_to_turn_it_on(
    new_agent: NewAgent, browser: Any, deadline: Any
) -> None:
    port = free_port()
    new_agent("[[rules]]\nname = 'none'\npattern = '^/nothing$'\n", ["--listen", f"127.0.0.1:{port}"]).start()
    with Visit(browser, f"http://127.0.0.1:{port}/#http", deadline(20), viewport=SMALL) as page:
        page.page.wait_for_selector("#about pre >> text=enabled = true")
        assert endpoints(page) == {}
        assert page.faults == []


def build_id_of(host: Host, path: Path) -> str:
    found = {one["path"]: one["build_id"] for one in host.agent.get("/inventory").json["libraries"]}
    return str(found[str(path)])


# ---- libraries and processes ---------------------------------------------------------------------


@pytest.mark.parametrize("viewport", [SMALL, LARGE], ids=["400px", "1400px"])
def test_the_base_name_of_a_library_is_shown_whole_however_deep_it_lies(
    host: Host, visit: Open, mapper: Mapper, library: Callable[[str], Path], viewport: dict[str, int]
) -> None:
    names = [f"{DEEP}/{LONG}", f"{DEEP}/libz.so.1", f"{DEEP}/{'W' * 22}.so"]
    for name in names:
        mapper.map(library(name))
    page = visit("#libraries&search=a-directory", viewport)
    page.page.wait_for_selector("text=3 of")
    for name in names:
        page.page.wait_for_function(_IS_WHOLE, arg=Path(name).name)
    assert page.page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]


def test_links_name_a_library_by_path_and_build_id_and_a_process_by_pid_and_start(
    host: Host, visit: Open, mapper: Mapper, library: Callable[[str], Path], programs: Any, tmp_path: Path
) -> None:
    path = library("libtwice.so")
    mapper.map(path)
    page = visit("#libraries&search=libtwice")
    page.open(str(path))
    link = page.page.evaluate("location.hash")
    assert re.fullmatch(rf"#library={re.escape(str(path))}&build_id=[0-9a-f]{{40}}", link)
    build_id = link.rpartition("=")[2]
    other = visit(link, SMALL)
    assert str(mapper.pid) in other.details()
    for address in (f"#library={path}", f"#library&build_id={build_id}"):
        other.page.goto(f"http://127.0.0.1:{host.port}/{address}")
        assert str(mapper.pid) in other.details()
    # The same build in another file of this path: its rows would have the same link.
    shutil.copyfile(path, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)
    (tmp_path / "second").mkdir()
    with Mapper(programs["mapper"], tmp_path / "second") as second:
        second.map(path)
        page.close_details()
        page.page.wait_for_selector("text=2 of")
        links = page.page.locator("#table tbody a").evaluate_all("all => all.map(one => one.getAttribute('href'))")
        assert len({*links, link}) == 3
        pids = []
        for each in links:
            page.page.goto(f"http://127.0.0.1:{host.port}/{each}")
            page.page.wait_for_selector("#details dt >> text=same build")
            details = page.details()
            pids.append([one for one in (mapper.pid, second.pid) if re.search(rf"^{one}\b", details, re.MULTILINE)])
        assert sorted(pids) == sorted([[mapper.pid], [second.pid]])
        process = visit(f"#process={second.pid}")
        assert str(path) in process.details()
        process.close_details()
        start = process.page.locator(f"#table a:text-is('{second.pid}')").get_attribute("href")
        assert re.fullmatch(rf"#process={second.pid}&start=\d+", start or "")
    gone = visit(start)
    gone.page.wait_for_selector("#details-title >> text=This process has ended")
    gone.page.goto(f"http://127.0.0.1:{host.port}/{links[0].replace(build_id, '0' * 40)}")
    gone.page.wait_for_selector("#details >> text=This library is mapped by nobody now")


@pytest.fixture
def cgroups(tmp_path: Path, wait_until: Any) -> Iterator[Cgroups]:
    made = Cgroups(tmp_path / "cgroups")
    yield made
    made.close(wait_until)


def test_a_search_says_by_what_it_found_a_row_and_processes_have_users_and_units(
    host: Host, visit: Open, cgroups: Cgroups, mapper: Mapper, library: Callable[[str], Path]
) -> None:
    cgroups.put(mapper.pid, "sowatch-page.slice/shop.service")
    path = library("libnamed.so")
    mapper.map(path)
    page = visit("", SMALL)
    page.page.wait_for_selector("#table a:has-text('libnamed.so')")
    page.search("named")
    page.page.wait_for_selector("#table mark >> text=named")
    assert page.page.locator(".hit").count() == 0
    build_id = build_id_of(host, path)
    page.search(f"libnamed {build_id[:9]}")
    page.page.wait_for_selector(f".hit:visible:has-text('build id: {build_id}')")
    page.page.click("#show-processes")
    page.search("mapper (0)")
    page.page.wait_for_selector(".hit:visible:has-text('user: root (0)')")
    page.search("shop.service")
    page.page.wait_for_selector(".hit:visible:has-text('unit: shop.service')")
    large = visit("#processes&search=mapper")
    large.page.wait_for_selector("#table td >> text=root")
    large.page.wait_for_selector("#table td.unit >> text=shop.service")
    assert large.page.locator("#search").input_value() == "mapper"


def test_the_history_of_stale_files_has_when_one_was_replaced_and_when_its_process_ended(
    host: Host, visit: Open, library: Callable[[str], Path], programs: Any, tmp_path: Path
) -> None:
    path = library("libold.so")
    page = visit("#stale", SMALL)
    page.page.wait_for_selector("#about >> text=Nothing is stale now")
    with Mapper(programs["mapper"], tmp_path) as mapper:
        mapper.map(path)
        row = "#table tr:has-text('libold.so')"
        other = visit("#libraries&search=libold")
        other.wait_for_link(str(path))
        library("libnew.so").rename(path)
        page.page.wait_for_selector(f"{row} .badge >> text=replaced")
        page.page.wait_for_selector("#about >> text=Stale now: 1 file in 1 process.")
        other.page.wait_for_selector(".badge >> text=replaced")
        page.page.check("#only")
        page.page.click(f"{row} a >> nth=0")
        page.page.wait_for_selector("#details dd >> text=replaced since it was mapped")
        page.page.keyboard.press("Escape")
        page.page.wait_for_function("() => location.hash === '#stale&only=1'")
    page.page.wait_for_selector(row, state="detached")
    page.page.uncheck("#only")
    page.page.wait_for_selector(f"{row} >> text=was replaced")
    large = visit("#stale&search=libold")
    large.page.wait_for_selector(f"{row} >> text=the process ended or has it no more")


def test_the_keyboard_goes_through_all_rows_and_back(
    host: Host, visit: Open, mapper: Mapper, library: Callable[[str], Path]
) -> None:
    first = library("libkey-000.so")
    copies = (host.maps / f"libkey-{number:03d}.so" for number in range(1, 60))
    paths = [first, *(shutil.copyfile(first, copy) for copy in copies)]
    for path in paths:
        mapper.map(path)
    page = visit()
    page.page.wait_for_selector("#table a:has-text('libkey')")
    keyboard = page.page.keyboard
    keyboard.press("/")
    keyboard.type("libkey")
    page.page.wait_for_selector("text=60 of")
    page.page.wait_for_function("() => location.hash === '#libraries&search=libkey'")
    seen = set()
    for _ in range(60):
        keyboard.press("ArrowDown")
        seen.add(page.page.evaluate("document.activeElement.textContent"))
    assert seen == {str(path) for path in paths}
    keyboard.press("Home")
    top = page.page.evaluate("document.activeElement.textContent")
    keyboard.press("ArrowDown")
    second = page.page.evaluate("document.activeElement.textContent")
    keyboard.press("Enter")
    assert second in page.details()
    keyboard.press("ArrowDown")
    assert page.page.evaluate("document.activeElement.closest('#details') !== null")
    keyboard.press("Escape")
    page.page.wait_for_function("text => document.activeElement.textContent === text", arg=second)
    keyboard.press("ArrowUp")
    assert page.page.evaluate("document.activeElement.textContent") == top
    keyboard.press("End")
    keyboard.press("ArrowDown")
    assert page.page.evaluate("document.activeElement.closest('tr').getAttribute('aria-rowindex')") == "61"
    keyboard.press("Escape")
    page.page.wait_for_function("() => location.hash === '#libraries'")
    assert page.page.locator("#search").input_value() == ""


def test_why_takes_a_base_name_a_process_name_and_a_build_id(
    host: Host, visit: Open, mapper: Mapper, library: Callable[[str], Path]
) -> None:
    path = library("libwhy.so")
    mapper.map(path)
    page = visit()
    page.page.wait_for_selector("#table a:has-text('libwhy.so')")
    build_id = build_id_of(host, path)
    for target in ("libwhy.so", build_id):
        page.page.fill("#target", target)
        page.page.keyboard.press("Enter")
        page.page.wait_for_selector("#explained >> text=yes, by rule mine")
        assert str(path) in page.page.inner_text("#explained") or target == build_id
        page.close_details()
    other = library("other/libwhy.so")
    mapper.map(other)
    page.wait_for_link(str(other))
    page.page.fill("#target", "libwhy.so")
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector("#explained >> text=Which one?")
    page.page.click(f"#explained a:has-text('{other}')")
    page.page.wait_for_selector("#explained >> text=yes, by rule mine")
    page.close_details()
    page.page.fill("#target", "no-such-thing")
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector("#explained >> text=No library that is mapped and no process has this name")


def test_a_long_list_in_the_details_can_be_made_longer_until_all_is_there(visit: Open) -> None:
    page = visit().page
    counts = page.evaluate(
        """async () => {
            const { list } = await import('/page/details.js');
            const made = list(['number'], [...Array(1200).keys()], (row) => [String(row)]);
            const more = made.querySelector('button');
            const counts = [];
            const rows = () => made.querySelectorAll('tbody tr').length;
            for (; !more.hidden; more.click()) counts.push([rows(), more.textContent]);
            return [...counts, rows()];
        }"""
    )
    assert counts == [[500, "700 more"], [1000, "200 more"], 1200]
