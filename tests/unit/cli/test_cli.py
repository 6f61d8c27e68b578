"""The command line: words into selections, errors into one line, and the feed of `sowatch watch`."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import IO, Any

import jsonschema
import pytest

from sowatch import cli
from sowatch.cli import watch
from sowatch.cli._options import Selection, selection_of
from sowatch.cli._out import Out
from sowatch.cli._parser import Parser, TextAsked
from sowatch.cli._schema import load_schema
from sowatch.model.errors import LoadAttempt, NotPermitted, SowatchError, UsageError
from sowatch.model.events import Library, Lost, Ready, Repaired
from sowatch.model.literals import KINDS
from support import strict
from support.scripted import SSL, TIME_NS, ScriptedWatcher, Stats, event

VALIDATOR = jsonschema.Draft202012Validator(load_schema(strict=True))


def parsed(*words: str, command: str = "watch") -> Namespace:
    module = importlib.import_module(f"sowatch.cli.{command}")
    parser = Parser(prog=f"sowatch {command}", description=module.__doc__)
    module.configure(parser)
    return parser.parse_words(words)


class Running:
    """`sowatch watch` with a scripted watcher behind it, its stdout a pipe that the test reads."""

    def __init__(self, watcher: ScriptedWatcher, *words: str) -> None:
        self.watcher = watcher
        self.warnings: list[str] = []
        self._words = words
        self._read_fd, self._write_fd = os.pipe()
        self.stdout: IO[str] = os.fdopen(self._read_fd, encoding="ascii")

    def run(self) -> int:
        """Run the command here, on the main thread, because it handles signals."""
        try:
            return watch.run(
                parsed(*self._words),
                out=Out(self._write_fd),
                warn=self.warnings.append,
                open_watcher=self.watcher.open,
            )
        finally:
            os.close(self._write_fd)

    def meanwhile(self, script: Callable[[], None]) -> threading.Thread:
        """Run the test's part of the story beside the command; ends it if that fails."""

        def play() -> None:
            try:
                script()
            except BaseException:
                self.watcher.stop()
                raise

        thread = threading.Thread(target=play)
        thread.start()
        return thread

    def lines(self) -> list[dict[str, Any]]:
        found = [strict.loads(line) for line in self.stdout]
        for line in found:
            VALIDATOR.validate(line)
        return found


@pytest.fixture
def running() -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(watcher: ScriptedWatcher, *words: str) -> Running:
        started.append(Running(watcher, *words))
        return started[-1]

    yield start
    for one in started:
        one.stdout.close()


# --- the feed -----------------------------------------------------------------------------------


def test_the_feed_is_one_numbered_json_object_a_line_from_the_snapshot_to_stopped(running: Any) -> None:
    watcher = ScriptedWatcher(
        before=[event("activate"), event("load", "snapshot")],
        after=[event("unload", "exit"), event("deactivate")],
    )
    command = running(watcher, "--json", "--duration", "0")

    code = command.run()
    lines = command.lines()

    assert code == 0
    assert [line["event"] for line in lines] == ["activate", "load", "ready", "unload", "deactivate", "stopped"]
    assert [line["seq"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert command.warnings == []


def test_each_line_can_be_read_before_the_next_thing_happens(running: Any) -> None:
    watcher = ScriptedWatcher()
    command = running(watcher, "--json")
    seen = []

    def script() -> None:
        for number in range(3):
            seen.append(strict.loads(command.stdout.readline())["event"])
            watcher.send(event("load", t_ns=number))
        seen.append(strict.loads(command.stdout.readline())["t_ns"])
        watcher.stop()

    thread = command.meanwhile(script)
    code = command.run()
    thread.join()

    assert code == 0
    assert seen == ["ready", "load", "load", 2]


def test_more_events_than_fit_into_the_pipe_all_come_through(running: Any) -> None:
    watcher = ScriptedWatcher(before=[event("load", t_ns=number) for number in range(3000)])
    command = running(watcher, "--json", "--duration", "0")
    lines: list[dict[str, Any]] = []

    thread = command.meanwhile(lambda: lines.extend(strict.loads(line) for line in command.stdout))
    code = command.run()
    thread.join()

    assert code == 0
    assert [line["t_ns"] for line in lines[:3000]] == list(range(3000))
    assert [line["event"] for line in lines[3000:]] == ["ready", "stopped"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_feed_with_stopped_and_0(running: Any, number: signal.Signals) -> None:
    command = running(ScriptedWatcher(), "--json")
    before = signal.getsignal(number)
    seen = []

    def script() -> None:
        seen.append(strict.loads(command.stdout.readline())["event"])
        os.kill(os.getpid(), number)
        seen.extend(strict.loads(line)["event"] for line in command.stdout)

    thread = command.meanwhile(script)
    code = command.run()
    thread.join()

    assert code == 0
    assert seen == ["ready", "stopped"]
    assert signal.getsignal(number) is before


def test_a_signal_while_the_watcher_starts_waits_until_it_can_be_stopped(running: Any) -> None:
    watcher = ScriptedWatcher()
    start = watcher.start

    def slow_start() -> Ready:
        os.kill(os.getpid(), signal.SIGTERM)
        signalled.wait()
        return start()

    signalled = threading.Event()
    watcher.start = slow_start  # type: ignore[method-assign]
    command = running(watcher, "--json")
    original = watch.Stopper._on_signal

    def on_signal(self: Any, *args: Any) -> None:
        original(self, *args)
        signalled.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch.Stopper, "_on_signal", on_signal)
        code = command.run()

    assert code == 0
    assert [line["event"] for line in command.lines()] == ["ready", "stopped"]


def test_a_reader_that_goes_away_ends_the_feed_quietly(running: Any) -> None:
    watcher = ScriptedWatcher(after=[event() for _ in range(3000)])
    command = running(watcher, "--json")

    def script() -> None:
        command.stdout.readline()
        command.stdout.close()

    thread = command.meanwhile(script)
    code = command.run()
    thread.join()

    assert code == 0
    assert command.warnings == []
    assert watcher.is_stopped.is_set()


def test_a_reader_that_goes_away_is_noticed_though_nothing_happens(running: Any) -> None:
    watcher = ScriptedWatcher()
    command = running(watcher, "--json")

    def script() -> None:
        command.stdout.readline()
        command.stdout.close()

    thread = command.meanwhile(script)
    code = command.run()
    thread.join()

    assert code == 0
    assert watcher.is_stopped.is_set()


def test_an_error_at_the_start_is_raised_and_the_watcher_is_stopped(running: Any) -> None:
    error = NotPermitted("cannot load BPF programs", "CAP_BPF is missing", "Run it as root.")
    watcher = ScriptedWatcher(start_error=error)
    command = running(watcher, "--json")

    with pytest.raises(NotPermitted):
        command.run()

    assert watcher.is_stopped.is_set()
    assert command.lines() == []


def test_a_loss_that_stayed_unrepaired_is_exit_code_1(running: Any) -> None:
    watcher = ScriptedWatcher(after=[Lost(TIME_NS, count=12, where="kernel")])
    command = running(watcher, "--json", "--duration", "0")

    assert command.run() == 1
    assert command.warnings == ["12 events were lost and not made good before the end."]


def test_a_loss_that_was_repaired_is_exit_code_0(running: Any) -> None:
    lost, repaired = Lost(TIME_NS, count=12, where="queue"), Repaired(TIME_NS, loads=1, unloads=0, seconds=0.01)
    command = running(ScriptedWatcher(after=[lost, lost, repaired]), "--json", "--duration", "0")

    assert command.run() == 0
    assert command.warnings == []


def test_a_watch_that_ends_without_stopped_is_exit_code_1(running: Any) -> None:
    watcher = ScriptedWatcher(says_stopped=False)
    command = running(watcher, "--json")

    def script() -> None:
        command.stdout.readline()
        watcher.stop()

    thread = command.meanwhile(script)
    code = command.run()
    thread.join()

    assert code == 1
    assert command.warnings == ["the watch ended before it was stopped. The lines so far are right."]


def test_a_weaker_strategy_is_said_on_stderr_with_what_failed_before(running: Any) -> None:
    ready = Ready(
        time_ns=TIME_NS,
        host="box",
        boot_id=None,
        strategy="procfs",
        guarantee="sampled",
        hooks=None,
        limits=(),
        attempts=(LoadAttempt("core", ok=False, error="no BTF"), LoadAttempt("procfs", ok=True, error=None)),
        processes=1,
        mappings=1,
        seconds=0.1,
    )
    command = running(ScriptedWatcher(ready=ready), "--json", "--duration", "0")

    assert command.run() == 0
    assert command.warnings == ["watching with procfs (sampled) because core: no BTF. See `sowatch doctor`."]


def test_only_the_events_asked_for_are_subscribed_to(running: Any) -> None:
    watcher = ScriptedWatcher()
    command = running(watcher, "--events", "load, unload,load", "--duration", "0")

    command.run()

    assert watcher.asked_for == ("load", "unload")


def test_a_watch_that_cannot_say_stopped_when_it_is_asked_to_end_has_it_all_the_same(running: Any) -> None:
    watcher = ScriptedWatcher(says_stopped=False, stats=Stats(loads=7, unloads=5))
    command = running(watcher, "--json", "--duration", "0")

    assert command.run() == 0
    assert command.warnings == []
    last = command.lines()[-1]
    assert (last["event"], last["seq"], last["loads"], last["unloads"], last["lost"]) == ("stopped", 2, 7, 5, 0)


def test_a_signal_before_the_watcher_starts_is_not_forgotten(running: Any) -> None:
    watcher = ScriptedWatcher()
    subscribe = watcher.subscribe
    signalled = threading.Event()
    original = watch.Stopper._on_signal

    def late_subscribe(**options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signalled.is_set()
        return subscribe(**options)

    def on_signal(self: Any, *args: Any) -> None:
        original(self, *args)
        self._thread.join()
        signalled.set()

    watcher.subscribe = late_subscribe  # type: ignore[method-assign]
    command = running(watcher, "--json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch.Stopper, "_on_signal", on_signal)
        assert command.run() == 0
    assert [line["event"] for line in command.lines()][-1] == "stopped"


def test_a_watch_that_does_not_start_in_time_is_left_when_it_is_asked_to_end(running: Any) -> None:
    watcher = ScriptedWatcher()
    released = threading.Event()

    def hanging_start() -> Ready:
        os.kill(os.getpid(), signal.SIGINT)
        released.wait()
        return watcher.ready

    watcher.start = hanging_start  # type: ignore[method-assign]
    command = running(watcher, "--json")
    try:
        assert command.run() == 0
    finally:
        released.set()

    assert [line["event"] for line in command.lines()] == ["stopped"]
    assert command.warnings == []


@pytest.mark.parametrize(
    ("words", "events"),
    [
        ((), ("load", "unload")),
        (("--json",), ("load", "unload", "activate", "deactivate")),
        (("--events", "activate"), ("activate",)),
        (("--json", "--events", "load"), ("load",)),
    ],
)
def test_text_tells_each_fact_once_and_json_has_all_four_events(
    running: Any, words: tuple[str, ...], events: tuple[str, ...]
) -> None:
    watcher = ScriptedWatcher()

    running(watcher, *words, "--duration", "0").run()

    assert watcher.asked_for == events


def test_following_takes_processes_to_follow(running: Any) -> None:
    with pytest.raises(UsageError, match="--follow needs --pid"):
        running(ScriptedWatcher(), "--follow").run()
    watcher = ScriptedWatcher()
    running(watcher, "--pid", str(os.getpid()), "--follow", "--duration", "0").run()
    assert watcher.selection.follow


def test_sighup_ends_the_feed_unless_nohup_had_it_ignored(running: Any) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        command = running(ScriptedWatcher(), "--json")

        def script() -> None:
            command.stdout.readline()
            os.kill(os.getpid(), signal.SIGHUP)
            command.watcher.send(event())
            assert strict.loads(command.stdout.readline())["event"] == "load"
            command.watcher.stop()

        thread = command.meanwhile(script)
        assert command.run() == 0
        thread.join()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_text_is_one_plain_line_an_event_with_names_made_visible(running: Any) -> None:
    evil = Library(path="/tmp/a\x1b[2J\n\udcffb\\.so", id=SSL.id, deleted=True)
    watcher = ScriptedWatcher(
        before=[event("activate"), event("load", "snapshot", library=evil), event("deactivate")],
    )
    command = running(watcher, "--format", "text", "--duration", "0")

    command.run()
    lines = [line[13:] for line in command.stdout]

    assert lines == [
        "* first       1234 nginx           [3f2a9c8b1d0e] /usr/lib/libssl.so.3\n",
        "+ snapshot    1234 nginx           [3f2a9c8b1d0e] /tmp/a\\x1b[2J\\n\\xffb\\\\.so (deleted)\n",
        "o last                             /usr/lib/libssl.so.3\n",
        "ready: 212 processes, 5120 mappings; strategy core (exact, syscall hooks)\n",
        "stopped: 1 load, 0 unloads, 0 lost\n",
    ]


def test_text_names_the_rule_only_where_there_are_several(running: Any) -> None:
    command = running(ScriptedWatcher(after=[event(rule="ssl")]), "--format", "text", "--duration", "0", "ssl", "z")

    command.run()

    assert "<ssl> /usr/lib/libssl.so.3" in command.stdout.read()


# --- words into selections ----------------------------------------------------------------------


def selection(*words: str) -> Selection:
    return selection_of(parsed(*words))


def test_without_options_every_library_of_every_process_is_watched() -> None:
    chosen = selection()

    assert [(rule.name, rule.pattern, rule.kind) for rule in chosen.rules] == [("all", None, {"library"})]
    assert chosen.pids == frozenset()
    assert chosen.container is None
    assert not chosen.exclude_self
    assert chosen.snapshot
    assert chosen.config.strategy == "auto"
    assert not chosen.is_selective


@pytest.mark.parametrize(
    ("words", "kinds"),
    [
        (["--kind", "executable,library"], {"executable", "library"}),
        (["--kind", "executable, interpreter", "--kind", "library"], {"executable", "interpreter", "library"}),
        (["--kind", "all"], set(KINDS)),
    ],
)
def test_kinds_may_stand_together_or_be_repeated_or_be_all(words: list[str], kinds: set[str]) -> None:
    assert [rule.kind for rule in selection(*words).rules] == [kinds]


@pytest.mark.parametrize("command", ["list", "top"])
def test_what_is_shown_as_a_table_leaves_sowatch_out_unless_it_is_asked_for(command: str) -> None:
    assert parsed(command=command).exclude_self
    assert not parsed("--include-self", command=command).exclude_self


@pytest.mark.parametrize("command", ["list", "top", "audit", "explain", "trace", "doctor"])
def test_no_option_is_offered_that_is_refused_always(command: str) -> None:
    with pytest.raises(TextAsked) as asked:
        parsed("--help", command=command)
    assert "--no-snapshot" not in str(asked.value)


def test_each_pattern_is_a_rule_of_its_own_and_repeated_ones_are_one() -> None:
    chosen = selection("ssl", "--kind", "library", "z", "ssl", "--kind", "executable")

    assert [(rule.name, rule.kind) for rule in chosen.rules] == [
        ("ssl", {"library", "executable"}),
        ("z", {"library", "executable"}),
    ]
    assert chosen.is_selective


def test_an_empty_pattern_is_found_in_every_path_so_it_is_the_only_rule() -> None:
    assert [rule.name for rule in selection("ssl", "").rules] == ["all"]


def test_a_pattern_may_begin_with_a_dash_after_two_of_them() -> None:
    assert [rule.pattern for rule in selection("--json", "--", "-foo").rules] == ["-foo"]


def test_processes_containers_and_switches_are_handed_on() -> None:
    words = ["--pid", f"{os.getpid()}, 1", "--pid", "1", "--container", "3f2a", "--exclude-self", "--no-snapshot"]
    chosen = selection(*words, "--strategy", "procfs")

    assert chosen.pids == {os.getpid(), 1}
    assert chosen.container == "3f2a"
    assert chosen.exclude_self
    assert not chosen.snapshot
    assert chosen.config.strategy == "procfs"


def test_a_process_that_does_not_exist_cannot_be_watched() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()

    with pytest.raises(SowatchError, match=f"there is no process {gone.pid} in /proc") as error:
        selection("--pid", str(gone.pid))
    assert error.value.exit_code == 1


def test_the_id_of_a_thread_is_refused_with_that_of_its_process() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        with pytest.raises(UsageError, match=f"{thread.native_id} is a thread of process {os.getpid()}"):
            selection("--pid", str(thread.native_id))
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["watch", "("], "bad pattern '(': missing ), unterminated subpattern at position 0"),
        (["watch", "ok", "a["], "bad pattern 'a[': unterminated character set at position 1"),
        (["watch", "--kind", "plugin"], "unknown kind 'plugin'"),
        (["watch", "--strategy", "magic"], "unknown strategy 'magic'"),
        (["watch", "--hooks", "magic"], "unknown hooks 'magic'"),
        (["watch", "--events", "load,open"], "unknown event 'open' (known: load, unload, activate, deactivate)"),
        (["watch", "--events", ""], "unknown event ''"),
        (["watch", "--pid", "0"], "'0' is not a process id"),
        (["watch", "--pid", "-5"], "'-5' is not a process id"),
        (["watch", "--pid", "nginx"], "'nginx' is not a process id"),
        (["watch", "--duration", "soon"], "'soon' is not a number of seconds"),
        (["watch", "--duration", "-1"], "'-1' is not a number of seconds"),
        (["watch", "--duration", "inf"], "'inf' is not a number of seconds"),
        (["watch", "--container", ""], "--container needs at least one character"),
        (["watch", "--format", "xml"], "unknown format 'xml'. Use one of: json, table, text."),
        (["watch", "--json", "--format", "table"], "--json and --format table contradict each other"),
        (["watch", "--proc-root", "/tmp"], "'/tmp' is not a proc file system"),
        (["watch", "--proc-root", "/nonexistent"], "'/nonexistent' is not a proc file system"),
        (["watch", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["watch", "--dur", "1"], "unrecognized arguments: --dur"),
        (["list", "--stall"], "unrecognized arguments: --stall. Did you mean --stale? See `sowatch list --help`."),
        (["watch", "--durations=2"], "--durations=2. Did you mean --duration?"),
        (["watch", "--pid", "1,x"], "'x' is not a process id"),
        (["watch", "--kind", "library,plugin"], "unknown kind 'plugin'"),
        (["help", "wach"], "unknown command 'wach'. Did you mean watch?"),
        (["list", "--by", "colour"], "unknown --by 'colour'. Use one of: process, unit, container, library."),
        (["list", "--no-snapshot"], "--no-snapshot leaves `sowatch list` nothing to show"),
        (["list", "--events", "load"], "unrecognized arguments: --events"),
        (["doctor", "--strategy", "magic"], "unknown strategy 'magic'"),
        (["doctor", "--proc-root", "/tmp"], "'/tmp' is not a proc file system"),
        (["doctor", "libssl"], "unrecognized arguments: libssl"),
        (["doctor", "--", "libssl"], "unrecognized arguments: libssl"),
        (
            ["wach"],
            "unknown command 'wach'. Did you mean watch? Use one of: watch, run, list, top, trace, http, audit, ",
        ),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (
            [],
            (
                "no command given. Use one of: watch, run, list, top, trace, http, audit, sbom, explain, fleet, serve, "
                "debug, schema"
            ),
        ),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    words: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(words)
    stdout, stderr = capfd.readouterr()

    assert code == 2
    assert stdout == ""
    assert stderr.startswith("sowatch: ")
    assert said in stderr
    assert stderr.count("\n") == 1
