"""The policy of the load ladder: which strategy comes after which, by the flags of the configuration."""

from __future__ import annotations

from typing import Any

import pytest

from sowatch.model.config import Config
from sowatch.model.literals import STRATEGIES
from sowatch.sources.select import CANDIDATES, candidates_to_try

NO_FALLBACK = {
    "allow_runtime_compiled_fallback": False,
    "allow_prebuilt_fallback": False,
    "allow_procfs_fallback": False,
}


@pytest.mark.parametrize(
    ("flags", "order"),
    [
        ({}, ["core", "runtime", "prebuilt", "procfs"]),
        ({"allow_procfs_fallback": False}, ["core", "runtime", "prebuilt"]),
        ({"allow_prebuilt_fallback": False}, ["core", "runtime", "procfs"]),
        ({"allow_runtime_compiled_fallback": False}, ["core", "prebuilt", "procfs"]),
        # Without any leave to fall, core is all there is, even if compiling is enabled.
        (NO_FALLBACK, ["core"]),
        ({**NO_FALLBACK, "enable_runtime_compiler": True}, ["core"]),
        # Compiling that is enabled is tried without core, and without leave to fall back to it.
        ({**NO_FALLBACK, "enable_core": False, "enable_runtime_compiler": True}, ["runtime"]),
        (
            {**NO_FALLBACK, "enable_runtime_compiler": True, "allow_prebuilt_fallback": True},
            ["core", "runtime", "prebuilt"],
        ),
        ({**NO_FALLBACK, "allow_runtime_compiled_fallback": True}, ["core", "runtime"]),
        # A fallback from core is none where core was not tried.
        ({"enable_core": False}, ["prebuilt", "procfs"]),
        # Nothing enabled and nothing allowed leaves prebuilt.
        ({**NO_FALLBACK, "enable_core": False}, ["prebuilt"]),
        ({**NO_FALLBACK, "allow_procfs_fallback": True}, ["core", "procfs"]),
    ],
)
def test_strategies_are_tried_in_the_order_that_the_flags_allow(flags: dict[str, Any], order: list[str]) -> None:
    assert list(candidates_to_try(Config(**flags))) == order


@pytest.mark.parametrize("strategy", [one for one in STRATEGIES if one != "auto"])
def test_a_strategy_that_was_asked_for_is_the_only_one_tried(strategy: str) -> None:
    assert list(candidates_to_try(Config(strategy=strategy, enable_core=False))) == [strategy]


def test_every_strategy_has_its_rung() -> None:
    assert tuple(CANDIDATES) == STRATEGIES[1:]


def test_only_polling_does_without_bpf() -> None:
    assert [name for name, candidate in CANDIDATES.items() if not candidate.needs_bpf] == ["procfs"]
