"""What is read from files for the fleet: whatever fails, each question has an answer."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest

from sowatch.agent.fleet_facts import FleetFacts
from sowatch.fleet.lookups import Question
from sowatch.fleet.records import Package
from sowatch.inventory.packages import PackageIdentity
from sowatch.linux.proc import ProcFs
from sowatch.model.events import Library, Process
from sowatch.model.identity import FileId, ProcessId

WEB = Process(2**22 + 1, 1, exe="/usr/bin/web")
IDENTITY = ("library", "", "", "", "", "", "")


def question(number: int, *, is_package: bool) -> Question:
    return Question(WEB, Library(f"/usr/lib/{number}.so", FileId(8, 1, number)), IDENTITY if is_package else None)


class Source:
    """Asks everything at once, and has the answers."""

    def __init__(self, questions: list[Question]) -> None:
        self.questions = questions
        self.packages: dict[str, Package | None] = {}
        self.hashes: list[tuple[str, str | None]] = []

    def take_questions(self, limit: int) -> list[Question]:
        taken, self.questions = self.questions[:limit], self.questions[limit:]
        return taken

    def answer(
        self,
        packages: Sequence[tuple[Question, Package | None]],
        hashes: Sequence[tuple[Library, str | None]],
        ports: Mapping[int, str],
    ) -> None:
        self.packages |= {one.library.path: package for one, package in packages}
        self.hashes += [(library.path, name) for library, name in hashes]

    def shown_processes(self) -> list[ProcessId]:
        return []


class Packages:
    """Fails for files of some numbers."""

    def __init__(self, *failing: int, error: type[BaseException] = ValueError) -> None:
        self.failing = set(failing)
        self.error = error
        self.asked = 0

    def content_name(self, one: Question) -> str | None:
        if one.library.id.inode in self.failing:
            raise self.error("broken")
        return f"htlhash:{one.library.id.inode}"

    def identify(self, wanted: Iterable[Question]) -> list[PackageIdentity | None]:
        self.asked += 1
        if any(one.library.id.inode in self.failing for one in wanted):
            raise self.error("broken")
        return [PackageIdentity(f"p{one.library.id.inode}", "1", None, "", "dpkg") for one in wanted]


def answered(wait_until: Any, source: Source, packages: Packages) -> None:
    facts = FleetFacts(source, packages, ProcFs())  # type: ignore[arg-type]
    count = len(source.questions)
    facts.start()
    facts.wake()
    wait_until(lambda: len(source.packages) + len(source.hashes) == count, 20, "the answers")
    facts.close()


def test_a_file_whose_hash_fails_leaves_the_others_theirs(wait_until: Any) -> None:
    source = Source([question(number, is_package=number > 4) for number in range(1, 7)])
    answered(wait_until, source, Packages(2))
    assert source.hashes == [
        ("/usr/lib/1.so", "htlhash:1"),
        ("/usr/lib/2.so", None),
        ("/usr/lib/3.so", "htlhash:3"),
        ("/usr/lib/4.so", "htlhash:4"),
    ]
    assert [package and package.name for package in source.packages.values()] == ["p5", "p6"]


def test_a_file_whose_package_fails_leaves_the_others_theirs(wait_until: Any) -> None:
    source, packages = Source([question(number, is_package=True) for number in range(300)]), Packages(7)
    answered(wait_until, source, packages)
    assert [path for path, package in source.packages.items() if package is None] == ["/usr/lib/7.so"]
    assert packages.asked < 20


def test_faults_of_everything_are_bounded(wait_until: Any) -> None:
    source, packages = Source([question(number, is_package=True) for number in range(300)]), Packages(*range(300))
    answered(wait_until, source, packages)
    assert set(source.packages.values()) == {None}
    assert packages.asked < 100


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_ends_the_thread_leaves_no_question_open(wait_until: Any) -> None:
    source = Source([question(number, is_package=number > 2) for number in range(1, 5)])
    answered(wait_until, source, Packages(1, error=SystemExit))
    assert source.hashes == [("/usr/lib/1.so", None), ("/usr/lib/2.so", None)]
    assert set(source.packages.values()) == {None}
    assert not [one for one in threading.enumerate() if one.name == "sowatch-fleet-facts"]
