"""The kernel matrix's own judgement: no guest that shows more or less than the table says passes."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from matrix.__main__ import Ready, _run_all, _say_what_ran
from matrix.guest import _running, is_hung
from matrix.judge import Verdict, faults_of_facts, judge, judge_unfinished, step_of
from matrix.kernels import (
    CELLS,
    CHOICES,
    CI_KERNELS,
    CI_WITHOUT_CELLS,
    FEATURES,
    HELPERS,
    KERNELS,
    KNOWN_FAULTS,
    TESTS,
    KnownFault,
)
from matrix.packages import Unpacked
from matrix.page import Run, is_news, read, render
from sowatch.cli.doctor import kernel_examiner
from sowatch.model.config import Config
from sowatch.sources.select import CANDIDATES

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/kernels.md"
#: A kernel on which the first cell of the table works.
KERNEL = min(CELLS[0].works_on)


def facts_of(kernel: str) -> dict[str, Any]:
    """What a guest tells that shows just what the table says."""
    cells = {}
    for cell in CELLS:
        works = kernel in cell.works_on
        cells[cell.name] = {
            "strategy": cell.strategy if works else None,
            "hooks": cell.hooks if works else None,
            "attempts": [{"strategy": cell.strategy, "ok": works, "error": cell.refused_on.get(kernel)}],
        }
    features = {name: "yes" if kernel in has else "no" for name, has in FEATURES.items()}
    strategy, hooks = CHOICES[kernel]
    choice = {"strategy": strategy, "hooks": hooks}
    return {
        "release": "1.2.3-cloud-amd64",
        "features": features,
        "choice": choice,
        "cells": cells,
        "refusals": {},
    }


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """What a guest leaves in which one test passed."""
    (tmp_path / "facts.json").write_text(json.dumps(facts_of(KERNEL)), encoding="utf-8")
    report(tmp_path, "kernel", 0, '<testcase classname="a" name="test_good"/>')
    return tmp_path


def report(out: Path, name: str, rc: int, cases: str) -> None:
    (out / f"{name}.rc").write_text(str(rc), encoding="ascii")
    (out / f"{name}.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>", encoding="utf-8")


# -- the table ---------------------------------------------------------------------------------


def test_every_cell_says_of_every_kernel_that_it_works_or_why_not() -> None:
    names = {kernel.name for kernel in KERNELS}
    for cell in CELLS:
        assert cell.works_on | cell.refused_on.keys() == names, cell.name
        assert not cell.works_on & cell.refused_on.keys(), cell.name


def test_every_strategy_has_a_cell_that_its_options_force() -> None:
    for cell in CELLS:
        forced = dict(zip(cell.options[::2], cell.options[1::2], strict=True))
        assert forced.pop("--strategy") == cell.strategy
        assert forced in ({}, {"--hooks": cell.hooks})
    assert {cell.strategy for cell in CELLS} == CANDIDATES.keys()


def test_what_doctor_asks_is_in_the_table_of_features() -> None:
    asked = {probe.name for probe in kernel_examiner().run_probes(Config())}
    objects = {name for name in FEATURES if name.endswith(".bpf.o")}

    assert asked | HELPERS.keys() | objects == FEATURES.keys()


def test_ci_runs_two_guests_at_least() -> None:
    assert set(CI_KERNELS) <= {kernel.name for kernel in KERNELS}
    assert CI_WITHOUT_CELLS.issubset(CI_KERNELS)
    # One that may be absent does not count.
    assert len(set(CI_KERNELS) - {kernel.name for kernel in KERNELS if kernel.may_be_absent}) >= 2


# -- facts against the table -------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [kernel.name for kernel in KERNELS])
def test_a_guest_that_shows_what_the_table_says_has_no_faults(kernel: str) -> None:
    assert list(faults_of_facts(kernel, facts_of(kernel))) == []


def lacks_a_feature(facts: dict[str, Any]) -> None:
    facts["features"]["kernel BTF"] = "no"


def cannot_tell(facts: dict[str, Any]) -> None:
    facts["features"]["kernel BTF"] = "unknown"


def has_a_feature_more(facts: dict[str, Any]) -> None:
    facts["features"]["time travel"] = "yes"


def was_not_asked(facts: dict[str, Any]) -> None:
    del facts["features"]["kernel BTF"]


def falls_back(facts: dict[str, Any]) -> None:
    facts["cells"][CELLS[0].name]["strategy"] = "procfs"


def chooses_less(facts: dict[str, Any]) -> None:
    facts["choice"]["hooks"] = "syscall"


def has_other_hooks(facts: dict[str, Any]) -> None:
    facts["cells"][CELLS[0].name]["hooks"] = "other"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lacks_a_feature, "kernel BTF: no, and must be yes"),
        (cannot_tell, "kernel BTF: unknown, and must be yes"),
        (has_a_feature_more, "time travel: yes, and not in the table of features"),
        (was_not_asked, "kernel BTF: in the table, but nobody looked"),
        (falls_back, "core, trampoline hooks: must be used, but it is procfs, trampoline (core: works)"),
        (chooses_less, "without options it chooses core, syscall, and must choose ('core', 'trampoline')"),
        (has_other_hooks, "core, trampoline hooks: must be used, but it is core, other (core: works)"),
    ],
)
def test_a_guest_that_differs_from_the_table_has_a_fault(change: Callable[[dict[str, Any]], None], fault: str) -> None:
    facts = copy.deepcopy(facts_of(KERNEL))
    change(facts)

    assert list(faults_of_facts(KERNEL, facts)) == [fault]


def test_what_an_object_was_refused_with_is_told() -> None:
    facts = facts_of(KERNEL)
    name = next(name for name, kernels in FEATURES.items() if name.endswith(".bpf.o") and KERNEL in kernels)
    facts["features"][name] = "no"
    facts["refusals"][name] = "the verifier's words"

    assert list(faults_of_facts(KERNEL, facts)) == [f"{name}: no, and must be yes\nthe verifier's words"]


def test_a_cell_that_nobody_tried_is_a_fault_unless_it_was_not_asked_for() -> None:
    facts = facts_of(KERNEL)
    first = facts["cells"].pop(CELLS[0].name)

    assert list(faults_of_facts(KERNEL, facts)) == [f"{CELLS[0].name}: in the table, but nobody tried"]
    assert list(faults_of_facts(KERNEL, {**facts, "cells": {}}, cells=())) == []
    assert list(faults_of_facts(KERNEL, {**facts, "cells": {CELLS[0].name: first}}, cells=CELLS[:1])) == []


# -- tests in a guest --------------------------------------------------------------------------


def test_a_guest_in_which_everything_passed_has_no_faults(out: Path) -> None:
    verdict = judge(KERNEL, out)

    assert (verdict.release, verdict.passed, verdict.faults) == ("1.2.3-cloud-amd64", 1, ())


@pytest.mark.parametrize("trouble", ["failure", "error", "skipped"])
def test_a_test_that_did_not_pass_is_a_fault(out: Path, trouble: str) -> None:
    report(out, "cell-0", 1, f'<testcase classname="b" name="test_bad"><{trouble} message="why"/></testcase>')
    verdict = judge(KERNEL, out)

    assert (verdict.passed, verdict.faults) == (1, (f"b::test_bad {trouble}: why",))


def test_a_run_of_no_tests_at_all_is_a_fault(out: Path) -> None:
    report(out, "cell-0", 5, "")

    assert judge(KERNEL, out).faults == (f"pytest ended with 5; see {out / 'console.log'}",)


def test_a_run_that_left_no_report_is_a_fault(out: Path) -> None:
    (out / "kernel.xml").unlink()

    assert judge(KERNEL, out).faults == (f"pytest ended with 0 and without a report; see {out / 'console.log'}",)


def test_a_test_that_is_known_to_fail_here_is_no_fault(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report(out, "cell-0", 1, '<testcase classname="b" name="test_bad"><failure message="why"/></testcase>')
    monkeypatch.setattr("matrix.judge.KNOWN_FAULTS", (KnownFault("b::test_bad", frozenset({KERNEL}), "why"),))
    verdict = judge(KERNEL, out)

    assert (verdict.passed, verdict.faults) == (1, ())


def test_a_known_fault_that_is_mended_is_told(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matrix.judge.KNOWN_FAULTS", (KnownFault("a::test_good", frozenset({KERNEL}), "why"),))
    (fault,) = judge(KERNEL, out).faults

    assert fault.startswith("a::test_good passes")


def test_every_test_that_is_chosen_or_known_to_fail_exists() -> None:
    chosen = [
        *TESTS,
        *(test for cell in CELLS for test in cell.tests),
        *(f.test.replace(".", "/").replace("::", ".py::") for f in KNOWN_FAULTS),
    ]
    for path, _, name in (test.partition("::") for test in chosen):
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not name or f"def {name.partition('[')[0]}(" in text, name


def test_a_guest_that_told_nothing_is_a_fault(tmp_path: Path) -> None:
    (fault,) = judge(KERNEL, tmp_path).faults

    assert fault.startswith("it told nothing of itself")


# -- a guest that is ended before it is done -----------------------------------------------------


def progress(out: Path, name: str, *lines: dict[str, str], cut: str = "") -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (out / f"{name}.progress").write_text(text + cut, encoding="utf-8")


def test_what_passed_before_the_time_was_up_counts_and_what_was_not_reached_is_no_fault(out: Path) -> None:
    progress(out, "kernel", {"test": "a::test_good", "outcome": "passed", "why": ""})  # as in its report
    progress(out, "cell-0", {"test": "b::test_good", "outcome": "passed", "why": ""}, {"begun": "b::test_next"})
    verdict = judge_unfinished(KERNEL, out)

    assert verdict == Verdict("1.2.3-cloud-amd64", 2, (), is_done=False)
    assert step_of(out) == "b::test_next"


@pytest.mark.parametrize("outcome", ["failure", "error", "skipped"])
def test_what_failed_before_the_time_was_up_is_a_fault(out: Path, outcome: str) -> None:
    progress(out, "cell-0", {"test": "b::test_bad", "outcome": outcome, "why": "it is wrong"}, cut='{"test": "b::')

    assert judge_unfinished(KERNEL, out).faults == (f"b::test_bad {outcome}: it is wrong",)


def test_what_differed_from_the_table_before_the_time_was_up_is_a_fault(out: Path) -> None:
    facts = facts_of(KERNEL)
    lacks_a_feature(facts)
    (out / "facts.json").write_text(json.dumps(facts), encoding="utf-8")

    assert judge_unfinished(KERNEL, out).faults == ("kernel BTF: no, and must be yes",)


def test_a_guest_that_was_ended_while_it_booted_has_no_fault(tmp_path: Path) -> None:
    assert judge_unfinished(KERNEL, tmp_path) == Verdict("", 0, (), is_done=False)
    assert step_of(tmp_path) == "its start"


def test_a_test_that_is_known_to_fail_is_no_fault_of_a_guest_that_was_ended(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress(out, "cell-0", {"test": "b::test_bad", "outcome": "failure", "why": "why"})
    monkeypatch.setattr("matrix.judge.KNOWN_FAULTS", (KnownFault("b::test_bad", frozenset({KERNEL}), "why"),))

    assert judge_unfinished(KERNEL, out).faults == ()


def test_the_plugin_writes_down_what_a_guest_has_done(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_left(): pytest.skip('later')\n"
        "@pytest.fixture\ndef torn():\n    yield\n    raise OSError('in the end')\n"
        "def test_torn(torn): pass\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", f"--rootdir={tmp_path}", "-p", "matrix.at_once"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "tools"),
        "SOWATCH_MATRIX_PROGRESS": str(tmp_path / "x.progress"),
    }
    subprocess.run([*command, "-p", "no:cacheprovider", tmp_path], env=environment, capture_output=True, check=False)
    lines = [json.loads(line) for line in (tmp_path / "x.progress").read_text(encoding="utf-8").splitlines()]

    assert [line["begun"] for line in lines if "begun" in line] == [
        "test_it::test_good",
        "test_it::test_bad",
        "test_it::test_left",
        "test_it::test_torn",
    ]
    assert [(line["test"], line["outcome"]) for line in lines if "test" in line] == [
        ("test_it::test_good", "passed"),
        ("test_it::test_bad", "failure"),
        ("test_it::test_left", "skipped"),
        ("test_it::test_torn", "passed"),
        ("test_it::test_torn", "error"),
    ]


@pytest.mark.parametrize(
    ("waited_s", "cpu_s", "hangs"),
    [
        (650, 640, True),  # it computes without end
        (1300, 20, True),  # it waits without end
        (1100, 20, False),
        (3000, 590, False),  # slow: this machine has no more for it
        (1300, 150, False),
    ],
)
def test_a_guest_that_is_slow_does_not_hang(waited_s: float, cpu_s: float, hangs: bool) -> None:
    assert is_hung(waited_s, cpu_s) is hangs


def test_when_the_time_is_up_guests_are_ended_and_no_more_are_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With commands of this machine in the place of QEMU: three guests that never end, two at a time."""
    monkeypatch.setenv("SOWATCH_MATRIX_CACHE", str(tmp_path))
    monkeypatch.setattr("matrix.__main__.LEAST_S", 0.001)

    async def run_guest(kernel: Unpacked, image: Path, command: list[str], out: Path, **_: object) -> int | None:
        progress(out, "asked", {"test": "b::test_good", "outcome": "passed", "why": ""}, {"begun": "b::test_next"})
        async with _running(["sleep", "inf"]) as process:
            await process.wait()
        return None

    monkeypatch.setattr("matrix.__main__.run_guest", run_guest)
    ready = [Ready(kernel, Unpacked(tmp_path, tmp_path), tmp_path) for kernel in KERNELS[:3]]
    names = [one.kernel.name for one in ready]
    asked = {name: ["tests/b.py"] for name in names}
    (first, second, third) = asyncio.run(_run_all(ready, asked, time.monotonic() + 0.2))
    _say_what_ran(names, dict(zip(names, (first, second, third), strict=True)))
    said = capsys.readouterr().out

    assert (first, second, third) == (*[Verdict("", 1, (), is_done=False)] * 2, None)
    assert f"{names[0]}: nothing wrong so far, 1 tests passed, ended after 0 s, in b::test_next\n" in said
    assert (
        f"ran: {names[0]} in part (1 tests passed), {names[1]} in part (1 tests passed), {names[2]} not begun\n"
        f"the time was up before all was done. Run `scripts/matrix {' '.join(names)}`.\n"
    ) in said


def test_a_run_without_time_for_a_guest_says_so_and_fails_nobody(tmp_path: Path) -> None:
    done = matrix("--ci", "--time", "60", SOWATCH_MATRIX_CACHE=str(tmp_path))

    assert done.returncode == 0
    assert done.stdout == f"no guest was begun: 60 s are too few. Run `scripts/matrix {' '.join(CI_KERNELS)}`.\n"


# -- the page ----------------------------------------------------------------------------------


def test_the_page_is_what_the_table_and_its_run_give() -> None:
    page = PAGE.read_text(encoding="utf-8")

    assert read(page), "no kernel ran"
    assert render(read(page)) == page, "run `scripts/matrix --write`"


def test_only_the_newest_kernel_may_differ_and_only_in_a_release_that_the_page_does_not_have() -> None:
    page = render([Run(kernel.name, f"{kernel.name}.1", 5) for kernel in KERNELS])
    assert [kernel.name for kernel in KERNELS if is_news(kernel, f"{kernel.name}.2", page)] == ["newest"]
    assert not [kernel for kernel in KERNELS if is_news(kernel, f"{kernel.name}.1", page) or is_news(kernel, "", page)]


def test_the_page_names_every_kernel_and_marks_those_that_did_not_run() -> None:
    first, *others = KERNELS
    page = render([Run(first.name, "1.2.3", 7)])
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in page.splitlines() if line.startswith("| ")}

    assert read(page) == [Run(first.name, "1.2.3", 7)]
    assert [word.strip() for word in rows["feature"]] == [kernel.name for kernel in KERNELS]
    assert [rows[kernel.name][1].strip() for kernel in others] == ["not run"] * len(others)
    assert [word.strip() for word in rows["kernel BTF"]] == ["yes"] + ["?"] * len(others)


def test_a_page_that_was_changed_by_hand_is_found_out() -> None:
    page = render([Run(kernel.name, "1.2.3", 7) for kernel in KERNELS])
    changed = page.replace("works", "no   ")

    assert render(read(page)) == page
    assert render(read(changed)) != changed


# -- the command -------------------------------------------------------------------------------


def matrix(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "matrix", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tools"), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "words",
    [("2.6",), ("start",), ("start", "2.6"), ("start", "--write", "6.1"), ("--ci", "--write"), ("prepare", "--what")],
)
def test_wrong_usage_says_so(words: tuple[str, ...]) -> None:
    done = matrix(*words)

    assert done.returncode == 2
    assert "error: " in done.stderr


def test_a_kernel_that_cannot_be_had_is_told_in_one_line_with_the_next_step(tmp_path: Path) -> None:
    # Nobody listens on this port, and nothing is in the cache yet.
    mirror = "http://127.0.0.1:9/debian"
    done = matrix("prepare", "6.1", SOWATCH_MATRIX_CACHE=str(tmp_path), SOWATCH_MATRIX_MIRROR=mirror)

    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    assert line.startswith("6.1: not run: ")
    assert "SOWATCH_MATRIX_MIRROR" in line


def test_a_cache_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = matrix("prepare", "6.1", SOWATCH_MATRIX_CACHE=str(tmp_path / "file" / "cache"))

    assert done.returncode == 1
    assert "Set SOWATCH_MATRIX_CACHE to another place." in done.stdout
