"""A clean root with systemd as its process 1: in a pid namespace, for a machine has one process 1 already."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from clean_root import Root

__all__ = ["HOST_PROC", "Booted", "booted"]

#: Where the root has this host's proc file system, of the initial pid namespace.
HOST_PROC: Final = "/hostproc"
#: Of /dev no terminal, which systemd would start logins on.
_DEVICES: Final = ("null", "zero", "full", "random", "urandom")
_BOOT: Final = """
set -e
mount -t tmpfs -o mode=755 tmpfs {root}/dev
for device in {devices}; do touch {root}/dev/$device; mount --bind /dev/$device {root}/dev/$device; done
mkdir -p {root}/dev/pts {root}/dev/shm {root}{host_proc}
mount --rbind /proc {root}{host_proc}
mount -t proc proc {root}/proc
mount -t tmpfs -o mode=755 tmpfs {root}/sys/fs/cgroup
mount -t cgroup2 cgroup2 {root}/sys/fs/cgroup
rm -f {root}/usr/sbin/policy-rc.d
exec chroot {root} env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system
"""


class Booted:
    """Runs commands where systemd runs; made by `booted`."""

    def __init__(self, root: Path, init: int) -> None:
        self._root = root
        self._init = init

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Runs a command as a shell of that machine would; nothing is raised if it fails."""
        namespaces = ("--mount", "--pid", "--cgroup", "--uts", "--ipc")
        path = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"
        enter = ["nsenter", f"--target={self._init}", *namespaces, "chroot", str(self._root), "env", "-i", path]
        return subprocess.run(
            [*enter, "DEBIAN_FRONTEND=noninteractive", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )


@contextlib.contextmanager
def booted(root: Root, wait_until: Callable[..., object]) -> Iterator[Booted]:
    """Boots a root that was entered; it ends, with all of its processes, with the context."""
    cgroup = _unified() / f"sowatch-booted-{os.getpid()}"
    cgroup.mkdir()
    script = _BOOT.format(root=root.path, devices=" ".join(_DEVICES), host_proc=HOST_PROC)
    enter = (
        f"echo $$ >{cgroup}/cgroup.procs && exec {_words(root.in_namespace())} unshare --mount --propagation private "
    )
    enter += '--pid --fork --kill-child --cgroup --uts --ipc sh -c "$0"'
    starter = subprocess.Popen(["sh", "-c", enter, script], stdin=subprocess.DEVNULL)
    try:
        machine = Booted(root.path, wait_until(lambda: _child(starter), 20, "process 1"))
        wait_until(
            lambda: machine.run("systemctl", "is-system-running").stdout in ("running\n", "degraded\n"), 60, "boot"
        )
        yield machine
    finally:
        starter.kill()  # its child is ended with it, and with that all of the pid namespace
        starter.wait()
        wait_until(lambda: _removed(cgroup), 20, "the end of all processes")


def _words(words: Sequence[str]) -> str:
    return " ".join(words)


def _unified() -> Path:
    """Where version 2 of control groups is mounted: there may be one beside version 1."""
    hybrid = Path("/sys/fs/cgroup/unified")
    return hybrid if hybrid.is_dir() else Path("/sys/fs/cgroup")


def _child(starter: subprocess.Popen[bytes]) -> int | None:
    """The process that `unshare --fork` has started, once it is systemd."""
    text = Path(f"/proc/{starter.pid}/task/{starter.pid}/children").read_text()
    children = [int(one) for one in text.split()]
    if children and Path(f"/proc/{children[0]}/comm").read_text() == "systemd\n":
        return children[0]
    assert starter.poll() is None, "the root did not boot, see above"
    return None


def _removed(cgroup: Path) -> bool:
    for directory in sorted(cgroup.rglob("*"), key=lambda path: -len(path.parts)):
        if directory.is_dir():
            with contextlib.suppress(OSError):
                directory.rmdir()
    with contextlib.suppress(OSError):
        cgroup.rmdir()
    return not cgroup.exists()
