"""Proof that the suite runs against a wheel that was installed, byte for byte, and not against src/."""

from __future__ import annotations

import os
import shutil
import sysconfig
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

__all__ = ["WHEEL", "difference", "missing_tool"]

#: The wheel that must be installed. None: the suite takes what is there, as in a checkout.
WHEEL = os.environ.get("SOWATCH_TEST_WHEEL") or None
#: What builds programs or reads them for a comparison: a system that a wheel is installed on need not have it.
TOOLS = frozenset({"cc", "g++", "clang", "nm", "objdump", "readelf", "prometheus", "promtool", "c++filt"})


def missing_tool(error: BaseException | None) -> str | None:
    """The tool whose absence ended a test, where that is what did."""
    if WHEEL and isinstance(error, FileNotFoundError) and error.filename in TOOLS and not shutil.which(error.filename):
        return str(error.filename)
    return None


def difference(wheel: Path) -> str | None:
    """What the package that tests import differs in from the wheel; None: in nothing."""
    import sowatch

    imported = Path(sowatch.__file__).resolve()
    site = Path(sysconfig.get_path("platlib")).resolve()
    if imported != site / "sowatch" / "__init__.py":
        return f"sowatch is imported from {imported}, not from {site}"
    try:
        distribution("sowatch")
    except PackageNotFoundError:
        return f"no distribution of sowatch is installed in {site}"
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            # pip writes its own list of files, and what stands in .data/ goes elsewhere.
            if name.endswith(("/", ".dist-info/RECORD")) or ".data/" in name:
                continue
            installed = site / name
            if not installed.is_file():
                return f"{installed} is missing"
            if installed.read_bytes() != archive.read(name):
                return f"{installed} is not the file of {wheel.name}"
    return None
