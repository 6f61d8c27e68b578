"""Files are attached before anybody loads them, so that the very first call of the first process counts."""

from __future__ import annotations

import logging
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sowatch import FileId, Library, ProcessId, Rule, Watcher
from sowatch.engine.workers import ActiveFile
from sowatch.model.errors import UsageError
from sowatch.uprobes import Attacher, CallCounter
from support.callers import Caller

Probed = Callable[..., Path]
NewCaller = Callable[..., Caller]
LOG = logging.getLogger(__name__)


def counts(counter: CallCounter) -> list[int]:
    return [one.calls for one in counter.calls()]


def one_shots(programs: Any, library: Path, number: int) -> None:
    for _ in range(number):
        subprocess.run([programs["oneshot"], library, "plain"], check=True)


@pytest.mark.parametrize("links", ["auto", "perf_event"])
def test_the_first_call_of_the_first_process_counts(probed: Probed, programs: Any, closing: Any, links: str) -> None:
    library = probed()
    counter = closing.enter_context(CallCounter(["plain"], prearm=[f"{library.parent}/lib*.so"], links=links))
    closing.enter_context(Watcher(counter.rule(re.escape(str(library)))))
    one_shots(programs, library, 1)
    assert counts(counter) == [1]


@pytest.mark.alone
@pytest.mark.timeout(300)
@pytest.mark.parametrize("processes", [100, pytest.param(1000, marks=pytest.mark.full)])
def test_of_a_thousand_short_processes_linger_and_prearm_miss_none(
    probed: Probed, programs: Any, caller: NewCaller, wait_until: Any, processes: int
) -> None:
    """Each maps the library, calls once and ends, about a millisecond later."""
    captured = {}
    for way in ("without", "linger", "prearm"):
        library = probed(f"lib{way}.so")
        options = {"without": {}, "linger": {"linger_s": 300.0}, "prearm": {"prearm": [str(library)]}}[way]
        with CallCounter(["plain"], is_timed=False, **options) as counter:
            seen = set()

            def leave(file: ActiveFile, counter: CallCounter = counter, seen: set[ProcessId] = seen) -> None:
                seen.update(one.process for one in counter.calls())
                counter.detach(file)

            rule = Rule(re.escape(str(library)), on_activate=counter.attach, on_deactivate=leave)
            with Watcher(rule):
                if way == "linger":
                    first = caller(library)
                    wait_until(lambda counter=counter: counter.stats.attached == 1)
                    first.end()
                one_shots(programs, library, processes)
                seen.update(one.process for one in counter.calls())
                captured[way] = len(seen)
            assert counter.lost == 0
    LOG.info("first calls captured of %d: %s", processes, captured)
    assert (captured["linger"], captured["prearm"]) == (processes, processes)
    # Most come before the probe.
    assert captured["without"] < processes


def test_a_file_is_attached_once_however_it_was_found(
    user_object: Path, probed: Probed, caller: NewCaller, active: Any
) -> None:
    library = probed()
    (library.parent / "libother.so").symlink_to(library)
    process = caller(library)
    with Attacher(user_object, {"plain": "by_section"}, prearm=[f"{library.parent}/*.so"]) as attacher:
        ring = attacher.ring("events")
        assert (attacher.stats.files, attacher.stats.armed) == (1, 1)
        # The kernel knows the generation of the inode, stat does not.
        file = active(library, generation=77)
        attacher.attach(file)
        process.call("plain")
        assert len(list(ring.take())) == 1
        (known,) = attacher.files()
        assert (known.library, known.users, known.is_armed) == (file.library, 1, True)
        assert {site.library for site in attacher.sites.values()} == {file.library}
        attacher.detach(file)
        process.call("plain")
        assert (len(list(ring.take())), attacher.stats.files) == (1, 1)


def test_two_users_with_the_generation_that_the_kernel_knows_are_one_attachment(
    user_object: Path, probed: Probed, active: Any
) -> None:
    library = probed()
    with Attacher(user_object, {"plain": "by_section"}) as attacher:
        first, second = active(library, generation=5), active(library, generation=5)
        attacher.attach(first)
        attacher.attach(second)
        assert (attacher.stats.files, attacher.stats.attached) == (1, 1)
        attacher.detach(first)
        attacher.detach(second)
        assert attacher.stats.files == 0


def test_a_file_that_comes_later_is_found_by_its_pattern_and_one_that_is_deleted_is_let_go(
    user_object: Path, probed: Probed, wait_until: Any
) -> None:
    first = probed("libfirst.so")
    with Attacher(user_object, {"plain": "by_section"}, prearm=[f"{first.parent}/*.so"], verify_s=0.05) as attacher:
        second = probed("libsecond.so")
        wait_until(lambda: {one.library.path for one in attacher.files()} == {str(first), str(second)})
        first.unlink()
        wait_until(lambda: [one.library.path for one in attacher.files()] == [str(second)])


def test_what_the_inventory_has_seen_is_attached_with_its_identity(user_object: Path, probed: Probed) -> None:
    path = probed()
    status = path.stat()
    seen = Library("/in/a/container.so", FileId(os.major(status.st_dev), os.minor(status.st_dev), status.st_ino, 9))
    seen = Library(seen.path, seen.id, host_path=str(path))
    with Attacher(user_object, {"plain": "by_section"}) as attacher:
        assert attacher.prearm(seen) == []
        assert [one.library for one in attacher.files()] == [seen]


def test_another_file_under_the_path_that_the_inventory_has_seen_is_not_attached(
    user_object: Path, probed: Probed
) -> None:
    path = probed()
    seen = Library(str(path), FileId(0, 0, 1), host_path=str(path))
    nowhere = Library("/in/a/container.so", FileId(0, 0, 2))
    with Attacher(user_object, {"plain": "by_section"}) as attacher:
        assert [str(one) for one in attacher.prearm(seen, nowhere)] == [
            f"{path} is another file by now. Take a new inventory.",
            "no path leads to /in/a/container.so from here. Give the path of the file on the host.",
        ]
        assert attacher.stats.files == 0


def test_on_an_overlay_the_file_of_the_layer_is_attached_which_every_container_maps(
    user_object: Path, probed: Probed, scratch: Path
) -> None:
    lower = probed("lower/libprobed.so")
    for name in ("upper", "work", "merged"):
        (scratch / name).mkdir()
    options = f"lowerdir={lower.parent},upperdir={scratch}/upper,workdir={scratch}/work"
    subprocess.run(["mount", "-t", "overlay", "o", "-o", options, scratch / "merged"], check=True)
    try:
        with Attacher(user_object, {"plain": "by_section"}) as attacher:
            assert attacher.prearm(f"{scratch}/merged/*.so", str(lower)) == []
            (known,) = attacher.files()
            assert known.library.id.inode == lower.stat().st_ino
            assert known.library.id.dev == f"{os.major(lower.stat().st_dev)}:{os.minor(lower.stat().st_dev)}"
    finally:
        subprocess.run(["umount", scratch / "merged"], check=True)


def test_what_cannot_be_armed_is_reported_and_the_rest_is(user_object: Path, probed: Probed) -> None:
    good, text = probed("liba.so"), probed("libb.so")
    text.write_bytes(b"/* GNU ld script */")
    (text.parent / "libc.so").symlink_to("/nowhere")
    os.mkfifo(text.parent / "libd.so")
    with Attacher(user_object, {"plain": "by_section"}) as attacher:
        problems = [str(one) for one in attacher.prearm(f"{text.parent}/*.so")]
        assert [one.library.path for one in attacher.files() if one.state == "attached"] == [str(good)]
    assert [
        part for part in ("it is no ELF file", "not a regular file") if not any(part in one for one in problems)
    ] == []


@pytest.mark.parametrize("pattern", ["lib*.so", ""])
def test_a_pattern_that_is_no_absolute_path_is_a_usage_error_and_nothing_stays(user_object: Path, pattern: str) -> None:
    attacher = Attacher(user_object, {"plain": "by_section"}, prearm=[pattern])
    with pytest.raises(UsageError, match="is no absolute path"):
        attacher.start()
    with Attacher(user_object, {"plain": "by_section"}) as started, pytest.raises(UsageError):
        started.prearm(pattern)
