"""The two things pyproject.toml cannot say: how the libbpf binding and the BPF objects are compiled.

The binding becomes `sowatch.bpf._libbpf`. Every src/sowatch/bpf/programs/*.bpf.c becomes a .bpf.o beside
it, and the headers that they include are copied to programs/headers, to compile them with elsewhere. An
editable install puts all of it into the source tree, a wheel takes it from the build directory.
Environment: CC, CLANG, LLVM_STRIP and PKG_CONFIG name other tools than the ones on PATH.
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Command, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BPF = Path("src/sowatch/bpf")
PROGRAMS = BPF / "programs"
BINDING = "sowatch.bpf._libbpf"

#: The limited API gives one binary for every Python from 3.11 on. cffi's C file asks for it by itself,
#: but not in debug builds, and free-threaded builds have none.
LIMITED_API = not (sysconfig.get_config_var("Py_GIL_DISABLED") or sysconfig.get_config_var("Py_DEBUG"))

#: libbpf's names for the register layouts (bpf/bpf_tracing.h), by `uname -m`.
ARCHITECTURES = {"x86_64": "x86", "amd64": "x86", "aarch64": "arm64", "arm64": "arm64"}


def binding_builder() -> dict[str, Any]:
    """The functions of _build_binding.py, run by path: the package is not installed yet."""
    return runpy.run_path(str(ROOT / BPF / "_build_binding.py"))


class BuildBinding(build_ext):
    """Compiles `sowatch.bpf._libbpf` from the declarations in shim.h and from shim*.c."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name != BINDING:
            super().build_extension(ext)
            return
        builder = binding_builder()
        try:
            builder["compiler"]()
            flags = builder["libbpf_flags"]()
        except builder["MissingTool"] as error:
            raise SystemExit(str(error)) from error
        if not Path(sysconfig.get_path("include"), "Python.h").is_file():
            raise SystemExit(
                "sowatch: the headers of this Python are not installed. Install them: "
                "apt-get install python3-dev (Debian, Ubuntu) or dnf install python3-devel (Fedora)."
            )
        generated = Path(self.build_temp, "_libbpf.c")
        generated.parent.mkdir(parents=True, exist_ok=True)
        builder["ffibuilder"]().emit_c_code(str(generated))
        ext.sources = [str(generated), *ext.sources]
        for name, values in flags.items():
            setattr(ext, name, [*getattr(ext, name), *values])
        super().build_extension(ext)


class BuildPrograms(Command):
    """Compiles every BPF program of the package; a step of ``build``, as setuptools' SubCommand says."""

    description = "compile the BPF programs (needs clang)"
    user_options = [("build-lib=", "d", "directory to build in")]  # noqa: RUF012 - the base class says list

    build_lib: str | None
    editable_mode: bool = False

    def initialize_options(self) -> None:
        self.build_lib = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        target = ARCHITECTURES.get(platform.machine())
        if target is None:
            raise SystemExit(
                f"sowatch: no BPF register layout is known for {platform.machine()}. "
                f"Known: {', '.join(sorted(set(ARCHITECTURES)))}."
            )
        clang = self._clang()
        includes = self._includes()
        strip = shutil.which(os.environ.get("LLVM_STRIP", "llvm-strip"))
        for source, made in self._pairs():
            self.announce(f"compiling {source} to {made}", level=2)
            made.parent.mkdir(parents=True, exist_ok=True)
            # Compiled from its own directory with relative names, so that no path of this machine
            # gets into the line information that BTF carries.
            command = [clang, "-O2", "-g", "-target", "bpf", "-mcpu=v3", f"-D__TARGET_ARCH_{target}"]
            command += ["-Wall", "-Werror", "-fdebug-compilation-dir=.", "-I.", *includes]
            command += ["-c", source.name, "-o", str(made.resolve())]
            if subprocess.run(command, cwd=source.parent, check=False).returncode != 0:
                raise SystemExit(f"sowatch: clang could not compile {source}; its messages are above.")
            self._ship_headers([*command[: command.index("-c")], "-M", source.name], source.parent, made.parent)
            # DWARF is most of the file and nobody reads it; BTF stays (-g, not -s).
            if strip and subprocess.run([strip, "-g", str(made)], check=False).returncode != 0:
                raise SystemExit(f"sowatch: {strip} could not strip {made}; its message is above.")

    def _ship_headers(self, command: list[str], directory: Path, target: Path) -> None:
        """Copies the headers that a program includes from the system, for strategy runtime to compile with.

        What stands in a directory for one architecture (asm/) goes where all look for it: the object is
        for this architecture anyway.
        """
        said = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True).stdout
        bases = sorted(self._include_directories(), key=len, reverse=True)
        for name in re.findall(r"/\S+\.h", said):
            base = next((base for base in bases if name.startswith(f"{base}/")), None)
            if base is not None:  # else one of the compiler's own
                copy = target / "headers" / Path(name).relative_to(base)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(name, copy)

    def _clang(self) -> str:
        names = [os.environ["CLANG"]] if os.environ.get("CLANG") else ["clang"]
        names += [f"clang-{version}" for version in range(22, 13, -1)] if names == ["clang"] else []
        for name in names:
            found = shutil.which(name)
            if found:
                return found
        raise SystemExit(
            f"sowatch: {names[0]} was not found, and the BPF programs need it. Install it: "
            "apt-get install clang llvm (Debian, Ubuntu) or dnf install clang llvm (Fedora)."
        )

    def _includes(self) -> list[str]:
        return [argument for directory in self._include_directories() for argument in ("-idirafter", directory)]

    def _include_directories(self) -> list[str]:
        builder = binding_builder()
        try:
            flags = builder["libbpf_flags"]()
            multiarch = subprocess.run(
                [builder["compiler"](), "-print-multiarch"], capture_output=True, text=True, check=False
            ).stdout.strip()
        except builder["MissingTool"] as error:
            raise SystemExit(str(error)) from error
        directories = [*flags["include_dirs"], "/usr/include"]
        # Debian keeps asm/types.h in a directory per architecture, which the bpf target does not search.
        if multiarch and Path("/usr/include", multiarch).is_dir():
            directories.append(f"/usr/include/{multiarch}")
        return directories

    def _pairs(self) -> list[tuple[Path, Path]]:
        base = Path("src") if self.editable_mode else Path(self.build_lib or "build/lib")
        return [
            (source, base / source.with_suffix(".o").relative_to("src")) for source in sorted(PROGRAMS.glob("*.bpf.c"))
        ]

    def get_source_files(self) -> list[str]:
        return [str(path) for path in sorted([*PROGRAMS.glob("*.c"), *PROGRAMS.glob("*.h")])]

    def get_outputs(self) -> list[str]:
        return [str(made) for _, made in self._pairs()]

    def get_output_mapping(self) -> dict[str, str]:
        # Nothing here is a copy of a source file.
        return {}


class Build(build):
    """`build` with the BPF programs as one more step."""

    sub_commands = [*build.sub_commands, ("build_programs", None)]  # noqa: RUF012 - the base class says list


class Wheel(bdist_wheel):
    """A wheel for this platform and, with the limited API, for every Python from 3.11 on."""

    def initialize_options(self) -> None:
        super().initialize_options()
        if LIMITED_API:
            self.py_limited_api = "cp311"


setup(
    ext_modules=[
        Extension(
            BINDING,
            sources=[str(BPF / "shim.c"), str(BPF / "shim_uprobes.c")],
            include_dirs=[str(BPF)],
            depends=[
                str(BPF / "shim.h"),
                str(BPF / "shim_object.h"),
                *(str(header) for header in sorted(PROGRAMS.glob("*.h"))),
            ],
            py_limited_api=LIMITED_API,
            define_macros=[("_GNU_SOURCE", None)],
            extra_compile_args=["-std=gnu11", "-Wall", "-Wextra", "-Wno-unused-parameter"],
        )
    ],
    cmdclass={"build": Build, "build_ext": BuildBinding, "build_programs": BuildPrograms, "bdist_wheel": Wheel},
)
