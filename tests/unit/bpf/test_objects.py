"""The objects of this installation: named by hash, and compared with what the build wrote down."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from sowatch.bpf.objects import ShippedObject, shipped_objects

SHA256_OF_ONE = hashlib.sha256(b"one").hexdigest()


def build(directory: Path, *, content: bytes = b"one", listed: bytes = b"one") -> None:
    """An object, and the manifest as the build writes it for ``listed``."""
    (directory / "a.bpf.o").write_bytes(content)
    manifest = {"objects": {"a.bpf.o": hashlib.sha256(listed).hexdigest()}}
    (directory / "objects.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_every_object_here_is_the_one_that_was_built() -> None:
    found = shipped_objects()

    assert {"watch.bpf.o", "watch_old.bpf.o", "prebuilt.bpf.o", "tls_taps.bpf.o"} <= {one.name for one in found}
    assert {one.is_as_built for one in found} == {True}


def test_an_object_is_named_with_its_hash(tmp_path: Path) -> None:
    build(tmp_path)

    assert shipped_objects(tmp_path) == (ShippedObject("a.bpf.o", SHA256_OF_ONE, True),)


def test_an_object_that_was_exchanged_is_not_as_built(tmp_path: Path) -> None:
    build(tmp_path, listed=b"another")

    assert shipped_objects(tmp_path) == (ShippedObject("a.bpf.o", SHA256_OF_ONE, False),)


def test_an_object_that_is_missing_is_named(tmp_path: Path) -> None:
    build(tmp_path)
    (tmp_path / "a.bpf.o").unlink()

    assert shipped_objects(tmp_path) == (ShippedObject("a.bpf.o", None, False),)


@pytest.mark.parametrize("manifest", [None, "", "[]", "{}", '{"objects": 1}'])
def test_without_a_manifest_nothing_is_known_of_the_build(tmp_path: Path, manifest: str | None) -> None:
    build(tmp_path)
    if manifest is None:
        (tmp_path / "objects.json").unlink()
    else:
        (tmp_path / "objects.json").write_text(manifest, encoding="utf-8")

    assert shipped_objects(tmp_path) == (ShippedObject("a.bpf.o", SHA256_OF_ONE, None),)
