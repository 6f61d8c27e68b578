"""Bills of materials: the same for the same files, and valid by the published schemas."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from hypothesis import given, settings
from hypothesis import strategies as st
from spdx_python_model import load_data

from sowatch.inventory.packages import PackageIdentity
from sowatch.inventory.sbom import LoadedFile, Sbom, sbom_of
from sowatch.inventory.sbom_cyclonedx import to_cyclonedx
from sowatch.inventory.sbom_spdx import to_spdx

#: Of the schema that comes with the library.
VALIDATOR = JsonStrictValidator(SchemaVersion.V1_7)
SSL = PackageIdentity(
    "libssl3",
    "3.0.11-1+b1",
    "openssl",
    "pkg:deb/debian/libssl3@3.0.11-1%2Bb1?arch=amd64&distro=debian-12&upstream=openssl%403.0.11-1",
    "dpkg",
    "3.0.11-1",
)
NUMPY = PackageIdentity("numpy", "1.26.4", None, "pkg:pypi/numpy@1.26.4", "pypi")
OLD, NEW, HASH, WEB = "ab" * 20, "cd" * 20, "htlhash:" + "ef" * 16, "0123456789abcdef" * 4
FILES = (
    LoadedFile("/usr/lib/libssl.so.3", "library", OLD, "libssl.so.3", None, SSL, 2, is_stale=True),
    LoadedFile("/usr/lib/libcrypto.so.3", "library", NEW, "libcrypto.so.3", None, SSL, 3),
    LoadedFile("/usr/lib/libssl.so.3", "library", OLD, "libssl.so.3", WEB, SSL, 0),
    LoadedFile("/opt/numpy/core.so", "library", None, None, WEB, NUMPY, 1),
    LoadedFile("/opt/app", "executable", HASH, None, None, None, 1),
    LoadedFile("/opt/app", "executable", HASH, None, WEB, None, 1),
    LoadedFile("/tmp/\x1b[2J\udcff", "library", None, "bad\x00name", None, None, 1),
)


def made(files: Sequence[LoadedFile] = FILES, **values: Any) -> Sbom:
    facts = {"host": "web1", "host_id": "f" * 32, "container": None, "version": "1.0", "time_s": 1_700_000_000}
    return sbom_of(files, **{**facts, "is_complete": True, "limits": [], **values})


def cyclonedx(sbom: Sbom) -> dict[str, Any]:
    text = to_cyclonedx(sbom)
    assert VALIDATOR.validate_str(text) is None
    return dict(json.loads(text))


def spdx(sbom: Sbom) -> list[dict[str, Any]]:
    """The elements; read by the model, which was generated from the published SHACL shapes and checks them."""
    data = json.loads(to_spdx(sbom))
    _, objects = load_data(data)
    assert objects.missing_ids == set()
    return list(data["@graph"])


def test_there_is_a_component_for_each_build_of_a_package_and_each_file_without_one() -> None:
    found = made()

    assert [(one.name, one.build_id, len(one.occurrences)) for one in found.components] == [
        ("/opt/app", HASH, 2),
        ("/tmp/\\x1b[2J\\udcff", None, 1),
        ("libssl3", OLD, 2),
        ("libssl3", NEW, 1),
        ("numpy", None, 1),
    ]


def test_same_file_twice_is_one_occurrence_with_the_processes_of_both() -> None:
    (one,) = made([FILES[1], FILES[1]]).components

    assert [(place.path, place.processes) for place in one.occurrences] == [("/usr/lib/libcrypto.so.3", 6)]


def test_documents_are_equal_for_equal_files_in_any_order() -> None:
    shuffled = list(FILES)
    random.Random(7).shuffle(shuffled)

    assert to_cyclonedx(made(shuffled)) == to_cyclonedx(made())
    assert to_spdx(made(shuffled)) == to_spdx(made())


def test_serial_number_is_of_the_content_unless_one_is_given() -> None:
    assert made().serial == made().serial
    assert made().serial != made(FILES[1:]).serial
    assert made(serial="3e671687-395b-41f5-a30f-a58921a69b79").serial == "3e671687-395b-41f5-a30f-a58921a69b79"
    found = cyclonedx(made(serial="3e671687-395b-41f5-a30f-a58921a69b79"))
    assert found["serialNumber"] == "urn:uuid:3e671687-395b-41f5-a30f-a58921a69b79"


def test_cyclonedx_has_what_was_seen_and_how_sure_it_is() -> None:
    found = cyclonedx(made())
    (old,) = [one for one in found["components"] if one["bom-ref"].endswith(OLD)]

    assert (found["specVersion"], found["metadata"]["timestamp"]) == ("1.7", "2023-11-14T22:13:20+00:00")
    assert found["metadata"]["lifecycles"] == [{"phase": "operations"}]
    assert (old["type"], old["name"], old["version"], old["purl"]) == ("library", "libssl3", "3.0.11-1+b1", SSL.purl)
    (identity,) = old["evidence"]["identity"]
    assert identity["field"] == "purl"
    assert [(one["technique"], one["confidence"]) for one in identity["methods"]] == [
        ("instrumentation", 1.0),
        ("manifest-analysis", 1.0),
    ]
    assert old["evidence"]["occurrences"] == [
        {"location": "/usr/lib/libssl.so.3", "additionalContext": f"container {WEB}"},
        {"location": "/usr/lib/libssl.so.3", "additionalContext": "host"},
    ]
    properties = {one["name"]: one["value"] for one in old["properties"]}
    assert properties == {
        "sowatch:build_id": OLD,
        "sowatch:identified_by": "dpkg",
        "sowatch:kind": "library",
        "sowatch:loaded": "now",
        "sowatch:processes": "2",
        "sowatch:soname": "libssl.so.3",
        "sowatch:source": "openssl",
        "sowatch:source_version": "3.0.11-1",
        "sowatch:stale": "true",
    }


def test_file_without_a_package_is_there_as_a_file() -> None:
    found = cyclonedx(made())
    (app,) = [one for one in found["components"] if one["name"] == "/opt/app"]

    assert app["type"] == "file"
    assert "purl" not in app
    assert {"name": "sowatch:htlhash", "value": "ef" * 16} in app["properties"]


@pytest.mark.parametrize(
    ("is_complete", "aggregate", "completeness"),
    [(True, "complete", "complete"), (False, "incomplete", "incomplete"), (None, "unknown", "noAssertion")],
)
def test_document_says_whether_it_is_complete(is_complete: bool | None, aggregate: str, completeness: str) -> None:
    sbom = made(is_complete=is_complete, limits=["3 processes could not be read"])

    found = cyclonedx(sbom)
    assert found["compositions"] == [{"aggregate": aggregate, "assemblies": ["subject"]}]
    assert {"name": "sowatch:limit", "value": "3 processes could not be read"} in found["metadata"]["properties"]
    elements = spdx(sbom)
    (whole,) = [one for one in elements if one.get("spdxId", "").endswith("#subject-contains")]
    assert whole["completeness"] == completeness
    (bill,) = [one for one in elements if one["type"] == "software_Sbom"]
    assert "3 processes could not be read" in bill["comment"]


def test_spdx_is_of_type_runtime_and_has_each_package_and_file() -> None:
    elements = spdx(made(container=WEB))

    (bill,) = [one for one in elements if one["type"] == "software_Sbom"]
    assert bill["software_sbomType"] == ["runtime"]
    packages = {one.get("software_packageUrl") for one in elements if one["type"] == "software_Package"}
    assert packages == {None, SSL.purl, NUMPY.purl}
    files = [one["name"] for one in elements if one["type"] == "software_File"]
    assert sorted(files) == sorted(["/tmp/\\x1b[2J\\udcff", *(one.path for one in FILES[:-1])])
    scopes = {one["scope"] for one in elements if one["type"] == "LifecycleScopedRelationship"}
    assert scopes == {"runtime"}
    identifiers = {one["identifier"] for element in elements for one in element.get("externalIdentifier", ())}
    assert {f"gnu-build-id:{OLD}", HASH, SSL.purl} <= identifiers


@pytest.mark.parametrize(
    "package",
    [
        PackageIdentity("/", "1", None, "pkg:npm/%2F@1", "npm"),
        PackageIdentity("/", "1", None, "pkg:deb/debian/%2F@1?arch=amd64", "dpkg"),
        PackageIdentity("x", "1", None, "no package URL", "dpkg"),
        PackageIdentity("", "", None, "pkg:npm/", "npm"),
    ],
)
def test_a_package_whose_name_makes_no_url_leaves_the_file_without_one(package: PackageIdentity) -> None:
    sbom = made([LoadedFile("/opt/evil.so", "library", OLD, None, WEB, package, 1), FILES[1]])
    found = cyclonedx(sbom)
    assert sorted((one["name"], one["type"]) for one in found["components"]) == [
        ("/opt/evil.so", "file"),
        ("libssl3", "library"),
    ]
    assert sbom.limits == ("1 files without a package: the names of theirs make no package URL",)
    assert [one["name"] for one in spdx(sbom) if one["type"] == "software_Package"] == ["libssl3", "web1"]


def test_a_name_of_a_package_is_text_of_any_document() -> None:
    odd = PackageIdentity("a\x1b[2J", "1\udcff", None, "pkg:npm/a%1B%5B2J@1", "npm")
    sbom = made([LoadedFile("/opt/odd.node", "library", OLD, None, WEB, odd, 1)])
    (one,) = cyclonedx(sbom)["components"]
    assert (one["name"], one["version"]) == ("a\\x1b[2J", "1\\udcff")
    spdx(sbom)


def test_paths_that_are_shown_alike_are_one_component() -> None:
    files = [
        LoadedFile("/a\x1b.so", "library", OLD, None, None, None, 1),
        LoadedFile("/a\\x1b.so", "library", OLD, None, None, None, 2),
    ]
    (one,) = made(files).components
    assert [(place.path, place.processes) for place in one.occurrences] == [("/a\\x1b.so", 3)]
    assert to_cyclonedx(made(files)) == to_cyclonedx(made(files[::-1]))
    assert to_spdx(made(files)) == to_spdx(made(files[::-1]))


def test_empty_host_is_a_valid_document() -> None:
    assert cyclonedx(made([])).get("components", []) == []
    assert [one for one in spdx(made([])) if one["type"] == "software_File"] == []


TEXT = st.text(st.characters(), max_size=30)
IDENTITIES = st.none() | st.sampled_from([SSL, NUMPY])
LOADED = st.builds(
    LoadedFile,
    path=TEXT.map(lambda text: f"/{text}"),
    kind=st.sampled_from(["library", "executable", "interpreter"]),
    build_id=st.none() | st.sampled_from([OLD, NEW, HASH]),
    soname=st.none() | TEXT,
    container=st.none() | st.just(WEB),
    package=IDENTITIES,
    processes=st.integers(0, 5),
    is_stale=st.booleans(),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(LOADED, max_size=8))
def test_names_of_any_bytes_make_valid_documents(files: list[LoadedFile]) -> None:
    cyclonedx(made(files))
    spdx(made(files))
