"""Requests of OTLP for logs in JSON: names in camelCase, 64-bit numbers as texts, ids in hexadecimal. Pure."""

from __future__ import annotations

from msgspec import Struct

__all__ = ["AnyValue", "KeyValue", "Request"]


class _Json(Struct, rename="camel", frozen=True):
    """Unknown members are left out, as OTLP demands."""


class ArrayValue(_Json, frozen=True):
    """As the protocol has it."""

    values: list[AnyValue] | None = None


class KeyValueList(_Json, frozen=True):
    """As the protocol has it."""

    values: list[KeyValue] | None = None


class AnyValue(_Json, frozen=True):
    """As the protocol has it."""

    string_value: str | None = None
    bool_value: bool | None = None
    int_value: int | str | None = None
    double_value: float | str | None = None
    array_value: ArrayValue | None = None
    kvlist_value: KeyValueList | None = None
    bytes_value: str | None = None


class KeyValue(_Json, frozen=True):
    """As the protocol has it."""

    key: str = ""
    value: AnyValue | None = None


class Resource(_Json, frozen=True):
    """As the protocol has it."""

    attributes: list[KeyValue] | None = None


class Scope(_Json, frozen=True):
    """As the protocol has it."""

    name: str | None = None
    version: str | None = None
    attributes: list[KeyValue] | None = None


class LogRecord(_Json, frozen=True):
    """As the protocol has it."""

    time_unix_nano: int | str | None = None
    observed_time_unix_nano: int | str | None = None
    severity_number: int | None = None
    severity_text: str | None = None
    body: AnyValue | None = None
    attributes: list[KeyValue] | None = None
    flags: int | None = None
    trace_id: str | None = None
    span_id: str | None = None
    event_name: str | None = None


class ScopeLogs(_Json, frozen=True):
    """As the protocol has it."""

    scope: Scope | None = None
    log_records: list[LogRecord] | None = None
    schema_url: str | None = None


class ResourceLogs(_Json, frozen=True):
    """As the protocol has it."""

    resource: Resource | None = None
    scope_logs: list[ScopeLogs] | None = None
    schema_url: str | None = None


class Request(_Json, frozen=True):
    """As the protocol has it."""

    resource_logs: list[ResourceLogs] | None = None
