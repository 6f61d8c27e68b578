"""`sowatch fleet`: what the questions print, their exit codes, and errors that end with the next step."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sowatch.cli import main
from support.clickhouse_server import PASSWORD
from support.fleet_records import SECOND, Group, HostRecords, debian

HOUR = 3600 * SECOND
OLD = "7c1d8a4e" * 5
SSL = Group(
    "/usr/lib/libssl.so.3", OLD, "libssl.so.3", debian("libssl3", "3.0.11-1~deb12u1", "openssl"), listen="tcp:443"
)
LIBC = Group("/usr/lib/libc.so.6", "cc" * 20, "libc.so.6", debian("libc6", "2.36-9", "glibc"))


@pytest.fixture
def ask(store, capfd, monkeypatch):
    monkeypatch.setenv("CLICKHOUSE_PASSWORD", PASSWORD)

    def run(*words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(["fleet", *words, "--url", store.server.url])
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def fleet(store) -> int:
    """The host web has the old library, in nginx and a pod; database has none; mail is silent."""
    now = time.time_ns()
    for name, groups, heard_ns in (
        ("web", [SSL, LIBC], now),
        ("database", [LIBC], now),
        ("mail", [LIBC], now - HOUR // 2),
    ):
        host = HostRecords(f"id-{name}", name, now - HOUR)
        records = host.snapshot_of(groups)
        if name == "web":
            host.now_ns = now - HOUR // 2
            stale = {"stale": "replaced", "stale_since_ns": now - HOUR // 2}
            pod = {
                "unit": "",
                "container": "c" * 64,
                "pod_uid": "u",
                "pod": "shop-7d9c5b8f6-x2x9z",
                "namespace": "prod",
            }
            records += [host.changed(replace(SSL, **stale)), host.mapped(replace(SSL, exe="/app", **pod, **stale))]
        host.now_ns = heard_ns
        store.take(records, host.heartbeat())
    return now


def test_who_prints_its_answer_and_for_how_many_hosts_it_holds(ask, fleet) -> None:
    code, out, err = ask("who", OLD[:8])
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0] == f"mapped: build id {OLD[:8]}: mapped on 1 host, not mapped on 1, not observed on 1"
    assert lines[1].startswith("2 of 3 hosts answered, 1 silent, at ")
    assert lines[2] == f"build {OLD} libssl.so.3 pkg:deb/debian/libssl3@3.0.11-1~deb12u1"
    assert lines[3].split()[:3] == ["HOST", "ANSWER", "UNIT"]
    assert any("nginx.service" in line and "tcp:443" in line for line in lines)
    assert any("prod/shop-7d9c5b8f6-x2x9z" in line for line in lines)
    assert lines[-1].split()[:3] == ["mail", "silent", "not"]


@pytest.mark.parametrize(
    "words",
    [
        ("who", "libssl.so.3"),
        ("stale",),
        ("stale", "--plan"),
        ("versions", "libssl"),
        ("history", OLD),
        ("coverage",),
        ("remediated", OLD),
    ],
)
def test_each_line_of_json_is_of_the_schema(ask, fleet, schema, words) -> None:
    _, out, _ = ask(*words, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines[0]["event"] == "fleet_answer"
    assert lines[0]["hosts"] == {"answered": 2, "silent": 1, "lossy": 0, "unsupported": 0}
    assert [line["seq"] for line in lines] == list(range(1, len(lines) + 1))
    assert len(lines) > 1
    for line in lines:
        schema(line)


def test_the_plan_has_a_command_for_each_unit_and_deployment(ask, fleet) -> None:
    code, out, err = ask("stale", "--plan")
    assert code == 0
    purl = SSL.package.purl
    assert out.splitlines() == [
        f"web systemctl restart nginx.service  # 1 process; listens on tcp:443; {purl}",
        f"- kubectl -n prod rollout restart deployment/shop  # 1 process; listens on tcp:443; {purl}",
    ]
    assert err == "sowatch: 2 of 3 hosts answered, 1 silent\n"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ((OLD,), 1),
        (("libc.so.7",), 3),
        (("libc.so.7", "--ignore-silent"), 0),
        (("libc.so.7", "libssl"), 1),
        (("libc.so.7", "--ignore-silent", "--expect", "hosts"), 3),
    ],
)
def test_remediated_answers_by_its_exit_code(ask, fleet, tmp_path: Path, monkeypatch, words, code: int) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("# all\nweb\nid-database\nbackup\n")
    found, out, _ = ask("remediated", *words)
    # A host of --expect of which nothing came is silent, and is left out with the others.
    assert found == (0 if "--expect" in words else code), out


def test_an_expected_host_of_which_nothing_came_leaves_the_answer_open(ask, fleet, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("backup\n")
    code, out, _ = ask("who", "libc.so.7", "--expect", str(tmp_path / "hosts"))
    assert (code, out.splitlines()[1].split(",")[:2]) == (0, ["2 of 4 hosts answered", " 2 silent"])
    assert "it is expected, and nothing ever came from it" in out


def osv(directory: Path, fixed: str) -> str:
    """An advisory of OSV about openssl in Debian 12."""
    events = [{"introduced": "0"}, {"fixed": fixed}]
    package = {"ecosystem": "Debian:12", "name": "openssl"}
    affected = [{"package": package, "ranges": [{"type": "ECOSYSTEM", "events": events}]}]
    advisory = {"id": "DSA-1-1", "modified": "2026-01-01T00:00:00Z", "aliases": ["CVE-2026-1111"], "affected": affected}
    (directory / "DSA-1-1.json").write_text(json.dumps(advisory))
    return str(directory)


@pytest.mark.parametrize(("fixed", "answer"), [("3.0.13-1~deb12u1", "mapped"), ("3.0.9-1", "not observed")])
def test_a_cve_is_asked_for_by_the_versions_of_its_packages(ask, fleet, tmp_path: Path, fixed, answer) -> None:
    code, out, _ = ask("who", "CVE-2026-1111", "--osv", osv(tmp_path, fixed), "--json")
    head, *lines = [json.loads(line) for line in out.splitlines()]
    assert (code, head["answer"], head["targets"][0]["kind"]) == (0, answer, "cve")
    assert [one["build_id"] for one in head["builds"]] == ([OLD] if answer == "mapped" else [])
    assert {one["host_name"] for one in lines if one["event"] == "fleet_mapping"} == (
        {"web"} if answer == "mapped" else set()
    )


def test_a_build_without_a_package_is_not_known_to_be_unaffected(ask, store, fleet, tmp_path: Path) -> None:
    lab = HostRecords("id-lab", "lab", fleet - HOUR)
    store.take(lab.snapshot_of([replace(LIBC, build_id="dd" * 20, path="/opt/libown.so", package=None)]))
    lab.now_ns = fleet
    store.take(lab.heartbeat())
    _, out, _ = ask("who", "CVE-2026-1111", "--osv", osv(tmp_path, "3.0.9-1"), "--json")
    head, *lines = [json.loads(line) for line in out.splitlines()]
    assert [one["build_id"] for one in head["unknown_builds"]] == ["dd" * 20]
    assert {one["host_name"]: one["answer"] for one in lines}["lab"] == "not observed"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "say what: one of who,"),
        (("whom",), "Did you mean who?"),
        (("who",), "`sowatch fleet who` takes one WHAT."),
        (("stale", "x"), "takes nothing else"),
        (("coverage", "--plan"), "--plan is for stale, not for coverage."),
        (("who", "x", "--kind", "name"), "unknown --kind 'name'."),
        (("who", "abc", "--kind", "build_id"), "'abc' is no build id"),
        (("who", "CVE-2026-1"), "no host"),
        (("who", "CVE-2026-1111"), "Name them: --osv PATH"),
        (("who", "x", "--at", "soon"), "'soon' is no time"),
        (("who", "x", "--expect", "/no/such"), "cannot read the hosts of --expect in '/no/such'"),
        (("who", "x", "--store", "/no/such"), "--store and --url name two stores."),
    ],
)
def test_wrong_usage_is_refused_with_the_next_step(ask, words, message: str) -> None:
    code, out, err = ask(*words)
    if message == "no host":  # no CVE has so few digits: it is taken for a soname
        assert "no host has ever reported such a file" in out
        return
    assert code == 2
    assert message in err
    assert err.rstrip().endswith((".", "?", "ago"))


@pytest.mark.parametrize(
    ("url", "code", "message"),
    [
        ("http://127.0.0.1:1", 1, "does not answer: Connection refused. Check that a ClickHouse listens there"),
        ("ftp://x", 2, "is no URL of http or https"),
        ("http://user:secret@x", 2, "a password in --url can be read by every process"),
        ("http://[", 2, "is no URL"),
    ],
)
def test_a_url_that_cannot_be_asked_is_an_error(capfd, url: str, code: int, message: str) -> None:
    assert main(["fleet", "coverage", "--url", url]) == code
    err = capfd.readouterr().err
    assert message in err
    assert "secret" not in err


def test_a_wrong_password_is_not_permitted(ask, monkeypatch) -> None:
    monkeypatch.setenv("CLICKHOUSE_PASSWORD", "wrong")
    code, _, err = ask("coverage")
    assert code == 3
    assert "Authentication failed" in err
    assert "CLICKHOUSE_PASSWORD_FILE" in err


def test_a_password_may_be_in_a_file(ask, fleet, monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "password").write_text(PASSWORD + "\n")
    monkeypatch.delenv("CLICKHOUSE_PASSWORD")
    monkeypatch.setenv("CLICKHOUSE_PASSWORD_FILE", str(tmp_path / "password"))
    assert ask("coverage")[0] == 0


def test_rows_that_are_hostile_cannot_steer_a_terminal_or_a_shell(ask, store, fleet) -> None:
    name = "web\x1b[2J\n; rm -rf /"
    host = HostRecords("id-x", name, fleet - HOUR)
    evil = replace(SSL, unit="a;reboot.service", exe="/x\x1b]0;", stale="replaced", stale_since_ns=fleet - HOUR)
    store.take(host.snapshot_of([evil, replace(evil, unit="nginx.service")]))
    host.now_ns = fleet
    store.take(host.heartbeat())
    for words in (("who", OLD), ("stale",), ("stale", "--plan"), ("coverage",), ("history", OLD)):
        _, out, _ = ask(*words)
        assert "\x1b" not in out
    _, out, _ = ask("stale", "--plan")
    assert [line for line in out.splitlines() if "rm -rf" in line and not line.startswith("#")] == []
    assert [line for line in out.splitlines() if "reboot" in line and not line.startswith("#")] == []


@pytest.mark.timeout(600)
def test_a_hundred_thousand_rows_are_written_as_they_come(ask, store, fleet) -> None:
    store.server.execute(
        "INSERT INTO fleet_state (build_id, host_id, key, version, path, processes) "
        f"SELECT '{'ee' * 20}', 'id-web', number, {fleet}, concat('/lib/', toString(number)), 1 FROM numbers(100000)"
    )
    store.server.execute(
        f"INSERT INTO fleet_builds (build_id, path, version) VALUES ('{'ee' * 20}', '/lib/0', {fleet})"
    )
    _, out, _ = ask("who", "ee" * 20)
    rows = [line for line in out.splitlines() if line.startswith("web ")]
    assert len(rows) == 100_000
    assert len({line.index("/lib/") for line in rows}) < 10  # columns only ever widen
