"""What this kernel and this user can do, which strategy is used and why, known kernel risks.

Finds out by trying: each probe loads or attaches something small and takes it away again. Kernel
versions are compared for one thing only: to say which reports of others concern a kernel like this.

Exit codes: 0 something can watch; 3 only permission is missing; 1 otherwise.
"""

# `bpf` is imported only in `run`, because it may fail to load.

from __future__ import annotations

import errno
import os
import socket
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from textwrap import wrap
from typing import Any, Final, NamedTuple, Protocol

from msgspec import Struct
from msgspec.structs import asdict

from sowatch.cli._options import add_format, add_strategy, config_of, wants_json
from sowatch.cli._out import Out
from sowatch.cli._parser import Parser
from sowatch.linux.host import KNOWN_RISKS, Host, read_host, risk_here
from sowatch.linux.proc import ProcFs
from sowatch.model.config import Config
from sowatch.model.encoding import dumps
from sowatch.model.errors import LoadAttempt, NotPermitted, SowatchError
from sowatch.model.escape import visible
from sowatch.model.lines import SCHEMA

#: Behind whatever could not be tried.
_MAY_NOT_LOAD: Final = "this user may not load BPF programs (CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN), so not tried"
_LOOKS: Final = {"yes": "green", "no": "red", "unknown": "yellow"}


class _Probe(Protocol):
    """One answer of `sowatch.bpf.features.run_probes`."""

    @property
    def name(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def detail(self) -> str: ...
    @property
    def needed_for(self) -> str: ...
    @property
    def feature(self) -> str: ...


class _Plan(Protocol):
    """What `sowatch.sources.select.plan` decides; ``strategy`` is ``None`` if nothing works."""

    @property
    def strategy(self) -> str | None: ...
    @property
    def hooks(self) -> str | None: ...
    @property
    def guarantee(self) -> str | None: ...
    @property
    def attempts(self) -> Sequence[LoadAttempt]: ...
    @property
    def remedy(self) -> str: ...
    @property
    def is_only_permission(self) -> bool: ...
    @property
    def limits(self) -> Sequence[str]: ...


class _Object(Protocol):
    """One answer of `sowatch.bpf.objects.shipped_objects`."""

    @property
    def name(self) -> str: ...
    @property
    def sha256(self) -> str | None: ...
    @property
    def is_as_built(self) -> bool | None: ...


class Examiner(Struct, frozen=True):
    """Where the answers come from; tests put their own in its place."""

    libbpf_version: Callable[[], str]
    run_probes: Callable[[Config], Sequence[_Probe]]
    plan: Callable[[Config], _Plan]
    objects: Callable[[], Sequence[_Object]] = tuple


def kernel_examiner() -> Examiner:
    """The real one: asks the kernel."""
    from sowatch.bpf.binding import libbpf_version
    from sowatch.bpf.features import run_probes
    from sowatch.bpf.objects import shipped_objects
    from sowatch.sources.select import plan
    from sowatch.uprobes import features as uprobes

    def probes(config: Config) -> list[_Probe]:
        found: list[_Probe] = [*run_probes(config)]
        # Without libbpf there is nothing to try with.
        return found if found[0].answer == "no" else [*found, *uprobes.run_probes()]

    return Examiner(lambda: ".".join(map(str, libbpf_version())), probes, plan, shipped_objects)


def configure(parser: Parser) -> None:
    """Add the command's options."""
    add_format(parser)
    add_strategy(parser)
    parser.add_argument(
        "--proc-root", default="/proc", metavar="DIR", help="where the host's proc is mounted. Default: /proc"
    )


def run(
    args: Namespace, *, out: Out, warn: Callable[[str], None], examiner: Callable[[], Examiner] = kernel_examiner
) -> int:
    """Examine and report; returns the exit code."""
    as_json = wants_json(args)
    config = config_of(args)
    host = read_host(ProcFs(config.proc_root))
    report = _examine(config, host, examiner)
    if as_json:
        out.write(dumps(report.to_dict()) + "\n")
        out.flush()
    else:
        _write(report, out)
    if not report.can_watch:
        warn(f"nothing can watch here. {report.remedy}".rstrip())
    return report.exit_code


class _Report(Struct, frozen=True):
    host: Host
    libbpf: str | None
    probes: tuple[_Probe, ...]
    plan: _Plan | None
    error: SowatchError | None
    objects: tuple[_Object, ...] = ()

    @property
    def can_watch(self) -> bool:
        return self.plan is not None and bool(self.plan.strategy)

    @property
    def exit_code(self) -> int:
        if self.can_watch:
            return 0
        refused = self.plan.is_only_permission if self.plan is not None else isinstance(self.error, NotPermitted)
        # Permission would not help where the kernel has no BTF or is locked down.
        return 3 if refused and self.host.btf is not None and self.host.lockdown != "confidentiality" else 1

    @property
    def remedy(self) -> str:
        if self.error is not None:
            return str(self.error)
        return self.plan.remedy if self.plan is not None else ""

    def to_dict(self) -> dict[str, Any]:
        plan = self.plan
        features = [
            {"name": one.name, "answer": one.answer, "detail": one.detail, "needed_for": one.needed_for}
            for one in self.probes
        ]
        return {
            "schema": SCHEMA,
            "event": "doctor",
            "host": socket.gethostname(),
            "facts": {
                **asdict(self.host),
                "capabilities": None if self.host.capabilities is None else list(self.host.capabilities),
                "lsms": None if self.host.lsms is None else list(self.host.lsms),
                "may_load_programs": self.host.may_load,
                "libbpf": self.libbpf,
            },
            "probes": features,
            "features": features,
            "seq": 1,
            "decision": {
                "strategy": plan.strategy if plan is not None else None,
                "hooks": plan.hooks if plan is not None else None,
                "guarantee": plan.guarantee if plan is not None else None,
                "limits": list(plan.limits) if plan is not None else [],
                "attempts": [one._asdict() for one in plan.attempts] if plan is not None else [],
                "remedy": self.remedy or None,
            },
            "risks": [
                {
                    "name": risk.name,
                    "status": "reported",
                    "kernels_like_this": risk_here(risk, self.host),
                    "text": risk.text,
                    "concerns": risk.concerns,
                    "sources": list(risk.sources),
                    "evidence": "reported",
                }
                for risk in KNOWN_RISKS
            ],
            "objects": [{"name": one.name, "sha256": one.sha256, "as_built": one.is_as_built} for one in self.objects],
        }


def _examine(config: Config, host: Host, examiner: Callable[[], Examiner]) -> _Report:
    """Ask everything that can be asked; one part that fails leaves the others."""
    version: str | None = None
    probes: tuple[_Probe, ...] = ()
    plan: _Plan | None = None
    first_error: SowatchError | None = None
    kernel = examiner()
    try:
        version = kernel.libbpf_version()
    except SowatchError as error:
        first_error = error
    try:
        probes = tuple(kernel.run_probes(config))
    except SowatchError as error:
        first_error = first_error or error
    try:
        plan = kernel.plan(config)
        first_error = None  # the plan says itself what is missing
    except SowatchError as error:
        # The decision's own error says most, unless there was no libbpf to decide with.
        first_error = first_error or error
    return _Report(host, version, probes, plan, first_error, tuple(kernel.objects()))


# --- for people ---------------------------------------------------------------------------------

#: Of a pipe; a terminal has its own, up to the second.
_WIDTH: Final = 80
_MOST_WIDTH: Final = 120
_LEAST_WIDTH: Final = 40
#: What each feature is, and which commands use it.
_FEATURES: Final = {
    "watching": "watching uses no uprobes: watch, run, list, top, audit, explain, serve",
    "probing": "probing uses uprobes: trace, http, rules of serve that count or attach",
}


class _Row(NamedTuple):
    """A name and its value with its look; without a value a heading, without a name a paragraph."""

    name: str
    value: str | None = None
    look: str = ""


def _write(report: _Report, out: Out) -> None:
    sections = [
        [_Row("this machine"), *_machine_rows(report)],
        [_Row("this user"), *_user_rows(report)],
        [_Row(_FEATURES["watching"]), *_decision_rows(report), *_probe_rows(report, "watching")],
        [_Row(_FEATURES["probing"]), *_probe_rows(report, "probing"), *_risk_rows(report, "probing")],
        [_Row("BPF objects of this installation, SHA-256"), *_object_rows(report)],
    ]
    if out.is_terminal:
        from rich.text import Text

        from sowatch.cli._live import terminal_console

        console, text = terminal_console(out), Text()
        for line, start, look in _lines(sections, max(_LEAST_WIDTH, min(console.width, _MOST_WIDTH))):
            text.append(line[:start]).append(f"{line[start:]}\n", look)
        console.print(text, end="")
    else:
        for line, _, _ in _lines(sections, _WIDTH):
            out.write(f"{line}\n")
    out.flush()


def _lines(sections: Sequence[Sequence[_Row]], width: int) -> Iterator[tuple[str, int, str]]:
    """Lines no wider than ``width``; of each where its value begins, and the look of that."""
    for rows in sections:
        names = max((len(name) for name, value, _ in rows if value is not None), default=0)
        for name, value, look in rows:
            start = 0 if value is None else 4 if not name else names + 3
            lead = "" if value is None else f"  {name:<{names}} " if name else " " * 4
            for line in wrap(name if value is None else value, width - start, break_on_hyphens=False) or [""]:
                yield lead + line, start, "bold" if value is None else look
                lead = " " * start


def _machine_rows(report: _Report) -> list[_Row]:
    host = report.host
    rows = [
        ("kernel", visible(f"{host.release} {host.machine}"), ""),
        ("BTF of the kernel", host.btf or "no", "" if host.btf else "yellow"),
        ("libbpf", report.libbpf or "missing", "" if report.libbpf else "red"),
        ("tracefs", _tracefs(report), ""),
        ("lockdown", host.lockdown or "unknown (no securityfs)", ""),
        ("LSMs", "unknown (no securityfs)" if host.lsms is None else visible(" ".join(host.lsms)), ""),
        ("unprivileged BPF", _unprivileged(host.unprivileged_bpf_disabled), ""),
    ]
    return [_Row(*row) for row in rows]


def _tracefs(report: _Report) -> str:
    if report.host.tracefs is not None:
        return visible(report.host.tracefs)
    # Who may mount gets a mount of its own, which nobody else sees.
    is_read = any(probe.name.startswith("tracefs") and probe.answer == "yes" for probe in report.probes)
    return "not mounted, and need not be: sowatch reads it by a mount of its own" if is_read else "not mounted"


def _user_rows(report: _Report) -> list[_Row]:
    host = report.host
    held = host.capabilities
    capabilities = "unknown" if held is None else " ".join(held) or "none"
    memlock = "unlimited" if host.memlock_bytes is None else f"{host.memlock_bytes} bytes"
    rows = [
        ("user", f"{host.uid}" if host.user is None else f"{visible(host.user)} ({host.uid})", ""),
        ("capabilities", capabilities, ""),
        ("may load programs", *_answer(host.may_load)),
        ("initial user namespace", *_answer(host.in_initial_user_namespace)),
        ("initial pid namespace", *_answer(host.in_initial_pid_namespace)),
        ("seccomp", host.seccomp or "unknown", ""),
        ("locked memory limit", memlock, ""),
    ]
    return [_Row(*row) for row in rows]


def _object_rows(report: _Report) -> list[_Row]:
    rows = []
    for one in report.objects:
        # Without the ending, which all have in common, a hash fits on one line of 80 columns.
        rows.append(_Row(visible(one.name.removesuffix(".bpf.o")), one.sha256 or "cannot be read", ""))
        if one.is_as_built is False:
            rows.append(_Row("", "not what was built: install sowatch again", "red"))
        elif one.is_as_built is None:
            rows.append(_Row("", "the build wrote down no hash for it", "yellow"))
    return rows or [_Row("objects", "none", "red")]


def _unprivileged(value: int | None) -> str:
    """kernel.unprivileged_bpf_disabled in words (Documentation/admin-guide/sysctl/kernel.rst)."""
    return {None: "unknown", 0: "allowed", 1: "off until the next boot"}.get(value, "off")


def _answer(value: bool | None) -> tuple[str, str]:
    word = "unknown" if value is None else "yes" if value else "no"
    return word, _LOOKS[word]


def _probe_rows(report: _Report, feature: str) -> list[_Row]:
    probes = [_judged(probe, report.host) for probe in report.probes if probe.feature == feature]
    rows = []
    for first, *others in _by_reason(probes):
        answer, look = first.answer, _LOOKS.get(first.answer, "")
        if others:
            names = "; ".join(visible(probe.name) for probe in (first, *others))
            rows.append(_Row(answer, f"{visible(first.detail)}: {names}", look))
        else:
            why = f": {visible(first.detail)}" if first.detail else ""
            rows.append(_Row(visible(first.name), f"{answer:<7} for {first.needed_for}{why}", look))
    if not probes and feature == "watching":
        rows.append(_Row("probes", "none could be run", "red"))
    return rows


class _Judged(NamedTuple):
    """A probe, its answer and its reason once it is known what this user may do."""

    name: str
    answer: str
    detail: str
    needed_for: str


def _judged(probe: _Probe, host: Host) -> _Judged:
    from sowatch.bpf.features import UNTRIED

    is_refused = probe.detail == UNTRIED or probe.detail.endswith(os.strerror(errno.EPERM))
    if probe.answer != "yes" and is_refused and host.may_load is False:
        return _Judged(probe.name, "unknown", _MAY_NOT_LOAD, probe.needed_for)
    return _Judged(probe.name, probe.answer, probe.detail, probe.needed_for)


def _by_reason(probes: Sequence[_Judged]) -> list[list[_Judged]]:
    """Probes together of which one reason is behind the answers; others and a ``yes`` are alone."""
    groups: dict[object, list[_Judged]] = {}
    for probe in probes:
        key = probe.name if probe.answer == "yes" or not probe.detail else (probe.answer, probe.detail)
        groups.setdefault(key, []).append(probe)
    return list(groups.values())


def _decision_rows(report: _Report) -> list[_Row]:
    plan = report.plan
    rows = []
    if plan is not None and plan.strategy:
        hooks = "" if plan.hooks is None else f", {plan.hooks} hooks"
        rows.append(_Row("strategy", f"{plan.strategy} ({plan.guarantee}{hooks})", "bold green"))
    else:
        rows.append(_Row("strategy", "none", "bold red"))
    rows += [_Row("limit", visible(limit)) for limit in (plan.limits if plan is not None else ())]
    for attempt in plan.attempts if plan is not None else ():
        word = "works" if attempt.ok else visible(attempt.error or "does not work")
        rows.append(_Row(f"tried {attempt.strategy}", word, "green" if attempt.ok else "yellow"))
    if report.remedy:
        rows.append(_Row("next step", visible(report.remedy)))
    return rows


def _number(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))


def _risk_rows(report: _Report, feature: str) -> list[_Row]:
    rows = [_Row("  reported by others of this, not seen here:")]
    for risk in KNOWN_RISKS:
        if risk.feature != feature:
            continue
        here = risk_here(risk, report.host)
        since = "" if risk.first_release is None else f"kernels from {_number(risk.first_release)}"
        if risk.fixed_release is not None:
            since += f" until {_number(risk.fixed_release)}"
        parts = (since, risk.machine or "", "with preemption" if risk.only_preemptible else "")
        where = " ".join(filter(None, parts)) or "any kernel"
        like = {True: "like this one", False: "not this one", None: "perhaps this one"}[here]
        rows.append(_Row(risk.name, f"{where} ({like})", "yellow" if here else "dim"))
        rows.append(_Row("", risk.text, "dim"))
        rows.append(_Row("", ", ".join(risk.sources), "dim"))
    return rows if len(rows) > 1 else []
