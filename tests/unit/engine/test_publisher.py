"""Publisher: which changes become events, under which rule, and what becomes of them when rules or files change."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from sowatch.engine.activation import FileRegistry
from sowatch.engine.address_space import Change, MappedFile
from sowatch.engine.facts_queue import FACTS_TIMEOUT_S
from sowatch.engine.file_inspector import FileFacts, Inspection
from sowatch.engine.publisher import Publisher, Selection
from sowatch.engine.rule_change import RuleChange
from sowatch.model.events import Activate, Deactivate, Event, LibraryEvent, Load, Pod, Process, Stopped, Unload
from sowatch.model.rules import Rule, RuleSet
from support.records import File, Proc
from support.tracking import CRYPTO, LIBC, SSL

RULES = RuleSet([Rule("libssl", name="tls")])


class KnowsAll:
    """An inspector that has read every file."""

    def known(self, _: object) -> FileFacts:
        return FileFacts(True)

    def take_finished(self) -> list[object]:
        return []

    def relieve(self, now_s: float) -> None:
        """Nothing is read."""


@pytest.fixture
def publisher() -> Publisher:
    made = Publisher(RULES, FileRegistry(is_alive=lambda process: True), Selection(), proc_root="/proc")
    made.in_force = RuleChange(RULES, KnowsAll())  # type: ignore[arg-type]
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
    return publisher.let_go(pid, "tls")


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
        publisher.rescan_for([change("snapshot")])

    assert story() == ["activate", "load"]
    publisher.recheck([change("repair")], only_held=False)
    assert story() == []
    assert detach(publisher) == 1


def test_a_file_that_could_not_be_read_before_is_published_by_the_second_reading(
    publisher: Publisher, story: Any
) -> None:
    publisher.recheck([change("repair")], only_held=False)

    assert story() == ["activate", "load"]


# ---- what becomes an event ----------------------------------------------------------------------


class Reads:
    """An inspector that knows what a test has let it read, by path; of anything else it says so when asked to."""

    def __init__(self, **facts: FileFacts) -> None:
        self.facts = {f"/usr/lib/{name}": one for name, one in facts.items()}
        self.asked: list[str] = []
        self._under_way: dict[str, Inspection] = {}
        self._finished: list[Inspection] = []

    def known(self, name: MappedFile) -> FileFacts | None:
        return self.facts.get(name.path)

    def inspect(self, change: Change, *, is_own_view: bool, now_s: float) -> Inspection:
        del is_own_view
        self.asked.append(change.name.path)
        return self._under_way.setdefault(change.name.path, Inspection(now_s))

    def finish(self, file: File, facts: FileFacts) -> None:
        one = self._under_way.pop(file.path)
        one.facts = facts
        self._finished.append(one)

    def relieve(self, now_s: float) -> None:
        del now_s

    def take_finished(self) -> list[Inspection]:
        taken, self._finished = self._finished, []
        return taken


class Published:
    """A publisher with rules of its own, and all that it emits."""

    def __init__(self, *rules: Rule, reads: Any = None, selection: Selection = Selection()) -> None:  # noqa: B008 - frozen
        self.rules = RuleSet(rules or [Rule("libssl", name="tls")])
        registry = FileRegistry(is_alive=lambda _: True)
        self.publisher = Publisher(self.rules, registry, selection, proc_root="/proc")
        self.reads = reads or KnowsAll()
        self.publisher.in_force = RuleChange(self.rules, self.reads)
        self._reader = self.publisher.subscribers.subscribe(control=True, limit=1000, limit_bytes=1 << 20)

    def change_rules(self, *rules: Rule, reads: Any = None) -> list[str]:
        self.publisher.change_rules(RuleChange(RuleSet(rules), reads or self.reads))
        return self.story()

    def change(
        self,
        file: File = SSL,
        *,
        cause: str = "mmap",
        is_load: bool = True,
        pid: int = 10,
        container: str | None = None,
    ) -> Change:
        process = Process(pid, 5, container=container)
        name = MappedFile(Proc().map(file), self.rules)
        return Change(is_load, cause, 1, process, "library", name, ((0, 4096),))  # type: ignore[arg-type]

    def load(self, file: File = SSL, **options: Any) -> list[str]:
        self.publisher.publish([self.change(file, **options)])
        return self.story()

    def unload(self, file: File = SSL, **options: Any) -> list[str]:
        return self.load(file, cause="munmap", is_load=False, **options)

    def events(self) -> list[Event]:
        self.publisher.subscribers.hand_over()
        found: list[Event] = []
        while (event := self._reader.get(0)) is not None:
            found.append(event)
        return found

    def story(self) -> list[str]:
        """``load 10 tls libssl mmap``: kind, pid, rule, file and cause of each event since the last call."""
        return [self._short(event) for event in self.events()]

    @staticmethod
    def _short(event: Event) -> str:
        if not isinstance(event, LibraryEvent):
            return event.event
        name = event.library.path.rsplit("/", 1)[-1].split(".")[0]
        if isinstance(event, Load | Unload):
            return f"{event.event} {event.process.pid} {event.rule} {name} {event.cause}"
        return f"{event.event} {event.rule} {name}" + (f" {event.cause}" if event.cause else "")


def test_a_file_is_activated_by_its_first_process_and_deactivated_by_its_last() -> None:
    made = Published()
    assert made.load() == ["activate tls libssl", "load 10 tls libssl mmap"]
    assert made.load(pid=11) == ["load 11 tls libssl mmap"]
    assert made.unload() == ["unload 10 tls libssl munmap"]
    assert made.unload(pid=11) == ["unload 11 tls libssl munmap", "deactivate tls libssl"]
    assert (made.publisher.loads, made.publisher.unloads) == (2, 2)


def test_an_unload_of_what_was_not_reported_is_none() -> None:
    made = Published()
    assert made.unload() == []
    assert (made.load(LIBC), made.unload(LIBC), made.publisher.unloads) == ([], [], 0)


@pytest.mark.parametrize(
    ("selection", "selected"),
    [
        (Selection(), {10, 11, 12}),
        (Selection(pids=frozenset({10, 12})), {10, 12}),
        (Selection(pids=frozenset({10, 12}), excluded_pids=frozenset({12})), {10}),
        (Selection(container="abc"), {11}),
        (Selection(container="abcdef0"), set()),
    ],
)
def test_only_processes_that_are_selected_are_reported(selection: Selection, selected: set[int]) -> None:
    made = Published(selection=selection)
    changes = [made.change(pid=10), made.change(pid=11, container="abcdef"), made.change(pid=12, container="zabc")]
    made.publisher.publish(changes)
    assert {one.process.pid for one in made.events() if isinstance(one, Load)} == selected
    made.publisher.rescan_for(changes)
    assert made.story() == []


def test_what_is_no_regular_file_is_not_read() -> None:
    made = Published(reads=Reads())
    made.load(SSL.but(mode=0o020666))
    assert made.reads.asked == []


def test_facts_that_are_partial_are_counted() -> None:
    made = Published(reads=Reads(**{"libssl.so.3": FileFacts(True, is_partial=True), "libc.so.6": FileFacts(True)}))
    made.load()
    made.load(LIBC)
    assert made.publisher.partial == 1


# ---- what waits for facts of files --------------------------------------------------------------


def test_a_file_that_is_read_holds_back_its_own_process_and_no_other() -> None:
    made = Published(
        Rule("lib(ssl|crypto)", name="tls"),
        reads=Reads(**{"libcrypto.so.3": FileFacts(True)}),
    )
    assert made.load(SSL) == []
    assert made.load(CRYPTO) == []
    assert made.publisher.is_waiting
    assert made.load(CRYPTO, pid=11) == ["activate tls libcrypto", "load 11 tls libcrypto mmap"]

    made.reads.finish(SSL, FileFacts(True, build_id="aa"))
    made.publisher.flush(0.0)

    (_, first, second) = made.events()
    assert isinstance(first, Load)
    assert isinstance(second, Load)
    assert (first.library.path, first.library.build_id, second.library.path) == (SSL.path, "aa", CRYPTO.path)
    assert (made.publisher.is_waiting, made.publisher.waiting_bytes) == (False, 0)


def test_a_file_that_does_not_answer_in_time_is_reported_without_its_facts() -> None:
    made = Published(reads=Reads())
    made.publisher.publish([made.change()])
    (inspection,) = made.reads._under_way.values()
    made.publisher.flush(inspection.asked_s + FACTS_TIMEOUT_S - 0.2)
    assert made.story() == []
    made.publisher.flush(inspection.asked_s + FACTS_TIMEOUT_S)
    (_, load) = made.events()
    assert isinstance(load, Load)
    assert (load.library.build_id, load.library.host_path) == (None, None)


def test_at_the_end_nothing_waits_any_more() -> None:
    made = Published(reads=Reads())
    made.load()
    made.publisher.flush_all()
    assert made.story() == ["activate tls libssl", "load 10 tls libssl mmap"]


@pytest.mark.parametrize(
    ("holds", "expected"), [(True, ["load 10", "stopped", "load 11"]), (False, ["load 11", "load 10", "stopped"])]
)
def test_what_is_announced_comes_after_what_was_taken_and_before_what_follows_if_it_holds(
    holds: bool, expected: list[str]
) -> None:
    made = Published(Rule("lib", name="all"), reads=Reads(**{"libc.so.6": FileFacts(True)}))
    made.publisher.publish([made.change(SSL)])
    made.publisher.announce(lambda: Stopped(1, 0, 0, 0), holds=holds)
    made.publisher.publish([made.change(LIBC, pid=11)])
    made.reads.finish(SSL, FileFacts(True))
    made.publisher.flush(0.0)
    kept = [one for one in made.events() if not isinstance(one, Activate)]
    order = [one.event if isinstance(one, Stopped) else f"load {one.process.pid}" for one in kept]  # type: ignore[union-attr]
    assert order == expected


# ---- rules --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "is_reported", "unresolved"),
    [
        (FileFacts(True, exports=frozenset({"SSL_read", "SSL_write", "more"})), True, 0),
        (FileFacts(True, exports=frozenset({"SSL_read"})), False, 0),
        (FileFacts(False), False, 0),
        (FileFacts(None), False, 1),
    ],
    ids=["all of them", "one of two", "no ELF file", "cannot be read"],
)
def test_exports_are_checked_and_what_cannot_be_read_is_counted(
    facts: FileFacts, is_reported: bool, unresolved: int
) -> None:
    made = Published(Rule(name="tls", exports=("SSL_read", "SSL_write")), reads=Reads(**{"libssl.so.3": facts}))
    assert bool(made.load()) == is_reported
    assert made.publisher.unresolved == unresolved


def test_what_a_rule_on_exports_cannot_judge_is_that_of_a_last_rule_for_everything() -> None:
    everything = Rule(name="rest", kind=("library", "executable", "interpreter"))
    tls = Rule(name="tls", exports=("SSL_read", "SSL_write"))
    made = Published(tls, everything, reads=Reads(**{"libssl.so.3": FileFacts(None)}))
    assert made.load() == ["activate rest libssl", "load 10 rest libssl mmap"]
    # A rule for libraries only is as before.
    assert not Published(tls, Rule(name="rest"), reads=Reads(**{"libssl.so.3": FileFacts(None)})).load()


def test_what_a_rule_had_that_goes_is_unloaded_before_anything_is_published_by_the_new_rules() -> None:
    stays = Rule("libc", name="libc")
    made = Published(Rule("libssl", name="tls"), stays)
    made.load()
    made.load(LIBC)
    unloads = made.change_rules(stays, Rule("lib", name="every"))
    assert unloads == ["unload 10 tls libssl rules", "deactivate tls libssl"]

    made.publisher.rescan_for([made.change(cause="snapshot"), made.change(LIBC, cause="snapshot")])
    assert made.story() == ["activate every libssl", "load 10 every libssl snapshot"]


def test_a_rule_that_calls_others_now_loads_its_files_anew_and_one_that_calls_the_same_goes_on() -> None:
    def first(_: object) -> None: ...

    def second(_: object) -> None: ...

    made = Published(Rule("libssl", name="tls", on_load=first))
    made.load()
    assert made.change_rules(Rule("libs+l", name="tls", on_load=first)) == []
    unloads = made.change_rules(Rule("libs+l", name="tls", on_load=second))
    assert unloads == ["unload 10 tls libssl rules", "deactivate tls libssl"]


def test_what_waits_for_facts_is_read_for_the_new_rules_and_published_by_them() -> None:
    made = Published(reads=Reads())
    made.load()
    other = Reads()
    made.change_rules(Rule("libssl", name="new"), reads=other)
    assert (other.asked, made.publisher.in_force.inspector) == ([SSL.path], other)
    other.finish(SSL, FileFacts(True))
    made.publisher.flush(0.0)
    assert made.story() == ["activate new libssl", "load 10 new libssl mmap"]


def test_what_another_rule_wants_by_now_is_unloaded_under_the_old_name_and_loaded_under_the_new() -> None:
    made = Published(Rule("libssl", name="tls"), Rule("lib", name="every"))
    made.load()
    # The first rule that matches names the event: the order has changed.
    assert made.change_rules(Rule("lib", name="every"), Rule("libssl", name="tls")) == []
    made.publisher.rescan_for([made.change(cause="snapshot")])
    assert made.story() == [
        "unload 10 tls libssl rules",
        "deactivate tls libssl",
        "activate every libssl",
        "load 10 every libssl snapshot",
    ]


# ---- files that are read once more --------------------------------------------------------------


def again(made: Published, facts: FileFacts, *, only_held: bool = False) -> list[str]:
    """What comes of reading libssl once more."""
    made.reads.facts[SSL.path] = facts
    made.publisher.recheck([made.change(cause="snapshot")], only_held=only_held)
    return made.story()


@pytest.fixture
def held() -> Published:
    """A publisher that has reported libssl with a build id."""
    made = Published(reads=Reads(**{"libssl.so.3": FileFacts(True, build_id="aa")}))
    assert made.load() == ["activate tls libssl", "load 10 tls libssl mmap"]
    return made


@pytest.mark.parametrize("facts", [FileFacts(True, build_id="aa"), FileFacts()], ids=["the same", "cannot be read"])
def test_a_file_that_says_nothing_new_is_not_reported_again(held: Published, facts: FileFacts) -> None:
    assert again(held, facts) == []


def test_a_file_with_another_build_id_is_unloaded_and_loaded_as_a_repair(held: Published) -> None:
    assert again(held, FileFacts(True, build_id="bb")) == [
        "unload 10 tls libssl repair",
        "deactivate tls libssl",
        "activate tls libssl",
        "load 10 tls libssl repair",
    ]


@pytest.mark.parametrize("build_id", ["aa", None])
def test_a_file_that_turns_out_to_be_no_library_is_unloaded(build_id: str | None) -> None:
    made = Published(reads=Reads(**{"libssl.so.3": FileFacts(True, build_id=build_id)}))
    made.load()
    assert again(made, FileFacts(False)) == ["unload 10 tls libssl repair", "deactivate tls libssl"]


def test_a_file_that_was_detached_and_asked_for_is_checked_like_any_other(held: Published) -> None:
    held.publisher.let_go(10, "tls")
    assert again(held, FileFacts(True, build_id="bb")) == ["unload 10 tls libssl rules", "deactivate tls libssl"]
    held.publisher.rescan_for([held.change(cause="snapshot")])
    assert held.story() == ["activate tls libssl", "load 10 tls libssl snapshot"]
    assert again(held, FileFacts(True, build_id="cc"))[0] == "unload 10 tls libssl repair"


def test_a_build_id_that_was_read_late_is_in_the_map_without_an_event() -> None:
    made = Published(reads=Reads(**{"libssl.so.3": FileFacts()}))
    made.load()
    assert again(made, FileFacts(True, build_id="aa", soname="libssl.so.3")) == []
    (load,) = made.publisher.published.where(lambda _: True)
    assert (load.library.build_id, load.library.soname, load.cause) == ("aa", "libssl.so.3", "mmap")


@pytest.mark.parametrize("only_held", [True, False])
def test_of_what_was_not_reported_nothing_is_said_where_only_that_is_checked(only_held: bool) -> None:
    made = Published(reads=Reads())
    expected = [] if only_held else ["activate tls libssl", "load 10 tls libssl snapshot"]
    assert again(made, FileFacts(True), only_held=only_held) == expected


# ---- the end ------------------------------------------------------------------------------------


def test_the_end_deactivates_each_file_of_each_rule_once_and_unloads_nothing() -> None:
    made = Published(Rule("libssl", name="tls"), Rule("libc", name="libc"))
    for file, pid in ((SSL, 10), (SSL, 11), (LIBC, 10)):
        made.load(file, pid=pid)
    made.publisher.stop(7)
    found = made.events()
    assert [one.time_ns for one in found] == [7, 7]
    assert all(isinstance(one, Deactivate) for one in found)
    assert sorted(map(made._short, found)) == ["deactivate libc libc stop", "deactivate tls libssl stop"]


class Names:
    """Names that come when they are let."""

    def __init__(self) -> None:
        self.lookup: Inspection | None = Inspection(100.0)
        self.pod: Pod | None = None

    def look_up(self, process: Process) -> Inspection | None:
        return self.lookup

    def named(self, process: Process) -> Process:
        return process if self.pod is None else replace(process, pod=self.pod)

    def take_finished(self) -> list[Inspection]:
        done, self.lookup = self.lookup, None
        return [] if done is None else [done]


def test_a_load_waits_for_the_names_of_its_pod_and_its_unload_has_them_too() -> None:
    names = Names()
    publisher = Publisher(
        RULES, FileRegistry(is_alive=lambda process: True), Selection(), proc_root="/proc", process_names=names
    )
    publisher.in_force = RuleChange(RULES, KnowsAll())  # type: ignore[arg-type]
    reader = publisher.subscribers.subscribe(control=False, limit=100, limit_bytes=1 << 20)
    load, unload = (
        one._replace(process=replace(one.process, pod=Pod("0f0e"))) for one in (change(), change(is_load=False))
    )
    publisher.publish([load])
    assert reader.get(0) is None
    names.pod = Pod("0f0e", "web-0", "shop", "nginx")
    assert names.lookup is not None
    names.lookup.facts = FileFacts()
    publisher.flush(100.0)
    # The runtime has forgotten the pod meanwhile.
    known, names.pod = names.pod, None
    publisher.publish([unload])
    found = [(event.event, event.process and event.process.pod) for event in iter(lambda: reader.get(0), None)]
    assert found == [("activate", known), ("load", known), ("unload", known), ("deactivate", None)]
