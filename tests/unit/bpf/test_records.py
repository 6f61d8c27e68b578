"""Records: what the parser reads is what the C structs hold, for every type, size and order."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sowatch.bpf import records as wire
from sowatch.bpf.records import MapRecord, ProcessRecord, RangeRecord, RecordType, file_id_of, parse, path_of
from sowatch.model.identity import FileId
from sowatch.sources.scan_rows import group
from support.records import File, Proc, key_of, text_of, to_bytes

HEADER = Path(wire.__file__).with_name("programs") / "records.h"

#: Writes one of each struct, every field another number, the way the programs do.
WRITER = r"""
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include "records.h"

static struct record head(int type, int size)
{
    struct record h = { .size = size, .type = type, .flags = FLAG_ASK | FLAG_IMAGE, .tgid = 11, .tid = 12,
            .start_ns = 13ull << 40, .t_ns = 14ull << 40, .exec_id = 15, .activity = 16 };
    return h;
}

int main(void)
{
    struct file_id id = { .inode = 21ull << 33, .subvolume = 22, .dev = 254u << 20 | 3, .generation = 24 };
    struct file_key key = { .file = id, .dentry = 31, .mnt = 32, .root_dentry = 33, .root_mnt = 34,
                .name_hash = 35, .epoch = 36 };
    struct record visit = head(RECORD_SCAN, sizeof(visit));
    struct range_record range = { .head = head(RECORD_RANGE, sizeof(range)), .start = 41ull << 33, .end = 42ull << 33 };
    struct map_record map = { .head = head(RECORD_MAP, sizeof(map) + 8), .key = key, .start = 51ull << 33,
                .end = 52ull << 33, .offset_bytes = 53ull << 33, .changed_ns = 54ull << 33, .place = 55ull << 33,
                .comm = "thread",
                .mode = 0100755, .path_bytes = 6 };
    struct process_record process = { .head = head(RECORD_FORK, sizeof(process) + 16), .parent_start_ns = 61ull << 33,
                    .parent_tgid = 62, .ppid = 63, .uid = 64, .ns_pid = 65, .exe = id,
                    .interpreter_base = 66ull << 33, .root_dentry = 67, .root_mnt = 68,
                    .reserved = { ~0ull, ~0ull, ~0ull, ~0ull }, .comm = "main", .cgroup_bytes = 4,
                    .path_bytes = 7 };

    int size = offsetof(struct rows_record, rows) + 2 * sizeof(struct row);
    struct rows_record rows = { .head = head(RECORD_ROWS, size), .comm = "main", .count = 2, .rows = {
        { .start = 71ull << 33, .end = 72ull << 33, .offset_bytes = 73ull << 33, .file = 74, .flags = 75 },
        { .start = 81ull << 33, .end = 82ull << 33, .offset_bytes = 83ull << 33, .file = 84, .flags = 85 } } };

    fwrite(&visit, sizeof(visit), 1, stdout);
    fwrite(&range, sizeof(range), 1, stdout);
    fwrite(&map, sizeof(map), 1, stdout);
    fwrite("so\0us\0\0\0", 8, 1, stdout);
    fwrite(&process, sizeof(process), 1, stdout);
    fwrite("x.s\0exe\0us\0\0\0\0\0\0", 16, 1, stdout);
    fwrite(&rows, size, 1, stdout);
    return 0;
}
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("records")
    source = directory / "writer.c"
    source.write_text(WRITER)
    program = directory / "writer"
    command = ["cc", "-Wall", "-Wextra", "-Werror", "-I", HEADER.parent, "-o", program, source]
    subprocess.run(command, check=True)
    return parse(subprocess.run([program], check=True, stdout=subprocess.PIPE).stdout)


HEAD = (wire.FLAG_ASK | wire.FLAG_IMAGE, 11, 12, 13 << 40, 14 << 40, 15, 16)
KEY = struct.pack("=QQIIQQQQII", 21 << 33, 22, 254 << 20 | 3, 24, 31, 32, 33, 34, 35, 36)


def test_c_and_python_agree_on_the_bare_head(written):
    assert written[0] == RangeRecord(40, RecordType.SCAN, *HEAD, 0, 0)


def test_c_and_python_agree_on_a_range_record(written):
    assert written[1] == RangeRecord(56, RecordType.RANGE, *HEAD, 41 << 33, 42 << 33)


def test_c_and_python_agree_on_a_map_record(written):
    text = b"so\0us\0"
    comm = b"thread".ljust(16, b"\0")
    expected = MapRecord(
        *(176, RecordType.MAP, *HEAD, KEY, 51 << 33, 52 << 33, 53 << 33, 54 << 33, 55 << 33, comm, 0o100755, 6, text),
        FileId(254, 3, 21 << 33, 24, 22),
        KEY[40:56],
    )
    assert written[2] == expected


def test_c_and_python_agree_on_a_process_record(written):
    root = struct.pack("=QQ", 67, 68)
    comm = b"main".ljust(16, b"\0")
    expected = ProcessRecord(
        *(184, RecordType.FORK, *HEAD),
        *(
            61 << 33,
            62,
            63,
            64,
            65,
            FileId(254, 3, 21 << 33, 24, 22),
            66 << 33,
            root,
            comm,
            4,
            7,
            b"x.s\0",
            b"exe\0us\0",
        ),
    )
    assert written[3] == expected


def test_c_and_python_agree_on_rows(written):
    rows = written[4]
    assert rows[:-1] == (128, RecordType.ROWS, *HEAD, b"main".ljust(16, b"\0"), 2, 0)
    assert list(wire.ROW.iter_unpack(rows.rows)) == [
        (71 << 33, 72 << 33, 73 << 33, 74, 75),
        (81 << 33, 82 << 33, 83 << 33, 84, 85),
    ]


def test_c_and_python_agree_on_where_the_root_stands_in_a_key(written):
    assert written[2].key[wire.ROOT] == struct.pack("=QQ", 33, 34)


def test_c_and_python_agree_on_the_numbers():
    text = HEADER.read_text()
    for name in ("MAP", "RANGE", "NEEDS_RESCAN", "FORK", "EXEC", "EXIT", "INTRO", "SCAN", "FILE", "ROWS"):
        assert f"RECORD_{name} = {getattr(RecordType, name)}," in text
    for name in ("ASK", "NEEDS_RESCAN", "DELETED", "PARTIAL", "SHARED_VM", "MPROTECT", "IMAGE", "COMPAT"):
        bit = getattr(wire, f"FLAG_{name}").bit_length() - 1
        assert f"FLAG_{name} = 1 << {bit}," in text


def test_nothing_parses_to_nothing():
    assert parse(b"") == []


P = Proc(4242)
ONE_OF_EACH = [
    P.visit(t=1),
    P.intro(t=2),
    P.map(File(), 0x7F0000001000, 0x7F0000005000, t=3, flags=wire.FLAG_ASK),
    P.range(0x7F0000001000, 0x7F0000002000, t=4),
    P.needs_rescan(t=5),
    P.fork(Proc(4243), t=6, flags=wire.FLAG_SHARED_VM),
    P.exec(t=7, with_exe=True),
    P.exit(t=8),
    P.file(1, File()),
    P.rows((1, wire.FLAG_ASK, 0x7F0000001000, 0x7F0000005000), (2, 0, 0x7F0000006000, 0x7F0000007000), t=9),
]


@pytest.mark.parametrize("record", ONE_OF_EACH, ids=lambda record: type(record).__name__ + str(record.type))
def test_a_record_survives_the_ring(record):
    assert parse(to_bytes(record)) == [record]


def test_records_behind_each_other_keep_their_order_and_their_text():
    data = b"".join(map(to_bytes, ONE_OF_EACH))
    assert parse(data) == ONE_OF_EACH


components = st.binary(min_size=1, max_size=40).filter(lambda name: not {0, ord("/")} & set(name) and name != b".")


@settings(max_examples=100, derandomize=True)
@given(st.lists(components, min_size=1, max_size=60))
def test_any_path_survives_with_every_byte_of_it(parts):
    path = "/" + b"/".join(parts).decode("utf-8", "surrogateescape")
    (record,) = parse(to_bytes(P.map(File(path))))
    assert path_of(record.text) == path
    assert path_of(record.text).encode("utf-8", "surrogateescape") == b"/" + b"/".join(parts)
    assert wire.text_of(b"/" + b"/".join(parts), is_deleted=False) == record.text


@pytest.mark.parametrize("path", [b"/memfd:jit code/1", b"/SYSV00000000", b"/dev/zero"])
def test_what_the_kernel_names_is_one_component_whatever_slashes_it_holds(path):
    assert wire.text_of(path, is_deleted=True) == path[1:] + b"\0"
    assert wire.text_of(path, is_deleted=False) == text_of(path.decode())
    assert path_of(wire.text_of(path, is_deleted=True)) == path.decode()


@settings(max_examples=100, derandomize=True)
@given(st.lists(st.sampled_from(ONE_OF_EACH), max_size=20), st.text("ab/", max_size=30))
def test_text_of_any_length_never_shifts_what_follows(records, path):
    between = P.map(File(f"/{path}"))
    data = b"".join(map(to_bytes, [*records, between, *records]))
    assert parse(data) == [*records, between, *records]


def test_an_empty_text_is_no_path_component():
    assert text_of("/") == wire.text_of(b"/", is_deleted=False) == b""
    assert parse(to_bytes(P.map(File("/")))) == [P.map(File("/"))]


def test_file_id_takes_the_kernels_dev_apart():
    assert file_id_of(key_of(7, dev=(8, 1), generation=9, subvolume=256)) == FileId(8, 1, 7, 9, 256)


def test_file_id_keeps_a_minor_of_20_bits():
    assert file_id_of(key_of(7, dev=(4095, 0xFFFFF))) == FileId(4095, 0xFFFFF, 7, 1, 0)


def test_file_id_of_a_bare_struct_file_id_is_the_same():
    assert file_id_of(key_of(7)[:24]) == file_id_of(key_of(7))


# ---- what the iterator wrote, sorted into readings ----------------------------------------------


def test_rows_become_one_reading_a_process():
    a, b = Proc(1), Proc(2)
    intro = a.intro(t=11)
    rows = [a.visit(t=10), intro, a.map(File(), t=12), b.visit(t=13), b.map(File(), t=14), b.map(File(), 0x9000, t=15)]
    first, second = group(rows)
    assert (first.tgid, first.begin_ns, first.end_ns) == (1, 10, 12)
    assert (first.intro, first.maps) == (intro, [rows[2]])
    assert (second.tgid, second.begin_ns, second.end_ns) == (2, 13, 15)
    assert (second.intro, second.maps) == (None, [rows[4], rows[5]])


def test_a_visit_without_rows_is_an_empty_reading():
    (found,) = group([Proc(1).visit(t=10)])
    assert (found.tgid, found.start_ns, found.begin_ns, found.end_ns) == (1, Proc(1).start_ns, 10, 10)
    assert (found.intro, found.maps) == (None, [])


def test_a_process_met_twice_keeps_both_looks_at_it():
    a, b = Proc(1), Proc(2)
    rows = [a.map(File(), t=10), b.map(File(), t=11), a.map(File(inode=5), t=12)]
    assert [one.tgid for one in group(rows)] == [1, 2]
    assert group(rows)[0].maps == [rows[0], rows[2]]
