"""What an agent could not start with, found without starting it: `sowatch serve` and its ``--check`` both ask it first.

Opens no socket, makes no file, loads no program. What is taken by somebody now (the port, the socket of an agent that
runs) is no fault of the settings, and not asked here; nor is, by another user than root, what root may do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from sowatch.agent.settings import ExporterSettings, FleetSettings, Settings, SinkSettings
from sowatch.linux.openat import open_regular
from sowatch.linux.proc import ProcFs
from sowatch.model.errors import ConfigError, SowatchError
from sowatch.telemetry.file_sink import check_path
from sowatch.telemetry.otlp import check_collector
from sowatch.telemetry.statsd import parse_address
from sowatch.uprobes.features import why_not_attach
from sowatch.web.servers import check_socket, parse_listen

__all__ = ["check_settings"]

T = TypeVar("T")


def check_settings(settings: Settings) -> None:
    """Refuses settings that name what is not there or cannot be used.

    Raises:
        ConfigError: which key, and what is wrong with it.
        SowatchError: the proc file system of ``watch.proc_root`` is not there.
    """
    if settings.listen is not None:
        parse_listen(settings.listen)
    if settings.listen_metrics is not None:
        parse_listen(settings.listen_metrics, is_for_metrics=True)
    check_socket(settings.socket, settings.socket_owner, settings.socket_group)
    ProcFs(settings.watch.proc_root)
    if settings.watch.btf_path is not None:
        _check_file("watch.btf_path", settings.watch.btf_path)
    for place, rule in enumerate(settings.rules, 1):
        if rule.attach is not None:
            _check_file(f"rules[{place}].attach.object", rule.attach.object)
    for place, sink in enumerate(settings.sinks, 1):
        _with_place(f"sinks[{place}]", _check_sink, sink)
    for place, exporter in enumerate(settings.exporters, 1):
        _with_place(f"exporters[{place}]", _check_exporter, exporter)
    if settings.fleet.enabled:
        _with_place("fleet", _check_fleet, settings.fleet)
    attaching = next((one.make().name for one in settings.rules if one.has_action), None)
    # Without the privileges to try it there is no answer, and the agent says so itself.
    if (attaching or settings.http.enabled) and os.geteuid() == 0 and (reason := why_not_attach()) is not None:
        key = "rules" if attaching else "http.enabled"
        raise ConfigError(key, f"functions of libraries cannot be probed here: {reason}")


def _check_sink(one: SinkSettings) -> None:
    if one.type == "file":
        assert one.path is not None
        check_path(one.path)
    elif one.type == "otlp":
        check_collector(one.endpoint, one.protocol, "logs")


def _check_exporter(one: ExporterSettings) -> None:
    if one.type == "statsd":
        parse_address(one.address)
    else:
        check_collector(one.endpoint, one.protocol, "metrics")


def _check_fleet(one: FleetSettings) -> None:
    check_collector(one.endpoint, one.protocol, "logs")
    if one.token_file is not None:
        _check_file("token_file", one.token_file)


def _check_file(key: str, path: str) -> None:
    try:
        os.close(open_regular(path))
    except OSError as error:
        raise ConfigError(
            key, f"cannot read {path!r}: {error.strerror}. Give the path of a file that is there."
        ) from error


def _with_place(place: str, check: Callable[[T], None], one: T) -> None:
    try:
        check(one)
    except ConfigError as error:
        key = f"{place}.{error.key.rpartition(' ')[2]}"
        raise ConfigError(key, error.problem, source=error.source) from error
    except SowatchError as error:
        raise ConfigError(place, str(error)) from error
