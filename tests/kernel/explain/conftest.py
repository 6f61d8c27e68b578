"""The watchers that the tests of explanations ask."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import pytest

from sowatch import Rule, Watcher
from support import bpfsys
from support.asked import Watch
from support.kernel import TAG


@pytest.fixture(scope="module")
def long_watcher() -> Iterator[Watcher]:
    error = bpfsys.why_no_bpf()
    if error is not None:
        pytest.skip(f"bpf(2) cannot create a map: {error.strerror}")
    with Watcher(Rule(re.escape(f"wanted{TAG}"), name="wanted")) as watcher:
        yield watcher


@pytest.fixture
def watcher(long_watcher: Watcher, wait_until: Any) -> Iterator[Watcher]:
    """A running watcher whose one rule, ``wanted``, looks for ``wanted`` and our tag in a path."""
    yield long_watcher
    # Then it has nothing to read while the descriptors of the next test are counted.
    wait_until(lambda: not long_watcher.snapshot(), what="the end of the test's processes")


@pytest.fixture
def watch(closing: contextlib.ExitStack) -> Watch:
    """``watch(*rules, **options)`` is a Watcher of the test's own, running."""
    return lambda *rules, **options: closing.enter_context(Watcher(*rules, **options))
