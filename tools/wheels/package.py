"""The sdist with the BPF objects of every machine, and of it the wheels."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from outside import OutsideError, run
from wheels import zig
from wheels.place import MACHINES, NEXT_STEP, PLATFORM, ROOT

__all__ = ["make_sdist", "make_wheel"]

#: In the sdist: `prebuilt/MACHINE/`; setup.py reads it.
_PREBUILT: Final = "prebuilt"
#: Variables of a user's that would change what comes out.
_UNWANTED: Final = ("CC", "CFLAGS", "CPPFLAGS", "LDFLAGS", "LDSHARED", "PKG_CONFIG_PATH", "PYTHONPATH")


def make_sdist(work: Path, libbpf_headers: Path) -> Path:
    """What git knows of the checkout, with the BPF objects of every machine.

    Args:
        work: an empty directory.
        libbpf_headers: of the libbpf that goes into the wheels.

    Raises:
        OutsideError: a step failed.
    """
    tree = work / "tree"
    # Tracked files only: what is published is what was committed, or will be.
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in map(os.fsdecode, filter(None, names.split(b"\0"))):
        if (ROOT / name).is_file():  # else removed, and not committed yet
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    programs = runpy.run_path(str(tree / "src/sowatch/bpf/_build_programs.py"))
    for machine in MACHINES:
        includes = [str(libbpf_headers), *zig.kernel_headers(machine)]
        try:
            programs["compile_programs"](machine, includes, tree / _PREBUILT / machine)
        except programs["BuildError"] as error:
            raise OutsideError(str(error)) from error
    version = run([sys.executable, "-m", "setuptools_scm"], next_step=NEXT_STEP, directory=ROOT).strip()
    manual: list[str | Path] = [sys.executable, tree / "tools/manual.py", tree / "share", version]
    run(manual, next_step=NEXT_STEP, environment={"PYTHONPATH": str(tree / "src")})
    # The copy has no git to take the version from; what is made of the sdist finds it there.
    _build(["--sdist"], tree, work / "dist", {"SETUPTOOLS_SCM_PRETEND_VERSION": version})
    return next((work / "dist").glob("*.tar.gz"))


def make_wheel(machine: str, sdist: Path, prefix: Path, work: Path) -> Path:
    """A wheel of an sdist, with the libraries brought in.

    Args:
        machine: it is for.
        sdist: of `make_sdist`.
        prefix: the libraries for the machine.
        work: an empty directory.

    Raises:
        OutsideError: a step failed.
    """
    with tarfile.open(sdist) as archive:
        archive.extractall(work, filter="data")
    tree = next(path for path in work.iterdir() if path.is_dir())
    compiler = zig.compiler_for(machine)
    variables = {
        **compiler.environment,
        "CC": str(compiler.cc),
        "LDSHARED": f"{compiler.cc} -shared",
        "CFLAGS": f"-g0 -fno-sanitize=all -fstack-protector-strong {_python_headers(work / 'python')}",
        "LDFLAGS": "-Wl,-z,relro -Wl,-z,now -s",
        "PKG_CONFIG_LIBDIR": str(prefix / "lib" / "pkgconfig"),
        "SOWATCH_BPF_OBJECTS": "prebuilt",
        # Python's own name for it: sysconfig.get_platform() gives this instead of the machine that builds.
        "_PYTHON_HOST_PLATFORM": f"linux-{machine}",
    }
    _build(["--wheel"], tree, work / "plain", variables)
    plain = next((work / "plain").glob("*.whl"))
    # Of platforms for other machines it takes "auto" only: the oldest that fits, which may be older than ours.
    repair = [sys.executable, "-m", "auditwheel", "repair", "--plat", "auto", "--only-plat"]
    run(
        [*repair, "-w", work / "repaired", plain],
        next_step=NEXT_STEP,
        environment={
            "LD_LIBRARY_PATH": str(prefix / "lib"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        },
    )
    tag = ["tags", "--remove", "--platform-tag", f"{PLATFORM}_{machine}"]
    run([sys.executable, "-m", "wheel", *tag, next((work / "repaired").glob("*.whl"))], next_step=NEXT_STEP)
    return next((work / "repaired").glob("*.whl"))


def _build(words: Sequence[str], tree: Path, output: Path, variables: dict[str, str]) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in _UNWANTED}
    command = [sys.executable, "-m", "build", "--no-isolation", *words, "--outdir", str(output), str(tree)]
    done = subprocess.run(
        command, env={**kept, **variables}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise OutsideError(f"python -m build failed:\n{done.stdout}\n{NEXT_STEP}")


def _python_headers(place: Path) -> str:
    """Flags for Debian's Python, whose pyconfig.h includes one in a directory for the machine.

    The one of this machine serves all: of what it says the limited API uses the sizes of C's types, which are the same
    on every 64-bit Linux.
    """
    import sysconfig

    include = Path(sysconfig.get_path("include"))
    said = (include / "pyconfig.h").read_text(encoding="utf-8")
    if "linux-gnu" not in said:
        return ""
    for machine in MACHINES:
        below = f"{machine}-linux-gnu/{include.name}/pyconfig.h"
        real = next(
            path
            for one in MACHINES
            if (path := Path(f"/usr/include/{one}-linux-gnu/{include.name}/pyconfig.h")).is_file()
        )
        (place / below).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(real, place / below)
    return f"-I{place}"
