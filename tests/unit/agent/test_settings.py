"""The agent's configuration: what wins, and what an error names."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from sowatch.agent.settings import AttachSettings, ExporterSettings, RuleSettings, Settings, SinkSettings, load_settings
from sowatch.model.config import Config
from sowatch.model.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]


def load(text: str, tmp_path: Path, environment: dict[str, str] | None = None, **flags: Any) -> Settings:
    path = tmp_path / "c.toml"
    path.write_text(text, encoding="utf-8")
    return load_settings(str(path), environment=environment or {}, flags=flags)


def test_without_a_file_the_defaults_hold() -> None:
    found = load_settings(None, environment={})
    assert found == Settings()
    assert found.watch.allow_procfs_fallback is False
    assert found.socket == "/run/sowatch/sowatch.sock"
    assert found.listen is None


def test_a_flag_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    text = 'socket = "/a"\nlisten = "127.0.0.1:1"\nlog_level = "error"\n'
    environment = {"SOWATCH_LISTEN": "127.0.0.1:2", "SOWATCH_LOG_LEVEL": "debug"}
    found = load(text, tmp_path, environment, listen="127.0.0.1:3")
    assert (found.socket, found.listen, found.log_level) == ("/a", "127.0.0.1:3", "debug")


def test_every_kind_of_value_is_taken(tmp_path: Path) -> None:
    found = load(
        """
        audit_interval_s = 60
        allowed_hosts = ["a", "b"]
        reload = false
        [watch]
        strategy = "core"
        ring_bytes = 4096
        ignore_ttl_s = 5
        [[rules]]
        name = "tls"
        pattern = 'libssl\\.so'
        [[rules]]
        kind = ["executable", "interpreter"]
        exports = ["main"]
        [[sinks]]
        type = "file"
        path = "/x"
        [[exporters]]
        type = "otlp"
        protocol = "grpc"
        """,
        tmp_path,
    )
    assert (found.audit_interval_s, found.allowed_hosts, found.reload) == (60.0, ("a", "b"), False)
    assert found.watch == Config(strategy="core", ring_bytes=4096, ignore_ttl_s=5.0, allow_procfs_fallback=False)
    assert found.rules == (
        RuleSettings(name="tls", pattern=r"libssl\.so"),
        RuleSettings(kind=("executable", "interpreter"), exports=("main",)),
    )
    assert found.sinks == (SinkSettings(type="file", path="/x"),)
    assert found.exporters == (ExporterSettings(type="otlp", protocol="grpc"),)
    assert [one.make().name for one in found.rules] == ["tls", "all"]


def test_texts_of_the_environment_become_what_the_setting_is(tmp_path: Path) -> None:
    environment = {
        "SOWATCH_RELOAD": "no",
        "SOWATCH_AUDIT_INTERVAL_S": "5",
        "SOWATCH_ALLOWED_HOSTS": "a, b",
        "SOWATCH_WATCH_RING_BYTES": "8192",
        "SOWATCH_WATCH_ALLOW_PROCFS_FALLBACK": "true",
    }
    found = load("[watch]\nring_bytes = 4096\n", tmp_path, environment)
    assert (found.reload, found.audit_interval_s, found.allowed_hosts) == (False, 5.0, ("a", "b"))
    assert (found.watch.ring_bytes, found.watch.allow_procfs_fallback) == (8192, True)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ('log_level = "info"\nsokcet = "/x"\n', 2, "sokcet"),
        ("\n\nsocket = 5\n", 3, "5 is not a text"),
        ('socket = ""\n', 1, "is no path"),
        ("audit_interval_s = true\n", 1, "True is not a number"),
        ("audit_interval_s = -1\n", 1, "out of range"),
        ("audit_interval_s = nan\n", 1, "out of range"),
        ("audit_interval_s = 0.5\n", 1, "Use a number from 1 to 86400, or 0 for none."),
        ("stale_interval_s = 0.5\n", 1, "Use a number from 1 to 86400, or 0 for none."),
        ('reload = "yes"\n', 1, "'yes' is not true or false"),
        ('log_level = "loud"\n', 1, "none of debug, info"),
        ('allowed_hosts = "a"\n', 1, "no list"),
        ("allowed_hosts = [\n  'a',\n  1,\n]\n", 4, "allowed_hosts[2]"),
        ("watch = 1\n", 1, "no table"),
        ("[watch]\nring_bytes = 4097\n", 2, "watch.ring_bytes"),
        ("[watch]\nstrategy = 'magic'\n", 2, "'magic' is none of auto, core"),
        ("[watch]\nring_byte = 1\n", 2, "watch.ring_byte"),
        ("[rules]\npattern = 'x'\n", 1, "no list of tables"),
        ("[[rules]]\npattern = 'x'\n\n[[rules]]\n# here\npattern = '('\n", 6, "rules[2].pattern"),
        ("[[rules]]\npattern = 'x'\nkind = ['car']\n", 3, "rules[1].kind"),
        ("[[rules]]\npattern = 'x'\n[[rules]]\npattern = 'x'\n", 1, "two rules are named 'x'"),
        ("[[sinks]]\npath = 'x'\n", 1, "sinks[1].type"),
        ("[[sinks]]\ntype = 'file'\n", 1, "a file sink needs one"),
        ("[[sinks]]\ntype = 'file'\npath = 'x'\n[[sinks]]\ntype = 'file'\npath = 'y'\n", 1, "two sinks"),
        ("[[exporters]]\ntype = 'statsd'\ninterval_s = 0\n", 3, "exporters[1].interval_s"),
        ('a = """\nlog_level = 3\n"""\nlog_level = 4\n', 3, "a"),
        ("log_level = \n", 1, "not valid TOML"),
        ("socket = '/x'\n[watch\n", 2, "not valid TOML"),
        ("socket = '/x'\nsocket = '/y'\n", 2, "not valid TOML"),
        ("a = " + "[" * 5000 + "\n", 2, "not valid TOML"),
    ],
)
def test_an_error_names_file_line_and_key(text: str, line: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text, tmp_path)
    assert f"{tmp_path}/c.toml:{line})" in str(caught.value)
    assert said in str(caught.value)
    assert str(caught.value).endswith(".")


def test_an_error_in_the_environment_or_a_flag_names_that(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"log_level \(from SOWATCH_LOG_LEVEL\): 'loud' is none of"):
        load('log_level = "info"\n', tmp_path, {"SOWATCH_LOG_LEVEL": "loud"})
    with pytest.raises(ConfigError, match=r"watch.ring_bytes \(from SOWATCH_WATCH_RING_BYTES\): 'x' is not a whole"):
        load("", tmp_path, {"SOWATCH_WATCH_RING_BYTES": "x"})
    with pytest.raises(ConfigError, match=r"socket \(from --socket\): '' is no path"):
        load("", tmp_path, socket="")


@pytest.mark.parametrize("name", ["SOWATCH_SOKCET", "SOWATCH_RULES", "SOWATCH_WATCH", "SOWATCH_WATCH_X", "SOWATCH_"])
def test_a_variable_that_names_no_setting_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"\(from {name}\): no setting has that name"):
        load("", tmp_path, {name: "1"})


@pytest.mark.parametrize(
    "name",
    [
        "SOWATCH_TRACEBACK",
        "SOWATCH_SERVICE_HOST",
        "SOWATCH_FLEET_SERVICE_PORT_OTLP",
        "SOWATCH_FLEET_PORT_4318_TCP",
        "SOWATCH_FLEET_PORT",
        "SOWATCH_PORT",
        "SOWATCH_PORT_9400_TCP_ADDR",
        "SOWATCH_DEADLINE_SCALE",
    ],
)
def test_variables_that_mean_something_else_are_left_alone(name: str, tmp_path: Path) -> None:
    assert load("", tmp_path, {name: "tcp://10.0.0.1:9400"}) == Settings()


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_settings(str(tmp_path / "none"), environment={})
    with pytest.raises(ConfigError, match=r"cannot read .*: Is a directory"):
        load_settings(str(tmp_path), environment={})
    (tmp_path / "c").write_bytes(b"a = 1\nb = '\xff'\n")
    with pytest.raises(ConfigError, match=r"/c:2\): the line is not UTF-8"):
        load_settings(str(tmp_path / "c"), environment={})
    (tmp_path / "c").write_bytes(b"#" * (2 << 20))
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        load_settings(str(tmp_path / "c"), environment={})


def test_the_example_that_ships_holds_the_defaults_and_nothing_else() -> None:
    example = ROOT / "deploy" / "sowatch.toml"
    assert load_settings(str(example), environment={}) == Settings()
    # Every key stands there, commented out with its default; with that taken away it must still be right.
    text = example.read_text(encoding="utf-8")
    lines = [line[1:] if line.startswith("#") and not line.startswith("# ") else line for line in text.splitlines()]
    shown = tomllib.loads("\n".join(lines))
    assert shown.keys() == set(Settings.__struct_fields__)
    assert shown["watch"].keys() == set(Config.__struct_fields__)
    for kind in ("rules", "sinks", "exporters"):
        hints = {"rules": RuleSettings, "sinks": SinkSettings, "exporters": ExporterSettings}[kind]
        assert set().union(*shown[kind]) == set(hints.__struct_fields__)


def test_a_rule_carries_an_action(tmp_path: Path) -> None:
    text = """
        [[rules]]
        name = "tls"
        count = ["SSL_*", "SSL_write+0x10"]
        latency = false
        linger_s = 0
        attach = { object = "/x.bpf.o", probes = { SSL_write = "on_write", "cpp:ns::f" = "on_f" } }
        [[rules]]
        attach = { object = "/y.bpf.o" }
        """
    first, second = load(text, tmp_path).rules
    assert (first.count, first.latency, first.linger_s) == (("SSL_*", "SSL_write+0x10"), False, 0.0)
    assert first.attach == AttachSettings(object="/x.bpf.o", probes={"SSL_write": "on_write", "cpp:ns::f": "on_f"})
    assert second.attach == AttachSettings(object="/y.bpf.o")
    assert (second.count, second.latency, second.linger_s) == ((), True, 5.0)
    assert (first.has_action, second.has_action, RuleSettings().has_action) == (True, True, False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("count = 'SSL_read'", r"rules\[1\].count .*c.toml:2.* no list of texts"),
        ("count = ['']", r"rules\[1\].count .*c.toml:2.* needs a symbol"),
        ("count = ['f', 'f']", r"rules\[1\].count .*c.toml:2.* named twice"),
        ("attach = 'x.bpf.o'", r"rules\[1\].attach .*c.toml:2.* no table"),
        ("attach = { probes = {} }", r"rules\[1\].attach.object .*c.toml:2.* missing"),
        ("attach = { object = 'x.bpf.o' }", r"rules\[1\].attach.object .*c.toml:2.* no absolute path"),
        ("attach = { object = '/x', probes = ['f'] }", r"rules\[1\].attach.probes .*c.toml:2.* no table"),
        ("attach = { object = '/x', probes = { f = 1 } }", r"rules\[1\].attach.probes.f .*c.toml:2.* is not a text"),
        ("attach = { object = '/x', probes = { f = '' } }", r"rules\[1\].attach.probes .*c.toml:2.* a program"),
        ("attach = { object = '/x', program = 'f' }", r"rules\[1\].attach.program .*c.toml:2.* no such key"),
        ("prearm = ['libssl.so']", r"rules\[1\].prearm .*c.toml:2.* no absolute path"),
        ("linger_s = -1", r"rules\[1\].linger_s .*c.toml:2.* out of range"),
    ],
)
def test_an_action_that_cannot_be_is_an_error_with_its_line(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        load(f"[[rules]]\n{text}\n", tmp_path)
