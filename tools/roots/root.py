"""A root: made by mmdebstrap in the cache, copied for each use, entered in a mount namespace of its own."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from outside import KEYS, TRIES, OutsideError, apt_options, mirror, run
from roots.table import Root
from wheels.place import cache_directory

__all__ = ["Entered", "open_root", "prepare"]

_NEXT: Final = "Run `scripts/test-wheel` again."
_ENTER: Final = Path(__file__).with_name("enter")
#: Debian's names of the machines.
_DEBIAN: Final = {"x86_64": "amd64", "aarch64": "arm64"}
#: What a root must not have: the wheel brings it, or nobody needs it.
_UNWANTED: Final = ("usr/bin/cc", "usr/bin/gcc", "usr/bin/clang", "usr/bin/c99", "usr/bin/pkg-config")
_UNWANTED_LIBRARIES: Final = ("libbpf.so*", "libelf.so*")


def prepare(root: Root) -> Path:
    """The root in the cache; made anew if it is a week old.

    Raises:
        OutsideError: it cannot be made, or has what it must not have.
    """
    place = cache_directory("roots") / root.name
    stamp = place.with_suffix(".complete")
    if stamp.exists() and _age_s(stamp) < 7 * 86400:
        return place
    site = mirror(_NEXT, "ubuntu" if root.is_ubuntu else "debian")
    stamp.unlink(missing_ok=True)
    shutil.rmtree(place, ignore_errors=True)
    command = ["mmdebstrap", "--quiet", "--variant=minbase", "--include=python3,python3-venv"]
    command += [f"--architectures={_DEBIAN[root.machine]}", f"--components=main{',universe' if root.is_ubuntu else ''}"]
    # A mirror that is some weeks behind is as good for this: the signature counts.
    command += ["--aptopt=Acquire::Check-Valid-Until false"]
    command += [f'--aptopt={name} "{value}"' for name, value in TRIES.items()]
    keys = _ubuntu_keys() if root.is_ubuntu else KEYS
    run([*command, f"--keyring={keys}", root.suite, place, site], next_step=_NEXT)
    found = [name for name in _UNWANTED if (place / name).exists()]
    found += [str(path) for pattern in _UNWANTED_LIBRARIES for path in (place / "usr").rglob(pattern)]
    if found:
        raise OutsideError(f"the root {root.name} has {found[0]}, so it proves nothing. {_NEXT}")
    stamp.touch()
    return place


def _ubuntu_keys() -> Path:
    """Ubuntu's keys, out of Debian's package of them."""
    place = cache_directory("ubuntu-keyring")
    found = place / "usr" / "share" / "keyrings" / "ubuntu-archive-keyring.gpg"
    if not found.exists():
        apt = apt_options(cache_directory("apt", "ubuntu-keyring"), [f"deb {{keys}} {mirror(_NEXT)} trixie main"])
        run(["apt-get", *apt, "-qq", "update"], next_step=_NEXT)
        run(["apt-get", *apt, "-qq", "download", "ubuntu-keyring"], next_step=_NEXT, directory=place)
        run(["dpkg", "-x", next(place.glob("ubuntu-keyring_*.deb")), place], next_step=_NEXT)
    return found


def _age_s(path: Path) -> float:
    import time

    return time.time() - path.stat().st_mtime


class Entered:
    """A copy of a root that commands run in; files are put into it by path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(
        self, command: Sequence[str], variables: Mapping[str, str], *, is_kept: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command in it, with this machine's /proc, /sys and /dev.

        Args:
            command: by its path in the root.
            variables: beside the few that every command gets.
            is_kept: its standard output is returned, and else goes where ours goes.
        """
        words = ["unshare", "--mount", "--propagation", "private", str(_ENTER), str(self.path), *command]
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C.UTF-8", **variables}
        output = subprocess.PIPE if is_kept else None
        return subprocess.run(words, env=environment, text=True, check=False, stdout=output)


@contextmanager
def open_root(root: Root) -> Iterator[Entered]:
    """A copy of the root, gone afterwards.

    Raises:
        OutsideError: see `prepare`.
    """
    source = prepare(root)
    with tempfile.TemporaryDirectory(prefix="root-", dir=cache_directory("work")) as name:
        copy = Path(name) / "root"
        run(["cp", "-a", "--reflink=auto", source, copy], next_step=_NEXT)
        yield Entered(copy)
