"""The Helm chart of deploy/, rendered as `helm install` would."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import helm_python as helm
import yaml

__all__ = ["CHART", "ROOT", "Rendered", "rendered"]

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "sowatch"


class Rendered(NamedTuple):
    """The manifests, and what is asked of them often."""

    manifests: list[dict[str, Any]]

    @property
    def daemonset(self) -> dict[str, Any]:
        return self._one("DaemonSet")

    @property
    def pod(self) -> dict[str, Any]:
        return self.daemonset["spec"]["template"]["spec"]

    @property
    def container(self) -> dict[str, Any]:
        (found,) = self.pod["containers"]
        return found

    @property
    def environment(self) -> dict[str, str]:
        return {one["name"]: one["value"] for one in self.container["env"]}

    @property
    def config(self) -> str:
        return self._one("ConfigMap")["data"]["config.toml"]

    def _one(self, kind: str) -> dict[str, Any]:
        (found,) = [one for one in self.manifests if one["kind"] == kind]
        return found


def rendered(values: dict[str, Any], place: Path = CHART) -> Rendered:
    """What a chart makes of these values; raises `helm.HelmError` for those that the schema does not take."""
    with helm.Chart.load(place) as chart:
        chart.validate_schema(values)
        texts = chart.render(values, name="watch", namespace="nodes")
    documents = [one for name, text in texts.items() if name.endswith(".yaml") for one in yaml.safe_load_all(text)]
    return Rendered([one for one in documents if one])
