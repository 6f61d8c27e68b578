"""Kernels from Debian's mirror, unpacked into the cache. May import ``cache`` and ``kernels``.

apt runs with lists of its own, so that nothing of this machine's configuration or packages changes. Which
package is the newest is asked of the mirror each time: mirrors drop what was superseded.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from matrix.cache import MatrixError, cache_directory, run
from matrix.kernels import Kernel

__all__ = ["Unpacked", "fetch", "unpacked"]

#: Depends on the newest kernel of its suite. The cloud flavour is a third of the size of the usual one
#: and has all that the tests need.
_NEWEST = "linux-image-cloud-amd64"
_PARTS = re.compile(r"^linux-(?:image|base|binary|modules)-\d\S*-cloud-amd64$", re.MULTILINE)
_KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"
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
        MatrixError: no mirror, or the mirror has no such kernel.
    """
    place = cache_directory("kernels", kernel.name)
    apt = _apt(cache_directory("apt", kernel.suite), kernel.suite)
    run(["apt-get", *apt, "-qq", "update"], next_step=_RETRY)
    quiet = [f"--no-{kind}" for kind in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")]
    listed = run(["apt-cache", *apt, "depends", "--recurse", *quiet, _NEWEST], next_step=_RETRY)
    wanted = sorted(set(_PARTS.findall(listed)))
    if not wanted:
        raise MatrixError(f"the mirror has no {_NEWEST} in {kernel.suite}. {_RETRY}")
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
            raise MatrixError(f"{' and '.join(wanted)} hold no kernel. Debian packs it otherwise now: see {__file__}.")
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
        MatrixError: it is not there.
    """
    found = _find(cache_directory("kernels", kernel.name))
    if found is None:
        raise MatrixError(f"kernel {kernel.name} is not in the cache. Run `scripts/matrix prepare`.")
    return found


def _find(place: Path) -> Unpacked | None:
    for modules in [*place.glob("lib/modules/*"), *place.glob("usr/lib/modules/*")]:
        # Newer packages have the kernel beside its modules.
        for image in (place / "boot" / f"vmlinuz-{modules.name}", modules / "vmlinuz"):
            if image.is_file():
                return Unpacked(image, modules)
    return None


def _apt(state: Path, suite: str) -> list[str]:
    """Options that make apt see one suite, and keep what it knows of it in ``state``."""
    for part in ("lists/partial", "cache/archives/partial"):
        (state / part).mkdir(parents=True, exist_ok=True)
    sources = state / "sources.list"
    sources.write_text(f"deb [signed-by={_KEYS}] {_mirror()} {suite} main\n", encoding="utf-8")
    options = {
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": state / "lists",
        "Dir::Cache": state / "cache",
        # Otherwise it warns that its own user cannot write to our directory.
        "APT::Sandbox::User": "root",
    }
    return [word for name, value in options.items() for word in ("-o", f"{name}={value}")]


def _mirror() -> str:
    """The mirror that apt takes Debian from already."""
    chosen = os.environ.get("SOWATCH_MATRIX_MIRROR")
    if chosen:
        return chosen
    sites = run(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"], next_step=_RETRY)
    for site in sites.split():
        if site.rstrip("/").endswith("/debian"):
            return site
    raise MatrixError("apt here takes nothing from a Debian mirror. Set SOWATCH_MATRIX_MIRROR to the URI of one.")
