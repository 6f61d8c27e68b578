"""From the core's figures to metrics: nothing is counted twice, nothing is lost when what is followed changes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sowatch.engine.activation import FileRegistry, RegistryStats
from sowatch.model.config import Config
from sowatch.model.events import Library
from sowatch.model.histogram import RuleTimings
from sowatch.model.identity import FileId, ProcessId
from sowatch.model.process_events import ProcessMonitorStats
from sowatch.model.stats import Losses
from sowatch.telemetry import MetricRegistry, Sampler
from sowatch.watcher.watcher import Watcher
from support.figures import Figures, Monitor, changed
from support.scripted import READY


@pytest.fixture
def registry():
    return MetricRegistry()


@pytest.fixture
def sampler(registry):
    return Sampler(registry, version="1.2.3")


def values(registry):
    return {(metric.name, *metric.tags): metric.get() for metric in registry.collect()}


def test_the_figures_of_a_watcher_become_metrics(registry, sampler):
    losses = Losses(ring=1, processes=2, pending=3, scratch=4, throttled=5, skipped=7, unresolved=8, unread=9)
    stats = changed(
        records=10,
        loads=9,
        unloads=8,
        events=20,
        processes=3,
        libraries=2,
        mappings=5,
        lost_queue=6,
        losses=losses,
        partial=4,
    )
    sampler.follow_watcher(Figures(stats, READY, is_repaired=False))
    found = values(registry)

    assert found["watcher.hits",] == 10
    assert found["watcher.matches",] == 9
    assert found["watcher.mappings",] == 5
    assert found["watcher.partial",] == 4
    assert found["watcher.repaired",] == 0
    assert {key[1]: value for key, value in found.items() if key[0] == "watcher.lost"} == {
        "where:ring": 1,
        "where:processes": 2,
        "where:pending": 3,
        "where:scratch": 4,
        "where:throttled": 5,
        "where:skipped": 7,
        "where:unresolved": 8,
        "where:unread": 9,
        "where:queue": 6,
    }
    assert found["strategy.info", "guarantee:exact", "hooks:syscall", "strategy:core"] == 1
    assert found["build.info", "version:1.2.3"] == 1


def test_a_real_watcher_can_be_followed_before_it_is_started(registry, sampler):
    sampler.follow_watcher(Watcher(config=Config()))

    assert values(registry)["watcher.hits",] == 0
    assert ("telemetry.sample_errors",) not in values(registry)


def test_figures_that_stand_still_are_not_counted_again(registry, sampler):
    sampler.follow_watcher(Figures(changed(loads=9)))
    values(registry)

    assert values(registry)["watcher.matches",] == 9


def test_a_new_watcher_adds_to_the_counters_of_the_one_before_and_takes_over_the_gauges(registry, sampler):
    end = sampler.follow_watcher(Figures(changed(loads=9, mappings=5), READY))
    values(registry)
    end()
    assert ("watcher.mappings",) not in values(registry)
    assert not [key for key in values(registry) if key[0] == "strategy.info"]

    sampler.follow_watcher(Figures(changed(loads=2, mappings=1)))

    assert values(registry)["watcher.matches",] == 11
    assert values(registry)["watcher.mappings",] == 1


def test_the_last_figures_are_taken_when_the_following_ends(registry, sampler):
    figures = Figures(changed(loads=1))
    end = sampler.follow_watcher(figures)
    figures.stats = changed(loads=7)
    end()
    end()
    figures.stats = changed(loads=100)

    assert values(registry)["watcher.matches",] == 7


@given(st.lists(st.lists(st.integers(0, 20), max_size=5), max_size=5))
def test_a_counter_is_the_sum_of_all_watchers_whenever_they_are_looked_at(watchers):
    registry = MetricRegistry()
    sampler = Sampler(registry)
    expected = 0
    for growths in watchers:
        figures = Figures()
        end = sampler.follow_watcher(figures)
        total = 0
        for growth in growths:
            total += growth
            figures.stats = changed(loads=total)
            if growth % 2:
                values(registry)
        expected += total
        end()

    assert values(registry).get(("watcher.matches",), 0) == expected


def test_timings_become_histograms_by_rule_and_callback_and_grow_by_what_is_new(registry, sampler):
    timings = RuleTimings()
    sampler.follow_watcher(Figures(timings={"tls": timings}))
    timings.callbacks["on_load"].observe(0.002)
    values(registry)
    timings.callbacks["on_load"].observe(0.002)
    timings.attach.observe(0.5)
    timings.delays["on_activate"].observe(0.001)
    found = values(registry)

    assert found["callback.duration_seconds", "callback:on_load", "rule:tls"].count == 2
    assert found["callback.duration_seconds", "callback:on_load", "rule:tls"].total == pytest.approx(0.004)
    assert found["attach.duration_seconds", "rule:tls"].count == 1
    assert found["load_to_callback.seconds", "callback:on_activate", "rule:tls"].count == 1


def test_rules_beyond_the_limit_are_not_mixed_up_in_the_series_they_share():
    registry = MetricRegistry(max_series=4)
    sampler = Sampler(registry)
    rules = {f"rule{number}": RuleTimings() for number in range(8)}
    sampler.follow_watcher(Figures(timings=rules))
    for _ in range(3):
        for timings in rules.values():
            timings.attach.observe(0.1)
        found = values(registry)

    series = [value for key, value in found.items() if key[0] == "attach.duration_seconds"]
    assert len(series) == 5
    assert sum(one.count for one in series) == 24


def test_the_figures_of_a_real_file_registry_become_metrics(registry, sampler):
    files = FileRegistry(is_alive=lambda process: True)
    sampler.follow_watcher(Figures(registry=files))
    library = Library("/usr/lib/libz.so.1", FileId(8, 1, 42))
    files.acquire("tls", library, ProcessId(1, 0))
    files.activate("tls", library, lambda file: None)
    found = values(registry)

    assert found["file_registry.registered",] == 1
    assert found["file_registry.total_files",] == 1
    assert found["file_registry.total_pids",] == 1
    files.release("tls", library.id, ProcessId(1, 0))
    files.deactivate("tls", library.id, lambda file: None)
    assert values(registry)["file_registry.unregistered",] == 1
    assert values(registry)["file_registry.total_files",] == 0


def test_every_figure_of_registry_and_monitor_has_a_metric(registry, sampler):
    numbers = {name: place + 1 for place, name in enumerate(ProcessMonitorStats.__struct_fields__)}
    sampler.follow_process_monitor(Monitor(ProcessMonitorStats(**numbers)))
    found = values(registry)

    assert sorted(value for key, value in found.items() if key[0].startswith("process_monitor.")) == list(
        range(1, len(numbers) + 1)
    )
    sampler.follow_watcher(Figures())
    assert len([key for key in values(registry) if key[0].startswith("file_registry.")]) == len(
        RegistryStats.__struct_fields__
    )
    assert ("telemetry.sample_errors",) not in values(registry)
