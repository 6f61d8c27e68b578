"""The Helm chart: rendered by Helm's own engine, validated against the schemas of Kubernetes, and what it grants."""

from __future__ import annotations

import json
import re
from typing import Any

import helm_python as helm
import jsonschema
import kubernetes_validate
import pytest
import yaml

import pack
from sowatch.agent.settings import load_settings
from sowatch.cli._client import QUICK_TIMEOUT_S
from sowatch.linux.capabilities import NEEDED
from support.chart import CHART, ROOT, Rendered, rendered

#: The oldest that Chart.yaml allows, and the newest that the schemas are of.
VERSIONS = ("1.30", "1.37")
#: Every value that has an effect of its own.
FULL: dict[str, Any] = {
    "image": {"repository": "registry.example/sowatch", "digest": f"sha256:{'0' * 64}", "pullPolicy": "Always"},
    "imagePullSecrets": [{"name": "pull"}],
    "commonLabels": {"team": "nodes"},
    "podLabels": {"pod": "yes"},
    "podAnnotations": {"example.com/a": "b"},
    "criSocket": "/run/containerd/containerd.sock",
    "fleet": {"enabled": True, "endpoint": "https://fleet.example:4318", "tokenSecret": {"name": "fleet"}},
    "metricsPort": 9500,
    "hostSocketDirectory": "/run/sowatch",
    "podMonitor": {
        "enabled": True,
        "labels": {"release": "prometheus"},
        "relabelings": [{"action": "labeldrop", "regex": "pod"}],
        "metricRelabelings": [{"action": "labeldrop", "regex": "by"}],
    },
    "networkPolicy": {
        "enabled": True,
        "from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
    },
    "serviceAccount": {"name": "watch", "annotations": {"a": "b"}},
    "podSecurityContext": {"supplementalGroups": [1]},
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": [{"key": "k", "operator": "Exists"}]}]
            }
        }
    },
    "priorityClassName": "system-node-critical",
    "updateStrategy": {"type": "OnDelete", "rollingUpdate": None},
    "extraEnv": [{"name": "SOWATCH_LOG_LEVEL", "value": "debug"}],
    "extraVolumes": [{"name": "more", "emptyDir": {}}],
    "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("values", [{}, FULL], ids=["defaults", "everything"])
def test_every_manifest_is_what_kubernetes_takes(values: dict[str, Any], version: str) -> None:
    found = rendered(values)
    assert {one["kind"] for one in found.manifests} >= {"DaemonSet", "ConfigMap", "ServiceAccount"}
    for one in found.manifests:
        if one["kind"] != "PodMonitor":  # not of Kubernetes itself
            kubernetes_validate.validate(one, version, strict=True)


def test_helm_finds_no_fault_in_the_chart() -> None:
    report = helm.lint(CHART, FULL, strict=True)
    # 1 is information.
    assert [one for one in report["messages"] if one["severity"] > 1] == report["errors"] == []


@pytest.fixture(scope="module")
def plain() -> Rendered:
    return rendered({})


def test_the_container_is_not_privileged_and_has_the_capabilities_that_the_agent_keeps(plain: Rendered) -> None:
    context = plain.container["securityContext"]
    assert context["capabilities"]["drop"] == ["ALL"]
    assert {f"CAP_{one}" for one in context["capabilities"]["add"]} == set(NEEDED)
    assert (context["privileged"], context["allowPrivilegeEscalation"], context["readOnlyRootFilesystem"]) == (
        False,
        False,
        True,
    )


def test_what_ptrace_permits_stands_beside_it() -> None:
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    before = text[: text.index("- SYS_PTRACE")].rsplit("\n      - ", 1)[1]
    assert "read\n      # and write its memory and to run code in it" in before


def test_it_sees_the_pids_of_the_node_and_shares_nothing_else_with_it(plain: Rendered) -> None:
    assert plain.pod["hostPID"] is True
    assert not plain.pod.keys() & {"hostNetwork", "hostIPC"}
    assert plain.pod["automountServiceAccountToken"] is False


def test_it_mounts_what_it_needs_and_no_more(plain: Rendered) -> None:
    assert {one["name"]: one.get("hostPath") for one in plain.pod["volumes"]} == {
        "config": None,
        "run": None,
        "tracing": {"path": "/sys/kernel/tracing", "type": "Directory"},
    }
    writable = [one["mountPath"] for one in plain.container["volumeMounts"] if not one.get("readOnly")]
    assert writable == ["/run/sowatch"]


def test_a_socket_of_the_runtime_is_mounted_without_its_directory() -> None:
    found = rendered({"criSocket": "/run/crio/crio.sock"})
    assert found.environment["SOWATCH_WATCH_CRI_SOCKET"] == "/run/crio/crio.sock"
    (mount,) = [one for one in found.container["volumeMounts"] if one["name"] == "cri"]
    assert (mount["mountPath"], mount["readOnly"]) == ("/run/crio/crio.sock", True)
    (volume,) = [one for one in found.pod["volumes"] if one["name"] == "cri"]
    assert volume["hostPath"] == {"path": "/run/crio/crio.sock", "type": "Socket"}


def test_probes_ask_the_agent_and_nothing_behind_it(plain: Rendered) -> None:
    found = {one: plain.container[f"{one}Probe"] for one in ("startup", "liveness", "readiness")}
    # Not by the network, whose listener other pods may fill.
    assert not [one for one in found.values() if one.keys() & {"httpGet", "tcpSocket", "grpc"}]
    command = "/opt/sowatch/bin/sowatch"
    assert {name: one["exec"]["command"] for name, one in found.items()} == {
        "startup": [command, "debug", "health"],
        "liveness": [command, "debug", "health"],
        "readiness": [command, "debug", "ready"],
    }
    assert f'ENTRYPOINT ["{command}"]' in (ROOT / "deploy" / "Containerfile").read_text(encoding="utf-8")
    # The command gives the agent five seconds, and has to start before.
    assert all(one["timeoutSeconds"] > QUICK_TIMEOUT_S for one in found.values())


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("peers", [[], FULL["networkPolicy"]["from"]], ids=["nobody", "monitoring"])
def test_a_policy_lets_in_who_is_named_to_the_metrics_and_nobody_else(peers: list[Any], version: str) -> None:
    found = rendered({"networkPolicy": {"enabled": True, "from": peers}})
    (policy,) = [one for one in found.manifests if one["kind"] == "NetworkPolicy"]
    kubernetes_validate.validate(policy, version, strict=True)
    assert policy["spec"]["podSelector"] == found.daemonset["spec"]["selector"]
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    port = {"port": "metrics", "protocol": "TCP"}
    assert policy["spec"]["ingress"] == ([{"ports": [port], "from": peers}] if peers else [])


def test_without_being_asked_for_there_is_no_policy(plain: Rendered) -> None:
    assert "NetworkPolicy" not in {one["kind"] for one in plain.manifests}


@pytest.mark.parametrize("text", [None, "[[rules]]\nname = 'tls'\npattern = 'libssl'\n"])
def test_the_configuration_with_its_environment_is_one_that_the_agent_takes(text: str | None, tmp_path: Any) -> None:
    found = rendered({} if text is None else {"config": text, "criSocket": "/run/x/x.sock"})
    path = tmp_path / "config.toml"
    path.write_text(found.config, encoding="utf-8")
    settings = load_settings(str(path), environment=found.environment)
    assert (settings.socket, settings.listen_metrics) == ("/run/sowatch/sowatch.sock", "0.0.0.0:9400")
    assert settings.watch.cri_socket == (None if text is None else "/run/x/x.sock")
    assert [one.name for one in settings.rules] == ([] if text is None else ["tls"])


def test_another_configuration_replaces_the_pods(plain: Rendered) -> None:
    def checksum(found: Rendered) -> str:
        return found.daemonset["spec"]["template"]["metadata"]["annotations"]["checksum/config"]

    assert checksum(rendered({})) == checksum(plain)
    assert checksum(rendered({"config": "log_level = 'debug'\n"})) != checksum(plain)


def test_every_value_gets_where_it_belongs() -> None:
    found = rendered(FULL)
    template = found.daemonset["spec"]["template"]
    assert found.container["image"] == f"registry.example/sowatch@sha256:{'0' * 64}"
    assert template["metadata"]["labels"].items() >= {"team": "nodes", "pod": "yes"}.items()
    assert template["metadata"]["annotations"]["example.com/a"] == "b"
    for key in ("imagePullSecrets", "affinity", "priorityClassName"):
        assert found.pod[key] == FULL[key]
    assert found.pod["securityContext"] == FULL["podSecurityContext"]
    assert found.pod["serviceAccountName"] == "watch"
    assert found.environment["SOWATCH_LOG_LEVEL"] == "debug"
    assert FULL["extraVolumes"][0] in found.pod["volumes"]
    assert FULL["extraVolumeMounts"][0] in found.container["volumeMounts"]
    assert {one["name"]: one.get("hostPath", {}).get("path") for one in found.pod["volumes"]}["run"] == "/run/sowatch"
    (monitor,) = [one for one in found.manifests if one["kind"] == "PodMonitor"]
    labels = template["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in {one["name"] for one in found.container["ports"]}


def test_every_value_is_in_the_schema_and_every_one_in_the_schema_has_a_default() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.validate(values, schema, jsonschema.Draft7Validator)
    assert schema["properties"].keys() - {"global"} == values.keys()


@pytest.mark.parametrize(
    "values",
    [
        {"tolerance": []},
        {"image": {"digest": "sha256:1"}},
        {"metricsPort": 0},
        {"criSocket": "run/x.sock"},
        {"criSocket": "unix:///run/x.sock"},
        {"resources": {"limits": {"memory": "much"}}},
        {"securityContext": {"privileged": True}},
        {"podMonitor": {"interval": "often"}},
        {"networkPolicy": {"from": [{}]}},
        {"updateStrategy": {"type": "Recreate"}},
        {"extraEnv": [{"value": "nameless"}]},
    ],
    ids=lambda values: next(iter(values)),
)
def test_a_value_that_cannot_be_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(helm.HelmError):
        rendered(values)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_chart_of_a_commit_after_a_release_has_labels_and_a_tag_that_can_be(version: str, tmp_path: Any) -> None:
    found = rendered({}, pack.chart("0.1.dev507+g0a55b5a1c", tmp_path))
    assert found.container["image"] == "sowatch:0.1.dev507_g0a55b5a1c"
    for one in found.manifests:
        kubernetes_validate.validate(one, version, strict=True)
        labels = one["metadata"]["labels"]
        assert labels["app.kubernetes.io/version"] == "0.1.dev507_g0a55b5a1c"
        assert labels["helm.sh/chart"] == "sowatch-0.1.0-dev.507_g0a55b5a1c"
        # What the API server asks of a label's value, which is not in the schemas.
        for value in labels.values():
            assert re.fullmatch(r"(?=.{1,63}$)[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?", value, re.ASCII), value


def test_the_chart_is_of_the_newest_version_of_the_changelog() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[([^]]+)\]", text, flags=re.MULTILINE)[0] == chart["appVersion"] == chart["version"]


# ---- the fleet -----------------------------------------------------------------------------------


def test_without_a_fleet_the_configuration_is_that_of_the_values(tmp_path) -> None:
    made = rendered({"config": "stale_interval_s = 5\n"})
    assert "[fleet]" not in made.config
    assert "fleet-token" not in {one["name"] for one in made.pod["volumes"]}


def test_a_fleet_is_sent_to_with_the_token_of_a_secret(tmp_path) -> None:
    made = rendered({"config": "stale_interval_s = 5\n[[rules]]\nname = 'all'\n", "fleet": FULL["fleet"]})
    file = tmp_path / "config.toml"
    file.write_text(made.config, encoding="utf-8")
    fleet = load_settings(str(file), environment={}).fleet
    assert (fleet.enabled, fleet.endpoint) == (True, "https://fleet.example:4318")
    (mount,) = [one for one in made.container["volumeMounts"] if one["name"] == "fleet-token"]
    (volume,) = [one for one in made.pod["volumes"] if one["name"] == "fleet-token"]
    assert fleet.token_file == f"{mount['mountPath']}/token"
    assert volume["secret"] == {
        "secretName": "fleet",
        "defaultMode": 0o400,
        "items": [{"key": "token", "path": "token"}],
    }


@pytest.mark.parametrize(
    "values",
    [
        {"fleet": {"enabled": True}},
        {"fleet": {"enabled": True, "endpoint": 'http://x"\nlisten = "y'}},
        {"fleet": {"enabled": True, "endpoint": "fleet:4318"}},
        {"fleet": {"enabled": True, "endpoint": "http://fleet:4318"}, "config": "[fleet]\nenabled = false\n"},
    ],
)
def test_a_fleet_that_cannot_be_meant_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(helm.HelmError):
        rendered(values)
