"""What the kernel side remembers of processes and files, and how it is read."""

from __future__ import annotations

import errno
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sowatch.bpf
from sowatch import Watcher
from sowatch.model.config import Config
from sowatch.model.errors import BpfError
from sowatch.model.identity import FileId
from sowatch.sources.core import FILE_KEY, PROCESS_HEAD, PROCESS_TAIL, VERDICT_VALUE, BpfSource
from sowatch.sources.prebuilt import SEEN, PrebuiltSource
from support.asked import OTHER, WANTED, NewLibrary, Start, pages, process

PROGRAMS = Path(sowatch.bpf.__file__).parent / "programs"


def test_a_process_entry_and_a_file_key_are_the_same_in_c_and_in_python(tmp_path: Path) -> None:
    text = (PROGRAMS / "state.bpf.h").read_text(encoding="utf-8")
    (limit,) = re.findall(r"^#define MAX_RANGES \d+$", text, re.MULTILINE)
    (entry,) = re.findall(r"^struct process \{\n.*?^\};", text, re.MULTILINE | re.DOTALL)
    fields = ["start_ns", "range_count", "dirty", "introduced", "shares_vm", "activity", "ranges"]
    questions = [f"offsetof(struct process, {name})" for name in fields]
    questions += ["sizeof(struct process)", "sizeof(struct file_key)", "offsetof(struct file_key, epoch)"]
    lines = "".join(f'printf("%zu\\n", {question});\n' for question in questions)
    (tmp_path / "ask.c").write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "records.h"\n'
        f"{limit}\n{entry}\nint main(void) {{ {lines} }}\n",
        encoding="utf-8",
    )
    subprocess.run(["cc", f"-I{PROGRAMS}", "-o", tmp_path / "ask", tmp_path / "ask.c"], check=True)
    said = subprocess.run([tmp_path / "ask"], check=True, capture_output=True, text=True).stdout
    *offsets, size, key_size, epoch = map(int, said.split())
    assert (PROCESS_HEAD.format, PROCESS_HEAD.size) == ("=QQQIIII", 40)
    assert (PROCESS_TAIL.format, PROCESS_TAIL.size) == ("=I64Q", 516)
    assert offsets == [0, 24, 28, 32, 36, size - 516, size - 512]
    assert FILE_KEY.size == key_size == 64
    assert epoch == 60
    assert limit == "#define MAX_RANGES 32"


def test_the_room_for_an_entry_is_as_large_as_the_kernel_writes() -> None:
    source = BpfSource(Config())
    try:
        assert source._processes.value_bytes >= PROCESS_HEAD.size + PROCESS_TAIL.size
        assert source._verdicts.value_bytes == VERDICT_VALUE.size
    finally:
        source.close()


def test_the_kernels_entry_of_a_process_has_its_start_and_its_ranges(
    watcher: Watcher, start: Start, library: NewLibrary
) -> None:
    mapper, new = start(), library(WANTED)
    at, length = mapper.map(new)
    report = process(watcher, mapper.pid)
    assert report.followed is not None
    assert report.followed.start_ns == report.process.start_ns
    assert report.followed.activity > 0
    assert (at, at + pages(length)) in report.followed.ranges
    assert report.followed.range_count == len(report.followed.ranges)
    assert report.known is not None
    assert report.known.process.start_ns == report.process.start_ns


def test_a_process_of_which_nothing_is_wanted_is_not_followed(
    watcher: Watcher, start: Start, library: NewLibrary
) -> None:
    mapper = start()
    mapper.map(library(OTHER))
    report = process(watcher, mapper.pid)
    assert report.followed is None or report.followed.activity == 0
    assert report.known is None
    assert "nothing_wanted" in report.notes


def test_the_kernels_answers_outlive_their_source(tap: Any, start: Start, library: NewLibrary) -> None:
    source = BpfSource(Config())
    try:
        key = bytes(63) + b"\1"
        source.answer({bytes(64): 0}, is_wanted=True)
        source.answer({key: 0}, is_wanted=False)
        verdicts = source.open_verdicts()
    finally:
        source.close()
    with verdicts:
        assert verdicts.look_up(bytes(64)) == (FileId(0, 0, 0), bytes(16), True, None)
        assert verdicts.of_inodes([0]) == [(FileId(0, 0, 0), bytes(16), True, None)], (
            "the other key is of another epoch"
        )
        assert verdicts.of_inodes([1]) == []
    assert verdicts.of_inodes([0]) == []


def test_a_key_or_value_of_another_size_than_the_maps_is_refused() -> None:
    source = BpfSource(Config())
    try:
        table = source._verdicts
        calls: tuple[Callable[[], object], ...] = (
            lambda: table.lookup(bytes(table.key_bytes - 1)),
            lambda: table.delete(bytes(table.key_bytes + 1)),
            lambda: table.update(bytes(table.key_bytes), bytes(table.value_bytes - 1)),
            lambda: table.update_many([bytes(table.key_bytes)] * 2, [bytes(table.value_bytes), b""]),
        )
        for call in calls:
            with pytest.raises(BpfError, match=r"of map verdicts: .* bytes where it has") as caught:
                call()
            assert caught.value.errno == errno.EMSGSIZE
        # Of a per-CPU map the values of all CPUs are one.
        counters = source._object.map("counters")
        assert counters.value_bytes % 8 == 0
        assert len(counters.lookup(bytes(4)) or b"") == counters.value_bytes >= 8
    finally:
        source.close()


def test_the_entry_of_a_process_under_prebuilt_is_as_large_as_it_is_unpacked() -> None:
    source = PrebuiltSource(Config())
    try:
        assert source._processes.value_bytes == SEEN.size
    finally:
        source.close()
