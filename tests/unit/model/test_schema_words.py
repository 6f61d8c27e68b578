"""One word has one type, over all that any command prints; what has another one is marked as deprecated."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from sowatch.cli._schema import load_schema
from sowatch.cli.schema import EVENTS_OF, narrowed

SCHEMA = load_schema()
#: Python's words for the types of values in ``const`` and ``enum``.
NAMES = {"int": "number", "integer": "number", "float": "number", "str": "string", "bool": "boolean"}


def types_of(node: dict[str, Any], defs: dict[str, Any]) -> set[str]:
    """The types of a member, null aside; of a list those of what is in it."""
    if "$ref" in node:
        return types_of(defs[node["$ref"].rpartition("/")[2]], defs)
    if "const" in node or "enum" in node:
        values = [node["const"]] if "const" in node else node["enum"]
        return {NAMES.get(type(one).__name__, "object") for one in values if one is not None}
    for word in ("anyOf", "oneOf"):
        if word in node:
            return set().union(*(types_of(one, defs) for one in node[word]))
    found = node.get("type", "anything")
    kinds = {NAMES.get(one, one) for one in ([found] if isinstance(found, str) else found)} - {"null"}
    if "array" in kinds and "items" in node:
        kinds = (kinds - {"array"}) | {f"array of {one}" for one in types_of(node["items"], defs)}
    return kinds


def members(node: Any, at: str = "") -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Each member of each object: where, its name, its schema."""
    if isinstance(node, dict):
        if node.get("type") == "object":
            yield from ((at, name, one) for name, one in node.get("properties", {}).items())
        for key, one in node.items():
            yield from members(one, f"{at}.{key}")
    elif isinstance(node, list):
        for one in node:
            yield from members(one, at)


def words_of_several_types(schema: dict[str, Any]) -> dict[str, set[str]]:
    words: dict[str, set[str]] = {}
    for _, name, member in members(schema["$defs"]):
        if not member.get("deprecated"):
            words.setdefault(name, set()).update(types_of(member, schema["$defs"]))
    return {name: types for name, types in words.items() if len(types) > 1}


def test_one_word_has_one_type() -> None:
    assert words_of_several_types(SCHEMA) == {}


@pytest.mark.parametrize(("place", "word"), [("snapshot", "processes"), ("audit", "mappings"), ("map", "files")])
def test_a_word_of_two_types_is_found(place: str, word: str) -> None:
    schema = copy.deepcopy(SCHEMA)
    del schema["$defs"][place]["properties"][word]["deprecated"]

    assert word in words_of_several_types(schema)


def test_what_is_deprecated_says_what_has_its_place() -> None:
    deprecated = [(at, name, one["description"]) for at, name, one in members(SCHEMA["$defs"]) if one.get("deprecated")]
    assert len(deprecated) >= 15
    for at, name, description in deprecated:
        place = SCHEMA["$defs"][at.split(".")[1]]["properties"]
        assert any(f"Use {other}." in description for other in place.keys() - {name}), (at, name)


def test_every_kind_of_line_belongs_to_a_command() -> None:
    kinds = set(SCHEMA["properties"]["event"]["enum"])
    assert set().union(*EVENTS_OF.values()) == kinds


@pytest.mark.parametrize("command", EVENTS_OF)
def test_the_schema_of_a_command_needs_nothing_that_it_does_not_have(command: str) -> None:
    schema = narrowed(SCHEMA, EVENTS_OF[command], command)
    text = repr(schema)
    assert schema["$id"] == f"urn:sowatch:schema:1:{command}"
    assert set(schema["$defs"]) <= set(SCHEMA["$defs"])
    assert {one.split("'")[0] for one in text.split("#/$defs/")[1:]} <= set(schema["$defs"])
