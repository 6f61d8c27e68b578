"""A tracker of a few rules."""

from __future__ import annotations

import pytest

from sowatch.model.rules import Rule, RuleSet
from support.tracking import KeptEffects


@pytest.fixture
def table():
    return KeptEffects(
        RuleSet([Rule(r"libssl|libcrypto|nginx|memfd")]), label=lambda cgroup: cgroup and cgroup.strip("/")
    )
