"""Builds the binding to libbpf: shim.h is what Python sees, shim.c what it calls. Build time only."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from cffi import FFI

__all__ = ["MODULE", "MissingTool", "compiler", "definitions", "ffibuilder", "libbpf_flags"]

MODULE = "sowatch.bpf._libbpf"
#: 1.1 is the libbpf of Debian 12; Ubuntu 24.04 has 1.3.
LIBBPF_MIN = "1.1"

HERE = Path(__file__).resolve().parent


class MissingTool(Exception):
    """Something the build needs is not installed; the message is one line with its packages."""

    def __init__(self, what: str, *, debian: str, fedora: str) -> None:
        super().__init__(
            f"sowatch: {what}. Install it: apt-get install {debian} (Debian, Ubuntu) or dnf install {fedora} (Fedora)."
        )


def compiler() -> str:
    """The C compiler that the extension is built with.

    Raises:
        MissingTool: there is none.
    """
    command = os.environ.get("CC", "").split()[:1] or ["cc", "gcc", "clang"]
    for name in command:
        found = shutil.which(name)
        if found:
            return found
    raise MissingTool(f"no C compiler ({' or '.join(command)}) found", debian="gcc libc6-dev", fedora="gcc")


def libbpf_flags() -> dict[str, list[str]]:
    """What pkg-config says of libbpf, sorted into the arguments of an extension module.

    Raises:
        MissingTool: no pkg-config, no libbpf headers, or an older libbpf.
    """
    tool = shutil.which(os.environ.get("PKG_CONFIG", "pkg-config"))
    if tool is None:
        raise MissingTool("no pkg-config found", debian="pkg-config", fedora="pkgconf-pkg-config")
    asked = subprocess.run([tool, "--modversion", "libbpf"], capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        raise MissingTool(
            f"the headers of libbpf {LIBBPF_MIN} or newer are not installed", debian="libbpf-dev", fedora="libbpf-devel"
        )
    version = asked.stdout.strip()
    if not _at_least(version, LIBBPF_MIN):
        raise MissingTool(
            f"libbpf {version} is too old, {LIBBPF_MIN} is needed", debian="libbpf-dev", fedora="libbpf-devel"
        )
    said = subprocess.run([tool, "--cflags", "--libs", "libbpf"], capture_output=True, text=True, check=False)
    if said.returncode != 0:
        reason = (said.stderr.strip().splitlines() or ["no reason given"])[0]
        raise MissingTool(
            f"pkg-config cannot resolve libbpf ({reason})",
            debian="libbpf-dev libelf-dev zlib1g-dev",
            fedora="libbpf-devel elfutils-libelf-devel zlib-devel",
        )
    return _sort_flags(said.stdout.split())


def _at_least(version: str, minimum: str) -> bool:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", text)]

    return numbers(version) >= numbers(minimum)


def _sort_flags(flags: list[str]) -> dict[str, list[str]]:
    sorted_flags: dict[str, list[str]] = {
        "include_dirs": [],
        "library_dirs": [],
        "libraries": [],
        "extra_compile_args": [],
        "extra_link_args": [],
    }
    for flag in flags:
        if flag.startswith("-I"):
            sorted_flags["include_dirs"].append(flag[2:])
        elif flag.startswith("-L"):
            sorted_flags["library_dirs"].append(flag[2:])
        elif flag.startswith("-l"):
            sorted_flags["libraries"].append(flag[2:])
        elif flag.startswith("-Wl,"):
            sorted_flags["extra_link_args"].append(flag)
        else:
            sorted_flags["extra_compile_args"].append(flag)
    return sorted_flags


def definitions(header: str) -> str:
    r"""The declarations of a C header as cffi's parser takes them: no comments, no preprocessor.

    >>> definitions("#pragma once\n/* two\nlines */ int f(void); // said\n#define A \\\n 1\nint g(void);")
    ' int f(void); \nint g(void);'
    """
    text = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text)
    text = text.replace("\\\n", " ")
    return "\n".join(line for line in text.split("\n") if not line.lstrip().startswith("#"))


def ffibuilder() -> FFI:
    """The declarations and the source of `sowatch.bpf._libbpf`, not compiled yet."""
    ffi = FFI()
    ffi.cdef(definitions((HERE / "shim.h").read_text(encoding="utf-8")))
    ffi.set_source(MODULE, '#include "shim.h"')
    return ffi
