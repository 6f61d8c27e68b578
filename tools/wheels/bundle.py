"""What a wheel has of others: their licences, where their sources are, and an SBOM; put into what auditwheel made."""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, Property, XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import LicenseExpression
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from msgspec import Struct
from packageurl import PackageURL

from outside import OutsideError, run
from wheels import zig
from wheels.place import NEXT_STEP, ROOT
from wheels.sources import SUITE, Source

__all__ = ["complete"]


class _Part(Struct, frozen=True):
    """How a library is brought in, and under which licence.

    Attributes:
        licence: as an SPDX expression; where its authors leave a choice, all of it.
        texts: in the source package.
        how: it is in the wheel.
        files: what it is in the wheel as, a regular expression of file names; none: in those of others.
    """

    licence: str
    texts: tuple[str, ...]
    how: str
    files: str = ""


_PARTS: Final = {
    "libbpf": _Part(
        "LGPL-2.1-only OR BSD-2-Clause",
        ("LICENSE", "LICENSE.BSD-2-Clause", "LICENSE.LGPL-2.1"),
        "a shared library; its headers for BPF programs",
        r"libbpf-.*\.so.*",
    ),
    "elfutils": _Part(
        "GPL-2.0-or-later OR LGPL-3.0-or-later",
        ("COPYING-GPLV2", "COPYING-LGPLV3"),
        "libelf, a shared library",
        r"libelf-.*\.so.*",
    ),
    "zlib": _Part("Zlib", ("LICENSE",), "in libbpf and libelf, its functions hidden"),
}
#: The kernel's headers for user space, which come with zig.
_HEADERS: Final = "GPL-2.0-only WITH Linux-syscall-note"


def complete(wheel: Path, sources: Sequence[Source], work: Path, output: Path) -> Path:
    """Puts licences and the SBOM into a wheel, and its parts into the licence expression.

    Args:
        wheel: of `package.make_wheel`.
        sources: of the libraries in it.
        work: an empty directory.
        output: where the wheel goes.

    Raises:
        OutsideError: a licence is missing in its source package, or the SBOM is not valid.
    """
    run([sys.executable, "-m", "wheel", "unpack", wheel, "-d", work], next_step=NEXT_STEP)
    tree = next(work.iterdir())
    info = next(tree.glob("*.dist-info"))
    licences = info / "licenses" / "bundled"
    for source in sources:
        _copy_texts(source, licences / source.name)
    headers = licences / "linux-headers"
    headers.mkdir()
    for name in ("GPL-2.0-only.txt", "Linux-syscall-note.txt"):
        shutil.copyfile(ROOT / "LICENSES" / name, headers / name)
    (licences / "README.txt").write_text(_about(sources), encoding="utf-8")
    _write_metadata(info, licences)
    (info / "sboms").mkdir(exist_ok=True)
    (info / "sboms" / "sowatch.cdx.json").write_text(_sbom(sources, tree, info), encoding="utf-8")
    output.mkdir(parents=True, exist_ok=True)
    run([sys.executable, "-m", "wheel", "pack", tree, "-d", output], next_step=NEXT_STEP)
    return output / wheel.name


def _copy_texts(source: Source, place: Path) -> None:
    place.mkdir(parents=True)
    for name in _PARTS[source.name].texts:
        if not (source.directory / name).is_file():
            raise OutsideError(f"{source.name} {source.version} has no {name}. Name its licences in {__file__}.")
        shutil.copyfile(source.directory / name, place / name)


def _about(sources: Sequence[Source]) -> str:
    lines = [
        "What this wheel has of others. All of it was compiled from Debian's source packages, with their patches.",
        "",
    ]
    for source in sources:
        part = _PARTS[source.name]
        lines += [f"{source.name} {source.version} ({SUITE}): {part.how}", f"  licence: {part.licence}"]
        lines += [f"  sha256 {digest}  {name}" for name, digest in sorted(source.files.items())]
        lines.append("")
    packages = " ".join(f"{source.name}={source.version}" for source in sources)
    lines += [
        "The kernel's headers for user space, below sowatch/bpf/programs/headers",
        f"  licence: {_HEADERS}",
        "",
        f"The sources: `apt-get source {packages}`",
        f"with {SUITE} among the deb-src lines; Debian keeps every version of a source package that it had.",
        "`scripts/wheels` of sowatch's sources compiles them as they are here. A library of your own may take the",
        "place of one in sowatch.libs/.",
        "",
    ]
    return "\n".join(lines)


def _write_metadata(info: Path, licences: Path) -> None:
    path = info / "METADATA"
    head, _, body = path.read_text(encoding="utf-8").partition("\n\n")
    terms = [part.licence for part in _PARTS.values()] + [_HEADERS]
    expression = " AND ".join(f"({term})" if " OR " in term else term for term in terms)
    head = re.sub(r"^(License-Expression: .*)$", rf"\1 AND {expression}", head, count=1, flags=re.MULTILINE)
    files = sorted(path.relative_to(info / "licenses").as_posix() for path in licences.rglob("*") if path.is_file())
    named = "".join(f"\nLicense-File: {name}" for name in files)
    path.write_text(f"{head}{named}\n\n{body}", encoding="utf-8")


def _sbom(sources: Sequence[Source], tree: Path, info: Path) -> str:
    name, version = info.name.removesuffix(".dist-info").split("-")
    bom = Bom(serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"{name} {version} {[one.version for one in sources]}"))
    whole = Component(
        name=name,
        version=version,
        type=ComponentType.APPLICATION,
        bom_ref=f"{name}@{version}",
        purl=PackageURL("pypi", None, name, version),
    )
    bom.metadata.component = whole
    parts = [_component(source, tree) for source in sources]
    for part in parts:
        bom.components.add(part)
    bom.register_dependency(whole, parts)
    text: str = JsonV1Dot6(bom).output_as_string(indent=1)
    fault = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if fault is not None:
        raise OutsideError(f"the SBOM is not valid: {fault}. {NEXT_STEP}")
    return text


def _component(source: Source, tree: Path) -> Component:
    part = _PARTS[source.name]
    purl = PackageURL("deb", "debian", source.name, source.version, {"arch": "source", "distro": SUITE})
    files = [path for path in tree.rglob("*.so*") if part.files and re.fullmatch(part.files, path.name)]
    return Component(
        name=source.name,
        version=source.upstream,
        type=ComponentType.LIBRARY,
        bom_ref=str(purl),
        purl=purl,
        description=part.how,
        licenses=[LicenseExpression(part.licence)],
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=_sha256(path)) for path in files],
        properties=[
            *(Property(name="sowatch:file", value=path.relative_to(tree).as_posix()) for path in files),
            Property(name="sowatch:compiler", value=f"zig cc {zig.version()}"),
        ],
        external_references=[
            ExternalReference(
                type=ExternalReferenceType.SOURCE_DISTRIBUTION,
                # The file of a source package, by names only: where it is kept may change.
                url=XsUri(f"{purl}#{file}"),
                hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest)],
            )
            for file, digest in sorted(source.files.items())
        ],
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
