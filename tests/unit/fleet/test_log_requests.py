"""Requests of OTLP to rows, without a store: both encodings, and whatever else a client may send."""

from __future__ import annotations

import base64
import contextlib
import json
import random
import struct
import time
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import (
    ExportLogsServiceRequest,
    ExportLogsServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue

from sowatch.fleet import log_requests
from sowatch.fleet.log_requests import MAX_ATTRIBUTES, MAX_DEPTH, Decoded, NotOtlp, answer_of, decode, status_of

NOW = 1_764_412_345_123_456_789
SECOND = 1_000_000_000
DAY = 86_400 * SECOND


class Reader:
    """RowBinary, read back: what a row has in the order of its columns."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    def take(self, size: int) -> bytes:
        self._place += size
        assert self._place <= len(self._data)
        return self._data[self._place - size : self._place]

    def varint(self) -> int:
        number = shift = 0
        while True:
            byte = self.take(1)[0]
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number

    def text(self) -> str:
        return self.take(self.varint()).decode()

    def map(self) -> dict[str, str]:
        return {self.text(): self.text() for _ in range(self.varint())}

    def row(self) -> dict[str, Any]:
        found: dict[str, Any] = {"resource_url": self.text(), "resource": self.map(), "service": self.text()}
        found |= {"scope_url": self.text(), "scope": self.text(), "scope_version": self.text()}
        found["scope_attributes"] = self.map()
        found["time"] = struct.unpack("<q", self.take(8))[0]
        found |= {"trace": self.text(), "span": self.text(), "flags": self.take(1)[0]}
        found |= {"severity": self.text(), "number": self.take(1)[0], "body": self.text(), "event": self.text()}
        found["attributes"] = self.map()
        return found

    def rows(self) -> list[dict[str, Any]]:
        found = []
        while self._place < len(self._data):
            found.append(self.row())
        return found


def rows(decoded: Decoded) -> list[dict[str, Any]]:
    found = Reader(b"".join(decoded.rows)).rows()
    assert (len(found), sum(map(len, decoded.rows))) == (decoded.records, decoded.bytes)
    return found


def message(*attributes: KeyValue, **fields: Any) -> ExportLogsServiceRequest:
    """A request with one record."""
    request = ExportLogsServiceRequest()
    record = request.resource_logs.add().scope_logs.add().log_records.add(time_unix_nano=NOW, **fields)
    record.attributes.extend(attributes)
    return request


def pair(key: str, **value: Any) -> KeyValue:
    return KeyValue(key=key, value=AnyValue(**value))


def from_message(request: ExportLogsServiceRequest) -> Decoded:
    return decode(request.SerializeToString(), is_json=False, now_ns=NOW)


def from_json(value: Any) -> Decoded:
    return decode(json.dumps(value).encode(), is_json=True, now_ns=NOW)


def with_record(record: Any) -> dict[str, Any]:
    return {"resourceLogs": [{"scopeLogs": [{"logRecords": [record]}]}]}


FULL = {
    "resourceLogs": [
        {
            "resource": {
                "attributes": [
                    {"key": "service.name", "value": {"stringValue": "sowatch"}},
                    {"key": "n", "value": {"intValue": "-5"}},
                ]
            },
            "schemaUrl": "r",
            "scopeLogs": [
                {
                    "scope": {
                        "name": "sowatch.fleet",
                        "version": "1",
                        "attributes": [{"key": "s", "value": {"boolValue": True}}],
                    },
                    "schemaUrl": "s",
                    "logRecords": [
                        {
                            "timeUnixNano": str(NOW),
                            "observedTimeUnixNano": NOW + 1,
                            "severityNumber": 9,
                            "severityText": "INFO",
                            "body": {"stringValue": "text"},
                            "attributes": [
                                {"key": "double", "value": {"doubleValue": 1.5}},
                                {"key": "bytes", "value": {"bytesValue": base64.b64encode(b"\0\xff").decode()}},
                                {"key": "list", "value": {"arrayValue": {"values": [{"intValue": "1"}, {}]}}},
                                {
                                    "key": "map",
                                    "value": {"kvlistValue": {"values": [{"key": "a", "value": {"stringValue": "b"}}]}},
                                },
                                {"key": "none", "value": {}},
                                {"key": "missing"},
                            ],
                            "flags": 257,
                            "traceId": "0123456789abcdef0123456789ABCDEF",
                            "spanId": "0123456789abcdef",
                            "eventName": "sowatch.library.state",
                            "unknown": {"of": ["a", "later", "version"]},
                        }
                    ],
                }
            ],
        }
    ]
}
ROW = {
    "resource_url": "r",
    "resource": {"service.name": "sowatch", "n": "-5"},
    "service": "sowatch",
    "scope_url": "s",
    "scope": "sowatch.fleet",
    "scope_version": "1",
    "scope_attributes": {"s": "true"},
    "time": NOW,
    "trace": "0123456789abcdef0123456789abcdef",
    "span": "0123456789abcdef",
    "flags": 1,
    "severity": "INFO",
    "number": 9,
    "body": "text",
    "event": "sowatch.library.state",
    "attributes": {"double": "1.5", "bytes": "AP8=", "list": "[1,null]", "map": '{"a":"b"}', "none": "", "missing": ""},
}


def full_message() -> ExportLogsServiceRequest:
    request = ExportLogsServiceRequest()
    logs = request.resource_logs.add(schema_url="r")
    logs.resource.attributes.extend([pair("service.name", string_value="sowatch"), pair("n", int_value=-5)])
    scope = logs.scope_logs.add(schema_url="s")
    scope.scope.name, scope.scope.version = "sowatch.fleet", "1"
    scope.scope.attributes.append(pair("s", bool_value=True))
    record = scope.log_records.add(
        time_unix_nano=NOW,
        observed_time_unix_nano=NOW + 1,
        severity_number=9,
        severity_text="INFO",
        flags=257,
        trace_id=bytes.fromhex("0123456789abcdef" * 2),
        span_id=bytes.fromhex("0123456789abcdef"),
        event_name="sowatch.library.state",
    )
    record.body.string_value = "text"
    record.attributes.extend(
        [pair("double", double_value=1.5), pair("bytes", bytes_value=b"\0\xff"), KeyValue(key="list")]
    )
    record.attributes[2].value.array_value.values.extend([AnyValue(int_value=1), AnyValue()])
    record.attributes.append(KeyValue(key="map"))
    record.attributes[3].value.kvlist_value.values.append(pair("a", string_value="b"))
    record.attributes.extend([pair("none"), KeyValue(key="missing")])
    return request


def test_both_encodings_give_the_same_row_with_each_field_in_its_column() -> None:
    assert rows(from_json(FULL)) == [ROW]
    assert rows(from_message(full_message())) == [ROW]


def test_a_request_with_nothing_in_it_has_no_rows() -> None:
    for body in (
        {},
        {"resourceLogs": []},
        {"resourceLogs": None},
        {"resourceLogs": [{"scopeLogs": [{}]}]},
        {"other": 1},
    ):
        assert (from_json(body).records, from_json(body).rejected) == (0, 0)
    assert decode(b"", is_json=False, now_ns=NOW).records == 0


def test_a_record_without_a_time_has_that_of_its_observation_else_that_of_its_arrival() -> None:
    assert rows(from_json(with_record({"observedTimeUnixNano": str(NOW + 7)})))[0]["time"] == NOW + 7
    assert rows(from_json(with_record({})))[0]["time"] == NOW


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "truncated"),
        (b"{", "truncated"),
        (b"[]", "Expected `object`"),
        (b'"\xff"', ""),
        (b'{"resourceLogs": {}}', "Expected `array | null`, got `object` - at `$.resourceLogs`"),
        (b'{"resourceLogs": [{"scopeLogs": [{"logRecords": [{"attributes": [{"key": 5}]}]}]}]}', "Expected `str`"),
        (b'{"resourceLogs": [{"scopeLogs": [{"logRecords": [{"body": "text"}]}]}]}', "Expected `object | null`"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b"\x0a\x05hello", ""),
    ],
)
def test_what_is_no_json_of_otlp_is_refused_with_the_place(body: bytes, why: str) -> None:
    with pytest.raises(NotOtlp) as refused:
        decode(body, is_json=True, now_ns=NOW)
    assert why in str(refused.value)


@pytest.mark.parametrize("body", [b"{}", b"\x0a\x7fshort", b"\xff" * 100, b"\x0a\x00\x0b"])
def test_what_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(NotOtlp):
        decode(body, is_json=False, now_ns=NOW)


def test_text_that_is_not_utf8_is_refused_in_messages_wherever_it_stands() -> None:
    for text in ("attribute-value", "sowatch-event", "attribute-key"):
        request = message(pair("attribute-key", string_value="attribute-value"), event_name="sowatch-event")
        body = request.SerializeToString().replace(text.encode(), b"\xff" * len(text))
        with pytest.raises(NotOtlp):
            decode(body, is_json=False, now_ns=NOW)


def test_nuls_are_stored_as_text_and_lone_surrogates_refused() -> None:
    (row,) = rows(from_json(with_record({"eventName": "a\0b"})))
    assert row["event"] == "a\0b"
    with pytest.raises(NotOtlp):
        from_json(with_record({"eventName": "\ud800"}))


def test_sql_in_names_is_text_as_any_other() -> None:
    text = "'); DROP TABLE otel_logs; -- \\' \\\\ {x:String}"
    (row,) = rows(from_message(message(pair(text, string_value=text), event_name=text)))
    assert (row["attributes"], row["event"]) == ({text: text}, text)


def test_of_two_attributes_with_one_key_the_last_counts() -> None:
    twice = [pair("k", string_value="first"), pair("k", string_value="last")]
    assert rows(from_message(message(*twice)))[0]["attributes"] == {"k": "last"}


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {"stringValue": "x"}
    for _ in range(depth):
        value = {"arrayValue": {"values": [value]}}
    return value


RECORDS = [
    ({"timeUnixNano": "x"}, "a number is none"),
    ({"timeUnixNano": "9" * 30}, "a number is none"),
    ({"timeUnixNano": 1 << 70}, "a number has more than 64 bits"),
    ({"timeUnixNano": "-5"}, "its time is not between 1970 and 2103"),
    ({"timeUnixNano": str((1 << 63) - 1)}, "its time is not between 1970 and 2103"),
    ({"traceId": "xyz"}, "an id is not in hexadecimal"),
    ({"traceId": "00ff"}, "an id has 2 bytes, not 16"),
    ({"body": nested(MAX_DEPTH + 1)}, f"a value is nested more than {MAX_DEPTH} deep"),
    ({"body": {"stringValue": "x" * (257 << 10)}}, "its body has more than 256 KiB"),
    ({"attributes": [{"key": "k" * 2000}]}, "a key has more than 1024 bytes"),
    ({"attributes": [{"key": "k", "value": {"stringValue": "v" * (65 << 10)}}]}, "an attribute has more than 64 KiB"),
    ({"attributes": [{"key": "k", "value": {"bytesValue": "%"}}]}, "bytesValue is not in base64"),
    ({"attributes": [{"key": str(n)} for n in range(MAX_ATTRIBUTES + 1)]}, "it has more than 128 attributes"),
    ({"attributes": [{"key": "k", "value": {"doubleValue": "many"}}]}, "doubleValue is no number"),
]


@pytest.mark.parametrize(("record", "reason"), RECORDS, ids=[reason for _, reason in RECORDS])
def test_a_record_that_cannot_be_taken_is_counted_with_the_reason_and_the_others_are_taken(record, reason: str) -> None:
    body = with_record(record)
    body["resourceLogs"][0]["scopeLogs"][0]["logRecords"].append({"eventName": "taken"})
    decoded = from_json(body)

    assert [row["event"] for row in rows(decoded)] == ["taken"]
    assert (decoded.rejected, decoded.reason) == (1, reason)
    assert json.loads(answer_of(decoded, is_json=True)) == {
        "partialSuccess": {"rejectedLogRecords": "1", "errorMessage": reason}
    }
    partial = ExportLogsServiceResponse.FromString(answer_of(decoded, is_json=False)).partial_success
    assert (partial.rejected_log_records, partial.error_message) == (1, reason)


def test_deep_values_of_messages_are_refused_as_those_of_json() -> None:
    def deep(depth: int) -> AnyValue:
        value = AnyValue(string_value="x")
        for _ in range(depth):
            outer = AnyValue()
            outer.array_value.values.append(value)
            value = outer
        return value

    request = message(KeyValue(key="k", value=deep(MAX_DEPTH + 1)))
    assert from_message(request).reason == f"a value is nested more than {MAX_DEPTH} deep"
    # Beyond protobuf's own bound, which its Python parts have, too.
    value = b"\x0a\x01x"
    for _ in range(120):
        value = b"\x2a" + _varint(len(value) + 1 + len(_varint(len(value)))) + b"\x0a" + _varint(len(value)) + value
    body = b"\x0a\x01k\x12" + _varint(len(value)) + value
    with pytest.raises(NotOtlp, match="an attribute cannot be parsed"):
        decode(_with_attribute(body), is_json=False, now_ns=NOW)


def _field(number: int, data: bytes) -> bytes:
    return bytes((number << 3 | 2,)) + _varint(len(data)) + data


def _with_attribute(pair: bytes) -> bytes:
    """A request with one record, whose one attribute has these bytes."""
    return _field(1, _field(2, _field(2, _field(6, pair))))


@given(
    st.binary(max_size=80) | st.builds(lambda a, b: _field(1, a) + _field(2, _field(1, b)), st.binary(), st.binary())
)
def test_attributes_that_are_cut_are_those_that_protobuf_parses(data: bytes) -> None:
    try:
        parsed = KeyValue.FromString(data)
    except DecodeError:
        with pytest.raises(NotOtlp):
            decode(_with_attribute(data), is_json=False, now_ns=NOW)
        return
    cut = log_requests._short_text(data)
    if cut is not None:
        assert (cut[0][1:].decode(), cut[1][1:].decode()) == (parsed.key, parsed.value.string_value)
        assert cut == (log_requests._sized(parsed.key), log_requests._sized(parsed.value.string_value))


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 128, 129, 300])
def test_attributes_of_any_size_have_their_size_before_them(size: int) -> None:
    key, value = "k" * size, "v" * size
    assert rows(from_message(message(pair(key, string_value=value), pair("é", string_value=value))))[0][
        "attributes"
    ] == {
        key: value,
        "é": value,
    }


def test_records_of_a_resource_or_scope_that_cannot_be_taken_are_all_counted() -> None:
    request = ExportLogsServiceRequest()
    for where in ("resource", "scope", "neither"):
        logs = request.resource_logs.add()
        scope = logs.scope_logs.add()
        scope.log_records.add(event_name=where)
        scope.log_records.add(event_name=where)
        bad = {"resource": logs.resource, "scope": scope.scope}.get(where)
        if bad is not None:
            bad.attributes.append(pair("k" * 2000, string_value="v"))
    decoded = from_message(request)

    assert [row["event"] for row in rows(decoded)] == ["neither"] * 2
    assert (decoded.rejected, decoded.reason) == (4, "of a resource: a key has more than 1024 bytes")


def test_an_answer_without_losses_is_empty() -> None:
    decoded = from_json(with_record({}))
    assert (answer_of(decoded, is_json=True), answer_of(decoded, is_json=False)) == (b"{}", b"")


def test_small_records_with_a_large_resource_do_not_grow_beyond_the_bound() -> None:
    request = ExportLogsServiceRequest()
    logs = request.resource_logs.add()
    logs.resource.attributes.extend(pair(str(n), string_value="v" * 60_000) for n in range(100))
    scope = logs.scope_logs.add()
    for _ in range(1000):
        scope.log_records.add()
    decoded = from_message(request)

    assert decoded.bytes <= log_requests.MAX_ROW_BYTES
    assert (decoded.records, decoded.rejected) == (11, 989)
    assert decoded.reason == "the rows of a request have more than 64 MiB"


def test_a_request_has_no_more_records_than_the_bound() -> None:
    body = b"\x12\x00" * 150_000  # each an empty LogRecord
    decoded = decode(_field(1, _field(2, body)), is_json=False, now_ns=NOW)
    assert (decoded.records, decoded.rejected) == (100_000, 50_000)
    assert decoded.reason == "a request has more than 100000 records"


def _varint(number: int) -> bytes:
    made = bytearray()
    while number > 127:
        made.append(number & 127 | 128)
        number >>= 7
    return bytes(made) + bytes((number,))


@pytest.mark.parametrize("is_json", [True, False])
def test_a_request_has_no_more_resources_scopes_and_elements_than_the_bounds(is_json: bool) -> None:
    if is_json:
        bodies = [b'{"resourceLogs": [' + b"{}," * 20_000 + b"{}]}"]
        bodies += [b'{"resourceLogs": [{"scopeLogs": [' + b"{}," * 20_000 + b"{}]}]}"]
        value = {"arrayValue": {"values": [{}] * 10_001}}
        decoded = from_json(with_record({"body": value}))
    else:
        bodies = [b"\x0a\x00" * 20_001, _field(1, b"\x12\x00" * 20_001)]
        decoded = decode(
            _field(1, _field(2, _field(2, _field(5, _field(5, b"\x0a\x00" * 10_001))))), is_json=False, now_ns=NOW
        )
    for body, what in zip(bodies, ("resources", "scopes"), strict=True):
        with pytest.raises(NotOtlp, match=f"it has more than 20000 {what}"):
            decode(body, is_json=is_json, now_ns=NOW)
    assert (decoded.rejected, decoded.reason) == (1, "a value has more than 10000 elements")


def test_records_of_many_days_that_are_long_ago_are_refused_after_some() -> None:
    records = [{"timeUnixNano": str(NOW - age * DAY)} for age in (*range(31), *range(100, 120))]
    body = {"resourceLogs": [{"scopeLogs": [{"logRecords": records}]}]}
    decoded = from_json(body)

    assert (decoded.records, decoded.rejected) == (31 + log_requests.MAX_ODD_DAYS, 12)
    assert decoded.reason == "more than 8 days of a request are not of the last month"
    assert decoded.days == {NOW // DAY - age for age in (*range(31), *range(100, 108))}


def test_attributes_that_are_remembered_are_those_that_were_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_requests, "_KNOWN_TEXTS", 8)
    random_ = random.Random(5)
    for _ in range(50):
        sent = {f"k{random_.randrange(12)}": f"v{random_.randrange(4)}" for _ in range(10)}
        found = rows(from_message(message(*(pair(key, string_value=value) for key, value in sent.items()))))
        assert found[0]["attributes"] == sent


texts = st.text(max_size=200)


@given(st.lists(st.tuples(texts, texts, st.integers(-(1 << 63), (1 << 63) - 1)), max_size=20))
def test_whatever_text_is_sent_is_what_the_row_has(sent: list[tuple[str, str, int]]) -> None:
    request = ExportLogsServiceRequest()
    scope = request.resource_logs.add().scope_logs.add()
    for key, value, number in sent:
        record = scope.log_records.add(time_unix_nano=NOW, event_name=key)
        record.attributes.extend([pair("t:" + key, string_value=value), pair("n", int_value=number)])
    found = rows(from_message(request))
    assert [(row["event"], row["attributes"]) for row in found] == [
        (key, {"t:" + key: value, "n": str(number)}) for key, value, number in sent
    ]


@given(st.binary(max_size=400))
def test_no_bytes_are_more_than_refused(body: bytes) -> None:
    for is_json in (False, True):
        with contextlib.suppress(NotOtlp):
            rows(decode(body, is_json=is_json, now_ns=time.time_ns()))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


@given(
    st.dictionaries(
        st.sampled_from(["timeUnixNano", "body", "attributes", "traceId", "flags", "severityNumber"]), json_values
    )
)
def test_no_json_in_a_record_is_more_than_refused(record: dict[str, Any]) -> None:
    try:
        decoded = from_json(with_record(record))
    except NotOtlp:
        return
    assert len(rows(decoded)) + decoded.rejected == 1


def test_a_status_is_what_google_rpc_has() -> None:
    assert status_of(14, "later", is_json=True) == b'{"code":14,"message":"later"}'
    long = "x" * 300
    assert status_of(3, long, is_json=False) == b"\x08\x03\x12\xac\x02" + long.encode()
