"""zlib, libelf and libbpf for a machine. zlib goes into the other two, so a wheel needs the C library only.

Their own build systems are left out where they ask the machine that builds: libelf's configure tries programs. Which
files are compiled is read from their makefiles.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Self

from outside import OutsideError, run
from wheels import zig
from wheels.place import NEXT_STEP, cache_directory
from wheels.sources import Source

__all__ = ["build_libraries"]

#: No path of this machine in what ships, the usual hardening, and no checks of zig's own.
_FLAGS: Final = ("-O2", "-g0", "-fPIC", "-fstack-protector-strong", "-fno-sanitize=all", "-w", "-D_FORTIFY_SOURCE=2")
_LINK: Final = ("-shared", "-Wl,-z,relro", "-Wl,-z,now", "-Wl,-z,defs", "-s")

#: What elfutils' configure finds out, for glibc 2.28 and clang.
_ELFUTILS: Final = """\
#define PACKAGE "elfutils"
#define PACKAGE_NAME "elfutils"
#define PACKAGE_VERSION "{version}"
#define PACKAGE_URL "http://elfutils.org/"
#define VERSION "{version}"
#define HAVE_DECL_MEMPCPY 1
#define HAVE_DECL_MEMRCHR 1
#define HAVE_DECL_POWEROF2 1
#define HAVE_DECL_RAWMEMCHR 1
#define HAVE_DECL_REALLOCARRAY 1
#define HAVE_ERROR_H 1
#define HAVE_ERR_H 1
#define HAVE_FALLTHROUGH 1
#define HAVE_LIBINTL_H 1
#define HAVE_VISIBILITY 1
#define SYMBOL_VERSIONING 1
#define STDC_HEADERS 1
#include <eu-config.h>
"""


def build_libraries(machine: str, sources: Sequence[Source]) -> Path:
    """Compiles the libraries, unless this was done with the same sources and compiler.

    Returns:
        A directory with ``lib/``, ``include/`` and ``lib/pkgconfig/``.

    Raises:
        OutsideError: something does not compile.
    """
    parts = [machine, zig.version(), Path(__file__).read_text(encoding="utf-8")]
    parts += [f"{source.name} {source.version}" for source in sources]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    prefix = cache_directory("libraries") / f"{machine}-{key}"
    if prefix.is_dir():
        return prefix
    fresh = prefix.with_name(f".{prefix.name}")
    shutil.rmtree(fresh, ignore_errors=True)
    by_name = {source.name: source for source in sources}
    with _Build(fresh, zig.compiler_for(machine)) as build:
        build.zlib(by_name["zlib"])
        build.libelf(by_name["elfutils"])
        build.libbpf(by_name["libbpf"])
    fresh.rename(prefix)
    return prefix


class _Build:
    """Compiles into one prefix; a context manager that removes what is left of the work."""

    def __init__(self, prefix: Path, compiler: zig.Compiler) -> None:
        self.prefix, self.compiler = prefix, compiler
        self.work = prefix / "work"
        for part in ("lib/pkgconfig", "include/bpf", "work"):
            (prefix / part).mkdir(parents=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        shutil.rmtree(self.work, ignore_errors=True)

    def zlib(self, source: Source) -> None:
        """A static library, whose functions are hidden."""
        flags = ["-DHAVE_UNISTD_H", "-DHAVE_STDARG_H", "-DHAVE_HIDDEN", "-D_LARGEFILE64_SOURCE=1"]
        made = self._compile("zlib", sorted(source.directory.glob("*.c")), flags)
        self._run([self.compiler.ar, "rcs", self.prefix / "lib" / "libz.a", *made])
        self._headers(source.directory, ("zlib.h", "zconf.h"), "")

    def libelf(self, source: Source) -> None:
        """``libelf.so.1``, without zstd: no BPF object has compressed sections."""
        tree, config = source.directory, self.work / "elfutils"
        config.mkdir()
        (config / "config.h").write_text(_ELFUTILS.format(version=source.upstream), encoding="utf-8")
        files = [tree / "libelf" / name for name in _listed(tree / "libelf" / "Makefile.am", "libelf_a_SOURCES")]
        files += [tree / "lib" / name for name in ("crc32.c", "crc32_file.c", "eu-search.c", "next_prime.c")]
        flags = ["-std=gnu11", "-D_GNU_SOURCE", "-DHAVE_CONFIG_H", "-DPIC", f"-I{config}", f"-I{tree}/lib"]
        flags += [f"-I{tree}/libelf", f"-I{self.prefix}/include"]
        made = self._compile("libelf", files, flags)
        self._link("libelf", "1", made, tree / "libelf" / "libelf.map", ["-lz"])
        self._headers(tree / "libelf", ("libelf.h", "gelf.h", "nlist.h", "elf.h"), "")

    def libbpf(self, source: Source) -> None:
        """``libbpf.so.1`` and its headers, the ones for BPF programs too."""
        tree = source.directory / "src"
        flags = [f"-I{source.directory}/include", f"-I{source.directory}/include/uapi", f"-I{self.prefix}/include"]
        flags += ["-D_LARGEFILE64_SOURCE", "-D_FILE_OFFSET_BITS=64", "-DSHARED", "-fvisibility=hidden"]
        made = self._compile("libbpf", sorted(tree.glob("*.c")), flags)
        self._link("libbpf", "1", made, tree / "libbpf.map", ["-lelf", "-lz"])
        self._headers(tree, _listed(tree / "Makefile", "HEADERS"), "bpf")
        (self.prefix / "lib" / "pkgconfig" / "libbpf.pc").write_text(
            f"Name: libbpf\nDescription: libbpf\nVersion: {source.upstream}\n"
            f"Libs: -L{self.prefix_at_last}/lib -lbpf\nCflags: -I{self.prefix_at_last}/include\n",
            encoding="utf-8",
        )

    @property
    def prefix_at_last(self) -> Path:
        """Where the prefix is once it is renamed."""
        return self.prefix.with_name(self.prefix.name.removeprefix("."))

    def _compile(self, name: str, files: Iterable[Path], flags: Sequence[str]) -> list[Path]:
        place = self.work / f"{name}.objects"
        place.mkdir()
        pairs = [(path, place / f"{path.stem}.o") for path in files]
        # zig takes most of a second to start, which two of them share.
        with ThreadPoolExecutor(2) as pool:
            done = [
                pool.submit(self._run, [self.compiler.cc, *_FLAGS, *flags, "-c", path, "-o", made], path.parent)
                for path, made in pairs
            ]
        for one in done:
            one.result()
        return [made for _, made in pairs]

    def _link(self, name: str, version: str, objects: Sequence[Path], symbols: Path, libraries: Sequence[str]) -> None:
        soname = f"{name}.so.{version}"
        made = self.prefix / "lib" / soname
        words: list[str | Path] = [
            self.compiler.cc,
            *_LINK,
            f"-Wl,-soname,{soname}",
            f"-Wl,--version-script,{symbols}",
            "-o",
            made,
        ]
        self._run([*words, *objects, f"-L{self.prefix}/lib", *libraries])
        (self.prefix / "lib" / f"{name}.so").symlink_to(soname)

    def _headers(self, directory: Path, names: Iterable[str], below: str) -> None:
        place = self.prefix / "include" / below
        place.mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copyfile(directory / name, place / name)

    def _run(self, command: Sequence[str | Path], directory: Path | None = None) -> None:
        variables: Mapping[str, str] = self.compiler.environment
        run(command, next_step=NEXT_STEP, directory=directory, environment=variables)


def _listed(makefile: Path, variable: str) -> list[str]:
    r"""The words of a variable of a makefile, with what is appended to it.

    Raises:
        OutsideError: it has no such variable.
    """
    text = makefile.read_text(encoding="utf-8").replace("\\\n", " ")
    values = re.findall(rf"^(?:export )?{variable} *:?\+?= *(.*)$", text, flags=re.MULTILINE)
    names = [word for value in values for word in value.split() if not word.startswith("$")]
    if not names:
        raise OutsideError(f"{makefile} has no {variable}. {NEXT_STEP}")
    return [name for name in names if name.endswith((".c", ".h"))]
