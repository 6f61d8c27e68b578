"""Changes that wait for facts of files: in order for each process, and held up by no other one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sowatch.engine.facts_queue import FACTS_TIMEOUT_S, SPARE, FactsQueue
from sowatch.engine.file_inspector import FileFacts, Inspection

KNOWN = FileFacts(True)
NEVER = float("inf")


def change(pid: int, path: str = "/lib/a.so", ranges: int = 1, *, is_load: bool = True):
    name = SimpleNamespace(path=path, file_id=path)
    return SimpleNamespace(process=SimpleNamespace(pid=pid), name=name, ranges=((0, 1),) * ranges, is_load=is_load)


def asked(at_s: float = 100.0) -> Inspection:
    return Inspection(at_s)


def over(facts: FileFacts = KNOWN) -> Inspection:
    done = Inspection(0.0)
    done.facts = facts
    return done


@pytest.fixture
def told():
    return []


@pytest.fixture
def queue(told):
    def publish(one, facts, is_only_held):
        told.append((one.process.pid, one.name.path[-4], facts, *(["held"] if is_only_held else [])))

    return FactsQueue(publish, limit_bytes=100_000)


def finish(queue, inspection, now_s=100.1, facts=KNOWN):
    inspection.facts = facts
    queue.advance([inspection], now_s)


def test_a_process_waits_for_its_own_file_and_no_other_process_waits_with_it(queue, told):
    slow = asked()
    queue.put(change(1, "/lib/s.so"), slow)
    queue.put(change(1, "/lib/b.so"), over())
    queue.put(change(2, "/lib/b.so"), over())
    assert told == [(2, "b", KNOWN)]
    assert queue.holds_back(change(1))
    assert not queue.holds_back(change(2))
    finish(queue, slow)
    assert told == [(2, "b", KNOWN), (1, "s", KNOWN), (1, "b", KNOWN)]
    assert not queue
    assert queue.waiting_bytes == 0


def test_every_process_that_waits_for_a_file_goes_on_when_it_was_read(queue, told):
    file = asked()
    for pid in (3, 1, 2):
        queue.put(change(pid), file)
    assert told == []
    finish(queue, file)
    assert [one[0] for one in told] == [3, 1, 2]


def test_the_next_change_of_a_process_may_wait_for_another_file(queue, told):
    first, second = asked(), asked()
    queue.put(change(1, "/lib/a.so"), first)
    queue.put(change(1, "/lib/b.so"), second)
    finish(queue, second)
    assert told == []
    finish(queue, first)
    assert [one[1] for one in told] == ["a", "b"]


def test_a_file_that_does_not_answer_is_waited_for_so_long_and_no_longer(queue, told):
    queue.put(change(1, "/lib/a.so"), asked(100.0))
    queue.put(change(1, "/lib/b.so"), asked(100.5))
    queue.advance([], 100.0 + FACTS_TIMEOUT_S - 0.01)
    assert told == []
    queue.advance([], 100.0 + FACTS_TIMEOUT_S + 0.1)
    assert told == [(1, "a", None)]
    queue.advance([], 100.5 + FACTS_TIMEOUT_S + 0.1)
    assert told == [(1, "a", None), (1, "b", None)]


def test_a_process_with_many_files_that_do_not_answer_waits_once_for_all_of_them(queue, told):
    for number in range(10):
        queue.put(change(1, f"/lib/{number}.so"), asked(100.0 + number / 100))
    queue.advance([], 100.1 + FACTS_TIMEOUT_S)
    assert [one[1] for one in told] == [str(number) for number in range(10)]


def test_an_action_comes_after_what_was_put_before_it_and_later_changes_do_not_wait_for_it(queue, told):
    slow = asked()
    queue.put(change(1, "/lib/s.so"), slow)
    queue.after_all(lambda: told.append("first"))
    queue.after_all(lambda: told.append("second"))
    queue.put(change(2, "/lib/b.so"), over())
    assert told == [(2, "b", KNOWN)]
    finish(queue, slow)
    assert told == [(2, "b", KNOWN), (1, "s", KNOWN), "first", "second"]


def test_an_action_does_not_wait_for_what_was_put_after_it(queue, told):
    first, later = asked(), asked()
    queue.put(change(1, "/lib/a.so"), first)
    queue.after_all(lambda: told.append("action"))
    queue.put(change(2, "/lib/b.so"), later)
    finish(queue, first)
    assert told == [(1, "a", KNOWN), "action"]
    assert queue


def test_an_action_is_done_at_once_if_nothing_waits(queue, told):
    queue.after_all(lambda: told.append("action"))
    assert told == ["action"]


def test_an_action_that_holds_lets_nothing_pass_until_it_is_done(queue, told):
    slow = asked()
    queue.put(change(1, "/lib/s.so"), slow)
    queue.after_all(lambda: told.append("ready"), holds=True)
    assert queue.holds_back(change(2))
    queue.put(change(2, "/lib/b.so"), over())
    queue.put(change(1, "/lib/c.so"), over())
    queue.after_all(lambda: told.append("lost"))
    assert told == []
    finish(queue, slow)
    assert [one if isinstance(one, str) else one[:2] for one in told] == [(1, "s"), "ready", (2, "b"), (1, "c"), "lost"]
    assert not queue.holds_back(change(2))


def test_beyond_the_limit_the_process_with_the_most_waits_no_longer(queue, told):
    queue.put(change(1, "/lib/h.so"), asked())
    for _ in range(1000):
        queue.put(change(2, "/lib/f.so"), asked(), is_only_held=True)
        assert queue.waiting_bytes <= 100_000
    assert {one[0] for one in told} == {2}
    assert told[0] == (2, "f", None, "held")
    assert queue.waiting_bytes > 100_000 * (1 - SPARE) - 1_000
    assert queue.holds_back(change(1))
    queue.advance([], NEVER)
    assert [one[0] for one in told].count(1) == 1
    assert len(told) == 1001
    assert queue.waiting_bytes == 0


def test_another_inspection_takes_the_place_of_the_one_that_was_asked_for(queue, told):
    old, new = asked(), asked(101.0)
    queue.put(change(1, "/lib/a.so"), old)
    queue.put(change(2, "/lib/b.so"), old)
    queue.ask_again(lambda one: new if one.process.pid == 1 else over(FileFacts(False)))
    assert told == [(2, "b", FileFacts(False))]
    finish(queue, old)
    assert len(told) == 1
    finish(queue, new)
    assert told[1:] == [(1, "a", KNOWN)]


def test_asking_again_does_not_make_anybody_wait_longer(queue, told):
    queue.put(change(1, "/lib/a.so"), asked(100.0))
    queue.ask_again(lambda _: asked(101.9))
    queue.advance([], 100.1 + FACTS_TIMEOUT_S)
    assert told == [(1, "a", None)]


def test_an_unload_does_not_overtake_the_load_of_its_file_by_another_process(queue, told):
    """A server's parent exits while the load of its child still waits: the file must not seem to have no user."""
    slow = asked()
    queue.put(change(2), slow)
    unload = change(1, is_load=False)
    assert queue.holds_back(unload)
    assert not queue.holds_back(change(1, "/lib/b.so", is_load=False))
    queue.put(unload, over())
    queue.put(change(1, "/lib/b.so"), over())
    assert told == []
    finish(queue, slow)
    assert [one[:2] for one in told] == [(2, "a"), (1, "a"), (1, "b")]
    assert not queue
    assert queue.waiting_bytes == 0


def test_an_unload_waits_for_a_load_that_waits_behind_another_file(queue, told):
    first, second = asked(), asked()
    queue.put(change(2, "/lib/s.so"), first)
    queue.put(change(2), second)
    queue.put(change(1, is_load=False), over())
    finish(queue, second)
    assert told == []
    queue.advance([], 100.0 + FACTS_TIMEOUT_S)
    assert [one[:2] for one in told] == [(2, "s"), (2, "a"), (1, "a")]
    assert not queue


def test_what_comes_after_a_load_goes_on_when_the_queue_is_too_full_or_asks_again(queue, told):
    slow = asked()
    queue.put(change(2, ranges=250), slow)
    queue.put(change(1, is_load=False), over())
    queue.ask_again(lambda one: over() if not one.is_load else slow)
    assert told == []
    for number in range(3):
        queue.put(change(3 + number, "/lib/s.so", ranges=250), slow)
    assert (2, "a", None) in told
    queue.advance([], NEVER)
    assert [one[:2] for one in told].index((2, "a")) < [one[:2] for one in told].index((1, "a"))
    assert not queue


def test_a_change_waits_for_the_names_of_its_process_and_then_for_its_file(queue, told):
    names, file = asked(), asked()
    queue.put(change(1, "/lib/s.so"), file, lookup=names)
    queue.put(change(2, "/lib/b.so"), over())
    assert told == [(2, "b", KNOWN)]
    finish(queue, file)
    assert told == [(2, "b", KNOWN)]
    finish(queue, names)
    assert told == [(2, "b", KNOWN), (1, "s", KNOWN)]
    assert not queue


def test_names_that_come_first_leave_the_wait_for_the_file(queue, told):
    names, file = asked(), asked()
    queue.put(change(1, "/lib/s.so"), file, lookup=names)
    finish(queue, names)
    assert told == []
    finish(queue, file)
    assert told == [(1, "s", KNOWN)]


def test_names_are_waited_for_as_long_as_facts_are(queue, told):
    queue.put(change(1, "/lib/s.so"), over(), lookup=asked(100.0))
    queue.advance([], 100.0 + FACTS_TIMEOUT_S - 0.5)
    assert told == []
    queue.advance([], 100.0 + FACTS_TIMEOUT_S)
    assert told == [(1, "s", KNOWN)]


def test_when_too_much_waits_for_names_it_waits_no_longer(queue, told):
    names = asked()
    for number in range(600):
        queue.put(change(1, f"/lib/{number}.so"), over(), lookup=names)
    assert told
    assert queue.waiting_bytes <= 100_000
    finish(queue, names)
    assert len(told) == 600
    assert not queue
