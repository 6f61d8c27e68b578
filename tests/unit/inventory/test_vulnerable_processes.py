"""What runs and is affected: real processes in roots with databases made by hand, before and after an upgrade."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sowatch.inventory.packages import Packages
from sowatch.inventory.vulnerabilities import load_vulnerabilities
from support.advisories import advisory, statement, write_tree, write_vex
from support.package_roots import Jailed, add_dpkg, dpkg_status, elf

LIBRARY = "/usr/lib/liblamp.so.1"


@pytest.fixture
def data(tmp_path: Path) -> str:
    one = advisory("DSA-1", ranges="introduced 0, fixed 1.0-2", upstream=["CVE-1900-0001"], summary="A lamp burns")
    return str(write_tree(tmp_path / "osv", [one]))


def install(root: Path, version: str, number: int) -> None:
    add_dpkg(root, dpkg_status(liblamp1=(version, "Source: lamp\n")), {"liblamp1": {LIBRARY: elf(number)}})


def listed(*words: str) -> tuple[int, list[dict[str, Any]], str]:
    command = [sys.executable, "-m", "sowatch", "list", "--vulnerable", "--json", "--kind", "all", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_after_an_upgrade_the_process_that_goes_on_is_still_affected_and_the_next_one_is_not(
    root: Path, jailed: Callable[[], Jailed], data: str
) -> None:
    install(root, "1.0-1", 1)
    vulnerabilities = load_vulnerabilities([data])
    asked = vulnerabilities.affected_by("CVE-1900-0001")
    with Packages() as packages:
        old = jailed().map(LIBRARY)
        (before,) = packages.identify([old])
        assert [(one.status, one.id) for one in vulnerabilities.findings(before)] == [("affected", "CVE-1900-0001")]
        install(root, "1.0-2", 2)
        new = jailed().map(LIBRARY)
        running = packages.identify([old, new])

    assert [asked.status_of(one).status for one in running] == ["affected", "not_affected"]
    assert [len(vulnerabilities.findings(one)) for one in running] == [1, 0]


def test_who_asks_after_the_upgrade_only_does_not_know_what_goes_on_running(
    root: Path, jailed: Callable[[], Jailed], data: str
) -> None:
    install(root, "1.0-1", 1)
    old = jailed().map(LIBRARY)
    install(root, "1.0-2", 2)
    with Packages() as packages:
        (found,) = packages.identify([old])
    assert [one.status for one in load_vulnerabilities([data]).findings(found)] == ["unknown"]


def test_the_command_lists_who_has_what(
    root: Path, jailed: Callable[[], Jailed], data: str, schema: Callable[[Any], Any]
) -> None:
    install(root, "1.0-1+b1", 1)
    one = jailed().map(LIBRARY)
    words = ("--osv", data, "--pid", str(one.process.pid), LIBRARY)
    code, lines, _ = listed(*words)

    for line in lines:
        schema(line)
    head, found, summary = lines
    assert (code, head["event"], summary["event"]) == (0, "head", "vulnerability_data")
    assert {
        key: found[key] for key in ("event", "finding", "id", "aliases", "fixed_version", "summary", "found_by")
    } == {
        "event": "vulnerable",
        "finding": "affected",
        "id": "CVE-1900-0001",
        "aliases": ["DSA-1"],
        "fixed_version": "1.0-2",
        "summary": "A lamp burns",
        "found_by": "osv",
    }
    assert (found["mapped_package"]["name"], found["mapped_package"]["version"], found["process"]["pid"]) == (
        *("liblamp1", "1.0-1+b1"),
        one.process.pid,
    )
    assert (summary["file_count"], summary["files_without_package"], summary["files_unknown"]) == (1, 0, 0)
    assert (summary["advisories"], summary["affected_processes"], summary["problems"]) == (1, 1, [])
    assert listed(*words, "--check")[0] == 1


@pytest.mark.parametrize(
    ("version", "code"),
    [("1.0-1", 1), ("1.0-2", 0), ("1.0_x-1", 3), (None, 3)],
)
def test_the_exit_code_of_a_check_has_three_values(
    root: Path, jailed: Callable[[], Jailed], data: str, version: str | None, code: int
) -> None:
    install(root, version or "1.0-1", 1)
    one = jailed().map(LIBRARY)
    if version is None:  # nobody knows what it was any more
        install(root, "1.0-2", 2)
    found, lines, text = listed("--osv", data, "--pid", str(one.process.pid), LIBRARY, "--check")
    assert found == code, (lines, text)


def test_the_table_has_a_row_for_each_vulnerability_and_package_and_who_has_it_below(
    root: Path, jailed: Callable[[], Jailed], data: str
) -> None:
    install(root, "1.0-1", 1)
    one = jailed().map(LIBRARY)
    command = [sys.executable, "-m", "sowatch", "list", "--vulnerable", "--osv", data, "--pid", str(one.process.pid)]
    done = subprocess.run([*command, LIBRARY], capture_output=True, text=True, check=False)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[0] == ["ID", "SEVERITY", "STATUS", "PACKAGE", "VERSION", "FIXED", "IN", "PROCESSES", "WHAT"]
    assert rows[2] == ["CVE-1900-0001", "-", "affected", "liblamp1", "1.0-1", "1.0-2", "1", "A", "lamp", "burns"]
    assert rows[3][-1] == str(one.process.pid)
    assert "1 vulnerability in files of 1 process, by 1 advisory (the newest of 2026-01-02)." in done.stderr
    assert "of 1 mapped file the package of 0 is not known; 0 may be affected by what nobody knows." in done.stderr


def test_a_statement_takes_a_finding_out_of_the_table_and_not_out_of_json(
    root: Path, jailed: Callable[[], Jailed], data: str, tmp_path: Path
) -> None:
    install(root, "1.0-1", 1)
    one = jailed().map(LIBRARY)
    text = statement(
        "CVE-1900-0001", "not_affected", {"@id": "pkg:deb/debian/liblamp1"}, justification="component_not_present"
    )
    vex = str(write_vex(tmp_path / "vex.json", text))
    code, lines, _ = listed("--osv", data, "--vex", vex, "--pid", str(one.process.pid), LIBRARY, "--check")
    assert (code, lines[1]["finding"], lines[1]["reason"]) == (
        0,
        "not_affected",
        "VEX: not_affected, component_not_present",
    )


def test_a_list_of_builds_asks_for_no_package(tmp_path: Path, spawn: Any) -> None:
    (tmp_path / "x.c").write_text("int ours(void) { return 1; }")
    library, builds = tmp_path / "libbuild.so", tmp_path / "builds.csv"
    command = ["cc", "-shared", "-fPIC", "-Wl,--build-id=0x" + "cd" * 20, "-o", library, tmp_path / "x.c"]
    subprocess.run(command, check=True)
    code = f"import ctypes; ctypes.CDLL({str(library)!r}); print('ready', flush=True); input()"
    child = spawn([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    words = ("--build-ids", str(builds), "--pid", str(child.pid), "--check", str(library))

    builds.write_text(f"{'ab' * 20},X-1,seen in the lab\n")
    found, lines, _ = listed(*words)
    assert (found, lines[-1]["event"], lines[-1]["files_without_package"]) == (0, "vulnerability_data", 1)
    builds.write_text(f"{'cd' * 20},X-1,seen in the lab\n")
    found, lines, _ = listed(*words)
    assert (found, lines[1]["id"], lines[1]["reason"], lines[1]["found_by"]) == (
        *(1, "X-1"),
        *("seen in the lab", "build_ids"),
    )


def test_data_that_cannot_be_read_leave_the_answer_open(root: Path, jailed: Callable[[], Jailed], data: str) -> None:
    install(root, "1.0-2", 1)
    one = jailed().map(LIBRARY)
    (Path(data) / "broken.json").write_text("{")
    code, lines, text = listed("--osv", data, "--pid", str(one.process.pid), LIBRARY, "--check")
    assert (code, len(lines[-1]["problems"])) == (3, 1)
    assert "broken.json" in text


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--osv", "/nonexistent", "--check"], 3),
        (["--osv", "/nonexistent"], 1),
        (["--build-ids", "/nonexistent", "--check"], 3),
        (["--check"], 2),
    ],
)
def test_a_check_that_did_not_work_has_not_the_exit_code_of_something_affected(words: list[str], code: int) -> None:
    found, lines, text = listed(*words)
    assert (found, lines) == (code, []), text


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--vulnerable"], "--vulnerable takes data. Name them"),
        (["--osv", "x"], "--osv is about vulnerable files. Add --vulnerable."),
        (["--build-ids", "x"], "--build-ids is about vulnerable files"),
        (["--vulnerable", "--osv", "x", "--stale"], "are two questions"),
        (["--vulnerable", "--osv", "x", "--by", "unit"], "has a table of its own"),
        (["--vulnerable", "--osv", "x", "--agent"], "leave out --agent"),
        (["--check"], "--check is about stale or vulnerable files"),
    ],
)
def test_options_that_contradict_each_other_are_refused(words: list[str], wanted: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sowatch", "list", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert wanted in done.stderr
