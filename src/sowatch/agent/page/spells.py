"""What the page gets of the history of stale files: a JSON object."""

from __future__ import annotations

from typing import Any

from sowatch.inventory.remediation import Remediation
from sowatch.inventory.restarts import restart_target
from sowatch.inventory.stale_history import KEPT, StaleSpell
from sowatch.inventory.stale_watch import StaleWatch
from sowatch.linux.users import user_name

__all__ = ["history_dict"]


def history_dict(stale: StaleWatch) -> dict[str, Any]:
    """The spells that are kept, those without an end being stale now; times in ms since the epoch.

    ``compared_ms``: the last comparison, null: there was none yet. ``interval_s`` is 0 if it is only compared while
    somebody asks. ``left_out``: spells beyond ``kept``. ``remediations``: how long files went on running.
    """
    spells, left_out = stale.history.spells()
    return {
        "compared_ms": None if stale.compared_ns is None else stale.compared_ns // 1_000_000,
        "interval_s": stale.interval_s,
        "kept": KEPT,
        "left_out": left_out,
        "spells": [_spell(one) for one in spells],
        "remediations": [_remediation(one) for one in stale.remediations.all()],
    }


def _remediation(one: Remediation) -> dict[str, Any]:
    return {
        "path": one.path,
        "build_id": one.build_id,
        "stale": one.staleness,
        "since_ms": one.since_ns // 1_000_000,
        "since_known": one.is_since_known,
        "until_ms": None if one.until_ns is None else one.until_ns // 1_000_000,
        "seconds": None if one.seconds is None else round(one.seconds, 3),
        "processes": one.processes,
        "left": one.left,
    }


def _spell(one: StaleSpell) -> dict[str, Any]:
    process, library = one.mapped.process, one.mapped.library
    target, file = restart_target(process.cgroup), library.id
    return {
        "number": one.number,
        "pid": process.pid,
        "start_ns": process.start_ns,
        "comm": process.comm,
        "uid": process.uid,
        "user": user_name(process),
        "container": process.container,
        "unit": target.unit,
        "restart": target.command or target.advice,
        "path": library.path,
        "build_id": library.build_id,
        "dev": f"{file.major}:{file.minor}",
        "inode": file.inode,
        "generation": file.generation,
        "subvol": file.subvolume,
        "stale": one.staleness,
        "reason": one.reason,
        "since_ms": one.since_ns // 1_000_000,
        "older": one.is_older,
        "until_ms": None if one.until_ns is None else one.until_ns // 1_000_000,
        "cause": one.cause,
    }
