"""Counter, Gauge, Histogram and the registry: the origin's meaning, and bounds."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sowatch.model.errors import UsageError
from sowatch.model.histogram import Latency
from sowatch.telemetry.metrics import OVERFLOW_TAG, Counter, MetricRegistry, split_tags

TAGS = st.lists(st.sampled_from(["a:1", "b:2", "c:3", "flag"]), max_size=4)


class Clock:
    """Seconds that a test moves by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def registry(clock):
    return MetricRegistry(clock=clock)


def test_metrics_of_different_names_are_different(registry):
    assert registry.counter("m1") is not registry.counter("m2")


def test_a_metric_is_found_again_by_its_name(registry):
    assert registry.counter("m1") is registry.counter("m1")


def test_different_tags_make_different_metrics(registry):
    assert registry.counter("m1", "foo:bar") is not registry.counter("m1", "foo:baz")


def test_the_order_of_tags_does_not_matter(registry):
    assert registry.counter("m1", "a:1", "b:2") is registry.counter("m1", "b:2", "a:1")


def test_options_are_no_part_of_what_a_metric_is(registry):
    first = registry.counter("m1", "a:1", "_statsd")

    assert registry.counter("m1", "_prometheus", "a:1") is first
    assert first.options == ("_statsd",)


@given(TAGS, st.lists(st.sampled_from(["_statsd", "_prometheus", "_otlp"])), st.randoms())
def test_any_order_and_repetition_of_tags_and_options_finds_the_same_metric(tags, options, random):
    registry = MetricRegistry()
    first = registry.counter("m", *tags, *options)
    words = [*tags, *tags[:1], *options]
    random.shuffle(words)

    assert registry.counter("m", *words) is first
    assert first.tags == tuple(sorted(set(tags)))
    assert len(registry.metrics()) == 1


@pytest.mark.parametrize(
    ("words", "tags", "options"),
    [
        (["b:1", "a:2"], ("a:2", "b:1"), ()),
        (["_statsd", "_prometheus"], (), ("_prometheus", "_statsd")),
        (["_statsd", "b:1", "a:2", "_otlp"], ("a:2", "b:1"), ("_otlp", "_statsd")),
    ],
)
def test_words_are_split_into_sorted_tags_and_options(words, tags, options):
    assert split_tags(words) == (tags, options)


def test_a_name_that_is_taken_by_another_kind_is_refused_whatever_the_tags(registry):
    registry.counter("m1", "a:1")

    with pytest.raises(UsageError, match=r"'m1' is a counter, not a gauge. Use another name"):
        registry.gauge("m1", "a:2")


def test_a_counter_ignores_what_would_make_it_fall(registry):
    counter = registry.counter("m1")
    counter.add(5)
    counter.add(10)
    counter.add(-3)

    assert counter.get() == 15


def test_a_gauge_is_set_and_moved_both_ways(registry):
    gauge = registry.gauge("m1")
    gauge.set(5)
    gauge.add(10)
    gauge.add(-12)

    assert gauge.get() == 3


@given(st.lists(st.integers(-100, 100)))
def test_a_counter_is_the_sum_of_all_that_raised_it(deltas):
    counter = MetricRegistry().counter("m")
    for delta in deltas:
        counter.add(delta)

    assert counter.get() == sum(delta for delta in deltas if delta > 0)


@given(st.lists(st.floats(-1, 20), min_size=1))
def test_a_histogram_has_every_value_in_the_one_bucket_it_belongs_to(values):
    histogram = MetricRegistry().histogram("m")
    for value in values:
        histogram.observe(value)
    found = histogram.get()

    for place, bound in enumerate(found.bounds):
        assert sum(found.counts[: place + 1]) == sum(max(0.0, value) <= bound for value in values)
    assert found.count == len(values)
    assert found.total == pytest.approx(sum(max(0.0, value) for value in values))


def test_a_histogram_takes_no_value_that_is_no_number(registry):
    histogram = registry.histogram("m")
    histogram.observe(float("nan"))

    assert (histogram.get().count, histogram.get().total) == (0, 0.0)


def test_distributions_of_other_bounds_are_not_added(registry):
    with pytest.raises(ValueError, match="different bounds"):
        registry.histogram("m").add(Latency((1.0, 2.0)).read())


def test_threads_that_count_at_once_lose_nothing(registry):
    def count() -> None:
        for _ in range(2_000):
            registry.counter("m1", "a:1").add()
            registry.gauge("m2").add(1)
            registry.histogram("m3").observe(1.0)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert registry.counter("m1", "a:1").get() == 8_000
    assert registry.gauge("m2").get() == 8_000
    assert registry.histogram("m3").get().count == 8_000


# ---- bounds -------------------------------------------------------------------------------------


def test_what_has_no_room_goes_to_one_series_and_is_counted():
    registry = MetricRegistry(max_series=3)
    for number in range(10):
        registry.counter("m", f"k:{number}").add(1)

    assert {metric.tags: metric.get() for metric in registry.metrics() if metric.name == "m"} == {
        ("k:0",): 1,
        ("k:1",): 1,
        ("k:2",): 1,
        (OVERFLOW_TAG,): 7,
    }
    assert registry.counter("telemetry.overflow", "metric:m").get() == 7


def test_a_metric_that_was_there_before_the_limit_is_still_found():
    registry = MetricRegistry(max_series=1)
    first = registry.counter("m", "k:0")
    registry.counter("m", "k:1")

    assert registry.counter("m", "k:0") is first


@given(st.lists(st.text(max_size=3), max_size=60))
def test_no_sequence_of_labels_makes_more_series_than_the_limit_and_none_is_forgotten(values):
    registry = MetricRegistry(max_series=5)
    for value in values:
        registry.counter("m", f"k:{value}").add(1)
    series = [metric for metric in registry.metrics() if metric.name == "m"]

    assert len(series) <= 6
    assert sum(one.get() for one in series if isinstance(one, Counter)) == len(values)


def test_a_forgotten_series_makes_room():
    registry = MetricRegistry(max_series=1)
    registry.forget(registry.counter("m", "k:0"))

    assert registry.counter("m", "k:1").tags == ("k:1",)


def test_names_of_rules_that_are_no_text_or_too_long_become_tags_all_the_same(registry):
    assert registry.counter("m", "rule:\udcff").tags == ("rule:\\udcff",)
    assert len(registry.counter("m", "rule:" + "x" * 1000).tags[0]) == 200


# ---- sources ------------------------------------------------------------------------------------


def test_sources_are_asked_before_metrics_are_read_and_no_more_once_they_are_taken_away(registry):
    remove = registry.add_source(lambda: registry.counter("c").add(1))

    assert [metric.get() for metric in registry.collect()] == [1]
    remove()
    assert [metric.get() for metric in registry.collect()] == [1]


def test_sources_are_asked_no_more_often_than_the_interval_says(clock):
    registry = MetricRegistry(sample_interval_s=1.0, clock=clock)
    registry.add_source(lambda: registry.counter("c").add(1))
    for _ in range(5):
        registry.collect()
    clock.now_s += 1.0

    assert [metric.get() for metric in registry.collect()] == [2]


def test_a_source_that_fails_is_counted_and_hides_no_other(registry):
    registry.add_source(lambda: 1 / 0)
    registry.add_source(lambda: registry.counter("c").add(1))

    assert {metric.name: metric.get() for metric in registry.collect()} == {"c": 1, "telemetry.sample_errors": 1}


def test_the_report_is_sorted_and_plain(registry):
    registry.gauge("b", "k:1", "_statsd").set(2)
    registry.counter("a").add(1)
    registry.histogram("c").observe(0.5)

    assert registry.report() == [
        {"Name": "a", "Type": "counter", "Opts": [], "Value": 1},
        {"Name": "b", "Type": "gauge", "Tags": ["k:1"], "Opts": ["_statsd"], "Value": 2},
        {"Name": "c", "Type": "histogram", "Opts": [], "Value": {"count": 1, "sum": 0.5}},
    ]
