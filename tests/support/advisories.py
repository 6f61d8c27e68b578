"""Advisories of OSV and statements of VEX as tests write them: packages and ids are invented."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sowatch.inventory.packages import PackageIdentity
from sowatch.inventory.vulnerabilities import Finding

Events = Sequence[Mapping[str, str]]


def events(text: str) -> Events:
    """``"introduced 0, fixed 1.2"`` as events."""
    return [dict([one.split()]) for one in text.split(",")]


def advisory(
    name: str,
    ecosystem: str = "Debian:12",
    package: str = "lamp",
    ranges: str | Sequence[str] | None = None,
    *,
    kind: str = "ECOSYSTEM",
    versions: Sequence[str] | None = None,
    affected: Sequence[Any] | None = None,
    **further: Any,
) -> dict[str, Any]:
    """One advisory about one package, or about what ``affected`` has."""
    texts = [ranges] if isinstance(ranges, str) else ranges or ()
    entry: dict[str, Any] = {"package": {"ecosystem": ecosystem, "name": package}}
    if ranges is not None:
        entry["ranges"] = [{"type": kind, "events": events(text)} for text in texts]
    if versions is not None:
        entry["versions"] = list(versions)
    return {
        "schema_version": "1.7.0",
        "id": name,
        "modified": "2026-01-02T03:04:05Z",
        "affected": [entry] if affected is None else list(affected),
        **further,
    }


def write_tree(directory: Path, advisories: Sequence[Mapping[str, Any]]) -> Path:
    """One file for each, as a data base that is a repository has them."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, one in enumerate(advisories):
        (directory / f"{number}-{one['id']}.json").write_text(json.dumps(one))
    return directory


def write_zip(path: Path, advisories: Sequence[Mapping[str, Any]]) -> Path:
    """All in one archive, as osv-scanner keeps those of an ecosystem."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for one in advisories:
            archive.writestr(f"{one['id']}.json", json.dumps(one))
    return path


def statement(ids: str | Mapping[str, Any], status: str, *products: Any, **further: Any) -> dict[str, Any]:
    """One statement of VEX."""
    named = {"name": ids} if isinstance(ids, str) else dict(ids)
    return {"vulnerability": named, "status": status, "products": list(products), **further}


def write_vex(path: Path, *statements: Mapping[str, Any], timestamp: str = "2026-02-01T00:00:00Z") -> Path:
    """A document."""
    document = {
        "@context": "https://openvex.dev/ns/v0.2.0",
        "@id": "https://vendor.example/vex/1",
        "author": "a vendor",
        "timestamp": timestamp,
        "version": 1,
        "statements": list(statements),
    }
    path.write_text(json.dumps(document))
    return path


def debian(
    version: str, name: str = "liblamp1", source: str | None = "lamp", release: str = "12", **further: Any
) -> PackageIdentity:
    """A package of Debian's."""
    distro = f"debian-{release}" if release else "debian"
    url = f"pkg:deb/debian/{name}@{version.replace('+', '%2B')}?arch=amd64&distro={distro}"
    return PackageIdentity(name, version, source, url, "dpkg", **further)


def package(url: str, version: str, name: str, source: str | None = None, by: Any = "dpkg") -> PackageIdentity:
    """Any other."""
    return PackageIdentity(name, version, source, url, by)


def statuses(found: Sequence[Finding]) -> list[tuple[str, str | None]]:
    """Each with its id."""
    return [(one.status, one.id) for one in found]
