"""A tracker of a few rules."""

from __future__ import annotations

import pytest

from sowatch.engine.table import MappingTable
from sowatch.model.rules import Rule, RuleSet


@pytest.fixture
def table():
    return MappingTable(
        RuleSet([Rule(r"libssl|libcrypto|nginx|memfd")]), label=lambda cgroup: cgroup and cgroup.strip("/")
    )
