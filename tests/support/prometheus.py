"""A real Prometheus that scrapes one target, and pages of metrics as one reads them."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from support.receivers import free_port

__all__ = ["Prometheus", "samples"]


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """The value of each sample of a page of metrics, by its name and its labels."""
    return {
        (one.name, frozenset(one.labels.items())): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


class Prometheus:
    """Scrapes ``target`` (host:port) four times a second into ``directory``; ends with ``spawn``."""

    def __init__(self, spawn: Any, wait_until: Any, directory: Path, target: str) -> None:
        self._wait_until = wait_until
        self._url = f"http://127.0.0.1:{free_port()}"
        config = directory / "prometheus.yml"
        config.write_text(
            "global: {scrape_interval: 250ms, scrape_timeout: 250ms}\n"
            "scrape_configs:\n"
            f"  - {{job_name: sowatch, static_configs: [{{targets: ['{target}']}}]}}\n",
            encoding="utf-8",
        )
        with (directory / "prometheus.log").open("wb") as log:
            spawn(
                [
                    "prometheus",
                    f"--config.file={config}",
                    f"--storage.tsdb.path={directory / 'data'}",
                    f"--web.listen-address={self._url.removeprefix('http://')}",
                ],
                stdout=log,
                stderr=log,
            )

    def query(self, expression: str) -> dict[tuple[str, ...], float]:
        """The value of each series, by its labels (``key=value``, sorted, without the target's)."""
        words = urllib.parse.urlencode({"query": expression})
        try:
            with urllib.request.urlopen(f"{self._url}/api/v1/query?{words}", timeout=5) as answer:
                found = json.load(answer)["data"]["result"]
        except (urllib.error.URLError, ConnectionError):
            return {}  # it is still starting
        own = {"__name__", "instance", "job"}
        return {
            tuple(f"{key}={value}" for key, value in sorted(one["metric"].items()) if key not in own): float(
                one["value"][1]
            )
            for one in found
        }

    def wait_for(self, expression: str, expected: dict[tuple[str, ...], float]) -> None:
        """Waits until a query gives just that."""
        last: list[Any] = []

        def is_there() -> bool:
            last[:] = [self.query(expression)]
            return bool(last[0] == expected)

        self._wait_until(is_there, 30, f"{expression} == {expected} in Prometheus")
