"""The BPF objects that this installation has, by hash, and whether each is the one that was built. Loads nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Final

from msgspec import Struct

from sowatch.bpf.binding import PROGRAMS

__all__ = ["ShippedObject", "shipped_objects"]

#: Written by the build; see _build_programs.py.
MANIFEST: Final = "objects.json"


class ShippedObject(Struct, frozen=True):
    """An object beside the programs.

    Attributes:
        name: of the file, such as ``watch.bpf.o``.
        sha256: of what is in it now; None: it cannot be read.
        is_as_built: whether that is the hash that the build wrote down; None: the build wrote none down for it.
    """

    name: str
    sha256: str | None
    is_as_built: bool | None


def shipped_objects(directory: Path = PROGRAMS) -> tuple[ShippedObject, ...]:
    """Every object that is there or should be, by name."""
    built = _built(directory)
    names = sorted({*built, *(path.name for path in directory.glob("*.bpf.o"))})
    return tuple(_examined(directory / name, built.get(name)) for name in names)


def _built(directory: Path) -> dict[str, str]:
    try:
        listed = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["objects"]
        return {str(name): str(digest) for name, digest in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _examined(path: Path, built: str | None) -> ShippedObject:
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ShippedObject(path.name, None, None if built is None else False)
    return ShippedObject(path.name, found, None if built is None else found == built)
