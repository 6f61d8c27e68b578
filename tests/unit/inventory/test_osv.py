"""Reading advisories of OSV: directories, archives, and files that nobody who means well has written."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sowatch.inventory import osv
from sowatch.inventory.osv import OsvData, load_osv, state_of
from sowatch.model.errors import SowatchError
from support.advisories import advisory, write_tree, write_zip


def ids(data: OsvData, ecosystem: str = "Debian", name: str = "lamp") -> list[str]:
    return [one.id for one in data.of_package(ecosystem, [name])]


def test_files_directories_and_archives_are_read_alike(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree" / "deep" / "er", [advisory("A-1", ranges="introduced 0")])
    # osv-scanner keeps one archive for each ecosystem.
    scanner = write_zip(tmp_path / "osv-scanner" / "Debian" / "all.zip", [advisory("A-2", ranges="introduced 0")])
    other = write_zip(tmp_path / "other.ZIP", [advisory("A-3", ranges="introduced 0")])
    (tmp_path / "tree" / "README.md").write_text("not an advisory")

    data = load_osv([str(tmp_path / "tree"), str(tmp_path / "osv-scanner"), str(other)])
    assert ids(data) == ["A-1", "A-2", "A-3"]
    assert (len(data), data.problems, data.others) == (3, [], 0)
    assert ids(load_osv([str(next(tree.iterdir()))])) == ["A-1"]
    assert ids(load_osv([str(scanner)])) == ["A-2"]


def test_everything_an_answer_needs_is_kept(tmp_path: Path) -> None:
    one = advisory(
        "A-1",
        affected=[
            {
                "package": {"ecosystem": "Debian:12", "name": "lamp", "purl": "pkg:deb/debian/lamp?arch=source"},
                "ranges": [
                    {"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "2"}, {"limit": "9"}]},
                    {"type": "SEMVER", "events": [{"introduced": "1.0.0"}, {"last_affected": "1.9.0"}]},
                    {"type": "GIT", "repo": "https://vendor.example/x", "events": [{"introduced": "0"}]},
                ],
                "versions": ["1.1", "1.2"],
                "ecosystem_specific": {"urgency": "low", "binaries": [{"x": 1}]},
            }
        ],
        aliases=["CVE-1900-0001"],
        summary="A lamp burns",
        severity=[{"type": "CVSS_V3", "score": "CVSS:3.1/AV:N"}, {"type": "CVSS_V4", "score": "CVSS:4.0/AV:N"}],
    )
    (found,) = load_osv([str(write_tree(tmp_path / "d", [one]))]).of_package("Debian", ["lamp"])
    assert found.names == ("A-1", "CVE-1900-0001")
    assert (found.summary, found.severity) == ("A lamp burns", "CVSS:4.0/AV:N")
    (package,) = found.packages
    assert package.ranges == (
        (False, (("introduced", "0"), ("fixed", "2"), ("limit", "9"))),
        (True, (("introduced", "1.0.0"), ("last_affected", "1.9.0"))),
    )
    assert (package.versions, package.has_commits) == (("1.1", "1.2"), True)


@pytest.mark.parametrize(
    ("further", "severity"),
    [
        ({"database_specific": {"severity": "HIGH"}, "severity": [{"type": "CVSS_V3", "score": "CVSS:3.1/X"}]}, "high"),
        ({"severity": [{"type": "Ubuntu", "score": "medium"}]}, "medium"),
        ({"database_specific": ["anything"]}, None),
        ({"severity": None}, None),
    ],
)
def test_the_severity_is_a_word_where_there_is_one(tmp_path: Path, further: dict[str, object], severity: str) -> None:
    one = advisory("A-1", ranges="introduced 0", **further)
    data = load_osv([str(write_tree(tmp_path / "d", [one]))])
    assert [found.severity for found in data.of_package("Debian", ["lamp"])] == [severity]
    assert data.is_complete


def test_of_two_with_one_id_the_one_that_was_changed_last_counts(tmp_path: Path) -> None:
    old = advisory("A-1", package="lamp", ranges="introduced 0", modified="2026-01-01T00:00:00Z")
    new = advisory("A-1", package="torch", ranges="introduced 0", modified="2026-01-02T00:00:00Z")
    for order in ([old, new], [new, old]):
        place = str(write_tree(tmp_path / str(order[0]["modified"]), order))
        data = load_osv([place])
        assert (len(data), ids(data, name="torch"), data.newest) == (1, ["A-1"], "2026-01-02T00:00:00Z")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("2026-01-01T23:00:00Z", "2026-01-01T20:00:00-05:00"),
        ("2026-01-02T00:30:00+02:00", "2026-01-01T23:00:00Z"),
        ("2026-01-02T00:00:00Z", "2026-01-02T00:00:00.5Z"),
        ("yesterday", "2026-01-02T00:00:00Z"),
    ],
)
def test_the_last_one_is_that_by_time_not_by_text(tmp_path: Path, before: str, after: str) -> None:
    old = advisory("A-1", package="lamp", ranges="introduced 0", modified=before)
    new = advisory("A-1", package="torch", ranges="introduced 0", modified=after)
    for number, order in enumerate(([old, new], [new, old])):
        data = load_osv([str(write_tree(tmp_path / str(number), order))])
        assert [[about.name for about in one.packages] for one in data.named("A-1")] == [["torch"]]
        assert data.newest == after
        assert [one.packages[0].name for one in data.named("A-1")] == ["torch"]


def test_what_was_withdrawn_is_left_out_whatever_is_read_first(tmp_path: Path) -> None:
    old = advisory("A-1", ranges="introduced 0", modified="2026-01-01T00:00:00Z")
    gone = old | {"modified": "2026-01-03T00:00:00Z", "withdrawn": "2026-01-03T00:00:00Z"}
    for number, order in enumerate(([old, gone], [gone, old])):
        data = load_osv([str(write_tree(tmp_path / str(number), order))])
        assert (len(data), data.withdrawn) == (0, 1)
        assert [one.packages for one in data.of_package("Debian", ["lamp"])] in ([], [()])


def test_an_advisory_is_found_by_every_id_it_has(tmp_path: Path) -> None:
    data = load_osv(
        [
            str(
                write_tree(
                    tmp_path / "d",
                    [
                        advisory("A-1", ranges="introduced 0", aliases=["CVE-1900-0001"], related=["CVE-1900-0009"]),
                        advisory("A-2", ranges="introduced 0", upstream=["CVE-1900-0001", "CVE-1900-0002"]),
                        # As it was before there was a field for what is upstream.
                        advisory("A-3", ranges="introduced 0", related=["CVE-1900-0003"]),
                    ],
                )
            )
        ]
    )

    def named(name: str) -> list[str]:
        return sorted(one.id for one in data.named(name))

    assert named("cve-1900-0001") == ["A-1", "A-2"]
    assert (named("CVE-1900-0002"), named("CVE-1900-0003"), named("CVE-1900-0009")) == (["A-2"], ["A-3"], [])


# ---- what is not well meant -------------------------------------------------------------------


def problems(place: Path, wanted: str) -> OsvData:
    data = load_osv([str(place)])
    assert not data.is_complete
    assert wanted in " ".join(data.problems)
    return data


def test_a_place_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SowatchError, match="there is no"):
        load_osv([str(tmp_path / "nowhere")])


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "{",
            "[]",
            "1",
            '{"id": 1}',
            '{"id": "A", "affected": 1}',
            '{"id": "A", "affected": [{"versions": [1]}]}',
        ),
        *('{"id": "\\ud800", "affected": []}', "\xff", '{"id": "A", "affected": ' + "[" * 100_000),
    ],
)
def test_a_file_that_is_no_advisory_spoils_no_other(tmp_path: Path, text: str) -> None:
    write_tree(tmp_path / "d", [advisory("A-1", ranges="introduced 0")])
    (tmp_path / "d" / "bad.json").write_bytes(text.encode("latin-1"))
    data = problems(tmp_path / "d", "bad.json")
    assert ids(data) == ["A-1"]


def test_json_of_something_else_is_counted_and_no_problem(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('{"name": "x", "id": "y"}')
    data = load_osv([str(tmp_path)])
    assert (data.others, data.is_complete) == (1, True)


def test_an_archive_that_unpacks_to_much_more_than_text_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "all.zip", [advisory("A-1", ranges="introduced 0")])
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.json", b"0" * (40 << 20))
    assert ids(problems(path, "unpacks to more than any text")) == ["A-1"]


def test_an_entry_that_lies_about_its_size_is_not_read_beyond_it(tmp_path: Path) -> None:
    path = tmp_path / "all.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.json", b"0" * (8 << 20))
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    struct.pack_into("<I", data, at + 24, 100)  # the size that it is said to unpack to
    path.write_bytes(data)
    problems(path, "bomb.json")


def test_what_all_entries_unpack_to_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(osv, "MAX_UNPACKED_BYTES", 2_000)
    path = write_zip(tmp_path / "all.zip", [advisory(f"A-{number}", ranges="introduced 0") for number in range(100)])
    with pytest.raises(SowatchError, match="Name fewer ecosystems"):
        load_osv([str(path)])


def test_what_is_kept_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = str(write_tree(tmp_path, [advisory(f"A-{number}", ranges="introduced 0") for number in range(9)]))
    monkeypatch.setattr(osv, "MAX_RECORDS", 5)
    with pytest.raises(SowatchError, match="more than 5 advisories"):
        load_osv([place])
    monkeypatch.undo()
    monkeypatch.setattr(osv, "MAX_KEPT_BYTES", 300)
    with pytest.raises(SowatchError, match="Name fewer ecosystems"):
        load_osv([place])


def test_a_huge_table_of_contents_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_zip(tmp_path / "all.zip", [advisory(f"A-{number}", ranges="introduced 0") for number in range(2_000)])
    monkeypatch.setattr(osv, "_MAX_DIRECTORY_BYTES", 70_000)
    problems(path, "its table of contents is larger")


def test_an_entry_that_is_encrypted_or_packed_otherwise_spoils_no_other(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "all.zip", [advisory("A-1", ranges="introduced 0"), advisory("A-2")])
    with zipfile.ZipFile(path, "a", zipfile.ZIP_LZMA) as archive:
        archive.writestr("lzma.json", json.dumps(advisory("A-3")))
    data = bytearray(path.read_bytes())
    for place in (data.index(b"A-2.json"), data.rindex(b"A-2.json")):
        flags = place - (30 - 6 if place < len(data) // 2 else 46 - 8)
        data[flags] |= 1
    path.write_bytes(data)
    found = problems(path, "A-2.json")
    assert ids(found) == ["A-1"]
    assert "lzma.json" in " ".join(found.problems)


def test_an_archive_with_names_that_are_no_text_spoils_no_other(tmp_path: Path) -> None:
    write_zip(tmp_path / "1.zip", [advisory("A-1", ranges="introduced 0")])
    path = write_zip(tmp_path / "2.zip", [advisory("A-é", ranges="introduced 0")])
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xff\xff"))
    assert ids(problems(tmp_path, "2.zip")) == ["A-1"]


def test_names_in_an_archive_lead_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "d" / "all.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../outside.json", json.dumps(advisory("A-1", ranges="introduced 0")))
    assert ids(load_osv([str(path)])) == ["A-1"]
    assert sorted(tmp_path.rglob("*")) == [path.parent, path]


def test_neither_a_fifo_nor_a_loop_of_links_is_waited_for(tmp_path: Path) -> None:
    write_tree(tmp_path, [advisory("A-1", ranges="introduced 0")])
    os.mkfifo(tmp_path / "fifo.json")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "self.json").symlink_to(tmp_path / "self.json")
    data = problems(tmp_path, "fifo.json: it is not a regular file")
    assert ids(data) == ["A-1"]
    assert len(data.problems) == 2


def test_only_the_first_problems_are_named(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.json").write_text("{")
    data = load_osv([str(tmp_path)])
    assert (len(data.problems), data.problems[-1]) == (6, "15 more could not be read")


@given(st.binary(max_size=300))
def test_no_archive_raises(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("zip") / "x.zip"
    path.write_bytes(data)
    load_osv([str(path)])


@given(
    st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda one: st.lists(one, max_size=3), max_leaves=5)
)
def test_no_value_of_a_field_raises(value: object) -> None:
    for key in ("id", "modified", "affected", "aliases", "severity", "database_specific", "withdrawn"):
        OsvData().add(json.dumps(advisory("A-1", ranges="introduced 0") | {key: value}).encode(), "x")


def test_a_load_can_be_given_up(tmp_path: Path) -> None:
    place = write_zip(tmp_path / "all.zip", [advisory(f"A-{number}", ranges="introduced 0") for number in range(500)])

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_osv([str(place)], stop)


def test_the_state_is_another_one_when_a_file_has_changed(tmp_path: Path) -> None:
    place = write_tree(tmp_path / "d", [advisory("A-1", ranges="introduced 0")])
    before = state_of([str(place), str(tmp_path / "nowhere")])
    assert state_of([str(place), str(tmp_path / "nowhere")]) == before
    write_tree(place / "more", [advisory("A-2", ranges="introduced 0")])
    assert state_of([str(place), str(tmp_path / "nowhere")]) != before
