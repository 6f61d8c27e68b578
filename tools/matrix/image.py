"""The initramfs of a guest: busybox, ``init`` and the few modules it takes to find the shared root.

May import ``cache`` and ``packages``. Needs busybox (static), cpio, kmod and, for newer kernels, xz or zstd.
"""

from __future__ import annotations

import gzip
import lzma
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from matrix.packages import Unpacked
from outside import OutsideError, run

__all__ = ["make_image"]

_INIT: Final = Path(__file__).with_name("init")
_SETUP: Final = "Run `scripts/setup --for matrix`."
#: Drivers of the shared root. From 6.12 on they are built in.
_MODULES: Final = ("virtio_pci", "virtiofs")


def make_image(kernel: Unpacked, made: Path) -> None:
    """Writes the initramfs for a kernel to ``made``.

    Raises:
        OutsideError: a tool is missing, or the kernel has no virtiofs.
    """
    with tempfile.TemporaryDirectory(prefix="sowatch-image-") as name:
        tree = Path(name)
        for directory in ("bin", "dev", "keep", "modules", "proc", "root"):
            (tree / directory).mkdir()
        busybox = shutil.which("busybox")
        if busybox is None:
            raise OutsideError(f"busybox is not installed. {_SETUP}")
        shutil.copy(busybox, tree / "bin/busybox")
        shutil.copy(_INIT, tree / "init")
        for number, module in enumerate(_needed(kernel)):
            # init inserts them in the order of their names.
            (tree / "modules" / f"{number:02}-{module.name.partition('.')[0]}.ko").write_bytes(_plain(module))
        names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
        archive = subprocess.run(
            ["cpio", "--create", "--format=newc", "--quiet"],
            input=names.encode(),
            capture_output=True,
            cwd=tree,
            check=True,
        )
        made.write_bytes(gzip.compress(archive.stdout, 1))


def _needed(kernel: Unpacked) -> list[Path]:
    """The modules to insert, each after those it depends on."""
    found: dict[Path, None] = {}
    for module in _MODULES:
        listed = run(
            ["modprobe", "-d", kernel.module_root, "-S", kernel.release, "--show-depends", module], next_step=_SETUP
        )
        for line in listed.splitlines():
            verb, _, rest = line.partition(" ")
            if verb == "insmod":
                found[Path(rest.split()[0])] = None
    return list(found)


def _plain(module: Path) -> bytes:
    """The module as busybox can insert it."""
    if module.suffix == ".xz":
        return lzma.decompress(module.read_bytes())
    if module.suffix == ".zst":
        return subprocess.run(["zstd", "-qdc", module], capture_output=True, check=True).stdout
    return module.read_bytes()
