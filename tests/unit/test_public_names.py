"""What `from sowatch import ...` gives: a fixed set of names, each with its documentation."""

from __future__ import annotations

import inspect
from typing import get_args

import pytest

import sowatch

#: The contract: a name is added here on purpose, and none goes.
NAMES = [
    "Activate",
    "ActiveFile",
    "AuditReport",
    "Config",
    "Deactivate",
    "Difference",
    "EnvironmentFault",
    "Event",
    "FileId",
    "FileRegistry",
    "Library",
    "LibraryEvent",
    "Load",
    "LoadAttempt",
    "Lost",
    "Mapped",
    "PathReport",
    "Process",
    "ProcessId",
    "ProcessMonitor",
    "ProcessReport",
    "Ready",
    "Repaired",
    "Rule",
    "SowatchError",
    "Stats",
    "Stopped",
    "Unload",
    "Watcher",
    "awatch",
    "decode",
    "process_monitor",
    "watch",
]


def test_the_exported_names_are_these_and_sorted() -> None:
    assert sowatch.__all__ == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_name_is_documented(name: str) -> None:
    value = getattr(sowatch, name)
    # A union has no documentation of its own: that of its members stands for it.
    for one in get_args(value) or (value,):
        own = inspect.getdoc(one) or ""

        # A dataclass without documentation of its own has its signature as docstring.
        assert own
        assert not own.startswith(f"{name}(")


@pytest.mark.parametrize("name", [name for name in NAMES if inspect.isclass(getattr(sowatch, name))])
def test_each_public_method_of_an_exported_class_is_documented(name: str) -> None:
    exported = getattr(sowatch, name)
    bare = [
        member
        for member, value in vars(exported).items()
        if not member.startswith("_")
        and (inspect.isfunction(value) or isinstance(value, property | classmethod | staticmethod))
        and not inspect.getdoc(value)
    ]

    assert bare == []
