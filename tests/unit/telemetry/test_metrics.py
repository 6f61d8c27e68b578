"""Counter, Gauge, Histogram, MetricGroup and the registry: the origin's meaning, and bounds."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sowatch.model.errors import UsageError
from sowatch.model.histogram import Latency
from sowatch.telemetry.metrics import OVERFLOW_TAG, Counter, MetricGroup, MetricRegistry, default_registry, split_tags

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


@given(TAGS, st.lists(st.sampled_from(["_statsd", "_prometheus", "_payload"])), st.randoms())
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
        (["_statsd", "b:1", "a:2", "_payload"], ("a:2", "b:1"), ("_payload", "_statsd")),
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


# ---- groups -------------------------------------------------------------------------------------


def test_a_metric_of_a_group_has_its_namespace_and_its_tags(registry):
    made = MetricGroup("watcher", "tag1:a", registry=registry).counter("hits", "tag2:b", "_statsd")

    assert registry.counter("watcher.hits", "tag2:b", "tag1:a") is made


def test_a_group_without_a_namespace_leaves_names_alone(registry):
    assert MetricGroup("", registry=registry).counter("hits").name == "hits"


def test_a_group_uses_the_default_registry_unless_it_is_given_one():
    made = MetricGroup("test_metrics_default").counter("hits")

    assert made in default_registry().metrics()
    default_registry().forget(made)


def test_a_summary_has_growth_rates_and_the_tags_that_not_all_have(registry, clock):
    group = MetricGroup("ns", "common:x", registry=registry)
    one, two = group.counter("m1", "tag:foo"), group.counter("m2", "tag:bar")
    group.gauge("files").set(7)
    group.summary()
    clock.now_s += 4
    one.add(10)
    two.add(20)

    assert group.summary() == "m1[tag:foo]=10(2.50/s) m2[tag:bar]=20(5.00/s) files=7"


def test_a_summary_after_less_than_a_second_does_not_claim_a_higher_rate(registry, clock):
    group = MetricGroup("", registry=registry)
    counter = group.counter("m")
    group.summary()
    clock.now_s += 0.1
    counter.add(3)

    assert group.summary() == "m=3(3.00/s)"


def test_a_summary_of_many_metrics_leaves_out_those_that_stand_still(registry):
    group = MetricGroup("", registry=registry)
    for number in range(6):
        group.counter(f"m{number}")
    group.counter("m3").add(2)

    assert group.summary() == "m3=2(2.00/s)"
    assert group.summary() == "n/a"


def test_a_summary_of_an_empty_group_says_so(registry):
    assert MetricGroup("", registry=registry).summary() == "n/a"


def test_each_client_of_a_summary_has_its_own_past(registry):
    group = MetricGroup("", registry=registry)
    counter = group.counter("m")
    counter.add(10)

    assert group.summary("a") == "m=10(10.00/s)"
    counter.add(5)
    assert group.summary("a") == "m=5(5.00/s)"
    assert group.summary("b") == "m=15(15.00/s)"


# ---- deltas -------------------------------------------------------------------------------------


def test_payload_deltas_are_growth_for_counters_and_values_for_gauges(registry):
    registry.gauge("g", "_payload").set(10)
    counter = registry.counter("c", "a:1", "_payload")
    registry.counter("not.told").add(1)
    counter.add(10)

    assert registry.payload_deltas("x") == {"c[a:1]": 10, "g": 10}
    assert registry.payload_deltas("x") == {"c[a:1]": 0, "g": 10}
    counter.add(5)
    assert registry.payload_deltas("x") == {"c[a:1]": 5, "g": 10}
    assert registry.payload_deltas("y") == {"c[a:1]": 15, "g": 10}


def test_a_client_that_was_away_for_five_minutes_begins_anew(registry, clock):
    registry.counter("c", "_payload").add(10)
    registry.payload_deltas("x")

    clock.now_s += 299
    assert registry.payload_deltas("x") == {"c": 0}
    clock.now_s += 300
    assert registry.payload_deltas("x") == {"c": 10}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(-5, 50)), max_size=30))
def test_what_a_client_is_told_adds_up_to_what_the_counter_has(steps):
    registry = MetricRegistry(clock=Clock())
    counter = registry.counter("c", "_payload")
    told = dict.fromkeys("abc", 0)
    for client, delta in steps:
        counter.add(delta)
        told[client] += registry.payload_deltas(client)["c"]
    for client in "abc":
        told[client] += registry.payload_deltas(client)["c"]

    assert set(told.values()) == {counter.get()}


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
