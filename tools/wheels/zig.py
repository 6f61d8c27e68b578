"""zig as C compiler for a machine and glibc 2.28, and the kernel's headers for user space that come with it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from msgspec import Struct

from wheels.place import GLIBC, cache_directory

__all__ = ["Compiler", "compiler_for", "kernel_headers", "version"]

#: zig keeps the kernel's headers by its own names of machines.
_HEADERS = {"x86_64": "x86-linux-any", "aarch64": "aarch64-linux-any"}


class Compiler(Struct, frozen=True):
    """Commands that compile for one machine, and the variables that zig needs beside them."""

    cc: Path
    ar: Path
    machine: str
    environment: dict[str, str]


def _binary() -> Path:
    found = importlib.util.find_spec("ziglang")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).with_name("zig")


def version() -> str:
    """Of the compiler."""
    return importlib.metadata.version("ziglang")


def kernel_headers(machine: str) -> list[str]:
    """The directories of the kernel's headers for user space, those for all machines first."""
    base = _binary().parent / "lib" / "libc" / "include"
    return [str(base / "any-linux-any"), str(base / _HEADERS[machine])]


def compiler_for(machine: str) -> Compiler:
    """Makes the commands: build systems want one word for a compiler."""
    place = cache_directory("bin", version())
    zig, target = _binary(), f"{machine}-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"
    made = {}
    for name, words in {"cc": f"cc -target {target}", "ar": "ar"}.items():
        made[name] = place / f"{machine}-{name}"
        made[name].write_text(f'#!/bin/sh\nexec "{zig}" {words} "$@"\n', encoding="utf-8")
        made[name].chmod(0o755)
    cache = str(cache_directory("zig"))
    return Compiler(made["cc"], made["ar"], machine, {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache})
