"""Config: defaults that work, values that cannot work refused by name."""

from __future__ import annotations

import pickle

import pytest

from sowatch.model.config import Config
from sowatch.model.errors import ConfigError, UsageError
from sowatch.model.literals import STRATEGIES


def test_defaults_are_those_the_contract_names():
    config = Config()

    assert (config.strategy, config.proc_root, config.max_blocked) == ("auto", "/proc", 2000)
    assert config.enable_core
    assert config.allow_procfs_fallback


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_rung_of_the_ladder_can_be_asked_for(strategy):
    assert Config(strategy=strategy).strategy == strategy


def test_unknown_strategy_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="auto, core, runtime, prebuilt, procfs") as refused:
        Config(strategy="magic")

    assert refused.value.key == "strategy"


@pytest.mark.parametrize("ring_bytes", [4096, 1 << 23, 1 << 30])
def test_ring_of_a_power_of_two_from_a_page_to_a_gigabyte_is_taken(ring_bytes):
    assert Config(ring_bytes=ring_bytes).ring_bytes == ring_bytes


@pytest.mark.parametrize("ring_bytes", [0, -4096, 2048, 4097, 12288, 1 << 31])
def test_ring_of_another_size_is_refused(ring_bytes):
    with pytest.raises(ConfigError) as refused:
        Config(ring_bytes=ring_bytes)

    assert refused.value.key == "ring_bytes"


SIZES = ["max_processes", "max_verdicts", "max_pending", "queue_events", "max_blocked"]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [1, 1 << 24])
def test_size_within_its_range_is_taken(name, value):
    assert getattr(Config(**{name: value}), name) == value


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -1, (1 << 24) + 1])
def test_size_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match="out of range") as refused:
        Config(**{name: value})

    assert refused.value.key == name


@pytest.mark.parametrize("nice", [-20, 0, 19])
def test_nice_value_that_setpriority_takes_is_taken(nice):
    assert Config(nice=nice).nice == nice


@pytest.mark.parametrize("nice", [-21, 20])
def test_nice_value_out_of_range_is_refused_by_name(nice):
    with pytest.raises(ConfigError, match="Use a number from -20 to 19") as refused:
        Config(nice=nice)

    assert refused.value.key == "nice"


@pytest.mark.parametrize("name", ["ignore_ttl_s", "block_ttl_s"])
@pytest.mark.parametrize("value", [0, -0.5])
def test_time_that_is_not_positive_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match="positive number of seconds") as refused:
        Config(**{name: value})

    assert refused.value.key == name


def test_config_error_is_wrong_usage():
    with pytest.raises(UsageError) as refused:
        Config(max_blocked=0)

    assert refused.value.exit_code == 2


def test_replace_gives_a_changed_copy():
    config = Config()

    changed = config.replace(queue_events=10, proc_root="/host/proc")

    assert (changed.queue_events, changed.proc_root, changed.max_blocked) == (10, "/host/proc", config.max_blocked)
    assert config == Config()


def test_replace_checks_values_as_the_constructor_does():
    with pytest.raises(ConfigError, match="out of range"):
        Config().replace(queue_events=0)


def test_replace_of_an_unknown_setting_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"no such setting.*queue_events") as refused:
        Config().replace(queue_size=10)

    assert refused.value.key == "queue_size"


def test_config_does_not_change_and_has_no_positional_fields():
    with pytest.raises(AttributeError):
        Config().max_blocked = 3
    with pytest.raises(TypeError):
        Config("core")


def test_config_and_its_error_survive_pickling():
    assert pickle.loads(pickle.dumps(Config(max_blocked=5))) == Config(max_blocked=5)
    error = pickle.loads(pickle.dumps(ConfigError("ring_bytes", "odd", source="sowatch.toml")))

    assert (error.key, error.problem, error.source) == ("ring_bytes", "odd", "sowatch.toml")
    assert str(error) == "ring_bytes (from sowatch.toml): odd"
