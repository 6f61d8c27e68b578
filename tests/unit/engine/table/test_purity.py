"""The table is a function of its inputs: equal records have equal effects, however they are handed over."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sowatch.bpf.records import FLAG_ASK, FLAG_COMPAT, FLAG_IMAGE, FLAG_NEEDS_RESCAN, FLAG_SHARED_VM, FLAG_THROTTLED
from sowatch.engine.effects import Effects
from sowatch.engine.table import MappingTable
from sowatch.model.rules import Rule, RuleSet
from support.records import PAGE, Proc
from support.tracking import BASE, CRYPTO, LIBC, SSL, story

FLAGS = (0, 0, 0, FLAG_ASK, FLAG_IMAGE, FLAG_NEEDS_RESCAN, FLAG_SHARED_VM, FLAG_THROTTLED, FLAG_COMPAT)
KINDS = ("map", "range", "needs_rescan", "exit", "exec", "intro", "fork")

steps = st.lists(
    st.tuples(
        st.sampled_from(KINDS),
        st.integers(10, 13),
        st.integers(10, 13),
        st.integers(0, 4),
        st.integers(1, 3),
        st.sampled_from(FLAGS),
    ),
    max_size=40,
)


def records_of(script):
    """The records that four processes send by a script: what, who, which child, where, how much, flags."""
    processes = {pid: Proc(pid) for pid in range(10, 14)}
    for t, (kind, pid, child, page, pages, flags) in enumerate(script):
        process, start = processes[pid], BASE + page * PAGE
        if kind == "map":
            yield process.map((SSL, CRYPTO, LIBC)[pages - 1], start, start + pages * PAGE, t=t, flags=flags)
        elif kind == "range":
            yield process.range(start, start + pages * PAGE, t=t, flags=flags)
        elif kind == "fork":
            if child != pid:
                yield process.fork(processes[child], t=t, flags=flags)
        else:
            record = getattr(process, kind)(t=t)
            yield record._replace(flags=record.flags | flags)


def new_table():
    return MappingTable(RuleSet([Rule(r"libssl|libcrypto")]))


@given(script=steps)
def test_equal_records_have_equal_effects_and_are_left_as_they_are(script):
    records = list(records_of(script))
    before = repr(records)
    one, other = new_table(), new_table()
    for record in records:
        assert story(one.apply(record)) == story(other.apply(record))
    assert repr(records) == before
    assert one.needs_rescan == other.needs_rescan
    assert one.compat == other.compat


@given(script=steps, cut=st.integers(0, 40))
def test_the_changes_are_the_same_in_one_batch_and_in_several(script, cut):
    records = list(records_of(script))
    at_once, together = new_table(), Effects()
    several = new_table()
    together += several.apply(*records[:cut])
    together += several.apply(*records[cut:])
    effects = at_once.apply(*records)
    assert story(effects)[:2] == story(together)[:2]
    assert story(effects)[4] == story(together)[4]
    assert at_once.needs_rescan == several.needs_rescan


@given(script=steps, cut=st.integers(0, 40))
def test_what_an_input_returned_is_not_changed_by_later_ones(script, cut):
    records = list(records_of(script))
    table = new_table()
    first = table.apply(*records[:cut])
    before = story(first)
    table.apply(*records[cut:])
    assert story(first) == before
