"""`Watcher` on real processes: its callbacks, the files they get, and what is chosen."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sowatch import EnvironmentFault, Rule
from sowatch.explain import ProcessReport
from sowatch.model.config import Config
from sowatch.model.errors import SowatchError, UsageError
from sowatch.model.events import LibraryEvent
from sowatch.watcher.watcher import ActiveFile
from support.elf_files import Made, Sym
from support.kernel import IN_OWN_MOUNTS, TAG, Calls, Ledger, different, digest, with_prelude
from support.programs import Mapper

Start = Callable[..., Mapper]
NewLibrary = Callable[..., Path]
OpenLedger = Callable[..., Ledger]

#: The library that ``library()`` makes in this run of the tests; another run has other names.
NEW = rf"/libnew{TAG}\.so$"


# ---- callbacks ----------------------------------------------------------------------------------


def test_callbacks_come_in_order_and_activation_brackets_the_loads_of_all_processes(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, wait_until: Any
) -> None:
    calls, new = Calls(), library()
    ledger = open_ledger(calls.rule(NEW))
    first, second = start(), start()
    for mapper in (first, second):
        mapper.map(new)
        ledger.wait_load(mapper.pid, new.stat().st_ino)
    first.exit()
    at, length = second.map(new)
    second.exit()
    assert length
    assert at
    wait_until(lambda: calls.made[-1:] == [("deactivate", f"libnew{TAG}.so")])
    assert [name for name, _ in calls.made] == ["activate", "load", "load", "unload", "unload", "deactivate"]


def test_the_active_file_is_open_while_it_is_activated_and_reads_the_very_file(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, wait_until: Any
) -> None:
    calls, new = Calls(), different(library())
    open_ledger(calls.rule(NEW))
    start().map(new)
    wait_until(lambda: ("load", f"libnew{TAG}.so") in calls.made)
    (file,) = calls.files
    assert calls.contents == [digest(new)]
    assert file.library.host_path == str(new)
    assert not file.is_open
    with pytest.raises(SowatchError, match="dup"):
        file.fileno()


def test_the_active_file_is_the_mapped_one_although_another_has_its_name_by_now(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, wait_until: Any
) -> None:
    calls, new = Calls(), different(library())
    expected = digest(new)
    start().map(new)
    new.unlink()
    different(library())
    open_ledger(calls.rule(NEW))
    wait_until(lambda: calls.contents)
    assert calls.contents == [expected]
    assert calls.files[0].library.deleted


def test_the_active_file_of_a_process_with_other_mounts_is_the_one_that_it_sees(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, scratch: Path, programs: Any, wait_until: Any
) -> None:
    here, there = different(library(f"at/libnew{TAG}.so")), different(library(f"other/libnew{TAG}.so"))
    commands = f"mount --bind {there.parent} {here.parent}"
    mapper = start(with_prelude(scratch, programs["mapper"], commands, launcher=IN_OWN_MOUNTS))
    calls = Calls()
    ledger = open_ledger(calls.rule(NEW))
    mapper.map(here)
    wait_until(lambda: calls.contents)
    assert calls.contents == [digest(there)]
    library_record = ledger.wait_load(mapper.pid, there.stat().st_ino).library
    assert library_record.path == str(here)
    assert library_record.host_path is not None
    assert digest(library_record.host_path) == digest(there)


def test_the_active_file_is_not_another_one_that_was_mapped_in_the_same_place_meanwhile(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, wait_until: Any, deadline: Any
) -> None:
    opened: dict[str, str] = {}
    entered, release = threading.Event(), threading.Event()

    def activate(file: ActiveFile) -> None:
        opened[Path(file.library.path).name] = hashlib.sha256(os.pread(file.fileno(), 1 << 20, 0)).hexdigest()
        if file.library.path.endswith(f"liba{TAG}.so"):
            entered.set()
            release.wait(deadline(30))

    first, second, fake = library(f"liba{TAG}.so"), library(f"libb{TAG}.so"), different(library(f"libfake{TAG}.so"))
    done: list[str] = []
    rule = Rule(
        rf"/lib[ab]{TAG}\.so$",
        name="rule",
        on_activate=activate,
        on_load=lambda event: done.append(Path(event.library.path).name),
    )
    ledger = open_ledger(rule)
    try:
        start().map(first)
        assert entered.wait(deadline(10))
        mapper = start()
        at, length = mapper.map(second)
        ledger.wait_load(mapper.pid, second.stat().st_ino)
        # By now the file was met, but its activation waits; what it will find in that place is another.
        expected = digest(second)
        mapper.map(fake, "at", f"{at:x}", "len", length)
        ledger.wait_unload(mapper.pid, second.stat().st_ino)
    finally:
        release.set()
    wait_until(lambda: second.name in done)
    assert opened.get(second.name, expected) == expected


def test_a_slow_callback_delays_only_its_own_rule(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, wait_until: Any, deadline: Any
) -> None:
    calls, release, entered = Calls(), threading.Event(), threading.Event()

    def wait_long(event: LibraryEvent) -> None:
        entered.set()
        release.wait(deadline(30))

    slow = Rule(rf"/libslow{TAG}\.so$", name="slow", on_load=wait_long)
    ledger = open_ledger(slow, calls.rule(rf"/libquick\d+{TAG}\.so$", "quick"))
    try:
        start().map(library(f"libslow{TAG}.so"))
        assert entered.wait(deadline(10))
        for number in range(20):
            mapper, new = start(), library(f"libquick{number}{TAG}.so")
            mapper.map(new)
            ledger.wait_load(mapper.pid, new.stat().st_ino)
        wait_until(lambda: len([call for call in calls.made if call[0] == "load"]) == 20)
    finally:
        release.set()


def test_a_file_whose_activation_raised_is_blocked_and_not_activated_again(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, wait_until: Any
) -> None:
    tried: list[str] = []

    def fail(file: ActiveFile) -> None:
        tried.append(file.library.path)
        raise ValueError("no such symbol")

    new, loads = library(), []
    rule = Rule(NEW, name="rule", on_activate=fail, on_load=loads.append)
    ledger = open_ledger(rule)
    for number in range(3):
        mapper = start()
        mapper.map(new)
        wait_until(lambda number=number: len(loads) == number + 1)
        mapper.exit()
        ledger.wait_unload(mapper.pid, new.stat().st_ino)
    assert tried == [str(new)]
    (blocked,) = ledger.watcher.registry.blocked()
    assert "no such symbol" in blocked.reason
    assert blocked.id == ledger.of(mapper.pid)[0].library.id


def test_an_environment_fault_does_not_block_the_file(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, wait_until: Any
) -> None:
    tried: list[str] = []

    def fail_once(file: ActiveFile) -> None:
        tried.append(file.library.path)
        if len(tried) == 1:
            raise EnvironmentFault("no memory for probes today")

    new = library()
    ledger = open_ledger(Rule(NEW, name="rule", on_activate=fail_once))
    for number in range(2):
        mapper = start()
        mapper.map(new)
        wait_until(lambda number=number: len(tried) == number + 1)
        mapper.exit()
        ledger.wait_unload(mapper.pid, new.stat().st_ino)
    assert ledger.watcher.registry.blocked() == ()


def test_a_file_that_nobody_can_open_any_more_is_not_blocked(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, wait_until: Any, deadline: Any
) -> None:
    activated: list[str] = []
    entered, release = threading.Event(), threading.Event()

    def activate(file: ActiveFile) -> None:
        activated.append(Path(file.library.path).name)
        if file.library.path.endswith(f"liba{TAG}.so"):
            entered.set()
            release.wait(deadline(30))

    first, second = library(f"liba{TAG}.so"), library(f"libb{TAG}.so")
    ledger = open_ledger(Rule(rf"/lib[ab]{TAG}\.so$", name="rule", on_activate=activate))
    try:
        start().map(first)
        assert entered.wait(deadline(10))
        gone = start()
        gone.map(second)
        ledger.wait_load(gone.pid, second.stat().st_ino)
        number = second.stat().st_ino
        second.unlink()
        gone.exit()
        ledger.wait_unload(gone.pid, number)
    finally:
        release.set()
    wait_until(lambda: ledger.watcher.registry.stats.environment_faults == 1)
    assert activated == [f"liba{TAG}.so"]
    assert ledger.watcher.registry.blocked() == ()


def test_a_callback_that_raises_is_counted_and_the_next_is_called_all_the_same(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, wait_until: Any
) -> None:
    seen: list[str] = []

    def fail(event: LibraryEvent) -> None:
        seen.append(Path(event.library.path).name)
        raise KeyError("mine")

    ledger = open_ledger(Rule(rf"/libnew\d{TAG}\.so$", name="rule", on_load=fail))
    mapper = start()
    for number in range(3):
        mapper.map(library(f"libnew{number}{TAG}.so"))
    wait_until(lambda: len(seen) == 3)
    assert seen == [f"libnew{number}{TAG}.so" for number in range(3)]
    wait_until(lambda: ledger.watcher.stats.callback_errors == 3)


# ---- what is chosen -----------------------------------------------------------------------------


def test_the_first_rule_that_matches_has_the_file(open_ledger: OpenLedger, start: Start, library: NewLibrary) -> None:
    ledger = open_ledger(Rule(NEW, name="first"), Rule(r"/lib[^/]*$", name="second"))
    mapper, new, other = start(), library(), library("libother.so")
    mapper.map(new)
    mapper.map(other)
    assert ledger.wait_load(mapper.pid, new.stat().st_ino).rule == "first"
    assert ledger.wait_load(mapper.pid, other.stat().st_ino).rule == "second"


def test_a_rule_on_exports_wants_the_files_that_export_all_of_them(
    open_ledger: OpenLedger, start: Start, make_library: Callable[..., Path]
) -> None:
    both = make_library("libboth.so", exports=(f"read{os.getpid()}", "tls_write"))
    one = make_library("libone.so", exports=(f"read{os.getpid()}",))
    ledger = open_ledger(Rule(exports=(f"read{os.getpid()}", "tls_write"), name="tls"))
    mapper = start()
    mapper.map(one)
    mapper.map(both)
    ledger.wait_load(mapper.pid, both.stat().st_ino)
    assert ledger.story(mapper.pid, one.stat().st_ino) == []


def test_a_rule_on_exports_finds_a_name_in_a_symbol_table_of_any_size(
    open_ledger: OpenLedger, start: Start, tmp_path: Path
) -> None:
    made = Made()
    made.symbols = [Sym(b"f%d" % number) for number in range(310_000)]
    made.buckets = 100_003
    last = made.sorted_symbols()[-1].name.decode()
    large = tmp_path / "liblarge.so"
    large.write_bytes(made.data())
    ledger = open_ledger(Rule(re.escape(str(tmp_path)), exports=[last], name="last"))
    mapper = start()
    mapper.map(large)
    assert ledger.wait_load(mapper.pid, large.stat().st_ino).rule == "last"
    assert ledger.watcher.stats.partial == 0


def test_a_search_of_exports_that_is_given_up_is_counted_and_explained(
    open_ledger: OpenLedger, start: Start, tmp_path: Path
) -> None:
    made = Made()
    made.gnu["values"] = [1 << 30] * 3
    lying = tmp_path / "liblying.so"
    lying.write_bytes(made.data())
    ledger = open_ledger(
        Rule(re.escape(str(tmp_path)), exports=["made_read"], name="read"),
        Rule(re.escape(str(tmp_path)), name="rest"),
    )
    mapper = start()
    mapper.map(lying)
    assert ledger.wait_load(mapper.pid, lying.stat().st_ino).rule == "rest"
    assert ledger.watcher.stats.partial == 1
    report = ledger.watcher.explain(mapper.pid)
    assert isinstance(report, ProcessReport)
    (mapping,) = [one for one in report.mappings if one.library.path == str(lying)]
    assert (mapping.look.elf, mapping.look.reason) == ("partial", "its hash table ends outside the file")
    assert mapping.rules[0].why == "exports_given_up"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # 3.12 warns of just this
def test_in_a_child_of_fork_each_call_raises_and_leaving_the_context_does_nothing(
    open_ledger: OpenLedger, deadline: Any
) -> None:
    ledger = open_ledger()
    watcher = ledger.watcher
    subscription = watcher.subscribe()
    calls: dict[str, Callable[[], object]] = {
        "start": watcher.start,
        "stop": watcher.stop,
        "wait": lambda: watcher.wait(0),
        "subscribe": watcher.subscribe,
        "get": lambda: subscription.get(0.1),
        "snapshot": watcher.snapshot,
        "audit": watcher.audit,
        "explain": lambda: watcher.explain(os.getpid()),
        "set_rules": lambda: watcher.set_rules(Rule()),
        "attach_pid": lambda: watcher.attach_pid(1, "everything"),
    }
    read_fd, write_fd = os.pipe()
    child = os.fork()
    if not child:
        said = {}
        for name, call in calls.items():
            try:
                call()
            except UsageError as error:
                said[name] = str(error)
        watcher.__exit__(None, None, None)
        os.write(write_fd, json.dumps(said).encode())
        os._exit(0)
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as file:
        said = json.loads(file.read())
    assert os.waitpid(child, 0)[1] == 0
    assert said.keys() == calls.keys()
    refusal = f"this watch belongs to process {os.getpid()}, "
    assert [one for one in said.items() if not one[1].startswith(refusal)] == []
    assert watcher.is_running


def test_only_the_chosen_processes_are_told_of(open_ledger: OpenLedger, start: Start, library: NewLibrary) -> None:
    chosen, other, new = start(), start(), library()
    ledger = open_ledger(pids=[chosen.pid])
    other.map(new)
    chosen.map(new)
    ledger.wait_load(chosen.pid, new.stat().st_ino)
    assert {event.process.pid for event in ledger.events if isinstance(event, LibraryEvent) and event.process} == {
        chosen.pid
    }


def test_our_own_process_is_told_of_unless_it_is_left_out(open_ledger: OpenLedger, library: NewLibrary) -> None:
    with_us, without_us = open_ledger(), open_ledger(exclude_self=True)
    with_us.wait_for(lambda: with_us.inodes(os.getpid()), "our own libraries were not told")
    without_us.wait_for(lambda: "ready" in without_us.controls(), "no snapshot")
    assert not without_us.of(os.getpid())


def test_without_a_snapshot_only_news_is_told(open_ledger: OpenLedger, start: Start, library: NewLibrary) -> None:
    mapper, before, after = start(), library("libbefore.so"), library("libafter.so")
    at, length = mapper.map(before)
    ledger = open_ledger(snapshot=False)
    mapper.unmap(at, length)
    mapper.map(after)
    ledger.wait_load(mapper.pid, after.stat().st_ino)
    mapper.exit()
    ledger.wait_unload(mapper.pid, after.stat().st_ino)
    assert {event.library.id.inode for event in ledger.of(mapper.pid)} == {after.stat().st_ino}
    assert "snapshot" not in {event.cause for event in ledger.events if isinstance(event, LibraryEvent)}


def test_the_snapshot_of_a_watcher_is_what_its_events_say(
    open_ledger: OpenLedger, start: Start, library: NewLibrary
) -> None:
    ledger = open_ledger(Rule(NEW, name="rule"))
    mapper, new = start(), library()
    mapper.map(new)
    load = ledger.wait_load(mapper.pid, new.stat().st_ino)
    (mapped,) = [one for one in ledger.watcher.snapshot() if one.process.pid == mapper.pid]
    assert (mapped.process, mapped.library, mapped.rule, mapped.ranges) == (
        load.process,
        load.library,
        "rule",
        load.ranges,
    )


# ---- the draining thread ------------------------------------------------------------------------


@pytest.mark.parametrize("nice", [-5, 0, 3])
def test_the_draining_thread_has_a_nice_value_of_its_own(open_ledger: OpenLedger, nice: int) -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    before = {thread.native_id for thread in threading.enumerate()}
    open_ledger(Rule(NEW), config=Config(nice=nice))
    draining = [one for one in threading.enumerate() if one.name == "sowatch-engine" and one.native_id not in before]
    assert [os.getpriority(os.PRIO_PROCESS, one.native_id or 0) for one in draining] == [own + nice]
    assert os.getpriority(os.PRIO_PROCESS, 0) == own
