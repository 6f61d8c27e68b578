"""Builds the BPF programs: their objects, the headers that these were made with, and a manifest. Build time only.

setup.py and tools/wheels run it by path, so it imports nothing but Python's own library. The manifest,
``objects.json``, names each object with its SHA-256, the compiler, and a hash of the sources: objects that were made
elsewhere are taken for these sources only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

__all__ = ["ARCHITECTURES", "MANIFEST", "BuildError", "compile_programs", "copy_prebuilt", "find_clang", "sources_hash"]

#: libbpf's names for the register layouts (bpf/bpf_tracing.h), by `uname -m`.
ARCHITECTURES = {"x86_64": "x86", "amd64": "x86", "aarch64": "arm64", "arm64": "arm64"}
MANIFEST = "objects.json"

SOURCES = Path(__file__).resolve().parent / "programs"


class BuildError(Exception):
    """The programs cannot be built; the message is for the terminal."""


def find_clang() -> str:
    """The clang that CLANG names, else the first on PATH.

    Raises:
        BuildError: there is none.
    """
    names = [os.environ["CLANG"]] if os.environ.get("CLANG") else ["clang"]
    names += [f"clang-{version}" for version in range(22, 13, -1)] if names == ["clang"] else []
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    raise BuildError(
        f"sowatch: {names[0]} was not found, and the BPF programs need it. Install it: "
        "apt-get install clang llvm (Debian, Ubuntu) or dnf install clang llvm (Fedora)."
    )


def compile_programs(machine: str, includes: Sequence[str], made: Path) -> None:
    """Compiles every program for a machine.

    Args:
        machine: as `uname -m` names it.
        includes: directories of the headers of libbpf, and of the kernel for user space on that machine.
        made: where the objects, ``headers/`` and the manifest go.

    Raises:
        BuildError: no clang, no register layout for the machine, or a program does not compile.
    """
    target = ARCHITECTURES.get(machine)
    if target is None:
        raise BuildError(
            f"sowatch: no BPF register layout is known for {machine}. Known: {', '.join(sorted(ARCHITECTURES))}."
        )
    clang = find_clang()
    strip = shutil.which(os.environ.get("LLVM_STRIP", "llvm-strip"))
    made.mkdir(parents=True, exist_ok=True)
    # Compiled from its own directory with relative names, so that no path of this machine
    # gets into the line information that BTF carries.
    command = [clang, "-O2", "-g", "-target", "bpf", "-mcpu=v3", f"-D__TARGET_ARCH_{target}"]
    # Of the headers of this system only those that were asked for.
    command += ["-Wall", "-Werror", "-fdebug-compilation-dir=.", "-nostdlibinc", "-I."]
    command += [word for directory in includes for word in ("-idirafter", directory)]
    objects = []
    for source in sorted(SOURCES.glob("*.bpf.c")):
        output = made / source.with_suffix(".o").name
        words = [*command, "-c", source.name, "-o", str(output.resolve())]
        if subprocess.run(words, cwd=SOURCES, check=False).returncode != 0:
            raise BuildError(f"sowatch: clang could not compile {source}; its messages are above.")
        _ship_headers([*command, "-M", source.name], includes, made)
        # DWARF is most of the file and nobody reads it; BTF stays (-g, not -s).
        if strip and subprocess.run([strip, "-g", str(output)], check=False).returncode != 0:
            raise BuildError(f"sowatch: {strip} could not strip {output}; its message is above.")
        objects.append(output)
    said = subprocess.run([clang, "--version"], capture_output=True, text=True, check=True).stdout
    manifest = {
        "machine": machine,
        "compiler": said.splitlines()[0],
        "sources": sources_hash(),
        "objects": {path.name: _sha256(path) for path in objects},
    }
    (made / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _ship_headers(command: Sequence[str], includes: Sequence[str], made: Path) -> None:
    """Copies the headers that a program includes from the system, for strategy runtime to compile with.

    What stands in a directory for one architecture (asm/) goes where all look for it: the object is
    for this architecture anyway.
    """
    said = subprocess.run(command, cwd=SOURCES, capture_output=True, text=True, check=True).stdout
    bases = sorted(includes, key=len, reverse=True)
    for name in re.findall(r"/\S+\.h", said):
        base = next((base for base in bases if name.startswith(f"{base}/")), None)
        if base is not None:  # else one of the compiler's own
            copy = made / "headers" / Path(name).relative_to(base)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(name, copy)


def copy_prebuilt(prebuilt: Path, made: Path) -> None:
    """Takes the objects of an sdist, after a comparison with their manifest.

    Args:
        prebuilt: what `compile_programs` has made for the machine.
        made: where all of it goes.

    Raises:
        BuildError: they are not there, are damaged, or were made of other sources than these.
    """
    try:
        manifest = json.loads((prebuilt / MANIFEST).read_text(encoding="utf-8"))
        found = {name: _sha256(prebuilt / name) for name in manifest["objects"]}
    except OSError as error:
        raise BuildError(f"sowatch: {error.filename} cannot be read: {error.strerror}.") from error
    damaged = sorted(name for name, digest in manifest["objects"].items() if found[name] != digest)
    if damaged:
        raise BuildError(f"sowatch: {prebuilt / damaged[0]} is not what {MANIFEST} names. Unpack the sdist anew.")
    if manifest["sources"] != sources_hash():
        raise BuildError(
            f"sowatch: {prebuilt} was made of other sources than {SOURCES}. "
            "Install clang to compile them: apt-get install clang llvm (Debian, Ubuntu)."
        )
    shutil.copytree(prebuilt, made, dirs_exist_ok=True)


def sources_hash() -> str:
    """A hash of every source and header of the programs."""
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.c"), *SOURCES.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
