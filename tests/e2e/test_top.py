"""`sowatch top` in a terminal, and without one."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sowatch.model.escape import visible
from support import strict
from support.programs import Mapper
from support.screen import Terminal

HOSTILE = "lib\x1b[2J\x1b]0;hacked\x07\n\u202e<b>.so"


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "sowatch", "top", *words]


@pytest.fixture
def mapper(programs: Any, tmp_path: Path) -> Iterator[Mapper]:
    with Mapper(programs["mapper"], tmp_path) as started:
        yield started


@pytest.fixture
def open_top(tmp_path: Path, deadline: Any) -> Iterator[Callable[..., Terminal]]:
    """``open_top(columns, rows)`` is ``sowatch top`` of what lies in tmp_path, in a terminal."""
    opened: list[Terminal] = []

    def run(columns: int = 100, rows: int = 20, *words: str) -> Terminal:
        line = command(re.escape(str(tmp_path)), *words)
        opened.append(Terminal(line, columns=columns, rows=rows, timeout_s=deadline(60)))
        return opened[-1]

    yield run
    for terminal in opened:
        terminal.__exit__()


def has(text: str) -> Callable[[list[str]], bool]:
    return lambda lines: any(text in line for line in lines)


def test_a_library_is_shown_when_it_is_loaded_and_goes_with_its_process(
    open_top: Any, mapper: Mapper, make_library: Any
) -> None:
    top = open_top()
    top.wait_for(has("libraries 0 of 0"), "the empty table")
    library = make_library("libseen.so")
    mapper.map(library)
    lines = top.wait_for(has("libseen.so"), "the library")
    assert any(re.match(r" +1 .*libseen\.so$", line) for line in lines)
    mapper.exit()
    top.wait_for(lambda lines: not has("libseen.so")(lines), "that it has gone")
    top.press("q")
    assert top.wait_for_end() == 0


def test_the_size_is_that_of_the_terminal_whatever_was_exported(open_top: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setenv("COLUMNS", "200")
    top = open_top(100, 12)
    lines = top.wait_for(has("libraries 0 of 0"), "the empty table")
    assert len(lines) == 12
    assert lines[11].startswith("q quit")


def test_keys_change_the_view_the_order_and_the_filter(open_top: Any, mapper: Mapper, make_library: Any) -> None:
    for name in ("libaa.so", "libbb.so", "libcc.so"):
        mapper.map(make_library(name))

    def order(lines: list[str]) -> list[str]:
        return re.findall(r"lib(\w\w)\.so", "\n".join(lines))

    top = open_top(140)
    top.wait_for(lambda lines: len(order(lines)) == 3, "all of them")
    top.press("S")
    assert order(top.wait_for(has("PATH▲"), "the order by path")) == ["aa", "bb", "cc"]
    top.press("r")
    assert order(top.wait_for(has("PATH▼"), "the other direction")) == ["cc", "bb", "aa"]
    top.press("/LIBBB")
    top.wait_for(lambda lines: order(lines) == ["bb"], "what the filter leaves")
    top.press("\x7f\x7fcc\r")
    top.wait_for(lambda lines: order(lines) == ["cc"], "what the other filter leaves")
    top.press("\x1b")
    top.wait_for(lambda lines: len(order(lines)) == 3, "all of them again")
    top.press("\t")
    top.wait_for(has(f"{mapper.pid}"), "the process")
    assert has("processes 1 of 1")(top.lines())
    top.press("\x1b[5~\x1b[6~\x1b[1;5C\x1b[Zq")
    assert top.wait_for_end() == 0


def test_the_cursor_moves_through_more_rows_than_there_is_room_for(
    open_top: Any, mapper: Mapper, make_library: Any
) -> None:
    original = make_library("lib00.so")
    mapper.map(original)
    for number in range(1, 30):
        mapper.map(shutil.copy(original, original.with_name(f"lib{number:02d}.so")))
    top = open_top(100, 14)
    top.wait_for(has("libraries 30 of 30"), "all of them")

    def is_on(name: str) -> Callable[[list[str]], bool]:
        return lambda _: any(f"/{name}.so" in line for line in top.reversed_lines())

    top.press("S")
    top.wait_for(lambda lines: has("lib00.so")(lines) and not has("lib10.so")(lines), "the first ten")
    top.wait_for(is_on("lib00"), "the cursor on the first")
    top.press("\x1b[B\x1bOB")
    top.wait_for(is_on("lib02"), "the cursor two further down")
    assert has("lib00.so")(top.lines())
    top.press("\x1b[6~")
    top.wait_for(lambda lines: is_on("lib12")(lines) and not has("lib02.so")(lines), "a page further")
    top.press("\x1b[A")
    top.wait_for(is_on("lib11"), "one up")
    top.press("r")
    top.wait_for(lambda lines: is_on("lib11")(lines) and has("PATH▼")(lines), "the cursor where its row is now")
    top.press("r\x1b[F")
    top.wait_for(lambda lines: is_on("lib29")(lines) and not has("lib19.so")(lines), "the last ten")
    top.press("\x1b[H")
    top.wait_for(is_on("lib00"), "the first ones")


@pytest.mark.parametrize("columns", [80, 200])
def test_enter_shows_who_has_a_library_and_what_a_process_has_and_escape_goes_back(
    open_top: Any, mapper: Mapper, make_library: Any, programs: Any, tmp_path: Path, columns: int
) -> None:
    mine, shared = make_library("libmine.so"), make_library("libshared.so")
    mapper.map(mine)
    mapper.map(shared)
    with Mapper(programs["mapper"], tmp_path) as other:
        other.map(shared)
        top = open_top(columns)
        lines = top.wait_for(has("libraries 2 of 2"), "both")
        assert [line.split()[-1].rpartition("/")[2] for line in lines[3:5]] == ["libshared.so", "libmine.so"]
        assert lines[-1].startswith("q quit  Enter who has it  / filter")
        top.press("\r")
        lines = top.wait_for(has("processes with libshared.so: 2"), "who has it")
        assert lines[-1].startswith("q quit  Escape back  Enter what it has  / filter")
        assert {int(line.split()[0]) for line in lines[3:5]} == {mapper.pid, other.pid}
        top.press(f"/{mapper.pid}\r")
        top.wait_for(has("processes with libshared.so: 1"), "the one that the filter leaves")
        top.press("\r")
        lines = top.wait_for(has(f"libraries of mapper {mapper.pid}: 2"), "what it has")
        assert has("libmine.so")(lines)
        top.press("\x1b")
        top.wait_for(has("processes with libshared.so: 1"), "the processes again")
        top.press("\x1b")
        top.wait_for(has("processes with libshared.so: 2"), "them without the filter")
        top.press("\x1b")
        top.wait_for(has("libraries 2 of 2"), "the beginning")


def test_the_filter_finds_libraries_by_the_processes_that_have_them_and_the_other_way_round(
    open_top: Any, mapper: Mapper, make_library: Any, programs: Any, tmp_path: Path
) -> None:
    mapper.map(make_library("libmine.so"))
    with Mapper(programs["mapper"], tmp_path) as other:
        other.map(make_library("libother.so"))
        top = open_top(80)
        top.wait_for(has("libraries 2 of 2"), "both")
        top.press(f"/{other.pid}\r")
        assert has("libother.so")(top.wait_for(has("libraries 1 of 2"), "what that process has"))
        top.press("\x1bp/libmine\r")
        assert has(str(mapper.pid))(top.wait_for(has("processes 1 of 2"), "who has that library"))


def test_on_80_columns_the_base_name_and_the_key_that_ends_are_shown(
    open_top: Any, mapper: Mapper, make_library: Any
) -> None:
    name = "_ssl.cpython-311-x86_64-linux-gnu.so"
    mapper.map(make_library(f"{'deep/' * 20}{name}"))
    lines = open_top(80, 24).wait_for(has("libraries 1 of 1"), "it")
    assert any(line.endswith(f"/{name}") for line in lines)
    assert lines[-1].startswith("q quit")
    assert max(map(len, lines)) <= 80


def test_since_is_that_of_the_process_not_of_the_watch(make_library: Any, tmp_path: Path) -> None:
    ctypes.CDLL(str(make_library("libsince.so")))  # this process is older than the watch
    begun_s = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / 100
    for view, column in (("process", 3), ("library", 3)):
        before_s = time.clock_gettime(time.CLOCK_BOOTTIME) - begun_s
        line = command("--once", "--by", view, re.escape(str(tmp_path)))
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
        after_s = time.clock_gettime(time.CLOCK_BOOTTIME) - begun_s
        (row,) = [line.split() for line in done.stdout.splitlines()[1:]]
        number, unit = int(row[column][:-1]), row[column][-1]
        size = {"s": 1, "m": 60, "h": 3600, "d": 86400}[unit]
        assert int(before_s) // size <= number <= int(after_s) // size


def test_a_terminal_that_cannot_move_its_cursor_gets_one_table(
    mapper: Mapper, make_library: Any, tmp_path: Path, deadline: Any
) -> None:
    mapper.map(make_library("libseen.so"))
    line = command(re.escape(str(tmp_path)))
    with Terminal(line, columns=200, rows=20, timeout_s=deadline(60), term="dumb") as top:
        assert top.wait_for_end() == 0
        head, row, *below = top.wait_for(has("libseen.so"), "the library")
    assert (head.split()[0], row.split()[0]) == ("PROCESSES", "1")
    # A long path stands below its row.
    assert any(str(tmp_path / "libseen.so") in line for line in (row, *below))
    assert b"\x1b" not in top.written


def test_a_terminal_that_is_resized_is_filled_and_never_overfull(
    open_top: Any, mapper: Mapper, make_library: Any
) -> None:
    mapper.map(make_library("libseen.so"))
    top = open_top(120, 20)
    top.wait_for(lambda lines: has("libseen.so")(lines) and has("BUILD ID")(lines), "everything")
    top.resize(40, 8)
    lines = top.wait_for(lambda lines: has("…")(lines) and has("libseen.so")(lines) and has("PROCESSES")(lines), "less")
    assert not has("BUILD ID")(lines)
    for columns, rows in ((20, 5), (10, 3), (3, 2)):
        top.resize(columns, rows)
        top.wait_for(has("sow"), "the beginning")
    top.resize(200, 50)
    top.wait_for(lambda lines: has("BUILD ID")(lines) and lines[49].startswith("q quit"), "everything again")


def test_hostile_names_do_not_steer_the_terminal(
    open_top: Any, mapper: Mapper, make_library: Any, tmp_path: Path
) -> None:
    hostile = tmp_path / HOSTILE
    make_library("libseen.so").rename(hostile)
    mapper.map(hostile)
    top = open_top(160)
    top.wait_for(has(visible(HOSTILE)), "the name")
    top.press("q")
    assert top.wait_for_end() == 0
    assert b"hacked\x07" not in top.written
    assert b"\x1b]" not in top.written
    assert "\u202e".encode() not in top.written


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_terminal_is_given_back_as_it_was(open_top: Any, number: signal.Signals) -> None:
    top = open_top()
    top.wait_for(has("sowatch"), "the screen")
    top.process.send_signal(number)
    assert top.wait_for_end() == 0
    assert termios.tcgetattr(top._theirs) == top.settings
    assert top.written.count(b"\x1b[?1049h") == top.written.count(b"\x1b[?1049l") == 1
    assert top.written.count(b"\x1b[?25l") == top.written.count(b"\x1b[?25h")


def test_it_ends_after_the_duration(open_top: Any) -> None:
    assert open_top(80, 24, "--duration", "0.2").wait_for_end() == 0


def test_a_terminal_that_goes_away_ends_it(open_top: Any, deadline: Any) -> None:
    top = open_top()
    top.wait_for(has("sowatch"), "the screen")
    # Not the hang-up signal, which would end it anyway: the closed terminal alone.
    top.process.send_signal(signal.SIGSTOP)
    os.close(top._ours)
    top._ours = os.open(os.devnull, os.O_RDWR)
    top.process.send_signal(signal.SIGCONT)
    assert top.process.wait(deadline(20)) in (0, -signal.SIGHUP)


def test_without_a_terminal_one_table_is_printed(mapper: Mapper, make_library: Any, tmp_path: Path) -> None:
    mapper.map(make_library("libseen.so"))
    done = subprocess.run(command(re.escape(str(tmp_path))), stdout=subprocess.PIPE, text=True, check=True)
    head, row = done.stdout.splitlines()
    assert head.split() == ["PROCESSES", "CONTAINERS", "STALE", "SINCE", "BUILD", "ID", "PATH"]
    assert (row.split()[0], row.split()[-1]) == ("1", str(tmp_path / "libseen.so"))


def test_json_has_a_line_for_each_row_and_names_the_holders(
    mapper: Mapper, make_library: Any, tmp_path: Path, programs: Any, schema: Any
) -> None:
    gone, kept = make_library("libgone.so"), make_library("libkept.so")
    mapper.map(gone)
    mapper.map(kept)
    gone.unlink()
    with Mapper(programs["mapper"], tmp_path) as other:
        other.map(kept)
        asked = [json_of(tmp_path), json_of(tmp_path, "--by", "process")]
        pids = sorted([mapper.pid, other.pid])
    libraries, processes = ([schema(line) for line in lines] for lines in asked)
    assert [(line["library"]["path"], line["pids"], line["stale"]) for line in libraries] == [
        (str(kept), pids, None),
        (str(gone), [mapper.pid], "deleted"),
    ]
    assert {(line["process"]["pid"], line["libraries"], line["stale_libraries"]) for line in processes} == {
        (mapper.pid, 2, 1),
        (other.pid, 1, 0),
    }


def json_of(directory: Path, *words: str) -> list[dict[str, Any]]:
    line = command(re.escape(str(directory)), "--json", *words)
    return [strict.loads(one) for one in subprocess.run(line, stdout=subprocess.PIPE, check=True).stdout.splitlines()]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--by", "host"], "unknown --by 'host'. Use one of: library, process."),
        (["--no-snapshot"], "--no-snapshot leaves `sowatch top` nothing to show"),
    ],
)
def test_what_it_cannot_do_is_refused(words: list[str], expected: str) -> None:
    done = subprocess.run(command(*words), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert expected in done.stderr
