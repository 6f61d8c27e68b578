"""Whoever reads a process may have to wait for ever: nobody else is waited for with it.

A page fault that a file system does not answer holds the lock of an address space (mmap_lock). Any user can have
that, with a FUSE file system in a user namespace of their own; a dead network file system does it without malice.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sowatch import Rule
from sowatch.explain import ProcessReport
from sowatch.sources.select import CANDIDATES
from sowatch.sources.unread import ScanTimeout
from support.agent import Agent
from support.hangs import Hang
from support.hostile import SOWATCH
from support.kernel import TAG, Ledger, Tap
from support.programs import Mapper

pytestmark = pytest.mark.alone

Start = Callable[..., Mapper]
NewLibrary = Callable[..., Path]
NewHang = Callable[..., Hang]

HELD = f"libheld{TAG}.so"
HONEST = f"libhonest{TAG}.so"
RULE = Rule(rf"lib(held|honest){TAG}", name="ours")

#: What a reader of /proc/PID/maps waits for, too, whatever the kernel; the iterators of core wait for both.
WAYS = [("core", "lock"), ("core", "maps"), ("prebuilt", "maps"), ("procfs", "maps")]


def loads(ledger: Ledger, pid: int) -> list[str]:
    return [one.library.path for one in ledger.watcher.snapshot() if one.process.pid == pid]


@pytest.mark.parametrize(("strategy", "way"), WAYS)
def test_a_process_whose_lock_is_held_for_ever_is_named_and_holds_up_nobody(
    strategy: str,
    way: str,
    hang: NewHang,
    library: NewLibrary,
    start: Start,
    open_ledger: Any,
    wait_until: Any,
    closing: contextlib.ExitStack,
) -> None:
    held, honest = library(HELD), library(HONEST)
    hung = hang(way, held)
    ledger = open_ledger(RULE, open_source=CANDIDATES[strategy].open)
    watcher = ledger.watcher
    (pid,) = hung.pids
    hung.hang()
    mapper = start()
    mapper.map(honest)
    closing.enter_context(mapper.fork(how="clonevm"))
    watcher.set_rules(RULE)  # scans all: what the process did before it hung may have been scanned already
    wait_until(lambda: pid in watcher.audit().unread, 20, "the process is named")
    wait_until(lambda: loads(ledger, mapper.pid) == [os.fspath(honest)], 10, "the load of somebody else")
    audit = watcher.audit()
    assert [one for one in audit.differences if one.pid in (pid, mapper.pid)] == []
    report = watcher.explain(pid)
    assert isinstance(report, ProcessReport)
    assert "unread" in report.notes
    assert watcher.is_repaired
    hung.free()
    wait_until(lambda: not watcher.unread and pid not in watcher.audit().unread, 20, "the process is read again")
    assert loads(ledger, pid) == [os.fspath(held)]
    begun_s = time.monotonic()
    ledger.stop()
    assert time.monotonic() - begun_s < 20


def test_a_full_scan_goes_on_with_the_others_and_names_who_shares_the_address_space(
    hang: NewHang, library: NewLibrary, start: Start, open_tap: Callable[..., Tap]
) -> None:
    hung = hang("lock", library(HELD), 3)
    tap = open_tap()
    mapper = start()
    mapper.map(library(HONEST))
    hung.hang()
    scans, _ = tap.source.scan_all()
    tgids = {scan.tgid for scan in scans}
    assert mapper.pid in tgids
    assert set(hung.pids) & tgids == set()
    assert set(hung.pids) < set(tap.source.unread)
    # Each has a child in its address space, for which no further thread is left behind; the scan of all is one.
    assert len(tap.source.unread) == 6
    assert tap.source.unread._worker.abandoned == 4
    with pytest.raises(ScanTimeout):
        tap.source.scan_process(hung.pids[0])
    assert tap.source.unread._worker.abandoned == 4


def test_whoever_was_given_up_is_introduced_anew_when_it_can_be_read(
    hang: NewHang, library: NewLibrary, open_tap: Callable[..., Tap], wait_until: Any
) -> None:
    hung = hang("lock", library(HELD))
    tap = open_tap()
    hung.hang()
    tap.source.scan_all()
    hung.free()
    found: list[int] = []
    wait_until(lambda: found.extend(tap.source.unread.take_readable()) or not tap.source.unread, 10, "its return")
    assert hung.pids[0] in found
    scan = tap.source.scan_process(hung.pids[0])
    assert scan is not None
    assert scan.intro is not None
    assert len(scan.maps) > 0


def test_a_watch_that_begins_while_somebody_hangs_begins_and_says_who(
    hang: NewHang, library: NewLibrary, start: Start, open_ledger: Any
) -> None:
    hung = hang("lock", library(HELD))
    mapper = start()
    honest = library(HONEST)
    mapper.map(honest)
    hung.hang()
    ledger = open_ledger(RULE)
    assert loads(ledger, mapper.pid) == [os.fspath(honest)]
    ready = ledger.watcher.ready
    assert ready is not None
    (limit,) = (one for one in ready.limits if "do not answer" in one)
    assert str(hung.pids[0]) in limit


def test_more_hung_processes_than_there_were_threads_hold_up_nobody(
    hang: NewHang,
    library: NewLibrary,
    start: Start,
    open_ledger: Any,
    wait_until: Any,
    closing: contextlib.ExitStack,
) -> None:
    hung = hang("lock", library(HELD), 20)
    ledger = open_ledger(RULE)
    hung.hang()
    first = start()
    first.map(library(HONEST))
    closing.enter_context(first.fork(how="clonevm"))
    ledger.watcher.set_rules(RULE)  # scans all, as above
    wait_until(lambda: set(hung.pids) <= set(ledger.watcher.audit().unread), 30, "all of them are named")
    mapper = start()
    honest = library(HONEST)  # another file under that name
    mapper.map(honest)
    wait_until(lambda: loads(ledger, mapper.pid) == [os.fspath(honest)], 10, "the load of somebody else")


@pytest.mark.parametrize("words", [["list", "--json"], ["audit", "--json"], ["explain", "--json"]])
def test_a_command_ends_while_somebody_hangs(
    words: list[str], hang: NewHang, library: NewLibrary, start: Start, deadline: Any
) -> None:
    hung = hang("maps", library(HELD))
    mapper = start()
    honest = library(HONEST)
    mapper.map(honest)
    hung.hang()
    what = {"list": [HONEST], "audit": [TAG], "explain": [str(hung.pids[0])]}[words[0]]
    done = subprocess.run([SOWATCH, *words, *what], capture_output=True, timeout=deadline(15), check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    if words[0] == "list":
        # The last line says that who hangs could not be read.
        assert [one["process"]["pid"] for one in lines if "process" in one] == [mapper.pid]
        assert lines[-1]["event"] == "coverage"
    elif words[0] == "audit":
        assert hung.pids[0] in lines[0]["unread"]
    else:
        assert "unread" in lines[0]["notes"]


def test_an_agent_says_who_hangs_and_ends_on_sigterm(
    hang: NewHang,
    library: NewLibrary,
    agent: Callable[..., Agent],
    wait_until: Any,
    deadline: Any,
) -> None:
    hung = hang("maps", library(HELD))
    # The watch scans all processes this often, for names that have changed, and so meets who hangs.
    served = agent(f'[watch]\nignore_ttl_s = 2\n[[rules]]\nname = "ours"\npattern = "{TAG}"\n')
    hung.hang()
    (pid,) = hung.pids
    wait_until(lambda: pid in served.get("/audit").json["unread"], 20, "the audit names it")
    wait_until(
        lambda: pid in [one["pid"] for one in served.get("/readyz").json["unread"]], 20, "the readiness names it"
    )
    assert served.get("/healthz").status == 200
    assert f"sowatch_watcher_unread {len(served.get('/readyz').json['unread'])}" in served.get("/metrics").text
    assert served.get("/inventory").status == 200
    assert "unread" in served.get(f"/explain?pid={pid}").json["notes"]
    begun_s = time.monotonic()
    assert served.stop() == 0
    assert time.monotonic() - begun_s < deadline(5)
