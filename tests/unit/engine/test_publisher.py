"""Publisher: what is taken away by hand stays away, until something asks for it."""

from __future__ import annotations

from typing import Any

import pytest

from sowatch.engine.activation import FileRegistry
from sowatch.engine.address_space import Change, MappedFile
from sowatch.engine.file_inspector import FileFacts
from sowatch.engine.publisher import Publisher, Selection
from sowatch.model.events import Process
from sowatch.model.rules import Rule, RuleSet
from support.records import Proc
from support.tracking import SSL

RULES = RuleSet([Rule("libssl", name="tls")])


class KnowsAll:
    """An inspector that has read every file."""

    def known(self, _: object) -> FileFacts:
        return FileFacts(True)

    def take_finished(self) -> list[object]:
        return []


@pytest.fixture
def publisher() -> Publisher:
    made = Publisher(RULES, FileRegistry(is_alive=lambda process: True), Selection(), proc_root="/proc")
    made.inspector = KnowsAll()  # type: ignore[assignment]
    return made


@pytest.fixture
def story(publisher: Publisher) -> Any:
    """What was published since it was last asked."""
    reader = publisher.subscribers.subscribe(control=False, limit=100, limit_bytes=1 << 20)

    def read() -> list[str]:
        publisher.subscribers.hand_over()
        found = []
        while (event := reader.get(0)) is not None:
            found.append(event.event)
        return found

    return read


def change(cause: str = "mmap", *, is_load: bool = True, pid: int = 10) -> Change:
    return Change(is_load, cause, 1, Process(pid, 5), "library", MappedFile(Proc().map(SSL), RULES), ((0, 4096),))


def detach(publisher: Publisher, pid: int = 10) -> int:
    return publisher.let_go(lambda load: load.process.pid == pid)


def test_what_was_detached_stays_so_when_its_file_is_read_once_more(publisher: Publisher, story: Any) -> None:
    publisher.publish([change(), change(pid=11)])
    assert detach(publisher) == 1
    story()

    publisher.recheck([change("repair"), change("repair", pid=11)], only_held=False)

    assert story() == []
    assert detach(publisher) == 0


@pytest.mark.parametrize("again", ["mapped anew", "asked for"])
def test_it_comes_back_when_it_is_mapped_anew_or_asked_for(publisher: Publisher, story: Any, again: str) -> None:
    publisher.publish([change()])
    detach(publisher)
    story()

    if again == "mapped anew":
        publisher.publish([change(is_load=False), change()])
    else:
        publisher.look_again([change("snapshot")])

    assert story() == ["activate", "load"]
    publisher.recheck([change("repair")], only_held=False)
    assert story() == []
    assert detach(publisher) == 1


def test_a_file_that_could_not_be_read_before_is_published_by_the_second_reading(
    publisher: Publisher, story: Any
) -> None:
    publisher.recheck([change("repair")], only_held=False)

    assert story() == ["activate", "load"]
