"""The three views of one layout: records.h, records.py, and the running kernel's own types."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import sowatch.bpf
from sowatch.bpf import records
from sowatch.sources import core as sources

PROGRAMS = Path(sowatch.bpf.__file__).parent / "programs"

#: Field of the C struct: field of the tuple. What is in brackets the tuple takes as bytes, unread.
HEAD = {
    "size": "size",
    "type": "type",
    "flags": "flags",
    "tgid": "tgid",
    "tid": "tid",
    "start_ns": "start_ns",
    "t_ns": "t_ns",
    "exec_id": "exec_id",
    "activity": "activity",
}


def ask_compiler(tmp_path: Path, questions: dict[str, str]) -> dict[str, int]:
    """What integer expressions come to in C, with records.h included."""
    lines = "".join(f'\tprintf("%s %lld\\n", "{name}", (long long)({text}));\n' for name, text in questions.items())
    source = tmp_path / "ask.c"
    source.write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "records.h"\nint main(void)\n{{\n{lines}}}\n',
        encoding="utf-8",
    )
    subprocess.run(["cc", f"-I{PROGRAMS}", "-o", tmp_path / "ask", source], check=True)
    answers = subprocess.run([tmp_path / "ask"], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.split() for line in answers.splitlines())}


def offsets_in_python(layout: Any, names: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Where a `struct.Struct` has its fields, and their sizes, by the names of the tuple made of it."""
    codes = re.findall(r"(\d*)([a-zA-Z])", layout.format.lstrip("=<"))
    sizes = {"I": 4, "H": 2, "Q": 8}
    found: dict[str, tuple[int, int]] = {}
    at = 0
    waiting = iter(names)
    for count, code in codes:
        number = int(count or 1)
        if code == "x":
            at += number
        elif code == "s":
            found[next(waiting)] = (at, number)
            at += number
        else:
            for _ in range(number):
                found[next(waiting)] = (at, sizes[code])
                at += sizes[code]
    assert at == layout.size
    return found


def check_layout(
    tmp_path: Path, struct: str, layout: Any, names: tuple[str, ...], fields: dict[str, tuple[str, str]]
) -> None:
    """Compares; ``fields`` gives for each name of the tuple the C field it begins at and the C text of its size."""
    found = offsets_in_python(layout, names)
    questions = {"whole": f"sizeof(struct {struct})"}
    for name in found:
        field, size = fields[name]
        questions[f"{name}.offset"] = f"offsetof(struct {struct}, {field})"
        questions[f"{name}.size"] = size or f"sizeof(((struct {struct} *)0)->{field})"
    reported = ask_compiler(tmp_path, questions)
    assert layout.size == reported.pop("whole")
    assert {name: (reported[f"{name}.offset"], reported[f"{name}.size"]) for name in found} == found


def plain(names: tuple[str, ...], head: str = "head.") -> dict[str, tuple[str, str]]:
    """The fields that have one name on both sides."""
    return {name: (f"{head}{name}" if name in HEAD else name, "") for name in names}


def test_the_head_of_a_record_is_the_same_in_c_and_in_python(tmp_path: Path) -> None:
    names = tuple(HEAD)
    assert records.RangeRecord._fields[: len(names)] == names
    check_layout(tmp_path, "record", records.HEAD, names, plain(names, head=""))


def test_a_range_record_is_the_same_in_c_and_in_python(tmp_path: Path) -> None:
    names = records.RangeRecord._fields
    check_layout(tmp_path, "range_record", records.RANGE, names, plain(names))


def test_a_map_record_is_the_same_in_c_and_in_python(tmp_path: Path) -> None:
    names = records.MapRecord._fields[:-3]
    check_layout(tmp_path, "map_record", records.MAP, names, plain(names))


def test_a_process_record_is_the_same_in_c_and_in_python(tmp_path: Path) -> None:
    names = records.ProcessRecord._fields[:-2]
    fields = plain(names) | {"root": ("root_dentry", "2 * sizeof(__u64)")}
    check_layout(tmp_path, "process_record", records.PROCESS, names, fields)


def test_a_file_id_and_the_root_in_a_file_key_stand_where_python_looks(tmp_path: Path) -> None:
    names = ("inode", "subvolume", "dev", "generation")
    check_layout(tmp_path, "file_id", records.FILE_ID, names, plain(names))
    reported = ask_compiler(
        tmp_path,
        {
            "file": "offsetof(struct file_key, file)",
            "begin": "offsetof(struct file_key, root_dentry)",
            "end": "offsetof(struct file_key, root_mnt) + sizeof(__u64)",
            "key": "sizeof(struct file_key)",
            "verdict": "sizeof(struct verdict_value)",
        },
    )
    assert reported["file"] == 0
    assert slice(reported["begin"], reported["end"]) == records.ROOT
    assert reported["key"] == 64
    assert reported["verdict"] == sources.VERDICT_VALUE.size


def test_both_long_records_are_of_one_size_so_that_their_text_follows_at_once(tmp_path: Path) -> None:
    reported = ask_compiler(tmp_path, {"map": "sizeof(struct map_record)", "process": "sizeof(struct process_record)"})
    assert reported["map"] == reported["process"] == records.MAP.size == records.PROCESS.size


def test_every_number_that_has_a_name_has_the_same_in_c_and_in_python(tmp_path: Path) -> None:
    expected = {f"RECORD_{name}": value for name, value in vars(records.RecordType).items() if name.isupper()}
    expected |= {name: getattr(records, name) for name in dir(records) if name.startswith("FLAG_")}
    expected |= {f"REPORT_{bit.name}": int(bit) for bit in sources.Report}
    expected |= {
        "VERDICT_MATCH": sources.VERDICT_MATCH,
        "VERDICT_IGNORE": sources.VERDICT_IGNORE,
        "LOST_RING": sources.LOST[sources.Losses._fields.index("ring")],
        "LOST_PROCESSES": sources.LOST[sources.Losses._fields.index("processes")],
        "LOST_PENDING": sources.LOST[sources.Losses._fields.index("pending")],
        "LOST_SCRATCH": sources.LOST[sources.Losses._fields.index("scratch")],
        "LOST_THROTTLED": sources.LOST[sources.Losses._fields.index("throttled")],
    }
    assert ask_compiler(tmp_path, {name: name for name in expected}) == expected


def test_every_record_type_and_flag_of_the_header_is_known_to_python() -> None:
    header = (PROGRAMS / "records.h").read_text(encoding="utf-8")
    types = set(re.findall(r"^\tRECORD_(\w+) =", header, re.MULTILINE))
    flags = set(re.findall(r"^\t(FLAG_\w+) =", header, re.MULTILINE))
    assert types == {name for name in vars(records.RecordType) if name.isupper()}
    assert flags == {name for name in dir(records) if name.startswith("FLAG_")}


# ---- kernel_types.h ---------------------------------------------------------------------------

#: Types that only some kernels have, and the field names of other kernels; each program that reads
#: them asks first (bpf_core_type_exists, bpf_core_field_exists).
OPTIONAL_TYPES = {"backing_file", "ovl_file", "btrfs_key", "btrfs_root", "btrfs_inode"}
CTIMES = {"i_ctime_sec", "i_ctime_nsec", "__i_ctime", "i_ctime"}
OPTIONAL_FIELDS = {
    ("kernfs_node", "__parent"),
    ("kernfs_node", "parent"),
    ("task_struct", "__state"),
    ("task_struct", "state"),
    *(("inode", name) for name in CTIMES),
}
#: Ours, not the kernel's: see the end of kernel_types.h.
OWN_TYPES = {"syscall_enter", "syscall_exit"}


def declared() -> dict[str, set[str]]:
    """The structs of kernel_types.h and the fields they name."""
    text = (PROGRAMS / "kernel_types.h").read_text(encoding="utf-8")
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    found: dict[str, set[str]] = {}
    for name, body in re.findall(r"^struct (\w+) \{\n(.*?)^\};", text, re.MULTILINE | re.DOTALL):
        if name not in OWN_TYPES:
            fields = re.findall(r"(\w+)(?:\[\d+\]| : \d+)?;", body)
            found.setdefault(name.partition("___")[0], set()).update(fields)
    return found


#: Registers have other names on other machines.
OTHER_MACHINES = (
    {("pt_regs", "regs")}
    if platform.machine() == "x86_64"
    else {("pt_regs", name) for name in ("di", "si", "dx", "r10", "r8", "r9", "bx", "cx", "orig_ax")}
    | {("thread_info", "status")}
)


@pytest.fixture(scope="module")
def kernel_fields() -> dict[str, set[str]]:
    """Field names of every struct of the running kernel, those of nameless members included."""
    if shutil.which("bpftool") is None:
        pytest.skip("bpftool is not installed; it reads the kernel's BTF")
    said = subprocess.run(
        ["bpftool", "-j", "btf", "dump", "file", "/sys/kernel/btf/vmlinux"], check=True, capture_output=True
    )
    types = {entry["id"]: entry for entry in json.loads(said.stdout)["types"]}

    def names(entry: dict[str, Any]) -> set[str]:
        found: set[str] = set()
        for member in entry["members"]:
            if member["name"] != "(anon)":
                found.add(member["name"])
                continue
            inner = types[member["type_id"]]
            while inner["kind"] in ("CONST", "VOLATILE", "TYPE_TAG"):
                inner = types[inner["type_id"]]
            found |= names(inner)
        return found

    result: dict[str, set[str]] = {}
    for entry in types.values():
        if entry["kind"] == "STRUCT" and entry["name"] != "(anon)":
            result.setdefault(entry["name"], set()).update(names(entry))
    return result


def test_every_kernel_field_that_a_program_reads_exists_in_the_running_kernel(
    kernel_fields: dict[str, set[str]],
) -> None:
    missing = [
        f"{name}.{field}"
        for name, fields in declared().items()
        if name not in OPTIONAL_TYPES or name in kernel_fields
        for field in fields
        if field not in kernel_fields.get(name, set()) and (name, field) not in OPTIONAL_FIELDS | OTHER_MACHINES
    ]
    assert missing == []
    assert kernel_fields["kernfs_node"] & {"__parent", "parent"}
    assert kernel_fields["inode"] & CTIMES
    assert kernel_fields["task_struct"] & {"__state", "state"}


def test_the_check_of_kernel_fields_reads_the_header(kernel_fields: dict[str, set[str]]) -> None:
    found = declared()
    assert {"d_hash", "d_parent", "d_name"} <= found["dentry"]
    assert {"hash", "len", "hash_len", "name"} <= found["qstr"]
    assert {"saved_auxv", "exe_file"} <= found["mm_struct"]
    assert "hash" in kernel_fields["qstr"]  # in a nameless struct in a nameless union
