"""What the command does to its stdout: escaping, blocking, ending, and the view on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from sowatch.cli import watch
from sowatch.cli._out import Out, PipeClosed
from sowatch.cli._parser import Parser
from sowatch.cli._stop import Stopper
from sowatch.cli._table import write_table
from sowatch.model.errors import SowatchError
from sowatch.model.escape import one_line, visible
from sowatch.model.events import Library, Lost, Repaired
from support.scripted import SSL, TIME_NS, ScriptedWatcher, Stats, event

# --- escaping -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/usr/lib/libz.so.1", "/usr/lib/libz.so.1"),
        ("/opt/Müller & Söhne/lib✓.so", "/opt/Müller & Söhne/lib✓.so"),
        ("a\nb\tc\rd", "a\\nb\\tc\\rd"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("nul\x00del\x7f", "nul\\x00del\\x7f"),
        ("c1\x85\x9b", "c1\\u0085\\u009b"),
        ("byte\udcff\udc80", "byte\\xff\\x80"),
        ("rtl\u202egnp.exe", "rtl\\u202egnp.exe"),
        ("zero\u200bwidth\ufeff", "zero\\u200bwidth\\ufeff"),
        ("nbsp\xa0", "nbsp\\u00a0"),
        ("back\\slash", "back\\\\slash"),
        ("tag\U000e0041", "tag\\U000e0041"),
        ("", ""),
    ],
)
def test_what_does_not_print_as_itself_is_shown_as_an_escape(name: str, shown: str) -> None:
    assert visible(name) == shown


@given(st.text())
def test_a_shown_name_prints_on_one_line(name: str) -> None:
    assert visible(name).isprintable()
    assert one_line(name).isprintable()


@given(st.text(), st.text())
def test_two_different_names_never_look_the_same(one: str, other: str) -> None:
    assert (visible(one) == visible(other)) == (one == other)


@given(st.binary(), st.binary())
def test_two_different_names_in_bytes_never_look_the_same(one: bytes, other: bytes) -> None:
    assert (visible(os.fsdecode(one)) == visible(os.fsdecode(other))) == (one == other)


# --- the writer ---------------------------------------------------------------------------------


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            continue


def test_nothing_is_written_before_the_flush(pipe: tuple[int, int]) -> None:
    out = Out(pipe[1])

    out.write("one\n")
    out.write("two\n")

    assert select.select([pipe[0]], [], [], 0)[0] == []
    out.flush()
    assert os.read(pipe[0], 100) == b"one\ntwo\n"


def test_characters_that_the_encoding_does_not_have_are_escaped(pipe: tuple[int, int]) -> None:
    out = Out(pipe[1], encoding="ascii")

    out.write("Müller ✓")
    out.flush()

    assert os.read(pipe[0], 100) == b"M\\xfcller \\u2713"


@pytest.mark.parametrize("is_nonblocking", [False, True])
def test_more_than_a_pipe_holds_is_written_as_the_reader_reads(pipe: tuple[int, int], is_nonblocking: bool) -> None:
    os.set_blocking(pipe[1], not is_nonblocking)
    text = "".join(f"line {number}\n" for number in range(50_000))
    got: list[bytes] = []

    def read() -> None:
        while sum(map(len, got)) < len(text):
            got.append(os.read(pipe[0], 1 << 16))

    reader = threading.Thread(target=read)
    reader.start()
    out = Out(pipe[1])
    out.write(text)
    out.flush()
    reader.join()

    assert b"".join(got) == text.encode()


def test_a_closed_pipe_is_told_by_the_flush(pipe: tuple[int, int]) -> None:
    out = Out(pipe[1])
    assert not out.reader_is_gone()
    os.close(pipe[0])

    out.write("x")

    assert out.reader_is_gone()
    with pytest.raises(PipeClosed):
        out.flush()


def test_a_file_has_no_reader_that_could_go_away(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as file:
        out = Out(file.fileno())
        out.write("kept\n" * 10_000)
        out.flush()

        assert not out.reader_is_gone()
    assert (tmp_path / "out").read_text() == "kept\n" * 10_000


def test_once_told_to_finish_a_reader_that_does_not_read_is_given_up(pipe: tuple[int, int]) -> None:
    out = Out(pipe[1])
    out.finish_within(0)

    out.write("x" * (1 << 20))

    with pytest.raises(SowatchError, match="the reader of standard output does not read"):
        out.flush()


def test_once_told_to_finish_what_the_reader_takes_is_still_written(pipe: tuple[int, int]) -> None:
    out = Out(pipe[1])
    out.finish_within(0)

    out.write("last words\n")
    out.flush()

    assert os.read(pipe[0], 100) == b"last words\n"


def test_a_descriptor_that_is_open_for_reading_only_is_refused_at_once(pipe: tuple[int, int]) -> None:
    with pytest.raises(SowatchError, match="standard output is not open for writing"):
        Out(pipe[0])


# --- ending -------------------------------------------------------------------------------------


def test_the_stop_runs_once_on_another_thread_however_many_signals_come(deadline: Any) -> None:
    calls: list[int] = []
    called = threading.Event()

    def stop() -> None:
        calls.append(threading.get_ident())
        called.set()

    with Stopper(stop):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert called.wait(deadline(10))
        os.kill(os.getpid(), signal.SIGTERM)

    assert len(calls) == 1
    assert calls[0] != threading.get_ident()


def test_the_stop_runs_when_the_time_is_up(deadline: Any) -> None:
    called = threading.Event()

    with Stopper(called.set) as stopper:
        assert not called.is_set()
        stopper.stop_after(0)
        assert called.wait(deadline(10))


def test_leaving_without_a_reason_to_stop_does_not_stop() -> None:
    called = threading.Event()

    with Stopper(called.set) as stopper:
        stopper.stop_after(3600)

    assert not called.is_set()


def test_what_the_stop_raised_is_raised_on_leaving(deadline: Any) -> None:
    called = threading.Event()

    def stop() -> None:
        called.set()
        raise SowatchError("cannot stop.")

    def watch_for_no_time() -> None:
        with Stopper(stop) as stopper:
            stopper.stop_after(0)
            assert called.wait(deadline(10))

    with pytest.raises(SowatchError, match=r"cannot stop\."):
        watch_for_no_time()


def test_stoppers_leave_no_descriptor_and_no_handler_behind() -> None:
    before = sorted(os.listdir("/proc/self/fd")), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    with Stopper(lambda: None):
        pass

    after = sorted(os.listdir("/proc/self/fd")), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert after == before


# --- tables -------------------------------------------------------------------------------------


def test_a_table_is_aligned_and_nothing_is_cut(pipe: tuple[int, int]) -> None:
    path = "/very" * 60

    write_table(Out(pipe[1]), ("PID", "COMM", "PATH"), [("7", "été", path), ("1234", "日本", "/x")], right=(0,))

    assert os.read(pipe[0], 4096).decode() == (f" PID  COMM  PATH\n   7  été   {path}\n1234  日本  /x\n")


def test_a_table_without_rows_is_its_head(pipe: tuple[int, int]) -> None:
    write_table(Out(pipe[1]), ("PID", "PATH"), [])

    assert os.read(pipe[0], 100) == b"PID  PATH\n"


# --- the terminal -------------------------------------------------------------------------------


class Terminal:
    """A pseudo terminal whose screen the test reads while a command runs."""

    def __init__(self) -> None:
        self.ours, self.theirs = pty.openpty()
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        self.text = ""
        self._ended = threading.Event()
        self._seen = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            readable, _, _ = select.select([self.ours], [], [], 0.05)
            if readable:
                more = os.read(self.ours, 1 << 16).decode(errors="replace")
                with self._seen:
                    self.text += more
                    self._seen.notify_all()
            elif self._ended.is_set():
                return

    def wait_for(self, pattern: str, timeout_s: float) -> None:
        with self._seen:
            assert self._seen.wait_for(lambda: re.search(pattern, self.text), timeout_s), self.text

    def plain(self) -> str:
        """Everything shown, without colours and cursor movements."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.text).replace("\r\n", "\n")

    def close(self) -> None:
        self._ended.set()
        self._reader.join()
        os.close(self.ours)
        os.close(self.theirs)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)
    one = Terminal()
    yield one
    if not one._ended.is_set():
        one.close()


def show(terminal: Terminal, watcher: ScriptedWatcher, *words: str, script: Callable[[], None] | None = None) -> str:
    """Run `sowatch watch` on the terminal until ``script`` ends; what was shown, without colours."""
    parser = Parser(prog="sowatch watch", description=None)
    watch.configure(parser)
    args = parser.parse_words(words)
    thread = None
    if script is not None:

        def play() -> None:
            try:
                script()
            finally:
                watcher.stop()

        thread = threading.Thread(target=play)
        thread.start()
    else:
        args.duration = 0.0
    code = watch.run(args, out=Out(terminal.theirs), warn=lambda _: None, open_watcher=watcher.open)
    if thread is not None:
        thread.join()
    terminal.close()
    assert code == 0
    return terminal.plain()


def test_on_a_terminal_events_are_coloured_lines(terminal: Terminal) -> None:
    text = show(terminal, ScriptedWatcher(after=[event("load"), event("unload", "exit")]))

    assert re.search(r"\+ mmap +1234 nginx +\[3f2a9c8b1d0e\] /usr/lib/libssl\.so\.3\n", text)
    assert re.search(r"- exit +1234 nginx +\[3f2a9c8b1d0e\] /usr/lib/libssl\.so\.3\n", text)
    assert "\x1b[32m+ mmap" in terminal.text
    assert "\x1b[31m- exit" in terminal.text


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colours_are_off_where_nobody_wants_them(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)

    text = show(terminal, ScriptedWatcher(after=[event("load")]))

    assert "/usr/lib/libssl.so.3\n" in text
    assert re.findall(r"\x1b\[[0-9;]*3[0-7][0-9;]*m", terminal.text) == []


def test_a_dumb_terminal_gets_no_control_sequences_at_all(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")

    show(terminal, ScriptedWatcher(after=[event("load")]))

    assert "\x1b" not in terminal.text


def test_the_status_line_counts_processes_libraries_events_and_losses(terminal: Terminal, deadline: Any) -> None:
    watcher = ScriptedWatcher(stats=Stats(processes=212, libraries=48, events=0))

    def script() -> None:
        terminal.wait_for("\\b0.{0,8} lost", deadline(10))
        watcher.stats.lost_kernel, watcher.stats.lost_queue, watcher.stats.events = 12, 3, 5000
        terminal.wait_for("15", deadline(10))
        terminal.wait_for(r"\d{2,}\.\d.{0,8} events/s", deadline(10))

    text = show(terminal, watcher, script=script)

    assert re.search(r"212 processes  48 libraries  0\.0 events/s  0 lost  core, exact  Ctrl-C ends", text)
    assert re.search(r"212 processes  48 libraries  [\d.]+ events/s  15 lost  core, exact  Ctrl-C ends", text)


def test_the_cursor_comes_back_and_the_status_line_goes_at_the_end(terminal: Terminal) -> None:
    show(terminal, ScriptedWatcher())

    assert terminal.text.rfind("\x1b[?25h") > terminal.text.rfind("\x1b[?25l")
    assert terminal.text.rstrip().endswith("\x1b[2K") or "\x1b[2K" in terminal.text[terminal.text.rfind("stopped") :]


def test_the_snapshot_of_a_whole_host_is_told_as_a_count(terminal: Terminal) -> None:
    before = [event("activate"), event("load", "snapshot")]
    after = [event("load", "fork"), replace(event("deactivate"), cause="stop"), event("deactivate")]

    text = show(terminal, ScriptedWatcher(before=before, after=after))

    assert "+ snapshot" not in text
    assert "o stop" not in text
    assert "o last" in text
    assert "* first" not in text
    assert "ready: 212 processes, 5120 mappings; strategy core (exact, syscall hooks)\n" in text
    assert "limit: 32-bit processes are watched by reads\n" in text
    assert "what is mapped already is not shown here; see `sowatch list`\n" in text
    assert "+ fork" in text


def test_the_snapshot_of_what_was_asked_for_is_shown(terminal: Terminal) -> None:
    before = [event("activate"), event("load", "snapshot")]
    after = [replace(event("deactivate"), cause="stop")]

    text = show(terminal, ScriptedWatcher(before=before, after=after), "libssl")

    assert "o stop" in text
    assert "* first" in text
    assert "+ snapshot" in text


def test_a_name_cannot_steer_the_terminal(terminal: Terminal) -> None:
    evil = Library(path="/tmp/\x1b]0;title\x07[bold]:boom:\u202e.so", id=SSL.id)

    text = show(terminal, ScriptedWatcher(after=[event(library=evil)]))

    assert "/tmp/\\x1b]0;title\\x07[bold]:boom:\\u202e.so\n" in text
    assert "\x1b]0;" not in terminal.text


def test_a_path_longer_than_the_terminal_is_wide_is_not_cut(terminal: Terminal) -> None:
    deep = Library(path="/tmp" + "/deep" * 100, id=SSL.id, path_partial=True)

    text = show(terminal, ScriptedWatcher(after=[event(library=deep)]))

    assert f"{deep.path} (path incomplete)\n" in text


def test_losses_and_repairs_are_lines_too(terminal: Terminal) -> None:
    lost, repaired = Lost(TIME_NS, count=1, where="kernel"), Repaired(TIME_NS, loads=3, unloads=1, seconds=0.01)

    text = show(terminal, ScriptedWatcher(after=[lost, repaired]))

    assert "lost: 1 event in the kernel; scanning again\n" in text
    assert "repaired in 0.010 s: 3 loads and 1 unload had been missed\n" in text


def test_a_table_on_a_terminal_has_a_bold_head_and_its_warnings_in_colour(terminal: Terminal) -> None:
    write_table(Out(terminal.theirs), ("PID", "STALE", "PATH"), [("7", "-", "/a"), ("8", "deleted", "/b")], warning=1)
    terminal.close()

    assert terminal.plain() == "PID  STALE    PATH\n7    -        /a\n8    deleted  /b\n"
    assert "\x1b[1mPID" in terminal.text
    assert "\x1b[1;33mdeleted" in terminal.text
