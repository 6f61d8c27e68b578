"""What the tests of explanations begin with: a case in which all is well, and something that hangs."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from support.explained import Case


@pytest.fixture
def case() -> Case:
    return Case()


@pytest.fixture
def dam() -> Iterator[threading.Event]:
    """Set when the test ends, so that no thread hangs on."""
    event = threading.Event()
    yield event
    event.set()
