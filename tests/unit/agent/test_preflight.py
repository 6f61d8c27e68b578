"""Settings that an agent could not start with are refused before it does, with the key and the next step."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sowatch.agent.preflight import check_settings
from sowatch.agent.settings import load_settings
from sowatch.model.errors import SowatchError


def refusal(tmp_path: Path, text: str, **environment: str) -> str:
    """Why this file, whose place is ``HERE``, cannot be used; empty: it can."""
    path = tmp_path / "c.toml"
    path.write_text(f"socket = '{tmp_path}/s.sock'\n" + text.replace("HERE", str(tmp_path)), encoding="utf-8")
    try:
        check_settings(load_settings(str(path), environment=environment))
    except SowatchError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("listen = '192.0.2.1:80'\n", "listen: '192.0.2.1:80' is no port of the loopback interface"),
        ("socket_group = 'nosuchgroup'\n", "socket_group: there is no 'nosuchgroup' on this host"),
        ("[watch]\nproc_root = 'HERE'\n", "is not a proc file system"),
        ("[watch]\nbtf_path = 'HERE/none'\n", "watch.btf_path: cannot read"),
        ("[[rules]]\nattach = { object = '/none.bpf.o' }\n", "rules[1].attach.object: cannot read '/none.bpf.o'"),
        ("[[sinks]]\ntype = 'file'\npath = 'HERE/no/x'\n", "sinks[1].path: cannot write"),
        ("[[sinks]]\ntype = 'file'\npath = 'HERE'\n", "it is not a regular file"),
        ("[[sinks]]\ntype = 'otlp'\nendpoint = 'nonsense'\n", "sinks[1].endpoint: 'nonsense' is no URL"),
        ("[[exporters]]\ntype = 'otlp'\nendpoint = 'ftp://x'\n", "exporters[1].endpoint: 'ftp://x' is no URL"),
        ("[[exporters]]\ntype = 'statsd'\naddress = 'tcp://x:1'\n", "exporters[1].address: 'tcp://x:1' is none"),
        ("[[sinks]]\ntype = 'stdout'\npath = '/x'\n", "sinks[1].path (from HERE/c.toml:4): type 'stdout' has none"),
        ("[[sinks]]\ntype = 'otlp'\nmax_files = 2\n", "type 'otlp' has none, only 'file' does"),
        ("[[exporters]]\ntype = 'statsd'\nendpoint = 'http://x:1'\n", "only 'otlp' does"),
    ],
)
def test_what_the_agent_could_not_start_with_is_refused(tmp_path: Path, text: str, said: str) -> None:
    assert said.replace("HERE", str(tmp_path)) in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("SOWATCH_LISTEN", "0.0.0.0:9400", "no port of the loopback interface"),
        ("SOWATCH_SOCKET", "/no/such/directory/s.sock", "cannot listen on '/no/such/directory/s.sock'"),
        ("SOWATCH_SOCKET", "/etc/passwd", "exists and is no socket"),
    ],
)
def test_values_of_the_environment_are_checked_like_those_of_the_file(
    tmp_path: Path, variable: str, value: str, said: str
) -> None:
    assert said in refusal(tmp_path, "", **{variable: value})


def test_the_endpoint_of_the_collectors_own_variable_is_checked_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = "[[sinks]]\ntype = 'otlp'\n"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "nonsense")
    assert "endpoint (from OTEL_EXPORTER_OTLP_ENDPOINT): 'nonsense' is no URL" in refusal(tmp_path, sink)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "http://127.0.0.1:4318/v1/logs")
    assert refusal(tmp_path, sink) == ""


def test_what_can_be_used_passes_and_nothing_is_made(tmp_path: Path) -> None:
    text = (
        "listen = '127.0.0.1:0'\n"
        "[[sinks]]\ntype = 'file'\npath = 'HERE/events.jsonl'\n"
        "[[sinks]]\ntype = 'otlp'\nprotocol = 'grpc'\n"
        "[[exporters]]\ntype = 'statsd'\naddress = 'unixgram:///run/statsd.sock'\n"
    )
    assert refusal(tmp_path, text) == ""
    assert os.listdir(tmp_path) == ["c.toml"]
