"""Kernels from Debian's mirror, unpacked into the cache. May import ``cache``, ``kernels`` and ``outside``.

Which package is the newest is asked of the mirror each time: mirrors drop what was superseded.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from matrix.cache import cache_directory
from matrix.kernels import Kernel
from outside import OutsideError, apt_options, mirror, run

__all__ = ["Unpacked", "fetch", "unpacked"]

#: Depends on the newest kernel of its suite. The cloud flavour is a third of the size of the usual one
#: and has all that the tests need.
_NEWEST = "linux-image-cloud-amd64"
_PARTS = re.compile(r"^linux-(?:image|base|binary|modules)-\d\S*-cloud-amd64$", re.MULTILINE)
_RETRY = "Run `scripts/matrix prepare` again, or with SOWATCH_MATRIX_MIRROR set to the URI of another Debian mirror."


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A kernel on disk: ``modules`` is its directory with ``modules.dep``, named by its release."""

    image: Path
    modules: Path

    @property
    def release(self) -> str:
        """What `uname -r` says under it."""
        return self.modules.name

    @property
    def module_root(self) -> Path:
        """What `modprobe -d` takes."""
        return self.modules.parents[2]


def fetch(kernel: Kernel) -> Unpacked:
    """Brings the newest package of the kernel's suite into the cache, if it is not there yet.

    Raises:
        OutsideError: no mirror, or the mirror has no such kernel.
    """
    place = cache_directory("kernels", kernel.name)
    sources = [f"deb {{keys}} {mirror(_RETRY)} {kernel.suite} main"]
    apt = apt_options(cache_directory("apt", kernel.suite), sources)
    run(["apt-get", *apt, "-qq", "update"], next_step=_RETRY)
    quiet = [f"--no-{kind}" for kind in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")]
    listed = run(["apt-cache", *apt, "depends", "--recurse", *quiet, _NEWEST], next_step=_RETRY)
    wanted = sorted(set(_PARTS.findall(listed)))
    if not wanted:
        raise OutsideError(f"the mirror has no {_NEWEST} in {kernel.suite}. {_RETRY}")
    stamp = place / "packages"
    if stamp.exists() and stamp.read_text(encoding="ascii").split() == wanted:
        return unpacked(kernel)
    # Made beside and renamed, so that what is in the cache is always whole.
    fresh = place.with_name(f".{kernel.name}.{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        run(["apt-get", *apt, "-qq", "download", *wanted], next_step=_RETRY, directory=fresh)
        for package in fresh.glob("*.deb"):
            run(["dpkg", "-x", package, fresh], next_step=_RETRY)
            package.unlink()
        found = _find(fresh)
        if found is None:
            raise OutsideError(f"{' and '.join(wanted)} hold no kernel. Debian packs it otherwise now: see {__file__}.")
        # Debian makes this file when a kernel is installed.
        run(["depmod", "-b", found.module_root, found.release], next_step="Run `scripts/setup --for matrix`.")
        (fresh / "packages").write_text("\n".join(wanted) + "\n", encoding="ascii")
        shutil.rmtree(place)
        fresh.rename(place)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return unpacked(kernel)


def unpacked(kernel: Kernel) -> Unpacked:
    """The kernel as `fetch` left it in the cache.

    Raises:
        OutsideError: it is not there.
    """
    found = _find(cache_directory("kernels", kernel.name))
    if found is None:
        raise OutsideError(f"kernel {kernel.name} is not in the cache. Run `scripts/matrix prepare`.")
    return found


def _find(place: Path) -> Unpacked | None:
    for modules in [*place.glob("lib/modules/*"), *place.glob("usr/lib/modules/*")]:
        # Newer packages have the kernel beside its modules.
        for image in (place / "boot" / f"vmlinuz-{modules.name}", modules / "vmlinuz"):
            if image.is_file():
                return Unpacked(image, modules)
    return None
