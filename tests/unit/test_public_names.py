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
    "MappedFacts",
    "PathReport",
    "Process",
    "ProcessId",
    "ProcessMonitor",
    "ProcessReport",
    "Ready",
    "Renewed",
    "Repaired",
    "Rule",
    "SowatchError",
    "Stale",
    "Staleness",
    "Stats",
    "Stopped",
    "Subscription",
    "Unload",
    "Watcher",
    "awatch",
    "decode",
    "facts_of",
    "process_monitor",
    "to_json",
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


def test_a_subscription_has_the_methods_of_its_reader_only() -> None:
    public = [name for name in dir(sowatch.Subscription) if not name.startswith("_")]
    assert public == ["call_on_event", "close", "get", "has_ended", "lost", "waiting", "waiting_bytes"]


def test_what_is_printed_says_what_it_is() -> None:
    def attach(_: object) -> None: ...

    watcher = sowatch.Watcher(sowatch.Rule("libssl", name="tls", exports=("SSL_read",), on_activate=attach))
    assert repr(watcher) == "<Watcher not started: tls>"
    assert repr(watcher.subscribe()) == "<Subscription open: 0 waiting, 0 lost>"
    assert repr(sowatch.Rule("libz")) == "Rule('libz')"
    assert repr(next(iter(watcher.rules))).startswith(
        "Rule('libssl', name='tls', exports=('SSL_read',), on_activate=test_what_is_printed"
    )
    library = sowatch.Library("/usr/lib/libz.so.1", sowatch.FileId(8, 1, 7))
    assert repr(sowatch.ActiveFile(library, -1)) == "<ActiveFile '/usr/lib/libz.so.1' closed>"
