"""Requests of OTLP/HTTP for logs, in protobuf or JSON, to rows of `otel_logs`. Pure; expects hostile input.

A record that cannot be taken is counted with the reason and left out; the others of its request are taken. Needs the
extra ``sowatch[fleet]``, whose parts are imported when the first request is decoded.
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, Final

import msgspec
from msgspec import Struct

from sowatch.fleet.log_json import AnyValue, KeyValue, Request

__all__ = ["Decoded", "NotOtlp", "answer_of", "decode", "status_of"]

#: Attributes of one record, resource or scope.
MAX_ATTRIBUTES: Final = 128
#: Bytes of a key, of a value, and of the body of a record.
MAX_KEY_BYTES: Final = 1 << 10
MAX_VALUE_BYTES: Final = 64 << 10
MAX_BODY_BYTES: Final = 256 << 10
#: Lists and maps within each other.
MAX_DEPTH: Final = 16
#: Elements of one list or map.
MAX_ELEMENTS: Final = 10_000
#: Resources of one request, and scopes. Empty ones have two bytes.
MAX_GROUPS: Final = 20_000
#: Records of one request, and bytes of their rows: each has its resource and scope with it.
MAX_RECORDS: Final = 100_000
MAX_ROW_BYTES: Final = 64 << 20
#: Days of records of one request that are not of this month: each is a part of the table of its own.
MAX_ODD_DAYS: Final = 8
_DAY_NS: Final = 86_400 * 10**9
#: A table has times up to the year 2106, and a margin for what expires then.
_LAST_NS: Final = 4_200_000_000 * 10**9
#: Texts that are kept encoded.
_KNOWN_TEXTS: Final = 20_000
_KNOWN_BYTES: Final = 512

_INT64: Final = struct.Struct("<q").pack
_NONE: Final = b"\0"


class NotOtlp(Exception):
    """The body is no request of OTLP for logs; the text says why."""


class Decoded(Struct, frozen=True):
    """The rows of a request.

    Attributes:
        rows: in RowBinary, with the columns of `sowatch.fleet.store.COLUMNS`; joined by the one that inserts them.
        records: how many.
        bytes: of all rows.
        days: since the epoch, on which they were made.
        rejected: records that cannot be taken.
        reason: why, of the first of them.
    """

    rows: list[bytes]
    records: int
    bytes: int
    days: frozenset[int]
    rejected: int = 0
    reason: str = ""


# ---- requests -------------------------------------------------------------------------------------


def decode(body: bytes, *, is_json: bool, now_ns: int) -> Decoded:
    """The rows of a request.

    Args:
        body: not compressed; its size is bounded by the caller.
        is_json: or protobuf.
        now_ns: the time of a record that has none.

    Raises:
        NotOtlp: it is none.
    """
    if is_json:
        try:
            request: Any = _json_decoder().decode(body)
        except RecursionError as error:
            raise NotOtlp("it is nested too deeply") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise NotOtlp(str(error)) from error
        return _Rows(now_ns, _text_of_json, _pairs_of_json).of(request.resource_logs or ())
    messages = _messages()
    try:
        request = messages.request.FromString(body)
    except messages.decode_error as error:
        raise NotOtlp("it cannot be parsed as an ExportLogsServiceRequest") from error
    return _Rows(now_ns, _text_of_message, messages.pairs.of).of(request.resource_logs)


def answer_of(decoded: Decoded, *, is_json: bool) -> bytes:
    """The body of the answer to a request that was taken, in its own encoding."""
    response = _messages().response()
    if decoded.rejected:
        response.partial_success.rejected_log_records = decoded.rejected
        response.partial_success.error_message = decoded.reason
    if not is_json:
        return bytes(response.SerializeToString())
    if not decoded.rejected:
        return b"{}"
    # 64-bit numbers are texts in this JSON.
    partial = {"rejectedLogRecords": str(decoded.rejected), "errorMessage": decoded.reason}
    return msgspec.json.encode({"partialSuccess": partial})


def status_of(code: int, message: str, *, is_json: bool) -> bytes:
    r"""A ``google.rpc.Status``, the body of every refusal, in the encoding of the request.

    >>> status_of(3, "no", is_json=False)
    b'\x08\x03\x12\x02no'
    """
    text = message.encode("utf-8", "replace")
    if is_json:
        return msgspec.json.encode({"code": code, "message": text.decode()})
    # Two fields: a varint below 128, and a text. Its package is 2 MB.
    return bytes([0x08, code, 0x12]) + _varint(len(text)) + text


@cache
def _json_decoder() -> msgspec.json.Decoder[Request]:
    return msgspec.json.Decoder(Request)


class _Messages(Struct):
    """What is used of protobuf: the classes of messages, and the error of what cannot be parsed."""

    request: Any
    response: Any
    decode_error: type[Exception]
    pairs: _Pairs


@cache
def _messages() -> _Messages:
    """The messages of opentelemetry-proto, with attributes left as bytes in requests: each is parsed once.

    A message and a text of bytes are the same on the wire, and most attributes of a fleet come again and again: reading
    them as messages takes four times as long as all the rest.
    """
    from google.protobuf import (  # type: ignore[import-untyped,unused-ignore]
        descriptor_pb2,
        descriptor_pool,
        message,
        message_factory,
    )
    from opentelemetry.proto.collector.logs.v1 import logs_service_pb2
    from opentelemetry.proto.common.v1 import common_pb2
    from opentelemetry.proto.logs.v1 import logs_pb2
    from opentelemetry.proto.resource.v1 import resource_pb2

    pool = descriptor_pool.DescriptorPool()
    for module in (common_pb2, resource_pb2, logs_pb2, logs_service_pb2):
        file = descriptor_pb2.FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(file)
        for one in file.message_type:
            for field in one.field:
                if field.name == "attributes":
                    field.type = field.TYPE_BYTES
                    field.ClearField("type_name")
        pool.Add(file)
    request = pool.FindMessageTypeByName(logs_service_pb2.ExportLogsServiceRequest.DESCRIPTOR.full_name)
    return _Messages(
        request=message_factory.GetMessageClass(request),
        response=logs_service_pb2.ExportLogsServiceResponse,
        decode_error=message.DecodeError,
        pairs=_Pairs(common_pb2.KeyValue.FromString, message.DecodeError),
    )


class _Pairs:
    """Attributes by their bytes, as key and value in RowBinary; the recent ones are remembered.

    Args:
        parse: of a KeyValue.
        decode_error: what it raises.
    """

    def __init__(self, parse: Callable[[bytes], Any], decode_error: type[Exception]) -> None:
        self._parse = parse
        self._decode_error = decode_error
        self._young: dict[bytes, tuple[bytes, bytes]] = {}
        self._old: dict[bytes, tuple[bytes, bytes]] = {}

    def of(self, attributes: Iterable[bytes]) -> dict[bytes, bytes]:
        """The pairs; of two with one key the last.

        Raises:
            NotOtlp: one is none.
            _Refused: one is too large.
        """
        recent = self._young.get
        found = {}
        for data in attributes:
            key, value = recent(data) or self._remembered(data)
            found[key] = value
        return found

    def _remembered(self, data: bytes) -> tuple[bytes, bytes]:
        found = self._old.get(data) or self._read(data)
        if len(data) < _KNOWN_BYTES:
            if len(self._young) >= _KNOWN_TEXTS:
                # Not cleared: the loop above has its method.
                self._old = self._young.copy()
                self._young.clear()
            self._young[data] = found
        return found

    def _read(self, data: bytes) -> tuple[bytes, bytes]:
        return _short_text(data) or self._parsed(data)

    def _parsed(self, data: bytes) -> tuple[bytes, bytes]:
        if len(data) > 2 * MAX_VALUE_BYTES:
            raise _Refused(f"an attribute has more than {MAX_VALUE_BYTES >> 10} KiB")
        try:
            pair = self._parse(data)
        except self._decode_error as error:
            raise NotOtlp("an attribute cannot be parsed as a KeyValue") from error
        return _checked(_sized(pair.key), _text_of_message(pair.value, 0))


def _short_text(data: bytes) -> tuple[bytes, bytes] | None:
    """The pair of an attribute that is a short text in ASCII, as most are: cut, not parsed. None: it is another one.

    On the wire a text has its size before it, as in RowBinary: field 1 is the key, field 2 a value with the text in
    its field 1.
    """
    try:
        end = data[1] + 2
        size = data[end + 1]
        if (
            data[0] == 0x0A
            and data[end] == 0x12
            and data[end + 2] == 0x0A
            and data[end + 3] == size - 2
            and len(data) == end + 2 + size
            and end < 130
            and size < 130
            and data.isascii()
        ):
            return data[1:end], data[end + 3 :]
    except IndexError:
        pass
    return None


class _Refused(Exception):
    """A record that cannot be taken."""


class _Rows:
    """The rows of one request, one after the other."""

    def __init__(
        self, now_ns: int, text_of: Callable[[Any, int], bytes], pairs_of: Callable[[Any], dict[bytes, bytes]]
    ) -> None:
        self._now_ns = now_ns
        self._text_of = text_of
        self._pairs_of = pairs_of
        self._rows: list[bytes] = []
        self._bytes = 0
        self._today = now_ns // _DAY_NS
        self._days: set[int] = set()
        self._odd_days: set[int] = set()
        self._records = self._rejected = 0
        self._reason = ""

    def of(self, all_logs: Sequence[Any]) -> Decoded:
        """All of them."""
        scopes = 0
        if len(all_logs) > MAX_GROUPS:
            raise NotOtlp(f"it has more than {MAX_GROUPS} resources")
        for logs in all_logs:
            try:
                resource = logs.resource
                attributes = self._attributes(resource.attributes if resource is not None else ())
                of_resource = _sized(logs.schema_url or "") + _map(attributes)
                of_resource += attributes.get(_sized("service.name"), _NONE)
            except _Refused as error:
                for scope_logs in logs.scope_logs or ():
                    self._reject(len(scope_logs.log_records or ()), f"of a resource: {error}")
                continue
            all_scopes = logs.scope_logs or ()
            scopes += len(all_scopes)
            if scopes > MAX_GROUPS:
                raise NotOtlp(f"it has more than {MAX_GROUPS} scopes")
            for scope_logs in all_scopes:
                self._add_scope(of_resource, scope_logs)
        return Decoded(self._rows, self._records, self._bytes, frozenset(self._days), self._rejected, self._reason)

    def _add_scope(self, of_resource: bytes, scope_logs: Any) -> None:
        records = scope_logs.log_records or ()
        try:
            scope = scope_logs.scope
            of_scope = _sized(scope_logs.schema_url or "")
            if scope is None:
                of_scope += _NONE * 3
            else:
                of_scope += _sized(scope.name or "") + _sized(scope.version or "")
                of_scope += _map(self._attributes(scope.attributes))
        except _Refused as error:
            self._reject(len(records), f"of a scope: {error}")
            return
        shared = of_resource + of_scope
        left = MAX_RECORDS - self._records - self._rejected
        if len(records) > left:
            self._reject(len(records) - max(left, 0), f"a request has more than {MAX_RECORDS} records")
            records = records[: max(left, 0)]
        for record in records:
            try:
                row = shared + self._row(record)
            except _Refused as error:
                self._reject(1, str(error))
                continue
            if self._bytes + len(row) > MAX_ROW_BYTES:
                self._reject(1, f"the rows of a request have more than {MAX_ROW_BYTES >> 20} MiB")
                continue
            self._rows.append(row)
            self._bytes += len(row)
            self._records += 1

    def _row(self, record: Any) -> bytes:
        time_ns = _whole(record.time_unix_nano) or _whole(record.observed_time_unix_nano) or self._now_ns
        if not 0 < time_ns < _LAST_NS:
            raise _Refused("its time is not between 1970 and 2103")
        attributes = self._attributes(record.attributes)
        body = _NONE if record.body is None else self._text_of(record.body, 0)
        if len(body) > MAX_BODY_BYTES:
            raise _Refused(f"its body has more than {MAX_BODY_BYTES >> 10} KiB")
        row = b"".join(
            (
                _INT64(time_ns),
                _id(record.trace_id, 16),
                _id(record.span_id, 8),
                bytes((_whole(record.flags) & 0xFF,)),
                _known(record.severity_text or ""),
                bytes((min(max(_whole(record.severity_number), 0), 255),)),
                body,
                _known(record.event_name or ""),
                _map(attributes),
            )
        )
        self._note_day(time_ns // _DAY_NS)
        return row

    def _note_day(self, day: int) -> None:
        if day in self._days:
            return
        if not -31 <= day - self._today <= 1:
            if len(self._odd_days) >= MAX_ODD_DAYS:
                raise _Refused(f"more than {MAX_ODD_DAYS} days of a request are not of the last month")
            self._odd_days.add(day)
        self._days.add(day)

    def _attributes(self, attributes: Sequence[Any] | None) -> dict[bytes, bytes]:
        """Keys and values as RowBinary has texts; of two with one key the last."""
        if not attributes:
            return {}
        if len(attributes) > MAX_ATTRIBUTES:
            raise _Refused(f"it has more than {MAX_ATTRIBUTES} attributes")
        return self._pairs_of(attributes)

    def _reject(self, count: int, reason: str) -> None:
        if count:
            self._rejected += count
            self._reason = self._reason or reason


# ---- values ---------------------------------------------------------------------------------------


def _text_of_message(value: Any, depth: int) -> bytes:
    kind = value.WhichOneof("value")
    if kind == "string_value":
        return _known(value.string_value)
    if kind is None:
        return _NONE
    return _sized(_plain(_value_of_message(value, depth)))


def _value_of_message(value: Any, depth: int) -> Any:
    """What JSON has for it."""
    kind = value.WhichOneof("value")
    if kind == "array_value":
        _check(depth, value.array_value.values)
        return [_value_of_message(one, depth + 1) for one in value.array_value.values]
    if kind == "kvlist_value":
        _check(depth, value.kvlist_value.values)
        return {one.key: _value_of_message(one.value, depth + 1) for one in value.kvlist_value.values}
    # A kind of a later version of the protocol is none here.
    return None if kind is None else getattr(value, kind)


def _pairs_of_json(pairs: Iterable[KeyValue]) -> dict[bytes, bytes]:
    return dict(map(_pair_of_json, pairs))


def _pair_of_json(pair: KeyValue) -> tuple[bytes, bytes]:
    return _checked(_known(pair.key), _NONE if pair.value is None else _text_of_json(pair.value, 0))


def _checked(key: bytes, value: bytes) -> tuple[bytes, bytes]:
    if len(key) > MAX_KEY_BYTES:
        raise _Refused(f"a key has more than {MAX_KEY_BYTES} bytes")
    if len(value) > MAX_VALUE_BYTES:
        raise _Refused(f"an attribute has more than {MAX_VALUE_BYTES >> 10} KiB")
    return key, value


def _text_of_json(value: AnyValue, depth: int) -> bytes:
    if value.string_value is not None:
        return _known(value.string_value)
    return _sized(_plain(_value_of_json(value, depth)))


def _value_of_json(value: AnyValue | None, depth: int) -> Any:
    if value is None:
        return None
    if value.array_value is not None:
        _check(depth, value.array_value.values or ())
        return [_value_of_json(one, depth + 1) for one in value.array_value.values or ()]
    if value.kvlist_value is not None:
        _check(depth, value.kvlist_value.values or ())
        return {one.key: _value_of_json(one.value, depth + 1) for one in value.kvlist_value.values or ()}
    if value.int_value is not None:
        return _whole(value.int_value)
    if value.double_value is not None:
        return _number(value.double_value)
    if value.bytes_value is not None:
        try:
            return base64.b64decode(value.bytes_value, validate=True)
        except binascii.Error as error:
            raise _Refused("bytesValue is not in base64") from error
    return value.string_value if value.string_value is not None else value.bool_value


def _check(depth: int, values: Sequence[Any]) -> None:
    if depth >= MAX_DEPTH:
        raise _Refused(f"a value is nested more than {MAX_DEPTH} deep")
    if len(values) > MAX_ELEMENTS:
        raise _Refused(f"a value has more than {MAX_ELEMENTS} elements")


def _plain(value: Any) -> str:
    """A value as the Collector writes it where a text is wanted: JSON for what is not plain."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    # msgspec writes bytes as base64, and no number that is none: null.
    return msgspec.json.encode(value).decode()


def _whole(value: int | str | None) -> int:
    """A 64-bit number of JSON, which may be a text."""
    if value is None:
        return 0
    if isinstance(value, str):
        digits = value.removeprefix("-")
        if not (digits.isascii() and digits.isdigit() and len(digits) < 21):
            raise _Refused("a number is none")
        value = int(value)
    if not -(1 << 63) <= value < 1 << 64:
        raise _Refused("a number has more than 64 bits")
    return value


def _number(value: float | str) -> float:
    try:
        return float(value) if len(str(value)) < 64 else math.nan
    except ValueError as error:
        raise _Refused("doubleValue is no number") from error


def _id(value: bytes | str | None, size: int) -> bytes:
    """A trace's or span's id in hexadecimal; empty if it has none."""
    if not value:
        return _NONE
    if isinstance(value, str):
        try:
            value = bytes.fromhex(value)
        except ValueError as error:
            raise _Refused("an id is not in hexadecimal") from error
    if len(value) != size:
        raise _Refused(f"an id has {len(value)} bytes, not {size}")
    return _sized(value.hex()) if any(value) else _NONE


# ---- RowBinary ------------------------------------------------------------------------------------

_known_texts: dict[str, bytes] = {}


def _known(text: str) -> bytes:
    """The same as `_sized`, remembered: keys and most values of a fleet come again and again."""
    found = _known_texts.get(text)
    if found is None:
        found = _sized(text)
        if len(found) < _KNOWN_BYTES:
            if len(_known_texts) >= _KNOWN_TEXTS:
                _known_texts.clear()
            _known_texts[text] = found
    return found


def _sized(text: str) -> bytes:
    data = text.encode()
    size = len(data)
    return (bytes((size,)) if size < 128 else _varint(size)) + data


def _varint(number: int) -> bytes:
    made = bytearray()
    while number > 127:
        made.append(number & 127 | 128)
        number >>= 7
    made.append(number)
    return bytes(made)


def _map(pairs: dict[bytes, bytes]) -> bytes:
    parts = [_varint(len(pairs))]
    for pair in pairs.items():
        parts += pair
    return b"".join(parts)
