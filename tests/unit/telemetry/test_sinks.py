"""Sinks: every event once and in order, whatever goes wrong meanwhile, and nobody else has to wait."""

from __future__ import annotations

import os
import resource
import signal
import stat
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from sowatch.engine.activation import FileRegistry
from sowatch.engine.publisher import Publisher, Selection
from sowatch.model.errors import ConfigError, SinkError
from sowatch.model.events import Lost, Origin, Stopped
from sowatch.model.lines import decode
from sowatch.model.rules import RuleSet
from sowatch.telemetry import FileSink, MetricRegistry, OtlpLogSink, Sampler, SinkRunner, StdoutSink
from support import strict
from support.receivers import free_port, grpc_collector, http_collector
from support.scripted import PROCESS, READY, SSL, TIME_NS, event


class Feed:
    """A real publisher and its subscriptions, which the test gives events."""

    def __init__(self) -> None:
        registry = FileRegistry(is_alive=lambda process: True)
        self.publisher = Publisher(RuleSet(()), registry, Selection(), proc_root="/proc")

    def subscribe(self, limit=1000):
        return self.publisher.subscribers.subscribe(control=True, limit=limit, limit_bytes=1 << 30)

    def send(self, *events):
        for one in events:
            self.publisher.subscribers.emit(one)
        self.publisher.subscribers.hand_over()


class Memory:
    """A sink that refuses while it is told to, after taking as many as it is told."""

    name = "memory"

    def __init__(self) -> None:
        self.taken = []
        self.refusal: SinkError | Exception | None = None
        self.tries = 0
        self.is_closed = False

    def write(self, events):
        self.tries += 1
        if self.refusal is not None:
            self.taken += events[: getattr(self.refusal, "delivered", 0)]
            raise self.refusal
        self.taken += events
        return len(events)

    def reopen(self):
        return None

    def interrupt(self):
        return None

    def close(self):
        self.is_closed = True


@pytest.fixture
def feed():
    return Feed()


def numbered(count, first=0):
    return [event(time_ns=TIME_NS + number) for number in range(first, first + count)]


def lines(path):
    return [strict.loads(line) for line in path.read_bytes().splitlines()]


# ---- the runner ---------------------------------------------------------------------------------


def test_a_sink_gets_every_event_in_order_and_is_closed_with_the_watch(feed, wait_until):
    sink, sent = Memory(), numbered(2000)
    runner = SinkRunner(sink, feed.subscribe(5000))
    runner.start()
    feed.send(*sent[:500])
    feed.send(*sent[500:])
    feed.publisher.subscribers.end()
    wait_until(lambda: sink.is_closed)

    assert sink.taken == sent
    stats = runner.stats
    assert (stats.events, stats.lost, stats.errors, stats.waiting, stats.is_up) == (2000, 0, 0, 0, True)


def test_what_a_sink_refused_comes_again_from_where_it_stopped(feed, wait_until):
    sink, sent = Memory(), numbered(10)
    sink.refusal = SinkError("no room", delivered=3)
    with SinkRunner(sink, feed.subscribe()) as runner:
        feed.send(*sent)
        wait_until(lambda: runner.stats.errors)
        assert not runner.stats.is_up
        assert "no room" in (runner.stats.last_error or "")
        sink.refusal = None
        wait_until(lambda: runner.stats.events == 10)

    assert sink.taken == sent
    assert runner.stats.is_up


def test_a_sink_that_raises_something_else_is_tried_again_too(feed, wait_until):
    sink = Memory()
    sink.refusal = RuntimeError("what a library raises")
    with SinkRunner(sink, feed.subscribe()) as runner:
        feed.send(*numbered(2))
        wait_until(lambda: runner.stats.errors)
        sink.refusal = None
        wait_until(lambda: len(sink.taken) == 2)

    assert runner.stats.lost == 0


def test_the_loss_of_a_dead_sink_is_told_to_it_and_counted_apart_from_the_kernels(feed, wait_until):
    sink = Memory()
    sink.refusal = SinkError("dead")
    metrics = MetricRegistry()
    with SinkRunner(sink, feed.subscribe(limit=10)) as runner:
        Sampler(metrics).follow_sink(runner)
        feed.send(*numbered(1))
        wait_until(lambda: sink.tries)
        feed.send(*numbered(99, 1))
        metrics.collect()
        lost = runner.stats.lost
        assert lost >= 80
        assert metrics.counter("sink.lost", "sink:memory").get() == lost
        assert metrics.gauge("sink.up", "sink:memory").get() == 0
        sink.refusal = None
        wait_until(lambda: runner.stats.waiting == 0)
        feed.publisher.subscribers.catch_up()
        wait_until(lambda: sink.taken[-1].event == "repaired")

    reported = [one for one in sink.taken if isinstance(one, Lost)]
    assert [(one.count, one.where) for one in reported] == [(lost, "queue")]
    assert len([one for one in sink.taken if one.event == "load"]) == 100 - lost


def test_a_sink_that_will_never_take_anything_ends_and_what_it_missed_is_counted(feed, wait_until):
    sink = Memory()
    sink.refusal = SinkError("gone", delivered=1, is_final=True)
    runner = SinkRunner(sink, feed.subscribe())
    feed.send(*numbered(10))
    runner.start()
    wait_until(lambda: sink.is_closed)

    assert (runner.stats.events, runner.stats.lost, runner.stats.is_up) == (1, 9, False)
    feed.send(*numbered(5))
    assert runner.stats.waiting == 0


def test_closing_delivers_what_waits(feed):
    sink = Memory()
    runner = SinkRunner(sink, feed.subscribe())
    feed.send(*numbered(700))
    runner.start()
    runner.close(timeout_s=10)
    runner.close()

    assert len(sink.taken) == 700
    assert sink.is_closed


def test_closing_gives_up_a_sink_that_takes_nothing_and_waits_for_one_that_does(feed, wait_until):
    class Dead(Memory):
        def write(self, events):
            raise SinkError("it is dead")

    class Slow(Memory):
        def write(self, events):
            return super().write(events[:100])

    dead, slow = SinkRunner(Dead(), feed.subscribe()), SinkRunner(Slow(), feed.subscribe())
    feed.send(*numbered(700))
    for runner in (dead, slow):
        runner.start()
    dead.close(timeout_s=1_000, stall_s=0.1)
    slow.close(timeout_s=1_000, stall_s=60)
    assert (dead.stats.events, dead.stats.lost) == (0, 700)
    assert (slow.stats.events, slow.stats.lost) == (700, 0)


def test_closing_a_sink_that_is_stuck_returns_and_counts_what_it_did_not_take(feed, wait_until):
    entered, release = threading.Event(), threading.Event()

    class Stuck(Memory):
        def write(self, events):
            entered.set()
            release.wait(60)
            return super().write(events)

    sink = Stuck()
    runner = SinkRunner(sink, feed.subscribe())
    runner.start()
    feed.send(*numbered(8))
    assert entered.wait(10)
    runner.close(timeout_s=0)
    assert (runner.stats.lost, runner.stats.waiting) == (8, 0)

    release.set()
    wait_until(lambda: sink.is_closed)
    assert runner.stats.lost + runner.stats.events == 8


@given(st.lists(st.tuples(st.integers(0, 40), st.booleans(), st.integers(0, 5)), max_size=8))
def test_whatever_a_sink_refuses_each_event_is_delivered_once_or_counted_as_lost(steps):
    feed, sink = Feed(), Memory()
    sent = 0
    with SinkRunner(sink, feed.subscribe(limit=20)) as runner:
        for count, refuses, delivered in steps:
            sink.refusal = SinkError("no", delivered=0 if not count else min(delivered, 1)) if refuses else None
            feed.send(*numbered(count, sent))
            sent += count
        sink.refusal = None
        runner.close(timeout_s=20)
    loads = [one for one in sink.taken if one.event == "load"]

    assert runner.stats.events + runner.stats.lost == sent
    assert len(loads) == runner.stats.events
    assert [one.time_ns for one in loads] == sorted({one.time_ns for one in loads})


# ---- the file -----------------------------------------------------------------------------------


def test_a_file_has_one_line_of_the_schema_for_each_event(tmp_path, schema):
    path = tmp_path / "events.jsonl"
    sink = FileSink(path)
    sink.write([READY, *numbered(3)])
    sink.write([Lost(TIME_NS, 4, "kernel"), Stopped(TIME_NS, 1, 1, 0)])
    sink.close()

    found = [schema(line) for line in path.read_bytes().splitlines()]
    assert [one["event"] for one in found] == ["ready", "load", "load", "load", "lost", "stopped"]
    assert [one["seq"] for one in found] == [0, 1, 2, 3, 4, 5]


def test_a_new_file_is_for_owner_and_group_only_whatever_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        FileSink(tmp_path / "a").close()
    finally:
        os.umask(before)

    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_a_file_that_is_there_is_appended_to_and_keeps_its_mode(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b'{"half a li')
    path.chmod(0o604)
    sink = FileSink(path)
    sink.write(numbered(1))
    sink.close()

    first, second = path.read_bytes().splitlines()
    assert first == b'{"half a li'
    assert strict.loads(second)["event"] == "load"
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


def test_files_rotate_before_they_grow_too_large_and_the_oldest_goes(tmp_path):
    path = tmp_path / "a"
    sink = FileSink(path, max_bytes=2000, max_files=3)
    for number in range(20):
        sink.write(numbered(1, number))
    sink.close()

    files = [path.with_name("a.2"), path.with_name("a.1"), path]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert all(one.stat().st_size <= 2000 for one in files)
    kept = [line["seq"] for one in files for line in lines(one)]
    assert kept == list(range(kept[0], 20))
    assert len(kept) >= 5


def test_one_batch_may_fill_several_files(tmp_path):
    path = tmp_path / "a"
    sink = FileSink(path, max_bytes=2000, max_files=100)
    assert sink.write(numbered(20)) == 20
    sink.close()

    kept = [
        line["seq"]
        for one in sorted(tmp_path.iterdir(), key=lambda one: -int(one.suffix[1:] or 0))
        for line in lines(one)
    ]
    assert kept == list(range(20))


ORIGIN = Origin("box", "0" * 32, "5d2a", "1.2.3")


@pytest.mark.parametrize("max_files", [1, 100])
def test_each_file_begins_with_where_its_events_are_from(tmp_path, schema, max_files):
    path = tmp_path / "a"
    sink = FileSink(path, max_bytes=2000, max_files=max_files, origin=ORIGIN)
    assert sink.write(numbered(20)) == 20
    sink.close()

    files = sorted(tmp_path.iterdir(), key=lambda one: -int(one.suffix[1:] or 0))
    assert len(files) > 1 or max_files == 1
    for one in files:
        head, *rest = [schema(line) for line in one.read_bytes().splitlines()]
        assert (head["event"], head["host"], head["host_id"]) == ("head", "box", "0" * 32)
        assert (head["boot_id"], head["version"]) == ("5d2a", "1.2.3")
        assert decode(one.read_bytes().splitlines()[0]).origin == ORIGIN
        assert {line["event"] for line in rest} == {"load"}
        assert one.stat().st_size <= 2000
    seqs = [line["seq"] for one in files for line in lines(one)]
    assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))


def test_a_head_stands_in_a_file_of_another_name_and_in_one_that_was_cut_and_before_a_line_that_is_too_large(tmp_path):
    path = tmp_path / "a"
    sink = FileSink(path, max_bytes=10, max_files=2, origin=ORIGIN)
    sink.write(numbered(1))
    path.rename(tmp_path / "rotated")
    sink.reopen()
    sink.write(numbered(1))
    os.truncate(path, 0)
    sink.write(numbered(1))
    sink.close()

    for one in (tmp_path / "rotated", path):
        assert [line["event"] for line in lines(one)] == ["head", "load"]


def test_a_file_that_is_appended_to_gets_no_second_head(tmp_path):
    path = tmp_path / "a"
    for _ in range(2):
        sink = FileSink(path, origin=ORIGIN)
        sink.write(numbered(1))
        sink.close()

    assert [line["event"] for line in lines(path)] == ["head", "load", "load"]


def test_with_one_file_only_it_begins_anew(tmp_path):
    path = tmp_path / "a"
    sink = FileSink(path, max_bytes=2000, max_files=1)
    sink.write(numbered(20))
    sink.close()

    assert [one.name for one in tmp_path.iterdir()] == ["a"]
    assert lines(path)[-1]["seq"] == 19
    assert path.stat().st_size <= 2000


def test_a_line_larger_than_a_file_has_one_of_its_own(tmp_path):
    path = tmp_path / "a"
    sink = FileSink(path, max_bytes=10, max_files=3)
    sink.write(numbered(2))
    sink.close()

    assert [line["seq"] for line in lines(path)] == [1]
    assert [line["seq"] for line in lines(path.with_name("a.1"))] == [0]


def test_after_reopen_the_next_event_goes_to_the_file_of_that_name(tmp_path):
    path = tmp_path / "a"
    sink = FileSink(path, max_bytes=0)
    sink.write(numbered(1))
    path.rename(tmp_path / "rotated")
    sink.write(numbered(1))
    sink.reopen()
    sink.write(numbered(1))
    sink.close()

    assert [line["seq"] for line in lines(tmp_path / "rotated")] == [0, 1]
    assert [line["seq"] for line in lines(path)] == [2]


def test_a_file_cut_by_somebody_else_is_written_on(tmp_path):
    path = tmp_path / "a"
    sink = FileSink(path, max_bytes=0)
    sink.write(numbered(2))
    os.truncate(path, 0)
    sink.write(numbered(1))
    sink.close()

    assert [line["seq"] for line in lines(path)] == [2]


def test_a_write_cut_off_in_the_middle_of_a_line_leaves_whole_lines_and_goes_on_there(tmp_path):
    path = tmp_path / "a"
    sink = FileSink(path, max_bytes=0)
    sent = numbered(10)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(SinkError, match="File too large") as refused:
            sink.write(sent)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    done = refused.value.delivered
    assert [line["seq"] for line in lines(path)] == list(range(done))
    assert 1 <= done < 10

    assert sink.write(sent[done:]) == 10 - done
    sink.close()
    assert [line["seq"] for line in lines(path)] == list(range(10))


@pytest.mark.parametrize("kind", ["directory", "link", "fifo", "missing directory"])
def test_what_is_no_file_of_ours_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "a"
    if kind == "directory":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path = path / "b"

    with pytest.raises(ConfigError, match="Give a regular file"):
        FileSink(path)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("limits", [{"max_bytes": -1}, {"max_files": 0}])
def test_limits_out_of_range_are_refused(tmp_path, limits):
    with pytest.raises(ConfigError, match="max_files at least 1"):
        FileSink(tmp_path / "a", **limits)


# ---- standard output ----------------------------------------------------------------------------


@pytest.fixture
def pipe():
    """Both ends of a pipe of one page."""
    import fcntl

    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    ends = {"read": read, "write": write}
    yield ends
    for fd in ends.values():
        os.close(fd)


def read_lines(fd, count):
    data = b""
    while data.count(b"\n") < count:
        data += os.read(fd, 65536)
    return [strict.loads(line) for line in data.splitlines()]


def test_standard_output_gets_the_lines(pipe, feed):
    with SinkRunner(StdoutSink(pipe["write"]), feed.subscribe()) as runner:
        feed.send(*numbered(100))
        found = read_lines(pipe["read"], 100)

    assert [one["seq"] for one in found] == list(range(100))
    assert runner.stats.events == 100


def test_a_reader_that_sleeps_gets_every_line_whole_once_it_wakes(pipe, feed, wait_until):
    with SinkRunner(StdoutSink(pipe["write"]), feed.subscribe()) as runner:
        # A line of more than the pipe takes, so that the reader sleeps in the middle of one.
        long = event(library=replace(SSL, path="/tmp/" + "x" * 6000))
        feed.send(long, *numbered(99))
        wait_until(lambda: runner.stats.errors, what="an impatient sink")
        assert "behind" in (runner.stats.last_error or "")
        found = read_lines(pipe["read"], 100)

    assert [one["seq"] for one in found] == list(range(100))
    assert (runner.stats.events, runner.stats.lost) == (100, 0)


def test_a_reader_that_is_gone_ends_the_sink(pipe, feed, wait_until):
    os.close(pipe.pop("read"))
    runner = SinkRunner(StdoutSink(pipe["write"]), feed.subscribe())
    runner.start()
    feed.send(*numbered(3))
    wait_until(lambda: runner.stats.lost == 3)
    runner.close()

    assert "Broken pipe" in (runner.stats.last_error or "")


# ---- logs for a collector -----------------------------------------------------------------------

COLLECTORS = {"http": http_collector, "grpc": grpc_collector}


@pytest.mark.parametrize("protocol", COLLECTORS)
def test_a_real_collector_gets_events_as_logs(feed, protocol, schema):
    odd = replace(SSL, path="/tmp/lib\udcff\n.so")
    with COLLECTORS[protocol]() as collector:
        with SinkRunner(OtlpLogSink(collector.url, protocol=protocol), feed.subscribe()) as runner:
            feed.send(READY, event(library=odd), Lost(TIME_NS, 4, "kernel"), event("deactivate"))
            runner.close(timeout_s=20)
        found = collector.records()

    assert [(one.event_name, one.severity_text) for one in found] == [
        ("sowatch.ready", "INFO"),
        ("sowatch.load", "INFO"),
        ("sowatch.lost", "WARN"),
        ("sowatch.deactivate", "INFO"),
    ]
    assert [schema(one.body.string_value)["seq"] for one in found] == [0, 1, 2, 3]
    load = found[1]
    assert strict.loads(load.body.string_value)["library"]["path"] == "/tmp/lib\udcff\n.so"
    facts = {one.key: one.value for one in load.attributes}
    assert facts["process.pid"].int_value == PROCESS.pid
    assert facts["file.path"].string_value == "/tmp/lib\\xff\\n.so"
    assert facts["sowatch.rule"].string_value == "all"
    assert load.time_unix_nano == TIME_NS
    assert runner.stats.events == 4


@pytest.mark.parametrize("protocol", COLLECTORS)
def test_a_sink_whose_collector_is_gone_ends_when_it_is_told_to_although_it_would_try_for_minutes(
    feed, protocol, wait_until
):
    sink = OtlpLogSink(f"http://127.0.0.1:{free_port()}", protocol=protocol, timeout_s=600)
    runner = SinkRunner(sink, feed.subscribe())
    before = threading.active_count()
    runner.start()
    feed.send(*numbered(3))
    wait_until(lambda: runner.stats.waiting == 3 and len(runner._batch) == 3)
    runner.close(timeout_s=0)

    wait_until(lambda: threading.active_count() <= before, what="the end of the thread")
    assert (runner.stats.events, runner.stats.lost) == (0, 3)


def test_what_a_collector_refused_is_sent_again_with_the_same_numbers(feed, wait_until):
    with http_collector() as collector:
        collector.refuses = True
        with SinkRunner(OtlpLogSink(collector.url, timeout_s=1), feed.subscribe()) as runner:
            feed.send(*numbered(3))
            wait_until(lambda: runner.stats.errors)
            assert collector.url in (runner.stats.last_error or "")
            collector.refuses = False
            wait_until(lambda: runner.stats.events == 3)

    assert [strict.loads(one.body.string_value)["seq"] for one in collector.records()] == [0, 1, 2]
