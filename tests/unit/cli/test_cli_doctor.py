"""`sowatch doctor`: the report and its exit code. The facts are this machine's, the answers a test's."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from msgspec import Struct
from msgspec.structs import replace

from sowatch.bpf.features import UNTRIED
from sowatch.bpf.objects import ShippedObject
from sowatch.cli import doctor
from sowatch.cli._out import Out
from sowatch.cli._parser import Parser
from sowatch.linux.host import KNOWN_RISKS, Host, Risk, capability_names, read_host, release_number, risk_here
from sowatch.linux.proc import ProcFs
from sowatch.model.errors import LibbpfMissing, LoadAttempt, NotPermitted
from support import strict
from support.printed import VALIDATOR


@dataclass(frozen=True)
class Probe:
    name: str
    answer: str
    detail: str = ""
    needed_for: str = "core"
    feature: str = "watching"


class Plan(Struct, frozen=True):
    strategy: str | None = "core"
    hooks: str | None = "syscall"
    guarantee: str | None = "exact"
    attempts: Sequence[LoadAttempt] = (LoadAttempt("core", ok=True, error=None),)
    remedy: str = ""
    is_only_permission: bool = False
    limits: Sequence[str] = ()


@dataclass
class Kernel:
    """A kernel whose answers the test writes down."""

    probes: Sequence[Probe] = (Probe("iter/task_vma", "yes", "loaded"),)
    plan: Plan = field(default_factory=Plan)
    error: Exception | None = None
    objects: Sequence[ShippedObject] = ()

    def examiner(self) -> doctor.Examiner:
        return doctor.Examiner(
            lambda: self._answer("1.1"),
            lambda _: self._answer(self.probes),
            lambda _: self._answer(self.plan),
            lambda: self.objects,
        )

    def _answer(self, value: Any) -> Any:
        if self.error is not None:
            raise self.error
        return value


@pytest.fixture
def examined(tmp_path: Path) -> Callable[..., tuple[int, str, list[str]]]:
    def run(kernel: Kernel, *words: str) -> tuple[int, str, list[str]]:
        parser = Parser(prog="sowatch doctor", description=None)
        doctor.configure(parser)
        warnings: list[str] = []
        with (tmp_path / "out").open("w+", encoding="utf-8") as file:
            code = doctor.run(
                parser.parse_words(words), out=Out(file.fileno()), warn=warnings.append, examiner=kernel.examiner
            )
            file.seek(0)
            return code, file.read(), warnings

    return run


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Changes what `doctor` takes for this machine."""

    def change(**facts: Any) -> None:
        changed = replace(read_host(ProcFs()), **facts)
        monkeypatch.setattr(doctor, "read_host", lambda _: changed)

    return change


NOTHING = Plan(
    strategy=None,
    hooks=None,
    guarantee=None,
    attempts=(LoadAttempt("core", ok=False, error="Operation not permitted"),),
    remedy="Run it as root.",
)
REFUSED = replace(NOTHING, is_only_permission=True)

# --- facts --------------------------------------------------------------------------------------


def test_the_facts_are_those_of_this_process() -> None:
    host = read_host(ProcFs())
    status = Path("/proc/self/status").read_text()

    assert host.release == platform.release()
    assert host.machine == platform.machine()
    assert host.uid == os.geteuid()
    assert host.capabilities is not None
    assert sum(1 << capability_number(name) for name in host.capabilities) == int(
        re.search(r"CapEff:\s*(\w+)", status)[1], 16
    )
    assert host.btf == ("/sys/kernel/btf/vmlinux" if Path("/sys/kernel/btf/vmlinux").exists() else None)
    assert host.in_initial_pid_namespace == (os.readlink("/proc/self/ns/pid") == "pid:[4026531836]")


def capability_number(name: str) -> int:
    [number] = [bit for bit in range(64) if capability_names(1 << bit) == (name,)]
    return number


def test_capabilities_have_the_names_of_the_kernel() -> None:
    assert capability_names(0) == ()
    assert capability_names(1 << 21) == ("CAP_SYS_ADMIN",)
    assert capability_names(1 << 38 | 1 << 39 | 1 << 40) == ("CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE")
    assert capability_names(1 << 50) == ("CAP_50",)


@pytest.mark.parametrize(
    ("held", "answer"),
    [
        (("CAP_SYS_ADMIN",), True),
        (("CAP_BPF", "CAP_PERFMON"), True),
        (("CAP_BPF",), False),
        (("CAP_PERFMON", "CAP_NET_ADMIN"), False),
        ((), False),
        (None, None),
    ],
)
def test_programs_are_loaded_with_bpf_and_perfmon_or_sys_admin(
    held: tuple[str, ...] | None, answer: bool | None
) -> None:
    assert replace(read_host(ProcFs()), capabilities=held).may_load is answer


# --- the report ---------------------------------------------------------------------------------


def test_json_is_one_object_with_facts_probes_decision_and_risks(examined: Any) -> None:
    code, text, warnings = examined(Kernel(), "--json")
    report = strict.loads(text)
    VALIDATOR.validate(report)

    assert code == 0
    assert warnings == []
    assert text.count("\n") == 1
    assert report["features"] == report["probes"]
    assert (report["schema"], report["event"]) == (1, "doctor")
    assert report["facts"]["release"] == platform.release()
    assert report["facts"]["libbpf"] == "1.1"
    assert report["probes"] == [{"name": "iter/task_vma", "answer": "yes", "detail": "loaded", "needed_for": "core"}]
    assert report["decision"] == {
        "strategy": "core",
        "hooks": "syscall",
        "guarantee": "exact",
        "limits": [],
        "attempts": [{"strategy": "core", "ok": True, "error": None}],
        "remedy": None,
    }
    assert [risk["status"] for risk in report["risks"]] == ["reported"] * len(KNOWN_RISKS)
    assert all(risk["sources"] for risk in report["risks"])


def test_text_is_for_people_even_into_a_pipe(examined: Any) -> None:
    code, text, _ = examined(Kernel(probes=[Probe("ring buffer", "no", "EINVAL\x1b[2J")]))

    assert code == 0
    assert re.search(r"^  kernel +" + re.escape(platform.release()), text, re.MULTILINE)
    assert re.search(r"^  ring buffer +no      for core: EINVAL\\x1b\[2J$", text, re.MULTILINE)
    assert re.search(r"^  strategy +core \(exact, syscall hooks\)$", text, re.MULTILINE)
    assert re.search(r"^  tried core +works$", text, re.MULTILINE)
    assert "systemd/systemd#34615" in text


def test_if_only_permission_is_missing_the_exit_code_is_3(examined: Any) -> None:
    code, text, warnings = examined(Kernel([Probe("map", "unknown", "Operation not permitted")], REFUSED))

    assert code == 3
    assert warnings == ["nothing can watch here. Run it as root."]
    assert re.search(r"^  strategy +none$", text, re.MULTILINE)
    assert re.search(r"^  tried core +Operation not permitted$", text, re.MULTILINE)
    assert re.search(r"^  next step +Run it as root\.$", text, re.MULTILINE)


@pytest.mark.parametrize("facts", [{"btf": None}, {"lockdown": "confidentiality"}])
def test_if_permission_would_not_help_the_exit_code_is_1(examined: Any, host: Any, facts: dict[str, Any]) -> None:
    host(**facts)

    assert examined(Kernel(plan=REFUSED))[0] == 1


def test_if_permission_is_there_but_nothing_works_the_exit_code_is_1(examined: Any) -> None:
    assert examined(Kernel([Probe("map", "no")], NOTHING))[0] == 1


def test_a_weaker_strategy_that_works_is_exit_code_0(examined: Any) -> None:
    assert examined(Kernel(plan=Plan("procfs", None, "sampled")))[0] == 0


def test_without_libbpf_the_facts_are_told_all_the_same(examined: Any) -> None:
    code, text, warnings = examined(Kernel(error=LibbpfMissing("libbpf.so.1: cannot open shared object file")))

    assert code == 1
    assert re.search(r"^  libbpf +missing$", text, re.MULTILINE)
    assert re.search(r"^  user +", text, re.MULTILINE)
    assert "Install libbpf 1.1 or newer" in text
    assert len(warnings) == 1


def test_a_decision_that_ends_with_not_permitted_is_exit_code_3(examined: Any) -> None:
    error = NotPermitted("cannot load BPF programs", "CAP_BPF is missing", "Run it as root.")

    assert examined(Kernel(error=error))[0] == 3


OBJECTS = (
    ShippedObject("watch.bpf.o", "ab" * 32, True),
    ShippedObject("watch_probe.bpf.o", "cd" * 32, False),
    ShippedObject("probes.bpf.o", "ef" * 32, None),
    ShippedObject("prebuilt.bpf.o", None, False),
)


def test_objects_are_shown_with_their_hashes_and_which_of_them_were_not_built_so(examined: Any) -> None:
    _, text, _ = examined(Kernel(objects=OBJECTS))

    assert section(text, "BPF objects") == [
        f"  watch       {'ab' * 32}",
        f"  watch_probe {'cd' * 32}",
        "    not what was built: install sowatch again",
        f"  probes      {'ef' * 32}",
        "    the build wrote down no hash for it",
        "  prebuilt    cannot be read",
        "    not what was built: install sowatch again",
    ]


def test_json_has_the_objects_with_their_hashes(examined: Any) -> None:
    _, text, _ = examined(Kernel(objects=OBJECTS), "--json")
    report = strict.loads(text)
    VALIDATOR.validate(report)

    assert report["objects"] == [
        {"name": "watch.bpf.o", "sha256": "ab" * 32, "as_built": True},
        {"name": "watch_probe.bpf.o", "sha256": "cd" * 32, "as_built": False},
        {"name": "probes.bpf.o", "sha256": "ef" * 32, "as_built": None},
        {"name": "prebuilt.bpf.o", "sha256": None, "as_built": False},
    ]


def section(text: str, heading: str) -> list[str]:
    """The lines below a heading, up to the next one."""
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(heading)) + 1
    rest = [number for number in range(first, len(lines)) if not lines[number].startswith(" ")]
    return lines[first : min(rest, default=len(lines))]


def test_text_is_wrapped_at_80_columns_below_its_column(examined: Any) -> None:
    long = " ".join(f"reason{number}" for number in range(30))
    _, text, _ = examined(Kernel(probes=[Probe("ring buffer", "no", long), Probe("a", "yes")]))

    assert max(map(len, text.splitlines())) <= 80
    lines = section(text, "watching uses no uprobes")
    first = next(number for number, line in enumerate(lines) if "ring buffer" in line)
    start = lines[first].index("no      for core:")
    assert lines[first + 1].startswith(" " * start + "reason")
    assert re.findall(r"reason\d+", text) == long.split()


def test_risks_stand_below_the_feature_that_they_belong_to(examined: Any) -> None:
    _, text, _ = examined(Kernel(probes=[Probe("map", "yes"), Probe("uprobes", "yes", feature="probing")]))

    watching = "\n".join(section(text, "watching uses no uprobes"))
    probing = "\n".join(section(text, "probing uses uprobes"))
    assert "map" in watching
    assert "uprobes" in probing
    for risk in KNOWN_RISKS:
        assert risk.name in probing
        assert risk.name not in watching


def test_one_reason_behind_several_probes_is_given_once(examined: Any) -> None:
    refused = "loading: Operation not permitted"
    probes = [Probe(name, "no", refused) for name in ("first", "second")]
    _, text, _ = examined(Kernel(probes=[*probes, Probe("third", "no", "other"), Probe("fourth", "yes", refused)]))

    joined = " ".join(" ".join(section(text, "watching uses no uprobes")).split())
    assert f"no {refused}: first; second" in joined
    assert "third no for core: other" in joined
    assert f"fourth yes for core: {refused}" in joined


def test_what_could_not_be_tried_for_want_of_a_capability_is_unknown_not_missing(
    examined: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = replace(read_host(ProcFs()), capabilities=())
    monkeypatch.setattr(doctor, "read_host", lambda _: host)
    probes = [Probe("first", "no", "loading: Operation not permitted"), Probe("second", "unknown", UNTRIED)]
    _, text, _ = examined(Kernel(probes=probes))

    joined = " ".join(" ".join(section(text, "watching uses no uprobes")).split())
    assert "unknown this user may not load BPF programs" in joined
    assert "not tried: first; second" in joined


@pytest.mark.parametrize(
    ("mounted", "answer", "said"),
    [
        ("/sys/kernel/tracing", "yes", "/sys/kernel/tracing"),
        (None, "yes", "not mounted, and need not be: sowatch reads it by a mount of its own"),
        (None, "unknown", "not mounted"),
    ],
)
def test_tracefs_is_not_said_to_be_missing_where_it_is_read(
    examined: Any, monkeypatch: pytest.MonkeyPatch, mounted: str | None, answer: str, said: str
) -> None:
    host = replace(read_host(ProcFs()), tracefs=mounted)
    monkeypatch.setattr(doctor, "read_host", lambda _: host)
    _, text, _ = examined(Kernel(probes=[Probe("tracefs with system call tracepoints", answer, "why")]))

    joined = " ".join(" ".join(section(text, "this machine")).split())
    assert f" tracefs {said} lockdown " in joined


# --- risks --------------------------------------------------------------------------------------

SINCE_6_11 = Risk("x", "text", "uprobes", ("a/b#1",), first_release=(6, 11), machine="x86_64")


@pytest.mark.parametrize(
    ("facts", "risk", "answer"),
    [
        ({"release": "6.11.0"}, SINCE_6_11, True),
        ({"release": "6.18.44-x"}, SINCE_6_11, True),
        ({"release": "7.0.0-22-generic"}, SINCE_6_11, True),
        ({"release": "6.10.9"}, SINCE_6_11, False),
        ({"release": "5.15.0"}, SINCE_6_11, False),
        ({"release": "6.18.0", "machine": "aarch64"}, SINCE_6_11, False),
        ({"release": "next"}, SINCE_6_11, None),
        ({"version": "#1 SMP"}, replace(SINCE_6_11, only_preemptible=True), False),
        ({"version": "#1 SMP PREEMPT_DYNAMIC"}, replace(SINCE_6_11, only_preemptible=True), True),
        ({"release": "4.14"}, replace(SINCE_6_11, first_release=None, machine=None), True),
    ],
)
def test_a_report_concerns_the_kernels_it_was_made_for(facts: dict[str, str], risk: Risk, answer: bool | None) -> None:
    plain: Host = replace(read_host(ProcFs()), release="6.18.0", machine="x86_64", version="#1 SMP")

    assert risk_here(risk, replace(plain, **facts)) is answer


def test_a_release_that_is_no_number_is_told_as_none() -> None:
    assert release_number("6.18.44-fc") == (6, 18)
    assert release_number("4.14") == (4, 14)
    assert release_number("mainline") is None
