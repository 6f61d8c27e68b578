"""Clean roots of Debian releases, to build packages in and to try what ships.

  python -m clean_root bookworm -- COMMAND...                      runs a command in a fresh root
  python -m clean_root bookworm --with 'gcc make' --bind /a:/b -- COMMAND...

`base` makes a root by debootstrap and keeps it in the cache; `Root` is a fresh one above it (overlayfs), in a mount
namespace of its own, with /proc, /sys and /dev of this host. What is done in it is gone with it, and never gets into
the base. Needs root, debootstrap and Debian's keyring.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Final, Self

__all__ = ["SUITES", "Root", "RootError", "base"]

#: By the name of the release, what debootstrap checks its packages with.
SUITES: Final = {
    "bookworm": "/usr/share/keyrings/debian-archive-keyring.gpg",
    "trixie": "/usr/share/keyrings/debian-archive-keyring.gpg",
}
#: A base is made anew after this time: mirrors drop what was superseded.
_KEPT_S: Final = 7 * 86_400.0
_ENVIRONMENT: Final = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
    "TERM": "dumb",
}
#: Services are not started in a root: there is no init.
_NO_SERVICES: Final = "#!/bin/sh\nexit 101\n"
#: No translations, no waiting for what hangs.
_APT: Final = (
    'Acquire::Languages "none";\nAcquire::Retries "3";\nAPT::Install-Recommends "false";\nDpkg::Use-Pty "0";\n'
)


class RootError(Exception):
    """A root could not be made; the message ends with the next step."""


def base(suite: str, packages: Sequence[str] = ()) -> Path:
    """The directory of a root with these packages beside debootstrap's `minbase`, made if need be. Never write to it.

    Raises:
        RootError: this user may not, debootstrap is missing or failed, or a package could not be installed.
    """
    key = hashlib.sha256(" ".join(sorted(packages)).encode()).hexdigest()[:12] if packages else "plain"
    cache = _cache()
    place = cache / f"{suite}-{key}"
    with _only_one(cache / f".{suite}-{key}.lock"):
        if place.is_dir() and time.time() - place.stat().st_mtime < _KEPT_S:
            return place
        fresh = place.with_name(f".{place.name}.{os.getpid()}")
        try:
            if packages:
                _install(suite, packages, fresh)
            else:
                _bootstrap(suite, fresh)
            shutil.rmtree(place, ignore_errors=True)
            os.utime(fresh)
            fresh.rename(place)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return place


class Root:
    """A fresh root above a base. A context manager: processes that are still in it are yours to end.

    Args:
        suite: one of `SUITES`.
        packages: what is installed in it from the beginning, and kept in the cache.
        binds: directories or files of this host by their place in the root; they are made there.
    """

    def __init__(self, suite: str, packages: Sequence[str] = (), binds: Mapping[str, Path] | None = None) -> None:
        self._lower = base(suite, packages)
        self._binds = dict(binds or {})
        self._keeper: subprocess.Popen[bytes] | None = None
        self._work = Path()
        #: What was written in it, and nothing else.
        self.upper = Path()
        #: The root, as seen from its mount namespace only.
        self.path = Path()

    def __enter__(self) -> Self:
        self._work = Path(tempfile.mkdtemp(prefix="run-", dir=_cache()))
        self.upper, work, self.path = (self._work / name for name in ("upper", "work", "root"))
        for directory in (self.upper, work, self.path):
            directory.mkdir()
        root = self.path
        lines = [
            f"mount -t overlay overlay -o lowerdir={self._lower},upperdir={self.upper},workdir={work} {root}",
            *(f"mount --rbind /{name} {root}/{name}" for name in ("proc", "sys", "dev")),
            f"mount -t tmpfs -o mode=755 tmpfs {root}/run",
            f"cat /etc/resolv.conf > {root}/etc/resolv.conf",
        ]
        for target, source in self._binds.items():
            place = f"{root}{target}"
            lines.append(f"mkdir -p {place}" if source.is_dir() else f"mkdir -p $(dirname {place}) && touch {place}")
            lines.append(f"mount --bind {source} {place}")
        script = "\n".join(["set -e", *lines, "echo ready", "read -r _ || true"])
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
        self._keeper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._keeper.stdout is not None
        if self._keeper.stdout.readline() != b"ready\n":
            self.__exit__()
            raise RootError("cannot mount the root, see above. It needs root, overlayfs and mount namespaces.")
        return self

    def __exit__(self, *_: object) -> None:
        if self._keeper is not None:
            self._keeper.communicate()  # closes its input, which ends it
            self._keeper = None
        shutil.rmtree(self._work, ignore_errors=True)

    def in_namespace(self) -> list[str]:
        """What stands before a command line that is to see the root at `path`."""
        assert self._keeper is not None, "the root is not entered"
        return ["nsenter", f"--mount=/proc/{self._keeper.pid}/ns/mnt"]

    def command(self, words: Sequence[str], environment: Mapping[str, str] | None = None) -> list[str]:
        """The command line, for this host, that runs a command in the root."""
        variables = [f"{name}={value}" for name, value in {**_ENVIRONMENT, **(environment or {})}.items()]
        return [*self.in_namespace(), "chroot", str(self.path), "env", "-i", *variables, *words]

    def run(
        self,
        words: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        check: bool = True,
        stdout: int | IO[bytes] | None = subprocess.PIPE,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command in the root, without standard input, and returns what it wrote.

        Raises:
            RootError: it failed, and ``check`` is set; the end of what it wrote is in the message.
        """
        done = subprocess.run(
            self.command(words, environment),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.STDOUT if stdout is None else subprocess.PIPE,
            text=True,
            errors="backslashreplace",
            check=False,
        )
        if check and done.returncode:
            last = "\n".join(f"{done.stdout or ''}{done.stderr or ''}".splitlines()[-40:])
            raise RootError(f"{' '.join(words)} ended with {done.returncode} in {self._lower.name}:\n{last}")
        return done

    def install(self, *names: str) -> None:
        """Installs packages, by name or by path in the root, without what they only recommend.

        Raises:
            RootError: apt could not.
        """
        self.run(["apt-get", "-qq", "update"])
        self.run(["apt-get", "-qq", "-y", "install", *names])


def _cache() -> Path:
    chosen = os.environ.get("SOWATCH_CLEAN_ROOTS_CACHE")
    made = (
        Path(chosen)
        if chosen
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sowatch/clean-roots")
    )
    made.mkdir(parents=True, exist_ok=True)
    return made.absolute()


@contextlib.contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _bootstrap(suite: str, target: Path) -> None:
    keyring = SUITES.get(suite)
    if keyring is None:
        raise RootError(f"no root of {suite!r} is known. Known: {', '.join(SUITES)}.")
    if os.geteuid():
        raise RootError("making a root needs root. Run it with sudo.")
    debootstrap = shutil.which("debootstrap", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if debootstrap is None or not Path(keyring).is_file():
        raise RootError(
            "debootstrap or its keyring is missing. Install them: apt-get install debootstrap debian-archive-keyring."
        )
    print(f"clean root: making a root of {suite} by debootstrap", file=sys.stderr)
    command = [debootstrap, "--variant=minbase", f"--keyring={keyring}", suite, str(target)]
    mirror = os.environ.get(f"SOWATCH_MIRROR_{suite.upper()}")
    done = subprocess.run([*command, *([mirror] if mirror else [])], capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n".join(f"{done.stdout}{done.stderr}".splitlines()[-20:])
        raise RootError(f"debootstrap failed for {suite}. SOWATCH_MIRROR_{suite.upper()} names another mirror.\n{last}")
    (target / "etc/apt/apt.conf.d/99clean-root").write_text(_APT, encoding="ascii")
    guard = target / "usr/sbin/policy-rc.d"
    guard.write_text(_NO_SERVICES, encoding="ascii")
    guard.chmod(0o755)


def _install(suite: str, packages: Sequence[str], target: Path) -> None:
    """A root with packages, as a directory of its own: the plain one, copied with what installing them wrote."""
    lower = base(suite)
    subprocess.run(["cp", "-a", "--reflink=auto", str(lower), str(target)], check=True)
    print(f"clean root: installing {' '.join(packages)} in a root of {suite}", file=sys.stderr)
    steps = [
        f"mount --rbind /proc {target}/proc; mount --rbind /sys {target}/sys; mount --rbind /dev {target}/dev",
        f"cat /etc/resolv.conf > {target}/etc/resolv.conf",
        f"chroot {target} apt-get -qq update",
        f'chroot {target} apt-get -qq -y install "$@"',
        f"chroot {target} apt-get clean",
    ]
    environment = {**_ENVIRONMENT, "PATH": f"{os.environ.get('PATH', '')}:{_ENVIRONMENT['PATH']}"}
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", "\n".join(steps), "sh", *packages]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        last = "\n".join(f"{done.stdout}{done.stderr}".splitlines()[-20:])
        raise RootError(f"cannot install {' '.join(packages)} in {suite}:\n{last}")


def main() -> int:
    """Runs a command in a fresh root; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="clean_root", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", choices=sorted(SUITES))
    parser.add_argument("--with", dest="packages", default="", metavar="PACKAGES", help="installed from the beginning")
    parser.add_argument("--bind", action="append", default=[], metavar="HERE:THERE", help="a directory of this host")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    binds = {there: Path(here).absolute() for here, _, there in (one.partition(":") for one in args.bind)}
    try:
        with Root(args.suite, args.packages.split(), binds) as root:
            return root.run(args.command, check=False, stdout=None).returncode
    except RootError as error:
        print(f"clean root: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
