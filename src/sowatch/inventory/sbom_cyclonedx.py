"""A bill of materials as CycloneDX, in the newest version that its own library writes.

The only module that knows that library: the model of evidence is another one in CycloneDX 2.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal
from typing import Final
from uuid import UUID

from cyclonedx.model import Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.component_evidence import (
    AnalysisTechnique,
    ComponentEvidence,
    Identity,
    IdentityField,
    Method,
    Occurrence,
)
from cyclonedx.model.lifecycle import LifecyclePhase, PredefinedLifecycle
from cyclonedx.model.tool import ToolRepository
from cyclonedx.output.json import JsonV1Dot7
from packageurl import PackageURL

from sowatch.inventory import sbom as model
from sowatch.inventory.packages import IdentifiedBy

__all__ = ["to_cyclonedx"]

#: A loader is a library that is started as a program.
_TYPES: Final = {"executable": ComponentType.APPLICATION}
#: How the package of a mapped file was found.
_TECHNIQUES: Final[dict[IdentifiedBy, AnalysisTechnique]] = {
    "note": AnalysisTechnique.BINARY_ANALYSIS,
    "dpkg": AnalysisTechnique.MANIFEST_ANALYSIS,
    "rpm": AnalysisTechnique.MANIFEST_ANALYSIS,
    "apk": AnalysisTechnique.MANIFEST_ANALYSIS,
    "pypi": AnalysisTechnique.MANIFEST_ANALYSIS,
    "npm": AnalysisTechnique.MANIFEST_ANALYSIS,
    "maven": AnalysisTechnique.HASH_COMPARISON,
}
_AGGREGATES: Final = {True: "complete", False: "incomplete", None: "unknown"}
_SUBJECT: Final = "subject"


def to_cyclonedx(sbom: model.Sbom) -> str:
    """The document as JSON; equal for equal ones."""
    is_container = sbom.container is not None
    subject = Component(
        name=sbom.container or sbom.host,
        type=ComponentType.CONTAINER if is_container else ComponentType.DEVICE,
        bom_ref=_SUBJECT,
        properties=_properties({"sowatch:host": sbom.host, "sowatch:host_id": sbom.host_id or ""}),
    )
    tool = Component(name="sowatch", version=sbom.version, type=ComponentType.APPLICATION, bom_ref="sowatch")
    bom = Bom(
        serial_number=UUID(sbom.serial),
        metadata=BomMetaData(
            timestamp=datetime.fromtimestamp(sbom.time_s, UTC),
            component=subject,
            tools=ToolRepository(components=[tool]),
            lifecycles=[PredefinedLifecycle(LifecyclePhase.OPERATIONS)],
            properties=[Property(name="sowatch:limit", value=limit) for limit in sbom.limits] + _since(sbom),
        ),
        components=list(map(_component, sbom.components)),
    )
    bom.register_dependency(subject, bom.components)
    found = json.loads(JsonV1Dot7(bom).output_as_string())
    for component in found.get("components", ()):
        # The library sorts by references that nobody gave.
        component["evidence"]["occurrences"].sort(key=lambda place: (place["location"], place["additionalContext"]))
    # The library has no compositions yet.
    found["compositions"] = [{"aggregate": _AGGREGATES[sbom.is_complete], "assemblies": [_SUBJECT]}]
    return json.dumps(found, indent=2, sort_keys=True) + "\n"


def _since(sbom: model.Sbom) -> list[Property]:
    if sbom.since_s is None:
        return []
    return [Property(name="sowatch:since", value=datetime.fromtimestamp(sbom.since_s, UTC).isoformat())]


def _component(one: model.SbomComponent) -> Component:
    identity, build_id = one.package, one.build_id or ""
    is_hash = build_id.startswith("htlhash:")
    made = Component(
        name=one.name,
        version=None if identity is None else identity.version,
        type=ComponentType.FILE if identity is None else _TYPES.get(one.kind, ComponentType.LIBRARY),
        bom_ref=one.ref,
        evidence=ComponentEvidence(
            identity=_identities(one),
            occurrences=[
                Occurrence(location=place.path, additional_context=_context(place)) for place in one.occurrences
            ],
        ),
        properties=_properties(
            {
                "sowatch:kind": one.kind,
                "sowatch:build_id": "" if is_hash else build_id,
                "sowatch:htlhash": build_id.removeprefix("htlhash:") if is_hash else "",
                "sowatch:processes": str(one.processes),
                "sowatch:identified_by": "" if identity is None else identity.identified_by,
                "sowatch:source": "" if identity is None else identity.source or "",
                "sowatch:source_version": "" if identity is None else identity.source_version or "",
                "sowatch:loaded": "now" if one.processes else "before",
                "sowatch:stale": "true" if any(place.is_stale for place in one.occurrences) else "",
            }
        )
        + [Property(name="sowatch:soname", value=soname) for soname in one.sonames],
    )
    if identity is not None:
        made.purl = PackageURL.from_string(identity.purl)
    return made


def _context(place: model.Occurrence) -> str:
    return f"container {place.container}" if place.container else "host"


def _identities(one: model.SbomComponent) -> list[Identity]:
    """That it is loaded was seen; which package it is of was found in its note, or in a database."""
    loaded = Method(technique=AnalysisTechnique.INSTRUMENTATION, confidence=Decimal(1), value="mapped executable")
    if one.package is None:
        return [Identity(field=IdentityField.NAME, confidence=Decimal(1), concluded_value=one.name, methods=[loaded])]
    confidence = Decimal(model.confidence_of(one.package))
    by = one.package.identified_by
    found = Method(technique=_TECHNIQUES[by], confidence=confidence, value=by)
    field, value = IdentityField.PURL, one.package.purl
    return [Identity(field=field, confidence=confidence, concluded_value=value, methods=[loaded, found])]


def _properties(values: dict[str, str]) -> list[Property]:
    return [Property(name=name, value=value) for name, value in values.items() if value]
