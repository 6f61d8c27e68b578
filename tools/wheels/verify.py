"""What a wheel must be, read off the file: machine, C library, limited API, BPF objects, licences, SBOM.

Nothing of the wheel is run, so one for another machine is checked in the same way.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Final

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

from wheels.place import GLIBC, MACHINES, PLATFORM

__all__ = ["faults_of", "needed_versions"]

_ELF_MACHINES: Final = {"x86_64": "EM_X86_64", "aarch64": "EM_AARCH64"}
#: What may be asked of the system: the C library and its dynamic linker.
_SYSTEM: Final = re.compile(r"lib(?:c|m|dl|rt|pthread)\.so\.\d+|ld-linux-(?:x86-64|aarch64)\.so\.\d")
_TAG: Final = "cp311-abi3"


def faults_of(wheel: Path, objects: dict[str, dict[str, str]]) -> list[str]:
    """What is wrong with a wheel; empty: nothing.

    Args:
        wheel: the file, by the name that it ships under.
        objects: by machine the SHA-256 of each BPF object, as the sdist has them.
    """
    machine = next((one for one in MACHINES if wheel.name.endswith(f"-{_TAG}-{PLATFORM}_{one}.whl")), None)
    if machine is None:
        return [f"its name does not end with -{_TAG}-{PLATFORM}_MACHINE.whl"]
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    libraries = {name: data for name, data in files.items() if data[:4] == b"\x7fELF" and not name.endswith(".bpf.o")}
    return [
        *_library_faults(libraries, machine),
        *_object_faults(files, objects[machine]),
        *_record_faults(files),
        *_abi_faults(wheel),
    ]


def _library_faults(libraries: dict[str, bytes], machine: str) -> Iterator[str]:
    inside = {Path(name).name for name in libraries}
    for wanted in ("_libbpf", "libbpf", "libelf"):
        if not any(name.startswith((f"{wanted}.", f"{wanted}-")) for name in inside):
            yield f"it has no {wanted}"
    for name, data in libraries.items():
        elf = ELFFile(BytesIO(data))
        if elf["e_machine"] != _ELF_MACHINES[machine]:
            yield f"{name} is for {elf['e_machine']}"
        for library, version in needed_versions(data):
            if library in inside or not version.startswith("GLIBC_"):
                continue
            if tuple(map(int, version.removeprefix("GLIBC_").split("."))) > GLIBC:
                yield f"{name} needs {version} of {library}"
        for tag, value in _dynamic(elf):
            if tag == "DT_NEEDED" and value not in inside and not _SYSTEM.fullmatch(value):
                yield f"{name} needs {value}, which is not in the wheel"
            if tag in ("DT_RPATH", "DT_RUNPATH") and any(not one.startswith("$ORIGIN") for one in value.split(":")):
                yield f"{name} searches {value}"
        if b"/cache/sowatch/" in data or b"/.cache/" in data:
            yield f"{name} names a path of the machine that built it"


def needed_versions(data: bytes) -> list[tuple[str, str]]:
    """(library, version) for each symbol version that an ELF file needs."""
    return [
        (str(version.name), auxiliary.name)
        for section in ELFFile(BytesIO(data)).iter_sections()
        if isinstance(section, GNUVerNeedSection)
        for version, auxiliaries in section.iter_versions()
        for auxiliary in auxiliaries
    ]


def _dynamic(elf: ELFFile) -> Iterator[tuple[str, str]]:
    for section in elf.iter_sections():
        if isinstance(section, DynamicSection):
            for tag in section.iter_tags():
                for attribute in ("needed", "rpath", "runpath"):
                    if hasattr(tag, attribute):
                        yield tag.entry.d_tag, getattr(tag, attribute)


def _object_faults(files: dict[str, bytes], objects: dict[str, str]) -> Iterator[str]:
    base = "sowatch/bpf/programs/"
    found = {name.removeprefix(base): data for name, data in files.items() if name.endswith(".bpf.o")}
    if found.keys() != objects.keys():
        yield f"its BPF objects are {', '.join(sorted(found))}, not {', '.join(sorted(objects))}"
    manifest = json.loads(files.get(f"{base}objects.json", b"{}")).get("objects", {})
    for name, data in found.items():
        digest = hashlib.sha256(data).hexdigest()
        if digest != objects.get(name):
            yield f"{name} is not the one of the sdist"
        if digest != manifest.get(name):
            yield f"{name} is not what objects.json names"
        if ELFFile(BytesIO(data)).get_section_by_name(".BTF") is None:
            yield f"{name} has no BTF"
    for header in ("bpf/bpf_helpers.h", "bpf/bpf_core_read.h", "linux/bpf.h", "asm/types.h"):
        if f"{base}headers/{header}" not in files:
            yield f"strategy runtime would lack {header}"


def _record_faults(files: dict[str, bytes]) -> Iterator[str]:
    """What speaks of the libraries that are brought in: licences and the SBOM."""
    sboms = [json.loads(data) for name, data in files.items() if re.search(r"\.dist-info/sboms/.*\.json$", name)]
    named = {one["name"] for sbom in sboms for one in sbom.get("components", ())}
    licences = [name for name in files if ".dist-info/licenses/" in name]
    for library in ("libbpf", "elfutils", "zlib"):
        if library not in named:
            yield f"no SBOM names {library}"
        if not any(f"/{library}/" in name for name in licences):
            yield f"it has no licence of {library}"


def _abi_faults(wheel: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "abi3audit", "--strict", "--report", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        yield f"abi3audit: {(done.stdout + done.stderr).strip()}"
