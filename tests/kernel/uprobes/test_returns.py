"""Returns are seen without harm: by return probes where these cannot kill, else by the return instructions."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sowatch import Watcher
from sowatch.bpf.probe_object import may_return_probe_kill
from sowatch.model.errors import SowatchError
from sowatch.uprobes import Attacher, CallCounter, Calls, Probe
from sowatch.uprobes.places import safe_returns
from support.callers import Caller

Probed = Callable[..., Path]
NewCaller = Callable[..., Caller]


@pytest.fixture(params=["auto", "perf_event"])
def watch_calls(request: pytest.FixtureRequest, closing: Any, wait_until: Any) -> Callable[..., CallCounter]:
    """``watch_calls(library, symbols)`` is a CallCounter that has it attached, by return instructions."""

    def start(library: Path, symbols: list[str], returns: str = "instructions") -> CallCounter:
        counter = closing.enter_context(CallCounter(symbols, links=request.param, returns=returns))
        closing.enter_context(Watcher(counter.rule(re.escape(str(library)))))
        wait_until(lambda: counter.stats.attached > 0 and counter.stats.attached == counter.stats.expected)
        return counter

    return start


def of(counter: CallCounter, symbol: str) -> Calls:
    (found,) = [one for one in counter.calls() if one.site.symbol == symbol]
    return found


def test_by_return_instructions_each_call_of_a_recursion_is_timed(
    probed: Probed, caller: NewCaller, watch_calls: Any
) -> None:
    library = probed()
    process = caller(library)
    counter = watch_calls(library, ["recursive", "nested", "plain"])
    process.call("recursive", 9)
    process.call("nested", times=4)
    assert [(one.calls, one.timed) for one in (of(counter, name) for name in ("recursive", "nested", "plain"))] == [
        (10, 10),
        (4, 4),
        (4, 4),
    ]


def test_by_return_instructions_calls_of_threads_and_those_after_longjmp_are_timed(
    probed: Probed, caller: NewCaller, watch_calls: Any
) -> None:
    library = probed()
    process = caller(library)
    counter = watch_calls(library, ["plain", "jumps"])
    process.call_in_threads("plain", 300, 6)
    process.call("leaves", 50)
    process.call("jumps", 0, times=7)
    assert (of(counter, "plain").timed, of(counter, "jumps").calls, of(counter, "jumps").timed) == (1800, 57, 7)


@pytest.mark.parametrize("returns", ["auto", "instructions"])
def test_a_process_below_a_seccomp_filter_survives_its_probes(
    probed: Probed, caller: NewCaller, watch_calls: Any, returns: str
) -> None:
    library = probed()
    process = caller(library)
    process.call("plain")  # bound, before nothing more may be mapped
    process.enter_sandbox()
    counter = watch_calls(library, ["plain"], returns=returns)
    process.call("plain", times=5)
    found = of(counter, "plain")
    assert (found.calls, found.timed) == (5, 5)
    process.call("plain")


def test_whether_return_probes_can_kill_is_found_out_by_trying_and_decides() -> None:
    answer = may_return_probe_kill()
    assert answer is not None, "no filter is above the tests"
    assert safe_returns() == ("instructions" if answer else "probe")


def test_a_function_that_may_be_left_in_another_way_is_counted_and_the_reason_is_reported(
    probed: Probed, caller: NewCaller, watch_calls: Any
) -> None:
    library = probed()
    process = caller(library)
    counter = watch_calls(library, ["only_return", "jumps_away", "plain"])
    process.call("only_return", times=3)
    process.call("jumps_away", times=2)
    assert [(one.calls, one.timed) for one in (of(counter, "only_return"), of(counter, "jumps_away"))] == [
        (5, 0),  # jumps_away ends in it
        (2, 0),
    ]
    reasons = {one.symbol: one.reason for one in counter.failures}
    assert "its first instruction returns" in reasons["only_return"]
    assert "it is left by a jump to another function at +0x" in reasons["jumps_away"]
    assert "returns='probe' takes it anyway" in reasons["jumps_away"]


def test_returns_of_a_program_in_go_are_refused_unless_by_its_instructions(
    user_object: Path, probed: Probed, caller: NewCaller, active: Any
) -> None:
    library = probed()
    # Its build id becomes the note that Go's linker writes.
    library.write_bytes(library.read_bytes().replace(b"\3\0\0\0GNU\0", b"\4\0\0\0Go\0\0"))
    process = caller(library)
    refused = Attacher(user_object, [Probe("nested", "uretprobe__nested")])
    with refused, pytest.raises(SowatchError, match="nested: a return probe breaks programs written in Go"):
        refused.attach(active(library))
    with Attacher(user_object, [Probe("nested", "uretprobe__nested", is_manual=True)]) as attacher:
        attacher.attach(active(library))
        process.call("nested", 10, times=2)
        assert list(attacher.map("returns").unpacked("=I", "=Q")) == [((12,), (2,))]


def test_a_place_inside_of_an_instruction_is_refused_and_one_between_two_is_probed(
    user_object: Path, probed: Probed, caller: NewCaller, active: Any
) -> None:
    library = probed()
    process = caller(library)
    with Attacher(user_object, {"two_steps+1": "by_section"}) as attacher:
        ring = attacher.ring("events")
        attacher.attach(active(library))
        process.call("two_steps", times=2)
        assert len(list(ring.take())) == 2
    with (
        Attacher(user_object, {"two_steps+2": "by_section"}) as attacher,
        pytest.raises(SowatchError, match=r"no instruction begins at \+0x2; a probe there would break the program"),
    ):
        attacher.attach(active(library))


def test_an_instruction_that_the_kernel_does_not_probe_is_refused_before_it_fails_in_silence(
    user_object: Path, probed: Probed, active: Any
) -> None:
    attacher = Attacher(user_object, {"locked": "by_section"})
    with attacher, pytest.raises(SowatchError, match="the kernel does not probe an instruction with prefix 0xf0"):
        attacher.attach(active(probed()))
