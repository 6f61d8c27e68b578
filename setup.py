"""The two things pyproject.toml cannot say: how the libbpf binding and the BPF objects are compiled.

The binding becomes `sowatch.bpf._libbpf`. Every src/sowatch/bpf/programs/*.bpf.c becomes a .bpf.o beside
it, and the headers that they include are copied to programs/headers, to compile them with elsewhere. An
editable install puts all of it into the source tree, a wheel takes it from the build directory. An sdist has
the objects in prebuilt/MACHINE/: they are taken where there is no clang.
Environment: CC, CLANG, LLVM_STRIP and PKG_CONFIG name other tools than the ones on PATH. SOWATCH_BPF_OBJECTS is
`compile` or `prebuilt`, where it shall not depend on what is installed.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sysconfig
from collections.abc import Sequence
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

#: Man pages and completions, as scripts/manual has written them; the sdist has them, a checkout need not.
SHARE = Path("share")


def binding_builder() -> dict[str, Any]:
    """The functions of _build_binding.py, run by path: the package is not installed yet."""
    return runpy.run_path(str(ROOT / BPF / "_build_binding.py"))


def target_machine() -> str:
    """What is built for, as `uname -m` names it; another than this one where _PYTHON_HOST_PLATFORM says so."""
    return sysconfig.get_platform().rpartition("-")[2]


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
        builder = runpy.run_path(str(ROOT / BPF / "_build_programs.py"))
        prebuilt = ROOT / "prebuilt" / target_machine()
        made = Path("src" if self.editable_mode else self.build_lib or "build/lib") / PROGRAMS.relative_to("src")
        try:
            if self._is_prebuilt_taken(builder, prebuilt):
                self.announce(f"taking the BPF objects of {prebuilt}", level=2)
                builder["copy_prebuilt"](prebuilt, made)
            else:
                builder["compile_programs"](target_machine(), self._include_directories(), made)
        except builder["BuildError"] as error:
            raise SystemExit(str(error)) from error

    def _is_prebuilt_taken(self, builder: dict[str, Any], prebuilt: Path) -> bool:
        chosen = os.environ.get("SOWATCH_BPF_OBJECTS")
        if chosen not in (None, "", "compile", "prebuilt"):
            raise SystemExit(
                f"sowatch: SOWATCH_BPF_OBJECTS is {chosen!r}. Set it to compile or prebuilt, or not at all."
            )
        if chosen or not prebuilt.is_dir():
            return chosen == "prebuilt"
        try:
            builder["find_clang"]()
        except builder["BuildError"]:
            return True
        return False

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

    def get_source_files(self) -> list[str]:
        return [str(path) for path in sorted([*PROGRAMS.glob("*.c"), *PROGRAMS.glob("*.h")])]

    def get_outputs(self) -> list[str]:
        base = Path(self.build_lib or "build/lib")
        made = (base / source.with_suffix(".o").relative_to("src") for source in sorted(PROGRAMS.glob("*.bpf.c")))
        return [str(path) for path in made]

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


def shared_files() -> list[tuple[str, Sequence[str]]]:
    """The files of `SHARE` by the directory below the prefix that they go to."""
    found = sorted(path for path in SHARE.rglob("*") if path.is_file())
    return [
        (str(parent), [str(path) for path in found if path.parent == parent]) for parent in {p.parent for p in found}
    ]


setup(
    data_files=shared_files(),
    ext_modules=[
        Extension(
            BINDING,
            sources=[str(BPF / "shim.c"), str(BPF / "shim_ring.c"), str(BPF / "shim_uprobes.c")],
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
