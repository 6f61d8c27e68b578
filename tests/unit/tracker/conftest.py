"""A tracker of a few rules."""

from __future__ import annotations

import pytest

from sowatch.rules import Rule, RuleSet
from sowatch.tracker import Tracker


@pytest.fixture
def tracker():
    return Tracker(RuleSet([Rule(r"libssl|libcrypto|nginx|memfd")]), label=lambda cgroup: cgroup and cgroup.strip("/"))
