"""polling: what a row of ``/proc`` becomes, and how two sets of rows differ. Pure."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sowatch.bpf.records import FLAG_DELETED, path_of
from sowatch.engine.address_space import MappedFile, ProcessState
from sowatch.linux.proc_parse import MapRow
from sowatch.model.identity import FileId
from sowatch.sources.polling import Row, compare, file_of


def map_row(path: bytes, *, inode: int = 7, is_deleted: bool = False) -> MapRow:
    return MapRow(0x1000, 0x2000, "r-xp", 0, 254, 1, inode, path, is_deleted)


VIEW = bytes(range(16))


def name_of(row: MapRow, root: bytes = b"/") -> MappedFile:
    file = file_of(row, root, VIEW)
    from sowatch.bpf.records import MapRecord, RecordType
    from sowatch.model.rules import Rule, RuleSet

    record = MapRecord(
        0,
        RecordType.MAP,
        file.flags,
        1,
        1,
        1,
        1,
        0,
        0,
        file.key,
        0,
        1,
        0,
        0,
        0,
        b"",
        file.mode,
        len(file.text),
        file.text,
        file.key.file_id,
        file.key.view,
    )
    return MappedFile(record, RuleSet([Rule(None)]))


def test_a_row_becomes_the_name_that_the_kernel_side_would_give() -> None:
    name = name_of(map_row(b"/srv/jail/lib/libz.so.1"), b"/srv/jail")

    assert (name.path, name.file_id, name.view) == ("/lib/libz.so.1", FileId(254, 1, 7), VIEW)
    assert name.is_regular
    assert not name.is_deleted
    assert not name.is_anonymous


def kind_of(name: MappedFile) -> str:
    from sowatch.engine.address_space import Mapping as Mapped
    from sowatch.model.identity import ProcessId

    return ProcessState(ProcessId(1, 1), 0, lambda _: None).kind_of(Mapped(name, is_image=False))


@pytest.mark.parametrize(
    ("path", "is_deleted", "kind"),
    [
        (b"/memfd:jit/a b", True, "library"),
        (b"/SYSV00000000", True, "other"),
        (b"/dev/zero", True, "other"),
        (b"anon_inode:[perf_event]", False, "other"),
        (b"/opt/libx.so", True, "library"),
    ],
)
def test_what_is_no_file_on_disk_is_told_as_what_it_is(path: bytes, is_deleted: bool, kind: str) -> None:
    name = name_of(map_row(path, is_deleted=is_deleted))

    assert (name.path, name.is_deleted, kind_of(name)) == (path.decode(), is_deleted, kind)
    assert bool(file_of(map_row(path, is_deleted=is_deleted), b"/", VIEW).flags & FLAG_DELETED) == is_deleted


@given(st.binary(min_size=1).filter(lambda name: b"\0" not in name))
def test_any_path_survives(name: bytes) -> None:
    file = file_of(map_row(b"/lib/" + name), b"/", VIEW)

    assert path_of(file.text) == (b"/lib/" + name).decode("utf-8", "surrogateescape")
    assert file.key.file_id == FileId(254, 1, 7)


FILES = [file_of(map_row(b"/lib/%d" % number, inode=number), b"/", VIEW) for number in range(1, 4)]


@st.composite
def rows(draw: st.DrawFn) -> list[Row]:
    """Mappings by address that do not overlap."""
    cuts = sorted(draw(st.sets(st.integers(0, 24), max_size=12)))
    pairs = itertools.pairwise(cuts)
    chosen = draw(st.lists(st.sampled_from([None, *FILES]), min_size=len(cuts), max_size=len(cuts)))
    return [Row(start, end, 0, file) for (start, end), file in zip(pairs, chosen, strict=False) if file is not None]


@given(rows(), rows())
def test_what_differs_turns_one_set_of_mappings_into_the_other(before: list[Row], after: list[Row]) -> None:
    added, gone = compare(before, after)

    pages = {page: row.file for row in before for page in range(row.start, row.end)}
    for row in added:
        pages.update(dict.fromkeys(range(row.start, row.end), row.file))
    for start, end in gone:
        for page in range(start, end):
            del pages[page]  # each once, and none that was not there
    assert pages == {page: row.file for row in after for page in range(row.start, row.end)}
    assert all(end <= row.start or start >= row.end for start, end in gone for row in after)


@given(rows())
def test_nothing_differs_from_itself(before: list[Row]) -> None:
    assert compare(before, before) == ([], [])
