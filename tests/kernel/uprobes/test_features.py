"""What `sowatch doctor` and the agent take for possible is what attaching does, with and without CAP_SYS_ADMIN."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from sowatch.agent.actions import Actions
from sowatch.agent.settings import RuleSettings
from sowatch.bpf.probe_object import may_return_probe_kill
from sowatch.linux.capabilities import SYS_ADMIN, effective_capabilities, without
from sowatch.linux.proc import ProcFs
from sowatch.model.errors import ConfigError
from sowatch.telemetry import MetricRegistry, Sampler
from sowatch.uprobes import features
from sowatch.uprobes.features import attaching_needs_admin, run_probes, try_attaching, why_not_attach

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="BPF programs need root")

BPF = 39


@pytest.fixture
def without_multi(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a kernel before 6.6."""
    monkeypatch.setattr(features, "has_uprobe_multi", lambda: False)
    features._perf_event_needs_admin.cache_clear()
    yield
    features._perf_event_needs_admin.cache_clear()


def answers() -> dict[str, str]:
    return {one.name: one.answer for one in run_probes()}


def test_the_probes_answer_what_attaching_does() -> None:
    features._perf_event_needs_admin.cache_clear()
    found = answers()
    refusal = without(1 << SYS_ADMIN, lambda: try_attaching(multi=False))
    multi = try_attaching(multi=True)
    assert found["uprobes"] == "yes"
    assert found["uprobe.multi (6.6)"] == ("yes" if multi is None else "no")
    assert found["perf-event uprobes with CAP_PERFMON"] == ("yes" if refusal is None else "no")
    assert refusal is None or refusal.errno == errno.EACCES
    kills = may_return_probe_kill()
    assert found["return probes below seccomp filters"] == {True: "no", False: "yes", None: "unknown"}[kills]
    assert why_not_attach() is None
    if multi is None:
        assert without(1 << SYS_ADMIN, lambda: try_attaching(multi=True)) is None
        assert not attaching_needs_admin()


def test_where_only_perf_events_are_what_they_need_is_said_and_kept(without_multi: None) -> None:
    needs_admin = without(1 << SYS_ADMIN, lambda: try_attaching(multi=False)) is not None
    assert attaching_needs_admin() is needs_admin
    assert why_not_attach() is None
    reason = without(1 << SYS_ADMIN, why_not_attach)
    assert (reason is not None) is needs_admin
    assert reason is None or ("CAP_SYS_ADMIN" in reason and "Permission denied" in reason)


def test_who_may_load_nothing_is_told_no_facts() -> None:
    features._perf_event_needs_admin.cache_clear()
    found = without(1 << SYS_ADMIN | 1 << BPF, answers)
    features._perf_event_needs_admin.cache_clear()
    assert {found[name] for name in ("uprobes", "uprobe.multi (6.6)", "perf-event uprobes with CAP_PERFMON")} == {
        "unknown"
    }


def test_a_rule_that_attaches_is_refused_where_nothing_can_be_attached(without_multi: None) -> None:
    metrics = MetricRegistry()
    actions = Actions(metrics, Sampler(metrics), ProcFs())
    change = actions.prepare([RuleSettings(name="tls", count=("f",))])
    if attaching_needs_admin():
        with pytest.raises(ConfigError, match=r"rule 'tls' attaches, which cannot be done: .*CAP_SYS_ADMIN"):
            without(1 << SYS_ADMIN, change.start)
    else:  # this kernel lets CAP_PERFMON attach
        without(1 << SYS_ADMIN, change.start)
        change.discard()


def test_work_without_a_capability_leaves_it_to_everybody_else() -> None:
    before = effective_capabilities()
    assert without(1 << SYS_ADMIN, effective_capabilities) == before & ~(1 << SYS_ADMIN)
    assert effective_capabilities() == before


@pytest.mark.parametrize(("also_keep", "keeps"), [(0, False), (1 << SYS_ADMIN, True)])
def test_privileges_are_dropped_to_what_is_needed_and_what_attaching_asks_for(also_keep: int, keeps: bool) -> None:
    code = (
        "from sowatch.linux.capabilities import *; import sowatch.uprobes.features as f\n"
        f"left = drop_privileges(also_keep={also_keep})\n"
        "assert left == effective_capabilities()\n"
        "print(left >> SYS_ADMIN & 1, f.try_attaching(multi=False) is None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    is_free = without(1 << SYS_ADMIN, lambda: try_attaching(multi=False)) is None
    assert done.stdout.split() == [str(int(keeps)), str(keeps or is_free)]
