"""Who descends from whom, by records and by /proc."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from sowatch.engine.descendants import Descendants
from sowatch.linux.containers import container_id
from sowatch.linux.proc import ProcFs
from sowatch.model.events import Process
from support.records import Proc


def process_of(one: Proc) -> Process:
    return Process(pid=one.pid, start_ns=one.start_ns)


@pytest.fixture
def root() -> Iterator[tuple[Proc, Any]]:
    """A real process with a child, as records have it; and its child's pid."""
    with subprocess.Popen(["sh", "-c", "sleep 1000 & echo $!; wait"], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        stat = ProcFs().stat(parent.pid)
        assert stat
        yield Proc(parent.pid, stat.start_ticks), child
        os.kill(child, 9)
        parent.kill()


@pytest.fixture
def descendants(root: tuple[Proc, int]) -> Descendants:
    made = Descendants({root[0].pid}, ProcFs())
    made.find()
    return made


def test_the_children_that_are_there_belong_and_others_do_not(descendants: Descendants, root: tuple[Proc, int]) -> None:
    child = ProcFs().process(root[1], container_of=container_id)
    assert child is not None
    assert child in descendants
    assert process_of(root[0]) in descendants
    assert Process(pid=os.getpid(), start_ns=0) not in descendants


def test_who_is_forked_by_one_belongs_whoever_adopts_it_and_so_do_its_children(
    descendants: Descendants, root: tuple[Proc, int]
) -> None:
    child, grandchild, other = Proc(2**22 + 1), Proc(2**22 + 2), Proc(2**22 + 3)
    descendants.note([root[0].fork(child), child.exit(), child.fork(grandchild), Proc(1).fork(other)])
    assert process_of(child) in descendants
    assert process_of(grandchild) in descendants
    assert process_of(other) not in descendants


def test_another_process_with_the_pid_of_one_does_not_belong_nor_do_its_children(
    descendants: Descendants, root: tuple[Proc, int]
) -> None:
    first, second, child = Proc(2**22 + 1), Proc(2**22 + 1, start_ticks=9), Proc(2**22 + 2, ppid=2**22 + 1)
    descendants.note([root[0].fork(first), first.exit(), Proc(1).fork(second), child.intro()])
    assert process_of(first) in descendants
    assert process_of(second) not in descendants
    assert process_of(child) not in descendants


def test_one_whose_fork_was_lost_belongs_by_its_parent(descendants: Descendants, root: tuple[Proc, int]) -> None:
    child = Proc(2**22 + 1, ppid=root[0].pid)
    descendants.note([child.intro()])
    assert process_of(child) in descendants
