"""Packs what others build from the checkout: `pack.py chart` and `pack.py site`, below dist/.

The version is SOWATCH_VERSION, as scripts/release sets it, or that of this checkout.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Final

from sowatch import __version__

__all__ = ["chart", "chart_version", "site"]

ROOT: Final = Path(__file__).resolve().parents[1]


def chart_version(version: str) -> str:
    """A version of PEP 440 as Semantic Versioning writes it, which Helm demands; it sorts the same.

    ``1.2.3rc1`` is ``1.2.3-rc.1``, ``1.2.4.dev3+gabc`` is ``1.2.4-dev.3+gabc``.
    """
    found = re.fullmatch(r"(\d+)\.(\d+)(?:\.(\d+))?(?:\.?(a|b|rc|dev)(\d+))?(?:\+(.+))?", version)
    if found is None:
        raise ValueError(f"{version!r} has no form that Helm takes. Tag a version such as v1.2.3 or v1.2.3rc1.")
    major, minor, patch, kind, number, local = found.groups()
    return f"{major}.{minor}.{patch or 0}" + (f"-{kind}.{number}" if kind else "") + (f"+{local}" if local else "")


def chart(version: str, directory: Path) -> Path:
    """The Helm chart as an archive in a directory, of this version and for this version."""
    import helm_python

    directory.mkdir(parents=True, exist_ok=True)
    made = helm_python.package(
        ROOT / "deploy/helm/sowatch", destination=directory, version=chart_version(version), app_version=version
    )
    return Path(made)


def site(version: str, directory: Path) -> Path:
    """The documentation site as an archive in a directory."""
    built = ROOT / "build" / "site"
    subprocess.run([ROOT / "scripts/docs", built], check=True)
    directory.mkdir(parents=True, exist_ok=True)
    made = directory / f"sowatch-{version}-site.tar.gz"
    with tarfile.open(made, "w:gz") as archive:
        archive.add(built, arcname=f"sowatch-{version}-site")
    return made


def main() -> int:
    """Returns the exit code."""
    packs = {"chart": (chart, "charts"), "site": (site, "site")}
    if sys.argv[1:] not in ([name] for name in packs):
        print(f"usage: pack.py {' or '.join(packs)}", file=sys.stderr)
        return 2
    pack, below = packs[sys.argv[1]]
    print(pack(os.environ.get("SOWATCH_VERSION", __version__), ROOT / "dist" / below))
    return 0


if __name__ == "__main__":
    sys.exit(main())
