"""Every block of code on a page is run by a test, or says why not."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from sowatch.agent.settings import load_settings
from sowatch.cli import fleet
from sowatch.cli._parser import Parser
from support.chart import rendered
from support.doc_blocks import ROOT, Block, blocks
from support.sessions import missing_lines, pages

#: By language which test runs a block that has no marker.
RUN = {
    "python": "test_examples.py",
    "console": "test_sessions.py",
    "sh": "test_sessions.py",
    "toml": "test_a_configuration_that_a_page_shows_is_one",
    "yaml": "test_values_that_a_page_shows_make_manifests",
    "promql": "test_an_expression_that_a_page_shows_is_one",
}
#: Output, and what only has a form.
SHOWN = {"text"}

#: Every reason why a block is not run, with how many blocks have it.
NOT_RUN: dict[str, int] = {
    "building wheels takes minutes": 1,
    "examples of usage, which the parser of the command reads": 11,
    "guests take minutes; .ci/run runs them": 1,
    "it installs a package; `scripts/deb --test` does so in clean roots": 1,
    "it makes a release": 1,
    "needs a ClickHouse and a Collector, which cannot be had where the tests run; "
    "chdb has the same tables and questions": 2,
    "needs a cluster; tests render and validate the chart, and containerd runs its pod": 1,
    "needs systemd, a container engine and a login; "
    "test_stale_files_stand_below_what_has_to_be_restarted has their cgroups": 1,
    "what is loaded is another one on each machine; test_loaded_library_is_there_with_its_package_and_paths has one": 1,
    "of what a whole host has loaded something always differs; "
    "test_same_files_give_the_same_document_and_a_file_is_written_as_a_whole does it for a process": 1,
    "the tests run from a checkout that is set up": 2,
    "they run the tests, and this one is one of them": 1,
    "what is found by hours of it is in the corpus, which a test replays": 1,
}


def test_no_fence_is_left_out() -> None:
    for path in {block.page for block in blocks()}:
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        fences = [line for line in lines if line.lstrip().startswith("```")]
        directives = [line for line in fences if line.startswith("```{")]
        assert len(fences) == 2 * (len([one for one in blocks() if one.page == path]) + len(directives)), path


@pytest.mark.parametrize("block", list(blocks()), ids=str)
def test_a_block_is_run_or_says_why_not(block: Block) -> None:
    if block.marker is None:
        assert block.language in RUN.keys() | SHOWN
    elif block.marker.startswith("run by: "):
        name = block.marker.removeprefix("run by: ")
        assert any(f"def {name}(" in path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py"))


def test_the_reasons_why_blocks_are_not_run_are_these() -> None:
    reasons = (
        block.marker.removeprefix("not run: ") for block in blocks() if block.marker and "not run" in block.marker
    )
    assert Counter(reasons) == NOT_RUN


def test_every_page_with_something_to_type_is_typed() -> None:
    assert {block.page for block in blocks() if block.language in ("console", "sh") and block.marker is None} == set(
        pages()
    )


@pytest.mark.parametrize("block", [one for one in blocks() if one.language == "toml"], ids=str)
def test_a_configuration_that_a_page_shows_is_one(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(block.text, encoding="utf-8")
    load_settings(str(file), environment={})


@pytest.mark.parametrize("block", [one for one in blocks() if one.language == "yaml" and one.marker is None], ids=str)
def test_values_that_a_page_shows_make_manifests(block: Block, tmp_path: Path) -> None:
    values = yaml.safe_load(block.text)
    made = rendered(values)
    for one in made.manifests:
        if one["kind"] != "PodMonitor":  # not of Kubernetes itself
            kubernetes_validate.validate(one, "1.37", strict=True)
    assert values["image"]["repository"] in made.container["image"]
    file = tmp_path / "config.toml"
    file.write_text(values["config"], encoding="utf-8")
    load_settings(str(file), environment={})


def test_configurations_of_the_fleet_page_are_yaml_with_what_they_need() -> None:
    collector, playbook, workflow = (
        yaml.safe_load(block.text) for block in blocks() if block.page == "docs/fleet.md" and block.language == "yaml"
    )
    service = collector["service"]
    for pipeline in service["pipelines"].values():
        for kind, names in pipeline.items():
            assert set(names) <= set(collector[kind])
    assert set(service["extensions"]) == set(collector["extensions"])
    assert collector["exporters"]["clickhouse"]["create_schema"] is False
    tasks = [task for play in playbook for task in play["tasks"]]
    (step,) = workflow["jobs"]["remediated"]["steps"]
    commands = [task["ansible.builtin.command"] for task in tasks if "ansible.builtin.command" in task] + [step["run"]]
    for command in commands:
        program, *words = shlex.split(re.sub(r"\{\{ \w+ \}\}|\$\w+", "0123456789ab", command))
        assert program == "sowatch"
        parser = Parser(prog="sowatch fleet", description=None)
        fleet.configure(parser)
        parser.parse_words(words[1:])
    wait = tasks[-1]
    assert (wait["register"], wait["until"]) == ("answer", "answer.rc == 0")


@pytest.mark.parametrize("block", [one for one in blocks() if one.language == "promql"], ids=str)
def test_an_expression_that_a_page_shows_is_one(block: Block, tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.fail("this test needs promtool; run scripts/setup --for test")
    expression = " ".join(block.text.split())
    rules = tmp_path / "rules.yml"
    rules.write_text(f"groups: [{{name: page, rules: [{{alert: Shown, expr: {expression!r}}}]}}]\n", encoding="utf-8")
    done = subprocess.run(["promtool", "check", "rules", rules], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_test_that_a_page_names_exists() -> None:
    named = set()
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        if "decisions" not in path.parts:
            named |= set(re.findall(r"`(test_\w+)`", path.read_text(encoding="utf-8")))
    written = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py"))
    assert named - set(re.findall(r"\bdef (test_\w+)\(", written)) == set()


def test_what_a_page_shows_is_met_on_another_day() -> None:
    shown = ["mapped  5  2026-11-26T16:53:37Z  libssl.so.3", "since 2026-11-26"]
    assert missing_lines(shown, "mapped 5 2027-01-02T01:02:03.5Z libssl.so.3\nsince 2026-12-01\n") == []
    assert missing_lines(["2026-11-26T16:53:37Z      1"], "2027-01-02T01:02:03Z  1\n") == []
    assert missing_lines(["2026-11-26T16:53:37Z      1"], "2027-01-02T01:02:03Z  2\n") != []
    assert missing_lines(shown, "mapped 5 2027-01-02T01:02:03.5Z libz.so.1\nsince 2026-12-01\n") == shown[:1]
