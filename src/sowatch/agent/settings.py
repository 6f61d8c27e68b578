"""The agent's configuration: file, environment and flags in one frozen value.

Later ones win: defaults, file, environment, flags. An unknown key is an error, as is a value of a wrong type; errors
name file, line and key.

Not pydantic-settings: it does not know the lines of a file, and the tables are structs already.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from msgspec import Struct, field
from msgspec.structs import fields

from sowatch.agent.fleet_settings import FLEET_RULE, FleetSettings
from sowatch.agent.setting_checks import in_range as _in_range
from sowatch.agent.setting_checks import missing_module as _missing_module
from sowatch.agent.vulnerability_settings import VulnerabilitySettings
from sowatch.linux.openat import open_regular
from sowatch.model.config import Config
from sowatch.model.errors import ConfigError, SowatchError
from sowatch.model.header_names import header_names
from sowatch.model.literals import STREAM_KINDS, Kind, StreamKind
from sowatch.model.rules import Rule, RuleSet
from sowatch.uprobes.probes import Probe

__all__ = [
    "DEFAULT_PATH",
    "HTTP_PREFIX",
    "AttachSettings",
    "ExporterSettings",
    "FleetSettings",
    "HttpSettings",
    "RuleSettings",
    "Settings",
    "SinkSettings",
    "VulnerabilitySettings",
    "changed_keys",
    "load_settings",
]

#: Names of the rules that [http] adds begin so.
HTTP_PREFIX: Final = "http-"
#: Read if no other file is named; it need not be there.
DEFAULT_PATH: Final = "/etc/sowatch/config.toml"
#: A file larger than this is none of ours.
_MAX_BYTES: Final = 1 << 20
_PREFIX: Final = "SOWATCH_"
#: Variables that say something else: ours of the command line and of the tests, and what Kubernetes gives every
#: container for a service named sowatch or sowatch-fleet.
_OTHER_VARIABLES: Final = re.compile(
    r"SOWATCH_(TRACEBACK|DEADLINE_SCALE|FORCE_KERNEL_TESTS|WITNESS_ROUNDS|BPF_OBJECTS|(MATRIX|MODEL|TEST|WHEELS)_\w+|(FLEET_)?(SERVICE_\w+|PORT(_\w+)?))"
)
_SYNTAX: Final = re.compile(r"(?P<what>.*) \(at (line (?P<line>\d+), column \d+|end of document)\)", re.DOTALL)
_OTLP_KEYS: Final = ("endpoint", "protocol")
_SCALARS: Final = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


class AttachSettings(Struct, frozen=True, kw_only=True):
    """The table ``attach`` of a rule: an object of BPF programs for the rule's files; see `sowatch.uprobes.Attacher`.

    Attributes:
        object: absolute path of a ``.bpf.o``.
        probes: by symbol the name of a program. Without any the object's sections and names say where programs go.
    """

    object: str
    probes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.object.startswith("/") or "\0" in self.object:
            raise ConfigError("object", f"{self.object!r} is no absolute path. Give one, such as /etc/sowatch/x.bpf.o.")
        for symbol, program in self.probes.items():
            _check_probe("probes", symbol, program)


class RuleSettings(Struct, frozen=True, kw_only=True):
    """One ``[[rules]]`` table; see `sowatch.Rule`.

    Attributes:
        name: how events and metrics call it. Default: the pattern.
        pattern: a Python regular expression, searched in the path. None: every file of the kind.
        kind: some of library, executable, interpreter, other.
        exports: symbols that a file must all export.
        count: functions of the files whose calls are counted: names, or patterns such as ``SSL_*``.
        latency: time the calls that are counted, too.
        attach: BPF programs of your own for the files.
        linger_s: seconds that a file stays attached after its last process, so that the next is covered at once.
        prearm: patterns of absolute paths of files that are attached before anybody loads them.
    """

    name: str | None = None
    pattern: str | None = None
    kind: tuple[Kind, ...] = ("library",)
    exports: tuple[str, ...] = ()
    count: tuple[str, ...] = ()
    latency: bool = True
    attach: AttachSettings | None = None
    linger_s: float = 5.0
    prearm: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for symbol in self.count:
            _check_probe("count", symbol, "count")
        if len(set(self.count)) < len(self.count):
            raise ConfigError("count", "a function is named twice. Name each once.")
        _in_range("linger_s", self.linger_s, 0, 86_400)
        for pattern in self.prearm:
            if not pattern.startswith("/") or "\0" in pattern:
                raise ConfigError("prearm", f"{pattern!r} is no absolute path. Write /usr/lib/*/libssl.so.3.")
        try:
            self.make()
        except ConfigError:
            raise
        except SowatchError as error:
            raise ConfigError("kind" if "kind" in str(error) else "pattern", str(error)) from error

    @property
    def has_action(self) -> bool:
        """Whether something is attached to the rule's files."""
        return bool(self.count) or self.attach is not None

    def make(self, **callbacks: Callable[[Any], Any] | None) -> Rule:
        """The rule, with callbacks as `sowatch.Rule` takes them."""
        return Rule(self.pattern, name=self.name, kind=self.kind, exports=self.exports, **callbacks)


class SinkSettings(Struct, frozen=True, kw_only=True):
    """One ``[[sinks]]`` table: where events go besides HTTP clients.

    Attributes:
        type: stdout, file or otlp.
        name: how metrics and messages call it. Default: the type.
        path: of a file sink; needed.
        max_bytes: a file that would grow beyond it is rotated first; 0: never, leave it to logrotate and SIGHUP.
        max_files: how many files there may be, the one being written among them.
        endpoint: of an otlp sink, as http://HOST:PORT. Default: OTEL_EXPORTER_OTLP_ENDPOINT.
        protocol: of an otlp sink: http or grpc.
        queue_events: events that may wait in it before some are lost.
        events: some of load, unload, activate, deactivate and http; control events always go there.
    """

    type: Literal["stdout", "file", "otlp"]
    name: str | None = None
    path: str | None = None
    max_bytes: int = 100 << 20
    max_files: int = 5
    endpoint: str | None = None
    protocol: Literal["http", "grpc"] = "http"
    queue_events: int = 50_000
    events: tuple[StreamKind, ...] = STREAM_KINDS

    def __post_init__(self) -> None:
        _refuse_keys_of_others(self, self.type, {"file": ("path", "max_bytes", "max_files"), "otlp": _OTLP_KEYS})
        if self.type == "file" and not self.path:
            raise ConfigError("path", 'a file sink needs one. Give path = "/var/log/sowatch/events.jsonl".')
        _in_range("queue_events", self.queue_events, 1, 1 << 24)

    @property
    def title(self) -> str:
        """Its name."""
        return self.name or self.type


class ExporterSettings(Struct, frozen=True, kw_only=True):
    """One ``[[exporters]]`` table: where metrics are sent besides being scraped.

    Attributes:
        type: statsd or otlp.
        address: of a statsd exporter: udp://HOST:PORT or unixgram:///PATH.
        tags: of a statsd exporter: dogstatsd, or name for servers that know no tags.
        endpoint: of an otlp exporter, as http://HOST:PORT. Default: OTEL_EXPORTER_OTLP_ENDPOINT.
        protocol: of an otlp exporter: http or grpc.
        interval_s: seconds between two deliveries.
    """

    type: Literal["statsd", "otlp"]
    address: str = "udp://127.0.0.1:8125"
    tags: Literal["dogstatsd", "name"] = "dogstatsd"
    endpoint: str | None = None
    protocol: Literal["http", "grpc"] = "http"
    interval_s: float = 10.0

    def __post_init__(self) -> None:
        _refuse_keys_of_others(self, self.type, {"statsd": ("address", "tags"), "otlp": _OTLP_KEYS})
        _in_range("interval_s", self.interval_s, 0.1, 86_400)


class HttpSettings(Struct, frozen=True, kw_only=True):
    """The table ``[http]``: requests and responses that pass TLS libraries. Off by default; see docs/http.md.

    Attributes:
        enabled: tap TLS libraries.
        libraries: a Python regular expression, searched in the path of a TLS library. None: all of them.
        process: a Python regular expression, searched in the name of a process and in the path of its program.
        containers: ids, or beginnings of ids, of containers whose processes count. Empty: all, and what is in none.
        path: a Python regular expression, searched in the path of a request.
        side: client or server: only requests that a process makes, or serves.
        keep_query: paths keep what stands behind ``?``.
        headers: names of header fields that flows keep; some are never kept, see docs/privacy.md.
        capture_bytes: of each call.
        linger_s: seconds that a library stays attached after its last process.
        max_endpoints: of each side, counted apart from one another; the rest is counted under ``other``.
        events: flows are events, too, not only metrics.
        flows_over_tcp: show single flows over TCP, too, to every user of this host: in /events and /http.
    """

    enabled: bool = False
    libraries: str | None = None
    process: str | None = None
    containers: tuple[str, ...] = ()
    path: str | None = None
    side: Literal["client", "server"] | None = None
    keep_query: bool = False
    headers: tuple[str, ...] = ()
    capture_bytes: int = 1 << 18
    linger_s: float = 5.0
    max_endpoints: int = 150
    events: bool = True
    flows_over_tcp: bool = False

    def __post_init__(self) -> None:
        for key in ("libraries", "process", "path"):
            try:
                Rule(getattr(self, key), name=key)
            except SowatchError as error:
                raise ConfigError(key, str(error)) from error
        if not all(self.containers):
            raise ConfigError("containers", "an empty id stands for every container. Give beginnings of ids.")
        try:
            header_names(self.headers)
        except SowatchError as error:
            raise ConfigError("headers", str(error)) from error
        # MAX_CAPTURE of tls_taps.h is the most; heads of less than 64 bytes are none.
        _in_range("capture_bytes", self.capture_bytes, 64, 1 << 18)
        _in_range("linger_s", self.linger_s, 0, 86_400)
        # Ten series for what is one of too many come on top, and 200 is the most of one metric.
        _in_range("max_endpoints", self.max_endpoints, 1, 180)
        if self.enabled and (missing := _missing_module("httptools", "hpack", "ddsketch")):
            raise ConfigError(
                "enabled",
                f"{missing} is not installed, and decoding needs it. Install it: pip install 'sowatch[http]'.",
            )

    @property
    def is_filtered(self) -> bool:
        """Whether only some processes count, so that the programs have to ask which."""
        return self.process is not None or bool(self.containers)


class Settings(Struct, frozen=True, kw_only=True):
    """How the agent runs.

    Attributes:
        socket: path of the unix socket.
        socket_owner: user who owns the socket. Default: the one who runs the agent.
        socket_group: group that may use the socket, too. Default: none, only the owner.
        listen: HOST:PORT of the loopback interface for what only reads. Default: no TCP.
        allowed_hosts: further names of this host that requests over TCP may use.
        listen_metrics: HOST:PORT of any interface, 0.0.0.0 for all, for /metrics, /healthz and /readyz only, which name
            no process. Default: none.
        audit_interval_s: seconds between two comparisons of the map with /proc; 0: none.
        stale_interval_s: seconds between two comparisons of mapped files with the disk; 0: only while the page is
            open.
        log_level: debug, info, warning or error.
        log_format: logfmt or json.
        reload: take over changes of the file as they happen; without, SIGHUP does.
        drop_privileges: keep only the capabilities that watching takes.
        watch: how to watch; see `sowatch.Config`.
        rules: what to watch. Default: every shared library.
        sinks: where events go.
        exporters: where metrics are sent.
        http: requests and responses that pass TLS libraries.
        fleet: what is mapped on this host, to the receiver of a fleet.
        vulnerabilities: what is mapped, judged by data that you bring.
    """

    socket: str = "/run/sowatch/sowatch.sock"
    socket_owner: str | None = None
    socket_group: str | None = None
    listen: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    listen_metrics: str | None = None
    audit_interval_s: float = 300.0
    stale_interval_s: float = 10.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["logfmt", "json"] = "logfmt"
    reload: bool = True
    drop_privileges: bool = True
    # An agent that silently polls is not what its operator asked for.
    watch: Config = field(default_factory=lambda: Config(allow_procfs_fallback=False))
    rules: tuple[RuleSettings, ...] = ()
    sinks: tuple[SinkSettings, ...] = ()
    exporters: tuple[ExporterSettings, ...] = ()
    http: HttpSettings = field(default_factory=HttpSettings)
    fleet: FleetSettings = field(default_factory=FleetSettings)
    vulnerabilities: VulnerabilitySettings = field(default_factory=VulnerabilitySettings)

    def __post_init__(self) -> None:
        if not self.socket or "\0" in self.socket:
            raise ConfigError("socket", f"{self.socket!r} is no path. Give one, such as /run/sowatch/sowatch.sock.")
        for key in ("audit_interval_s", "stale_interval_s"):
            if (value := getattr(self, key)) != 0:
                _in_range(key, value, 1, 86_400, or_zero="for none")
        try:
            RuleSet([one.make() for one in self.rules])
        except SowatchError as error:
            raise ConfigError("rules", str(error)) from error
        if self.http.enabled:
            for rule in self.rules:
                if (name := rule.make().name).startswith(HTTP_PREFIX):
                    raise ConfigError(
                        "rules", f"{name!r} begins like the rules of [http], {HTTP_PREFIX!r}. Give it another name."
                    )
        if self.fleet.enabled and any(one.make().name == FLEET_RULE for one in self.rules):
            raise ConfigError("rules", f"{FLEET_RULE!r} is the name of the rule of [fleet]. Give it another name.")
        titles = [one.title for one in self.sinks]
        for title in titles:
            if titles.count(title) > 1:
                raise ConfigError("sinks", f"two sinks are named {title!r}. Give each its own name.")


def changed_keys(name: str, old: Settings, new: Settings) -> list[str]:
    """The keys of a setting that are not the same in both, of a table each with its name: ``watch.ring_bytes``."""
    before, after = getattr(old, name), getattr(new, name)
    if not isinstance(before, Struct):
        return [name]
    return [f"{name}.{one.name}" for one in fields(before) if getattr(before, one.name) != getattr(after, one.name)]


#: What `load_settings` adds to the defaults of a table.
_TABLE_DEFAULTS: Final[Mapping[type, Mapping[str, Any]]] = {Config: {"allow_procfs_fallback": False}}


def load_settings(
    path: str | None, *, environment: Mapping[str, str] = os.environ, flags: Mapping[str, Any] | None = None
) -> Settings:
    """Reads and checks everything.

    Args:
        path: of the file; None: `DEFAULT_PATH` if it is there.
        environment: variables ``SOWATCH_KEY``, and ``SOWATCH_WATCH_KEY`` for the table ``[watch]``.
        flags: keys that were given on the command line, with their values.

    Raises:
        ConfigError: something is wrong; ``source`` says where.
    """
    text, name = _read(path)
    reader = _Reader(name, text)
    found = reader.parse()
    sources: dict[tuple[str, ...], str] = {}
    for key, value in _from_environment(environment):
        _put(found, key, value)
        sources[key] = _PREFIX + "_".join(key).upper()
    for flag, value in (flags or {}).items():
        found[flag] = value
        sources[flag,] = f"--{flag.replace('_', '-')}"
    settings: Settings = _build(Settings, found, (), _Origin(reader, sources))
    return settings


def _read(path: str | None) -> tuple[str, str]:
    """Text and name of the file."""
    name = path or DEFAULT_PATH
    try:
        with open(open_regular(name), "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        if path is None:
            return "", name
        raise ConfigError("config", f"{name!r} does not exist. Write it, or leave --config out.") from None
    except OSError as error:
        raise ConfigError(
            "config", f"cannot read {name!r}: {error.strerror}. Give a regular file that this user may read."
        ) from error
    if len(data) > _MAX_BYTES:
        raise ConfigError("config", f"{name!r} is larger than 1 MiB. Give a configuration file.")
    try:
        return data.decode(), name
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError("config", "the line is not UTF-8. Save the file as such.", source=f"{name}:{line}") from error


def _from_environment(environment: Mapping[str, str]) -> list[tuple[tuple[str, ...], str]]:
    """Keys and texts of variables that name a setting.

    Raises:
        ConfigError: one names none.
    """
    found: list[tuple[tuple[str, ...], str]] = []
    for variable, text in sorted(environment.items()):
        if not variable.startswith(_PREFIX) or _OTHER_VARIABLES.fullmatch(variable):
            continue
        name = variable.removeprefix(_PREFIX).lower()
        key: tuple[str, ...] = ("watch", name[6:]) if name.startswith("watch_") else (name,)
        kinds = get_type_hints(Config if len(key) == 2 else Settings)
        if key[-1] not in kinds or kinds[key[-1]] is Config or "Settings" in str(kinds[key[-1]]):
            raise ConfigError(
                key[-1], "no setting has that name. Take the variable away, or correct it.", source=variable
            )
        found.append((key, text))
    return found


def _put(table: dict[str, Any], key: Sequence[str], text: str) -> None:
    for part in key[:-1]:
        inner = table.setdefault(part, {})
        if not isinstance(inner, dict):
            return  # wrong in the file already, which is reported
        table = inner
    table[key[-1]] = _Text(text)


class _Text(str):
    """A value from the environment, which may stand for another type."""

    __slots__ = ()


class _Reader:
    """The file, and where its keys are."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self._text = text

    def parse(self) -> dict[str, Any]:
        try:
            return tomllib.loads(self._text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            said = _SYNTAX.fullmatch(str(error))
            line = int(said["line"]) if said and said["line"] else self._text.count("\n") + 1
            what = (said["what"] if said else str(error)).lower()
            raise ConfigError(
                "config", f"this is not valid TOML: {what}. Correct the line.", source=f"{self.name}:{line}"
            ) from error

    def line_of(self, path: Sequence[str | int]) -> int | None:
        """The line on which the value of a key ends: the first up to which the file has it."""
        lines = self._text.splitlines()
        for number in range(1, len(lines) + 1):
            try:
                found: Any = tomllib.loads("\n".join(lines[:number]))
                for part in path:
                    found = found[part]
            except (tomllib.TOMLDecodeError, KeyError, IndexError, TypeError):
                continue
            return number
        return None


class _Origin:
    """Where a value came from, for messages."""

    def __init__(self, reader: _Reader, sources: Mapping[tuple[str, ...], str]) -> None:
        self._reader = reader
        self._sources = sources

    def of(self, path: Sequence[str | int]) -> str | None:
        source = self._sources.get(tuple(map(str, path)))
        if source is not None:
            return source
        for length in range(len(path), 0, -1):  # a key that is missing: the table it is missing from
            line = self._reader.line_of(path[:length])
            if line is not None:
                return f"{self._reader.name}:{line}"
        return None

    def error(self, path: Sequence[str | int], problem: str) -> ConfigError:
        return ConfigError(_dotted(path), problem, source=self.of(path))


def _dotted(path: Sequence[str | int]) -> str:
    """``("rules", 0, "pattern")`` as ``rules[1].pattern``, as people count."""
    return "".join(f"[{one + 1}]" if isinstance(one, int) else f".{one}" for one in path).removeprefix(".")


def _build(kind: Any, table: Mapping[str, Any], path: tuple[str | int, ...], origin: _Origin) -> Any:
    """A struct from a table."""
    hints = get_type_hints(kind)
    known = fields(kind)
    names = [one.name for one in known]
    for key in table:
        if key not in names:
            raise origin.error((*path, key), f"there is no such key. Known ones: {', '.join(names)}.")
    values = dict(_TABLE_DEFAULTS.get(kind, {}))
    for key, value in table.items():
        values[key] = _convert(hints[key], value, (*path, key), origin)
    for one in known:
        if one.name not in values and one.required:
            raise origin.error((*path, one.name), "it is needed here and missing. Add it.")
    try:
        return kind(**values)
    except ConfigError as error:
        raise origin.error((*path, error.key), error.problem) from error


def _is_table(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Struct)


def _convert(hint: Any, value: Any, path: tuple[str | int, ...], origin: _Origin) -> Any:
    arguments = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (one for one in arguments if one is not NoneType)
        return _convert(hint, value, path, origin)
    if get_origin(hint) is Literal:
        if value not in arguments:
            raise origin.error(path, f"{value!r} is none of {', '.join(arguments)}. Use one of them.")
        return str(value)
    if get_origin(hint) is tuple:
        return _list(arguments[0], value, path, origin)
    if get_origin(hint) is Mapping:
        if not isinstance(value, dict):
            raise origin.error(path, 'it is no table. Write { "one" = "value" }.')
        return {key: _convert(arguments[1], one, (*path, key), origin) for key, one in value.items()}
    if _is_table(hint):
        if not isinstance(value, dict):
            raise origin.error(path, f"it is no table. Write [{_dotted(path)}] with its keys below.")
        return _build(hint, value, path, origin)
    return _scalar(hint, value, path, origin)


def _list(hint: Any, value: Any, path: tuple[str | int, ...], origin: _Origin) -> tuple[Any, ...]:
    if isinstance(value, _Text):
        value = [_Text(one.strip()) for one in value.split(",") if one.strip()]
    if not isinstance(value, list):
        what = f"tables. Write [[{_dotted(path)}]]" if _is_table(hint) else 'texts. Write ["one", "two"]'
        raise origin.error(path, f"it is no list of {what}.")
    return tuple(_convert(hint, one, (*path, place), origin) for place, one in enumerate(value))


def _scalar(hint: Any, value: Any, path: tuple[str | int, ...], origin: _Origin) -> Any:
    if isinstance(value, _Text):
        value = _from_text(hint, value)
    elif hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint:
        raise origin.error(path, f"{value!r} is not {_SCALARS[hint]}. Give {_SCALARS[hint]}.")
    return value


def _from_text(hint: Any, text: str) -> Any:
    """A text as the type that is wanted; as it is if it is none."""
    if hint is bool:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower(), text)
    try:
        return hint(str(text))
    except ValueError:
        return str(text)


def _check_probe(key: str, symbol: str, program: str) -> None:
    try:
        Probe(symbol, program)
    except SowatchError as error:
        raise ConfigError(key, str(error)) from error


def _refuse_keys_of_others(one: Struct, kind: str, keys: Mapping[str, Sequence[str]]) -> None:
    """A key that only another type of sink or exporter has says something that would not be done."""
    defaults = {known.name: known.default for known in fields(one)}
    for owner, names in keys.items():
        for name in names:
            if owner != kind and getattr(one, name) != defaults[name]:
                raise ConfigError(
                    name, f"type {kind!r} has none, only {owner!r} does. Take it away, or correct the type."
                )
