"""`sowatch sbom` as typed: of real processes, without rights, and of a running agent."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from spdx_python_model import load_data

from support.agent import Agent, short_directory
from support.cgroups import Cgroups
from support.package_roots import Jailed, add_dpkg, dpkg_status, elf
from support.programs import Mapper

SOWATCH = os.fspath(Path(sys.executable).parent / "sowatch")
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
VALIDATOR = JsonStrictValidator(SchemaVersion.V1_7)
SSL = "/usr/lib/x86_64-linux-gnu/libssl.so.3"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root reads all processes, and chroots")


def sbom(*words: str, prefix: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, SOWATCH, "sbom", *words],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )


def cyclonedx(*words: str, code: int = 0, **options: Any) -> dict[str, Any]:
    done = sbom(*words, **options)
    assert done.returncode == code, done.stderr
    assert VALIDATOR.validate_str(done.stdout) is None
    return dict(json.loads(done.stdout))


def by_name(document: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [one for one in document.get("components", ()) if one["name"] == name]


@pytest.fixture
def jailed(spawn: Any, tmp_path: Path) -> Jailed:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/os-release").write_text("ID=debian\nVERSION_ID=12\n")
    status = dpkg_status(libssl3=("3.0.11-1", "Source: openssl\n"))
    add_dpkg(root, status, {"libssl3": {SSL: elf(1)}})
    return Jailed(spawn, root)


@as_root
def test_loaded_library_is_there_with_its_package_and_paths(jailed: Jailed) -> None:
    jailed.map(SSL)

    found = cyclonedx("--pid", str(jailed.pid))

    (ssl,) = by_name(found, "libssl3")
    assert ssl["purl"] == "pkg:deb/debian/libssl3@3.0.11-1?arch=amd64&distro=debian-12&upstream=openssl"
    assert [one["location"] for one in ssl["evidence"]["occurrences"]] == [SSL]
    assert {"name": "sowatch:build_id", "value": f"{1:040x}"} in ssl["properties"]
    kinds = {
        one["value"] for each in found["components"] for one in each["properties"] if one["name"] == "sowatch:kind"
    }
    assert kinds == {"library", "executable", "interpreter"}


@as_root
def test_file_that_an_upgrade_has_replaced_is_no_component_of_the_new_version(jailed: Jailed) -> None:
    jailed.map(SSL)
    status = dpkg_status(libssl3=("3.0.15-1", "Source: openssl\n"))
    add_dpkg(jailed.root, status, {"libssl3": {SSL: elf(2)}})

    found = cyclonedx("--pid", str(jailed.pid), "libssl")

    assert by_name(found, "libssl3") == []
    (ssl,) = by_name(found, SSL)
    assert ssl["type"] == "file"
    assert {"name": "sowatch:stale", "value": "true"} in ssl["properties"]


@as_root
def test_container_is_the_subject_and_only_its_files_are_there(jailed: Jailed, tmp_path: Path, wait_until: Any) -> None:
    jailed.map(SSL)
    container = os.urandom(32).hex()
    cgroups = Cgroups(tmp_path / "cgroups")
    try:
        cgroups.put(jailed.pid, f"system.slice/docker-{container}.scope")

        found = cyclonedx("--container", container[:12])
        spdx = json.loads(sbom("--container", container[:12], "--format", "spdx3").stdout)
        nobody = sbom("--container", "ffffffffffffffffffff")
    finally:
        jailed.process.kill()
        jailed.process.wait()
        cgroups.close(wait_until)

    subject = found["metadata"]["component"]
    assert (subject["type"], subject["name"]) == ("container", container)
    places = [place for one in found["components"] for place in one["evidence"]["occurrences"]]
    assert {place["additionalContext"] for place in places} == {f"container {container}"}
    assert SSL in {place["location"] for place in places}
    assert found["compositions"][0]["aggregate"] == "complete"
    assert container in {one.get("name") for one in spdx["@graph"]}
    assert nobody.returncode == 1
    assert "there is no container whose id begins with" in nobody.stderr


@as_root
def test_whole_host_is_complete_and_two_documents_of_it_are_valid() -> None:
    found = cyclonedx(SOURCE_DATE_EPOCH="1700000000")

    assert found["compositions"] == [{"aggregate": "complete", "assemblies": ["subject"]}]
    assert found["metadata"]["timestamp"] == "2023-11-14T22:13:20+00:00"
    done = sbom("--format", "spdx3")
    assert done.returncode == 0, done.stderr
    load_data(json.loads(done.stdout))


@as_root
def test_what_is_mapped_of_memory_only_is_a_limit(spawn: Any) -> None:
    code = (
        "import mmap, os, sys; fd = os.memfd_create('x'); "
        "data = open(os.path.realpath(sys.executable), 'rb').read(4096); os.write(fd, data); "
        "kept = mmap.mmap(fd, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC); "
        "print('ready', flush=True); input()"
    )
    child = spawn([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()

    properties = cyclonedx("--pid", str(child.pid))["metadata"]["properties"]
    assert {"name": "sowatch:limit", "value": "1 executable mapping of memory only: not there"} in properties


@as_root
def test_same_files_give_the_same_document_and_a_file_is_written_as_a_whole(jailed: Jailed, tmp_path: Path) -> None:
    jailed.map(SSL)
    words = ("--pid", str(jailed.pid), "--format", "spdx3")

    first = sbom(*words, SOURCE_DATE_EPOCH="1700000000")
    second = sbom(*words, "-o", str(tmp_path / "made.json"), SOURCE_DATE_EPOCH="1700000000")

    assert first.stdout == (tmp_path / "made.json").read_text()
    assert second.stdout == ""
    assert oct((tmp_path / "made.json").stat().st_mode & 0o777) == oct(0o666 & ~current_umask())


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@as_root
def test_without_rights_it_ends_with_3_and_the_document_says_that_it_is_incomplete() -> None:
    done = sbom(prefix=tuple(NOBODY))

    assert done.returncode == 3
    assert "could not be read" in done.stderr
    document = json.loads(done.stdout)
    assert VALIDATOR.validate_str(done.stdout) is None
    assert document["compositions"][0]["aggregate"] == "incomplete"
    (limit, *_) = [one["value"] for one in document["metadata"]["properties"] if one["name"] == "sowatch:limit"]
    assert "could not be read" in limit


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--format", "xml"], 2, "unknown format 'xml'. Use one of: cyclonedx, spdx3."),
        (["--since-start"], 2, "--since-start asks a running agent"),
        (["--agent", "--since-start", "--pid", "1"], 2, "Leave out --pid."),
        (["--serial-number", "7"], 2, "'7' is not a UUID"),
        (["--agent", "/nowhere/s.sock"], 1, "no agent answers on '/nowhere/s.sock'"),
        (["-o", "/nowhere/x.json"], 1, "cannot write '/nowhere/x.json'"),
    ],
)
def test_wrong_use_is_one_line(words: list[str], code: int, message: str) -> None:
    done = sbom("--pid", str(os.getpid()), *words) if "--pid" not in words and "--agent" not in words else sbom(*words)

    assert done.returncode == code
    assert message in done.stderr
    assert done.stdout == ""


def test_wrong_source_date_is_refused() -> None:
    done = sbom(SOURCE_DATE_EPOCH="yesterday")

    assert (done.returncode, done.stdout) == (2, "")
    assert "SOURCE_DATE_EPOCH='yesterday' is no number of seconds" in done.stderr


@pytest.mark.parametrize("form", ["cyclonedx", "spdx3"])
def test_without_the_extra_it_says_how_to_install_it(form: str) -> None:
    hidden = "import sys; sys.modules.update(dict.fromkeys(('cyclonedx', 'packageurl', 'spdx_python_model')));"
    code = f"{hidden} from sowatch.cli._main import main; sys.exit(main(['sbom', '--format', '{form}']))"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (1, "")
    assert "pip install 'sowatch[sbom]'" in done.stderr


# --- of an agent --------------------------------------------------------------------------------

CONFIG = """
socket_group = "65534"
[[rules]]
name = "mine"
pattern = '/sow-[^/]*/|/root/'
kind = ["library", "executable", "interpreter"]
"""


@pytest.fixture
def agent(spawn: Any, wait_until: Any) -> Iterator[Agent]:
    with short_directory() as place:
        running = Agent(spawn, wait_until, place, CONFIG).start()
        yield running
        assert running.stop() == 0, running.log


@as_root
def test_what_has_gone_is_there_since_the_start_and_only_then(agent: Agent, programs: Any, wait_until: Any) -> None:
    gone = agent.directory / "gone"
    shutil.copy(programs.variant("mapper", "-static", "-Wno-error"), gone)
    subprocess.run([gone, "--no-such-option"], check=False, stdin=subprocess.DEVNULL, capture_output=True, timeout=20)
    gone.unlink()
    words = ("--agent", os.fspath(agent.socket))

    def document() -> dict[str, Any]:
        return cyclonedx(*words, "--since-start", "/gone$", prefix=tuple(NOBODY))

    wait_until(lambda: by_name(document(), os.fspath(gone)), 20, "the agent has kept what was loaded")
    (one,) = by_name(document(), os.fspath(gone))
    assert {"name": "sowatch:loaded", "value": "before"} in one["properties"]
    # Nothing was asked for here, but the rules of the agent are of some paths only.
    whole = cyclonedx(*words)
    assert whole["compositions"][0]["aggregate"] == "unknown"
    limits = [each["value"] for each in whole["metadata"]["properties"] if each["name"] == "sowatch:limit"]
    assert any(limit.startswith("rule mine: only files of kind executable, interpreter, library") for limit in limits)
    assert by_name(cyclonedx(*words, "/gone$"), os.fspath(gone)) == []
    assert "sowatch:since" in {each["name"] for each in document()["metadata"]["properties"]}


@as_root
def test_agent_knows_the_version_that_a_process_runs_after_the_upgrade(
    agent: Agent, spawn: Any, wait_until: Any
) -> None:
    root = agent.directory / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/os-release").write_text("ID=debian\nVERSION_ID=12\n")
    library = f"{agent.directory}/libssl.so.3"
    add_dpkg(root, dpkg_status(libssl3=("3.0.11-1", "")), {"libssl3": {library: elf(1)}})
    jailed = Jailed(spawn, root)
    jailed.map(library)
    words = ("--agent", os.fspath(agent.socket), "libssl")

    def versions(*more: str) -> list[str]:
        return [one["version"] for one in by_name(cyclonedx(*words, *more), "libssl3")]

    wait_until(lambda: versions() == ["3.0.11-1"], 20, "the agent has looked the package up")
    add_dpkg(root, dpkg_status(libssl3=("3.0.15-1", "")), {"libssl3": {library: elf(2)}})
    Jailed(spawn, root).map(library)

    wait_until(lambda: versions() == ["3.0.11-1", "3.0.15-1"], 20, "both builds are there, each with its version")
    jailed.process.kill()
    jailed.process.wait()
    wait_until(lambda: versions() == ["3.0.15-1"], 20, "the old one has gone")
    assert versions("--since-start") == ["3.0.11-1", "3.0.15-1"]


@as_root
def test_wrong_questions_to_the_agent_are_refused(agent: Agent) -> None:
    answer = agent.get("/sbom?since_start=2")
    assert answer.status == 400
    assert agent.get("/sbom?pid=x").status == 400
    assert agent.get("/sbom").json["event"] == "loaded"


@as_root
def test_process_that_is_asked_for_has_its_files_only(
    agent: Agent, programs: Any, tmp_path: Path, make_library: Any
) -> None:
    first, second = (make_library(f"sow-x/lib{name}.so") for name in "ab")
    with Mapper(programs["mapper"], tmp_path) as one, Mapper(programs["mapper"], tmp_path) as two:
        one.map(first)
        two.map(second)
        found = cyclonedx("--agent", os.fspath(agent.socket), "--pid", str(one.pid))

    assert {each["name"] for each in found["components"]} == {os.fspath(first)}
