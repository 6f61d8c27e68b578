"""Which builds of a fleet have a vulnerability, by data of `sowatch.inventory.vulnerabilities`. Pure.

What is unknown stays so: a build whose package no host could name may have any vulnerability.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sowatch.fleet.resolved import Build, VulnerableBuilds
from sowatch.inventory.packages import PackageIdentity
from sowatch.inventory.vulnerabilities import Vulnerabilities
from sowatch.model.errors import SowatchError

__all__ = ["builds_with"]


def builds_with(data: Vulnerabilities) -> VulnerableBuilds:
    """What finds the builds with a vulnerability: those that are affected, and those of which it is unknown."""

    def find(name: str, builds: Sequence[Build]) -> tuple[list[Build], list[Build]]:
        vulnerability = data.affected_by(name)
        if not vulnerability.is_known:
            raise SowatchError(
                f"none of the data names {name}: whether a host is affected is unknown. Give data that do: --osv, "
                "--build-ids or --vex."
            )
        named = {one.build_id for one in builds if one.build_id and one.purl}
        affected, unknown = [], []
        for one in builds:
            if one.build_id in named and not one.purl:
                continue  # another host knows the package of that build
            found = vulnerability.status_of(_identity(one), one.build_id or None)
            if found.status == "affected":
                affected.append(one)
            elif found.is_open:
                unknown.append(one)
        return affected, unknown

    return find


def _identity(one: Build) -> PackageIdentity | None:
    if not one.purl:
        return None
    by: Any = one.identified_by
    return PackageIdentity(one.package, one.package_version, one.source_package or None, one.purl, by)
