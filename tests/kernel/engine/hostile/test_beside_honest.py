"""A hostile process, as nobody, beside an honest one: what the honest one does is told, and the agent answers.

Each way is that of an issue: many ranges, floods, forks, posix_spawn and shared address spaces. What does not answer is
in ``test_hangs.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.agent import Agent
from support.hostile_process import WAYS, HostileProcess
from support.kernel import TAG
from support.programs import Mapper

pytestmark = pytest.mark.alone

COUNT = 10


@pytest.mark.parametrize("way", WAYS)
def test_beside_a_hostile_process_honest_loads_are_told_and_the_agent_answers_and_ends(
    way: str,
    programs: Any,
    library: Callable[..., Path],
    start: Callable[..., Mapper],
    agent: Callable[..., Agent],
    wait_until: Any,
    deadline: Any,
) -> None:
    program = programs.variant("hostile", "-pthread")
    target = library(f"libtarget{TAG}.so")
    os.truncate(target, 20_000 * 4096)  # sparse: many pages that cost nothing
    honest = [library(f"libhonest{number}{TAG}.so") for number in range(COUNT)]
    served = agent(f'[[rules]]\nname = "ours"\npattern = "{TAG}"\n')
    mapper = start()

    def reported() -> set[str]:
        found = served.get("/inventory").json
        places = {place for place, one in enumerate(found["processes"]) if one["pid"] == mapper.pid}
        return {one["path"] for one in found["libraries"] if places & set(one["processes"])}

    with HostileProcess(program, way, target):
        for path in honest:
            mapper.map(path)
            assert served.get("/healthz").status == 200
        during = served.get("/audit").json
        assert [one for one in during["differences"] if one["pid"] == mapper.pid] == []
        assert served.get("/readyz").json["silent_seconds"] < 10
    wait_until(lambda: reported() == {os.fspath(path) for path in honest}, 1, "every honest load, soon after the quiet")
    wait_until(lambda: served.get("/readyz").json["repaired"], 10, "everything lost is made good")
    after = served.get("/audit").json
    assert after["differences"] == []
    with HostileProcess(program, way, target):
        assert served.get("/healthz").status == 200
        served.timeout_s = deadline(5)
        assert served.stop() == 0
