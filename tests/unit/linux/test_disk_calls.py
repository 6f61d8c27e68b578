"""Calls that hang, of several who make calls: one place hangs for all of them, and all are counted together."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from sowatch.linux import disk_calls
from sowatch.linux.disk_calls import DiskCalls, HangingCalls
from sowatch.linux.timeout_worker import CallTimeout


def test_where_a_call_of_one_hangs_no_other_is_made_until_it_returns(wait_until: Any) -> None:
    hanging, over = HangingCalls(), threading.Event()
    first, second = DiskCalls("test", hanging), DiskCalls("test", hanging)
    assert first.run(over.wait, "hangs", 0.01, place=("a",)) == "hangs"
    assert second.run(lambda: "made", "not made", place=("a",)) == "not made"
    assert second.run(lambda: "made", "not made", place=("b",)) == "made"
    assert (second.hanging, second.hangs(("a",))) == (1, True)
    over.set()
    wait_until(lambda: not len(hanging))
    assert second.run(lambda: "made", "not made", place=("a",)) == "made"
    first.close()
    second.close()


def test_beyond_so_many_that_hang_for_all_together_each_call_is_refused(
    monkeypatch: pytest.MonkeyPatch, wait_until: Any
) -> None:
    monkeypatch.setattr(disk_calls, "MAX_HANGING", 3)
    hanging, over = HangingCalls(), threading.Event()
    several = [DiskCalls("test", hanging) for _ in range(4)]
    for calls in several[:3]:
        assert calls.run(over.wait, None, 0.01) is None
    call = "made".lower
    with pytest.raises(CallTimeout) as refused:
        several[3].run_in_time(call, ("elsewhere",))
    assert refused.value.is_refused
    over.set()
    wait_until(lambda: not len(hanging))
    assert several[3].run_in_time(call, ("elsewhere",)) == "made"
    for calls in several:
        calls.close()
