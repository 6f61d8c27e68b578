"""Databases of any content: read to an end, without an error and without a record that names nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packageurl import PackageURL

from sowatch.inventory.language_packages import npm_package, wheel_of, wheels_listed
from sowatch.inventory.look_budget import BudgetError, LookBudget, within
from sowatch.inventory.package_databases import (
    DatabaseIndex,
    Listed,
    apk_listed,
    apk_records,
    dpkg_digest,
    dpkg_listed,
    dpkg_records,
)
from sowatch.inventory.package_identity import Release, by_record, plain

SITE = "/lib/site-packages"
WORDS = [b"Package: ", b"Version: ", b"Status: install ok installed", b"Source: a (1)", b"P:", b"V:", b"F:lib"]
WORDS += [b"R:x.so", b"Z:Q1", b"Z:Q2AAAA", b"/lib/x.so", b"x.so,sha256=", b"Name: ", b'{"name":', b"[" * 2000]
WORDS += [b"\n", b"\n\n", b"\xff"]
CONTENT = st.lists(st.sampled_from(WORDS) | st.binary(max_size=12), max_size=30).map(b"".join)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("root")
    for directory in ("var/lib/dpkg/info", "var/lib/dpkg/updates", "var/lib/dpkg/status.d", "lib/apk/db"):
        (made / directory).mkdir(parents=True)
    (made / f"{SITE[1:]}/x-1.dist-info").mkdir(parents=True)
    (made / "node_modules/x").mkdir(parents=True)
    return made


@pytest.fixture(scope="module")
def root_fd(root: Path) -> Iterator[int]:
    fd = os.open(root, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CONTENT)
def test_database_of_any_content_is_read(root: Path, root_fd: int, content: bytes) -> None:
    places = (
        "status",
        "diversions",
        "info/p.list",
        "info/p.md5sums",
        "updates/0001",
        "status.d/p",
        "status.d/p.md5sums",
    )
    for place in places:
        (root / "var/lib/dpkg" / place).write_bytes(content)
    (root / "lib/apk/db/installed").write_bytes(content)
    for name in ("RECORD", "METADATA"):
        (root / f"{SITE[1:]}/x-1.dist-info" / name).write_bytes(content)
    (root / "node_modules/x/package.json").write_bytes(content)

    for records in (dpkg_records(root_fd), apk_records(root_fd)):
        assert all(record.name for record in records.values())
    for path in ("/lib/x.so", "/usr/lib/x.so", f"{SITE}/x.so"):
        with_index = DatabaseIndex()
        assert dpkg_listed(root_fd, [path]) == dpkg_listed(root_fd, [path], with_index)
        assert apk_listed(root_fd, [path]) == apk_listed(root_fd, [path], with_index)
        listed = dpkg_listed(root_fd, [path])[path]
        if listed is not None:
            dpkg_digest(root_fd, listed)
        wheels_listed(root_fd, [path])
    wheel_of(root_fd, Listed(f"{SITE}/x-1.dist-info", "x.so"))
    npm_package(root_fd, "/node_modules/x/x.so")


NAMES = st.text(st.sampled_from("ab1/@.+-_~ %?#:\u00e4"), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(NAMES, NAMES)
def test_whatever_a_database_says_becomes_a_package_url_or_nothing(
    root: Path, root_fd: int, name: str, version: str
) -> None:
    (root / "node_modules/x/package.json").write_text(json.dumps({"name": name, "version": version}))
    (root / f"{SITE[1:]}/x-1.dist-info/METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    (root / "var/lib/dpkg/status").write_text(f"Package: {name}\nVersion: {version}\nStatus: a b installed\n")
    (root / "lib/apk/db/installed").write_text(f"P:{name}\nV:{version}\n\n")
    npm = npm_package(root_fd, "/node_modules/x/x.so")
    wheel = wheel_of(root_fd, Listed(f"{SITE}/x-1.dist-info", "x.so"))
    release = Release("debian", "debian-12")

    made = [by_record(one, "dpkg", release) for one in dpkg_records(root_fd).values() if one.version]
    made += [by_record(one, "apk", release) for one in apk_records(root_fd).values() if one.version]
    made += [] if npm is None else [plain("npm", npm[0].rpartition("/")[0], npm[0].rpartition("/")[2], npm[1])]
    made += [] if wheel is None else [plain("pypi", "", *wheel)]

    for one in made:
        assert PackageURL.from_string(one.purl).version


@pytest.mark.parametrize("field", ["Package", "Version", "Source", "Architecture"])
def test_field_that_is_too_long_for_a_label_makes_no_record(root: Path, root_fd: int, field: str) -> None:
    fields = {"Package": "a", "Version": "1", "Source": "a", "Architecture": "amd64", "Status": "install ok installed"}
    text = "".join(f"{name}: {value}\n" for name, value in fields.items())
    (root / "lib/apk/db/installed").write_bytes(b"")
    (root / "var/lib/dpkg/status.d/p").unlink(missing_ok=True)
    (root / "var/lib/dpkg/updates/0001").unlink(missing_ok=True)
    (root / "var/lib/dpkg/status").write_text(text)
    assert len(dpkg_records(root_fd)) == 2
    fields[field] = "1" * 257
    text = "".join(f"{name}: {value}\n" for name, value in fields.items())
    (root / "var/lib/dpkg/status").write_text(text)

    assert dpkg_records(root_fd) == {}


def test_diversions_beyond_any_honest_number_do_not_count(root: Path, root_fd: int) -> None:
    lines = "".join(f"/usr/lib/{number}.so\n/usr/lib/{number}.diverted\nother\n" for number in range(12_000))
    (root / "var/lib/dpkg/diversions").write_text(lines)
    (root / "var/lib/dpkg/info/p.list").write_text("/usr/lib/7.so\n/usr/lib/11999.so\n")
    paths = ["/usr/lib/7.diverted", "/usr/lib/7.so", "/usr/lib/11999.diverted"]

    listed = dpkg_listed(root_fd, paths)

    (root / "var/lib/dpkg/diversions").write_bytes(b"")
    assert [one and one.package for one in listed.values()] == ["p", None, None]


def test_entry_of_the_journal_that_no_honest_one_is_as_large_as_is_passed_over(root: Path, root_fd: int) -> None:
    text = "Package: {}\nVersion: 1\nStatus: install ok installed\n{}"
    for number, more in enumerate(["", f"Description: {'x' * (1 << 20)}\n"], 1):
        (root / f"var/lib/dpkg/updates/000{number}").write_text(text.format(f"p{number}", more))
    (root / "var/lib/dpkg/status").write_bytes(b"")

    records = dpkg_records(root_fd)

    for number in (1, 2):
        (root / f"var/lib/dpkg/updates/000{number}").unlink()
    assert "p1" in records
    assert "p2" not in records


def test_search_ends_when_its_time_lines_or_bytes_are_used_up(root: Path, root_fd: int) -> None:
    (root / "var/lib/dpkg/info/p.list").write_text("/usr/lib/a.so\n" * 100)
    now_s = 0.0
    search = partial(dpkg_listed, root_fd, ["/usr/lib/a.so"])
    for limits in ({"lines": 99}, {"size_bytes": 500}):
        with within(LookBudget(1.0, **limits)), pytest.raises(BudgetError):
            search()
    late = LookBudget(1.0, clock=lambda: now_s)
    with within(late):
        assert search()["/usr/lib/a.so"] is not None
        now_s = 2.0
        with pytest.raises(BudgetError):
            search()
    assert search()["/usr/lib/a.so"] is not None


def test_index_finds_what_a_search_of_all_lists_finds(root: Path, root_fd: int) -> None:
    info = root / "var/lib/dpkg/info"
    (root / "var/lib/dpkg/diversions").write_bytes(b"")
    for number in range(30):
        (info / f"package{number}.list").write_text(f"/.\n/usr/lib/lib{number}.so\n/usr/lib/shared.so\n")
    paths = [f"/lib/lib{number}.so" for number in range(40)]
    index = DatabaseIndex()

    assert dpkg_listed(root_fd, paths, index) == dpkg_listed(root_fd, paths)
    (info / "package3.list-new").write_text("/usr/lib/other.so\n/usr/lib/lib35.so\n")
    (info / "package3.list-new").rename(info / "package3.list")
    again = dpkg_listed(root_fd, paths, index)

    assert again == dpkg_listed(root_fd, paths)
    assert again["/lib/lib3.so"] is None
    assert again["/lib/lib35.so"] is not None
