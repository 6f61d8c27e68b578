"""The list of metrics: docs/metrics.md is made from it, and it keeps the rules of its trade."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sowatch.telemetry.names import CATALOGUE, document, prometheus_name

ROOT = Path(__file__).resolve().parents[3]


def test_the_document_is_what_the_list_gives():
    assert (ROOT / "docs/metrics.md").read_text(encoding="utf-8") == document(), "write docs/metrics.md anew"


@pytest.mark.parametrize("definition", CATALOGUE.values(), ids=lambda one: one.name)
def test_a_metric_is_explained_and_has_no_label_without_bounds(definition):
    assert definition.help.endswith(".")
    # Calls are counted by container because whoever runs them asks for it; the series of one metric are bounded.
    # HTTP requests have the attributes of OpenTelemetry's conventions, which are bounded by the agent.
    wild = {"pid", "tgid", "path", "inode", "comm"} | ({"container"} if "calls" not in definition.name else set())
    assert not wild & set(definition.labels)
    assert re.fullmatch(r"sowatch(_[a-z]+)+", prometheus_name(definition.name, definition.kind))


def test_the_origins_sets_of_metrics_are_complete():
    origins = {word for one in CATALOGUE.values() for word in (one.origin or "").split(", ")}

    assert {"usm.so_watcher.hits", "usm.so_watcher.matches"} <= origins
    assert {
        f"usm.file_registry.{name}"
        for name in (
            "total_files",
            "total_pids",
            "registered",
            "already_registered",
            "hook_failed",
            "blocked",
            "unregistered",
            "unregister_errors",
            "unregister_failed_cb",
            "unregister_path_id_not_found",
        )
    } <= origins
