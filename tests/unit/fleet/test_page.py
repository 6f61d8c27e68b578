"""What the fleet page gets: the values of `sowatch fleet ... --json`, a page of rows at a time, for who may read."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import httpx
import pytest
from msgspec import to_builtins
from starlette.applications import Starlette

from sowatch.fleet.page import FleetPage, answers
from sowatch.fleet.targets import target_of
from sowatch.model.encoding import restore
from sowatch.web.servers import HttpThread, bind_tcp
from support.fleet_records import SECOND, Group, HostRecords
from support.sample_fleet import LIBSSL_NEW, LIBSSL_OLD, Sample

HOUR = 3600 * SECOND
PATH = "/usr/lib/libx.so.1"
TOKEN = "0f3e2a1c5b"

Open = Callable[..., httpx.Client]


@pytest.fixture
def page(store) -> Iterator[Open]:
    """``page(asks=None, token=None)`` is a client of the page of a store, served as the receiver does."""
    with ExitStack() as stack:

        def page(asks: Any = None, token: str | None = None) -> httpx.Client:
            made = FleetPage(asks or store.asks, token=token)
            stack.callback(made.close)
            listening = bind_tcp("127.0.0.1:0")
            server = HttpThread([(listening, Starlette(routes=made.routes()))], distinguishes_clients=False)
            stack.callback(server.stop)
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            server.start()
            return stack.enter_context(httpx.Client(base_url=url, timeout=60))

        yield page


@pytest.fixture
def sample(store) -> Sample:
    """A hundred hosts: see `Sample`."""
    found = Sample(100, time.time_ns())
    store.take(*found.records())
    return found


def get(client: httpx.Client, path: str, **query: Any) -> Any:
    answer = client.get(path, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def names(found: Any) -> list[str]:
    return [row["host_name"] for row in found["rows"]]


@pytest.mark.parametrize("question", ["who", "versions", "history", "stale", "coverage"])
def test_an_endpoint_gives_the_lines_of_the_command(store, sample: Sample, page: Open, question: str) -> None:
    query = {"what": "libssl.so.3"} if question in ("who", "versions", "history") else {}
    found = get(page(), f"/api/{question}", limit=500, **query)
    fleet = store.at(time.time_ns())
    asked = getattr(fleet, question)(*map(target_of, query.values()))
    lines = to_builtins(list(asked.lines))
    if question == "coverage":  # the page has those first of which something is not known
        lines.sort(key=lambda line: ("silent", "lossy", "unsupported", "answered").index(line["state"]))
    assert found["rows"] == lines
    assert {**found["answer"], "time": ""} == {**to_builtins(asked.head), "time": ""}
    assert found["total"] == len(lines) > 1


def test_rows_come_in_pages(sample: Sample, page: Open) -> None:
    client = page()
    whole = get(client, "/api/coverage", limit=500)
    first, second = (get(client, "/api/coverage", limit=60, offset=at) for at in (0, 60))
    assert [len(one["rows"]) for one in (whole, first, second)] == [100, 60, 40]
    assert first["rows"] + second["rows"] == whole["rows"]
    assert get(client, "/api/coverage", offset=100)["rows"] == []


def test_no_answer_has_more_than_five_hundred_rows(store, page: Open) -> None:
    store.take(*Sample(520, time.time_ns()).records())
    found = get(page(), "/api/coverage", limit=100_000)
    assert (len(found["rows"]), found["total"]) == (500, 520)


def test_hosts_are_found_by_state_name_id_and_reason(sample: Sample, page: Open) -> None:
    client = page()
    assert names(get(client, "/api/coverage", state="silent")) == [sample.name(1), sample.name(0)]
    assert names(get(client, "/api/coverage", search="WEB-00042")) == [sample.name(42)]
    assert names(get(client, "/api/coverage", search="are missing")) == [sample.name(2)]
    (one,) = get(client, "/api/coverage", search="web-00042")["rows"]
    assert names(get(client, "/api/coverage", host=one["host_id"])) == [sample.name(42)]
    assert names(get(client, "/api/coverage", host="nobody")) == []


def test_reasons_are_counted(sample: Sample, page: Open) -> None:
    found = get(page(), "/api/reasons")
    assert sorted((row["hosts"], row["state"], row["reason"]) for row in found["rows"]) == [
        (1, "lossy", "records are missing"),
        (1, "unsupported", "its agent polls: what lives shorter is not seen"),
        (2, "silent", "no heartbeat for three intervals"),
        (96, "answered", ""),
    ]


def test_libraries_have_their_builds_and_hosts(sample: Sample, page: Open) -> None:
    client = page()
    by_name = {row["name"]: row for row in get(client, "/api/libraries")["rows"]}
    # 97 hosts answer or poll; 8 of them run on a libssl that was replaced.
    assert by_name["libssl.so.3"] == {
        "name": "libssl.so.3",
        "builds": 2,
        "hosts": 97,
        "processes": 5 * 97,
        "stale_hosts": 8,
    }
    assert [row["name"] for row in get(client, "/api/libraries", search="libz")["rows"]] == ["libz.so.1"]


def test_hosts_are_drawn_by_build_over_time(sample: Sample, page: Open) -> None:
    found = get(page(), "/api/time", what="libssl.so.3", days=7)
    old, new = found["series"]
    assert (old["build_id"], new["build_id"]) == (LIBSSL_OLD, LIBSSL_NEW)
    assert (old["points"][0][1], old["points"][-1][1]) == (100, 20)
    assert (new["points"][0][1], new["points"][-1][1]) == (1, 80)
    assert found["from"] < old["points"][0][0] < old["points"][-1][0] < found["to"]
    assert found["other_builds"] == 0


def test_what_began_before_the_days_that_are_drawn_begins_with_them(sample: Sample, page: Open) -> None:
    found = get(page(), "/api/time", what=LIBSSL_OLD, days=1)
    assert found["series"][0]["points"][0] == [found["from"], 20]


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/api/who", "say what"),
        ("/api/versions?what=", "say what"),
        ("/api/who?what=pkg:", "no package URL"),
        ("/api/coverage?offset=x", "offset"),
        ("/api/coverage?limit=-1", "limit"),
        ("/api/time?what=libssl.so.3&days=many", "days"),
        ("/api/who?what=CVE-2024-5535", "data of yours"),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused_with_the_reason(page: Open, path: str, word: str) -> None:
    answer = page().get(path)
    assert answer.status_code == 400
    assert word in answer.json()["error"]


def test_texts_of_others_are_no_sql(store, sample: Sample, page: Open) -> None:
    client = page()
    for text in ("' OR 1=1 --", "x\\' UNION SELECT 1", "{now:UInt64}", "%00", "a\tb\nc"):
        assert get(client, "/api/who", what=f"lib{text}.so")["answer"]["mapped_host_count"] == 0
        assert get(client, "/api/coverage", search=text)["rows"] == []


def test_hostile_names_come_as_they_are(store, page: Open) -> None:
    now = time.time_ns()
    evil = "<img src=x onerror=alert(1)>\u202e\x07" + "x" * 65536
    host = HostRecords("id", evil[:60], now - HOUR)
    group = Group(f"/lib/{evil}", "ab" * 20, evil, unit=evil, exe=f"/{evil}")
    records = host.snapshot_of([group])
    host.now_ns = now
    store.take(records, host.heartbeat())
    client = page()
    (row,) = get(client, "/api/who", what="ab" * 20)["rows"]
    assert (row["path"], row["unit"], row["host_name"]) == (group.path, evil, evil[:60])
    assert client.get("/api/who", params={"what": "ab" * 20}).content.isascii()
    assert restore(get(client, "/api/libraries")["rows"])[0]["name"] == evil


# ---- who may read --------------------------------------------------------------------------------


def test_a_token_is_asked_for_on_every_path(page: Open) -> None:
    client = page(token=TOKEN)
    for path in ("/", "/page/fleet.js", "/page/text.js", "/api/coverage", "/api/time?what=x"):
        answer = client.get(path)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Basic ")


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"auth": ("anybody", TOKEN)}, 200),
        ({"auth": ("", TOKEN)}, 200),
        ({"headers": {"Authorization": f"Bearer {TOKEN}"}}, 200),
        ({"auth": (TOKEN, "")}, 401),
        ({"auth": ("anybody", TOKEN + "x")}, 401),
        ({"headers": {"Authorization": f"Bearer {TOKEN[:-1]}"}}, 401),
        ({"headers": {"Authorization": "Basic !!"}}, 401),
        ({"headers": {"Authorization": f"Digest {TOKEN}"}}, 401),
    ],
)
def test_the_token_is_a_password_or_a_bearer_token(page: Open, options: dict[str, Any], status: int) -> None:
    headers = {"Host": "receiver.example", **options.pop("headers", {})}
    assert page(token=TOKEN).get("/api/coverage", headers=headers, **options).status_code == status


@pytest.mark.parametrize(
    ("host", "status"), [("127.0.0.1:4318", 200), ("[::1]:4318", 200), ("localhost", 200), ("evil.example", 421)]
)
def test_without_a_token_the_name_of_somebody_else_is_not_served(page: Open, host: str, status: int) -> None:
    client = page()
    for path in ("/", "/api/coverage"):
        assert client.get(path, headers={"Host": host}).status_code == status


def test_the_page_only_reads(page: Open) -> None:
    client = page()
    for path in ("/", "/api/coverage", "/page/fleet.js"):
        for method in ("POST", "PUT", "DELETE"):
            assert client.request(method, path).status_code == 405


def test_every_answer_keeps_the_page_to_itself(page: Open) -> None:
    client = page()
    for path in ("/", "/page/fleet.css", "/api/coverage", "/api/who"):
        policy = client.get(path).headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'")
        assert "frame-ancestors 'none'" in policy


# ---- what the store is asked ---------------------------------------------------------------------


class Counting:
    """Passes questions on, once `gate` is open, and counts those of one kind."""

    def __init__(self, asks: Any) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.asked = 0
        self.at_once = self.most_at_once = 0
        self._asks = asks

    def ask(self, sql: str, parameters: Mapping[str, str]) -> Iterable[bytes]:
        assert self.gate.wait(30)
        self.asked += "FROM fleet_coverage" in sql
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return list(self._asks.ask(sql, parameters))
        finally:
            self.at_once -= 1


def test_pages_that_are_open_at_once_ask_the_store_once(store, sample: Sample, page: Open) -> None:
    counting = Counting(store.asks)
    client = page(counting)
    with ThreadPoolExecutor(20) as threads:
        found = list(threads.map(lambda at: get(client, "/api/coverage", offset=at), range(20)))
    assert {one["total"] for one in found} == {100}
    assert counting.asked == 1


def test_one_question_is_under_way_at_a_time_and_few_wait(store, page: Open, wait_until: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(answers, "_WAITING", 3)
    counting = Counting(store.asks)
    client = page(counting)
    counting.gate.clear()
    with ThreadPoolExecutor(12) as threads:
        asked = [threads.submit(client.get, f"/api/who?what=lib{number}.so") for number in range(12)]
        # One is being asked, three wait, and the others are told to come again.
        wait_until(lambda: sum(one.done() for one in asked) == 8, 20, "refusals")
        counting.gate.set()
        statuses = sorted(one.result().status_code for one in asked)
    assert statuses == [200] * 4 + [503] * 8
    assert counting.most_at_once == 1


def test_an_answer_that_could_not_be_given_is_asked_for_again(store, sample: Sample, page: Open) -> None:
    class Failing(Counting):
        fails = True

        def ask(self, sql: str, parameters: Mapping[str, str]) -> Iterable[bytes]:
            from sowatch.model.errors import SowatchError

            if self.fails:
                raise SowatchError("the store is closed. Open it again.")
            return super().ask(sql, parameters)

    failing = Failing(store.asks)
    client = page(failing)
    answer = client.get("/api/coverage")
    assert (answer.status_code, answer.json()) == (503, {"error": "the store is closed. Open it again."})
    failing.fails = False
    assert get(client, "/api/coverage")["total"] == 100


@pytest.mark.parametrize(("bound", "value"), [("MAX_ROWS", 10), ("MAX_BYTES", 5_000)])
def test_a_long_answer_is_cut_and_says_so(sample: Sample, page: Open, monkeypatch: Any, bound: str, value: int) -> None:
    monkeypatch.setattr(answers, bound, value)
    found = get(page(), "/api/who", what="libc.so.6")
    assert found["is_cut"]
    assert 5 <= found["total"] <= 10
    assert found["answer"]["mapped_host_count"] == 97  # the first line is of all


def test_an_answer_is_kept_for_some_times_what_it_took(store, sample: Sample, page: Open, monkeypatch: Any) -> None:
    monkeypatch.setattr(answers, "_AGE_S", 0.0)
    monkeypatch.setattr(answers, "_AGE_TIMES", 0.0)
    counting = Counting(store.asks)
    client = page(counting)
    for _ in range(3):
        get(client, "/api/coverage")
    assert counting.asked == 3
    monkeypatch.setattr(answers, "_AGE_TIMES", 1e6)
    for _ in range(3):
        get(client, "/api/coverage")
    assert counting.asked == 3


class Rows:
    """A store with a host, and 500 bytes of rows of it for whatever is asked of it."""

    def ask(self, sql: str, parameters: Mapping[str, str]) -> Iterable[bytes]:
        if "FROM fleet_coverage" in sql:
            return [b'{"host_id":"id","host_name":"web","state":"answered"}']
        return [b'{"name":"%s","builds":1,"hosts":1,"processes":1,"stale_hosts":0}' % (b"x" * 500)]


@pytest.fixture
def views() -> Iterator[answers.Views]:
    found = answers.Views(Rows())
    yield found
    found.close()


def test_what_is_kept_of_all_answers_has_one_bound(views: answers.Views, monkeypatch: Any) -> None:
    monkeypatch.setattr(answers, "_AGE_S", 60.0)

    async def ask() -> None:
        for number in range(40):
            await views._once(number, lambda: b"x" * (4 << 20))
            assert views.kept_bytes <= answers.MAX_KEPT_BYTES
        assert views.kept_bytes > answers.MAX_KEPT_BYTES // 2
        await views._once("more than all may have", lambda: b"x" * (answers.MAX_KEPT_BYTES + 1))
        assert views.kept_bytes <= answers.MAX_KEPT_BYTES

    asyncio.run(ask())


def test_old_answers_go_with_the_next_question(views: answers.Views, monkeypatch: Any) -> None:
    monkeypatch.setattr(answers, "_AGE_S", 60.0)

    async def ask() -> None:
        await views._once("long", lambda: b"x" * (4 << 20))
        await views.libraries("")
        assert views.kept_bytes > 4 << 20
        monkeypatch.setattr(answers, "_AGE_S", 0.0)
        monkeypatch.setattr(answers, "_AGE_TIMES", 0.0)
        await views.libraries("")
        assert 500 < views.kept_bytes < 4 << 20  # what was just asked, with its rows

    asyncio.run(ask())


def test_a_group_that_has_no_soname_is_called_by_its_file(store, page: Open) -> None:
    now = time.time_ns()
    host = HostRecords("id", "web", now - HOUR)
    groups = [Group(PATH, "ab" * 20), replace(Group(PATH, "cd" * 20), unit="other.service")]
    records = host.snapshot_of(groups)
    host.now_ns = now
    store.take(records, host.heartbeat())
    assert get(page(), "/api/libraries")["rows"] == [
        {"name": "libx.so.1", "builds": 2, "hosts": 1, "processes": 2, "stale_hosts": 0}
    ]
