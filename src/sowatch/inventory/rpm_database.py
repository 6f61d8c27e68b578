"""The database of rpm: which package owns a file, by rpm itself. Read-only; of our own root only."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from typing import Final

from sowatch.inventory.package_databases import Listed, PackageRecord, aliases

__all__ = ["rpm_listed", "rpm_owners"]

_RPM_TIMEOUT_S: Final = 20.0
#: One line for the package, then one for each of its files. In braces: digests of directories are empty.
_RPM_FORMAT: Final = (
    "%{NAME}\\t%{EPOCHNUM}\\t%{VERSION}-%{RELEASE}\\t%{ARCH}\\t%{SOURCERPM}\\t%{FILEDIGESTALGO}\\n"
    "[\\t%{FILEDIGESTS}\\t%{FILENAMES}\\n]"
)
#: PGPHASHALGO_* of rpm (RFC 4880, 9.4); MD5 where none is named.
_RPM_DIGESTS: Final = {"1": "md5", "2": "sha1", "8": "sha256", "9": "sha384", "10": "sha512"}


def rpm_listed(paths: Sequence[str]) -> tuple[dict[str, Listed | None], dict[str, PackageRecord]]:
    """Which package owns each file, and what rpm says of those packages.

    For our own root only: ``rpm`` runs macros, which a container could have written. `rpm_owners` asks for names only.
    """
    owners: dict[str, Listed | None] = dict.fromkeys(paths)
    records: dict[str, PackageRecord] = {}
    for path in paths:
        if owners[path] is not None:
            continue
        found = _ask_rpm(path, _RPM_FORMAT)
        if found is None:
            break  # there is no rpm, or its database is locked: the next path would fare no better
        head, *files = found.split("\n")
        fields = head.split("\t")
        if len(fields) != 6:
            continue
        name, epoch, version, architecture, source, algorithm = fields
        records[name] = _rpm_record(name, epoch, version, architecture, source)
        for line in files:
            _, _, rest = line.partition("\t")
            digest, _, file = rest.partition("\t")
            for mapped in aliases(file) if file else ():
                if mapped in owners and owners[mapped] is None:
                    known = _RPM_DIGESTS.get(algorithm, "md5") if digest else None
                    owners[mapped] = Listed(name, file, 0, None if known is None else (known, digest))
    return owners, records


def rpm_owners(paths: Sequence[str]) -> dict[str, str | None]:
    """The name of the package that owns each file, asked of rpm in our own root."""
    owners: dict[str, str | None] = dict.fromkeys(paths)
    for path in paths:
        found = _ask_rpm(path, "%{NAME}\\n")
        if found is None:
            break
        owners[path] = next(iter(found.split()), None)
    return owners


def _rpm_record(name: str, epoch: str, version: str, architecture: str, source_rpm: str) -> PackageRecord:
    """``source_rpm`` is the name of a file: ``openssl-3.0.7-27.el9.src.rpm``."""
    stem = source_rpm.removesuffix(".rpm").rpartition(".")[0]
    source, _, release = stem.rpartition("-")
    source, _, source_version = source.rpartition("-")
    is_known = bool(source and source_version and release)
    return PackageRecord(
        name,
        version,
        source if is_known else name,
        f"{source_version}-{release}" if is_known else version,
        architecture,
        "" if epoch in ("", "0", "(none)") else epoch,
    )


def _ask_rpm(path: str, query: str) -> str | None:
    """What rpm says of the package that owns a file, empty if none does; None if it cannot be asked."""
    try:
        done = subprocess.run(
            ["rpm", "-qf", "--qf", query, "--", path],  # noqa: S607  (the system's own, wherever it is)
            capture_output=True,
            timeout=_RPM_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return os.fsdecode(done.stdout) if done.returncode == 0 else ""
