"""A plugin of pytest that shows a failure when it happens and writes down what is done: a guest may not live on.

$SOWATCH_MATRIX_PROGRESS is the file, one JSON object a line: ``begun`` with the name of a test as JUnit has it, or
``test`` with its ``outcome`` (passed, failure, error, skipped) and ``why``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

__all__ = ["PROGRESS", "pytest_configure"]

#: Variable with the path of the file.
PROGRESS = "SOWATCH_MATRIX_PROGRESS"


class _AtOnce:
    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        path = os.environ.get(PROGRESS)
        self._progress = Path(path) if path else None

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._note({"begun": _junit_name(nodeid)})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            trouble = "failure" if report.when == "call" else "error"
            outcome = trouble if report.failed else report.outcome
            why = report.longreprtext.strip().rpartition("\n")[2]
            self._note({"test": _junit_name(report.nodeid), "outcome": outcome, "why": why})
        else:
            self._note({report.when: _junit_name(report.nodeid)})
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            terminal.write_line(f"\n{report.nodeid} ({report.when}):\n{report.longreprtext}")

    def _note(self, what: dict[str, str]) -> None:
        if self._progress is not None:
            with self._progress.open("a", encoding="utf-8") as file:
                file.write(json.dumps(what) + "\n")


def _junit_name(nodeid: str) -> str:
    path, _, name = nodeid.partition("::")
    return f"{path.removesuffix('.py').replace('/', '.')}::{name}"


def pytest_configure(config: pytest.Config) -> None:
    """Called by pytest."""
    config.pluginmanager.register(_AtOnce(config))
