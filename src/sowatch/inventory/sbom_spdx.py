"""A bill of materials as SPDX 3.0.1, of type runtime. The only module that knows the library of its model."""

from __future__ import annotations

import hashlib
import io
from datetime import UTC, datetime
from typing import Any, Final

from spdx_python_model.bindings import v3_0_1 as spdx

from sowatch.inventory import sbom as model

__all__ = ["to_spdx"]

_COMPLETENESS: Final = {
    True: spdx.RelationshipCompleteness.complete,
    False: spdx.RelationshipCompleteness.incomplete,
    None: spdx.RelationshipCompleteness.noAssertion,
}
_PURPOSES: Final = {"executable": spdx.software_SoftwarePurpose.executable}


def to_spdx(sbom: model.Sbom) -> str:
    """The document as JSON-LD; equal for equal ones."""
    return _Document(sbom).text()


class _Document:
    """Builds the elements of one document, each with an identifier that begins with that of the document."""

    def __init__(self, sbom: model.Sbom) -> None:
        self._sbom = sbom
        self._base = f"urn:uuid:{sbom.serial}#"
        self._elements: list[Any] = []
        self._creation = spdx.CreationInfo(
            _id="_:creation",
            specVersion="3.0.1",
            created=datetime.fromtimestamp(sbom.time_s, UTC),
        )
        agent = self._element(spdx.SoftwareAgent, "agent", name=f"sowatch {sbom.version}")
        self._creation.createdBy = [agent]

    def _element(self, kind: Any, part: str, **values: Any) -> Any:
        known = {name: value for name, value in values.items() if value is not None}
        made = kind(_id=self._base + part, creationInfo=self._creation, **known)
        self._elements.append(made)
        return made

    def text(self) -> str:
        sbom = self._sbom
        purpose = spdx.software_SoftwarePurpose
        subject = self._element(
            spdx.software_Package,
            "subject",
            name=sbom.container or sbom.host,
            software_primaryPurpose=purpose.platform if sbom.container is None else purpose.container,
            description=f"what is loaded on {sbom.host}"
            + (f" in container {sbom.container}" if sbom.container else ""),
        )
        components = [self._component(one) for one in sbom.components]
        if components:
            self._contains("subject-contains", subject, components, sbom.is_complete, sbom.limits)
        bill = spdx.software_Sbom(
            _id=self._base + "sbom",
            creationInfo=self._creation,
            software_sbomType=[spdx.software_SbomType.runtime],
            rootElement=[subject],
            element=list(self._elements),
            profileConformance=[spdx.ProfileIdentifierType.core, spdx.ProfileIdentifierType.software],
            comment="\n".join(self._statements()),
        )
        document = spdx.SpdxDocument(
            _id=self._base + "document",
            creationInfo=self._creation,
            rootElement=[bill],
            element=[*self._elements, bill],
            profileConformance=[spdx.ProfileIdentifierType.core, spdx.ProfileIdentifierType.software],
        )
        objects = spdx.SHACLObjectSet([*self._elements, bill, document])
        written = io.BytesIO()
        spdx.JSONLDSerializer().write(objects, written, indent=2, sort_keys=True)
        return written.getvalue().decode() + "\n"

    def _statements(self) -> list[str]:
        said = {True: "complete", False: "incomplete", None: "of what was asked for"}[self._sbom.is_complete]
        since = self._sbom.since_s
        what = "loaded now" if since is None else f"loaded since {datetime.fromtimestamp(since, UTC).isoformat()}"
        return [f"composition: {said}, {what}", *self._sbom.limits]

    def _component(self, one: model.SbomComponent) -> Any:
        key = hashlib.sha256(one.ref.encode()).hexdigest()[:32]
        files = [
            self._element(
                spdx.software_File,
                f"file-{key}-{number}",
                name=place.path,
                software_fileKind=spdx.software_FileKindType.file,
                software_primaryPurpose=_PURPOSES.get(one.kind, spdx.software_SoftwarePurpose.library),
                externalIdentifier=_identifiers(one, with_purl=False),
                comment=_comment(place),
            )
            for number, place in enumerate(one.occurrences)
        ]
        if one.package is None:
            if len(files) > 1:  # one path in several containers
                self._contains_same(key, files)
            return files[0]
        package = self._element(
            spdx.software_Package,
            f"package-{key}",
            name=one.name,
            software_packageVersion=one.package.version,
            software_packageUrl=one.package.purl,
            software_primaryPurpose=_PURPOSES.get(one.kind, spdx.software_SoftwarePurpose.library),
            software_sourceInfo=_source(one),
            externalIdentifier=_identifiers(one, with_purl=True),
            comment=f"evidence: instrumentation; package by {one.package.identified_by}, "
            f"confidence {model.confidence_of(one.package)}",
        )
        self._contains(f"contains-{key}", package, files, None, ())
        return package

    def _contains(self, name: str, whole: Any, parts: list[Any], is_complete: bool | None, limits: Any) -> None:
        self._element(
            spdx.LifecycleScopedRelationship,
            name,
            from_=whole,
            to=parts,
            relationshipType=spdx.RelationshipType.contains,
            scope=spdx.LifecycleScopeType.runtime,
            completeness=_COMPLETENESS[is_complete],
            comment="\n".join(limits) or None,
        )

    def _contains_same(self, key: str, files: list[Any]) -> None:
        self._element(
            spdx.Relationship,
            f"copies-{key}",
            from_=files[0],
            to=files[1:],
            relationshipType=spdx.RelationshipType.copiedTo,
            comment="the same build under the same path of other containers",
        )


def _source(one: model.SbomComponent) -> str | None:
    if one.package is None or one.package.source is None:
        return None
    return f"built from {one.package.source} {one.package.source_version or one.package.version}"


def _identifiers(one: model.SbomComponent, *, with_purl: bool) -> list[Any]:
    kinds = spdx.ExternalIdentifierType
    found = []
    if with_purl and one.package is not None:
        found.append(spdx.ExternalIdentifier(externalIdentifierType=kinds.packageUrl, identifier=one.package.purl))
    if one.build_id:
        is_hash = one.build_id.startswith("htlhash:")
        identifier = one.build_id if is_hash else f"gnu-build-id:{one.build_id}"
        comment = "hash of head, tail and length" if is_hash else "GNU build id"
        found.append(
            spdx.ExternalIdentifier(externalIdentifierType=kinds.other, identifier=identifier, comment=comment)
        )
    return found


def _comment(place: model.Occurrence) -> str:
    where = f"in container {place.container}" if place.container else "on the host"
    loaded = f"mapped by {place.processes} processes" if place.processes else "was mapped, and has gone"
    return f"{loaded} {where}" + (", replaced or deleted since" if place.is_stale else "")
