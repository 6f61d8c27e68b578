"""Many files: nothing leaks, and the end comes soon."""

from __future__ import annotations

import gc
import logging
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sowatch import FileId, Library
from sowatch.engine.workers import ActiveFile
from sowatch.uprobes import Attacher, Probe
from support import bpfsys

Probed = Callable[..., Path]
pytestmark = pytest.mark.alone

LOG = logging.getLogger(__name__)
ATTACHMENTS = 200


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("shape", ["one a file", "all on one file"])
def test_two_hundred_attachments_are_detached_within_five_seconds(
    user_object: Path, probed: Probed, active: Any, deadline: Any, shape: str
) -> None:
    """By the kind of link that this kernel has: it closes perf events one by one."""
    if shape == "one a file":
        files, probes = (
            [active(probed(f"lib{number}.so")) for number in range(ATTACHMENTS)],
            [Probe("plain", "by_section")],
        )
    else:
        files, probes = [active(probed())], [Probe("many_*", "by_section")]
    before = descriptors()
    attacher = Attacher(user_object, probes).start()
    for file in files:
        attacher.attach(file)
    assert attacher.stats.attached == ATTACHMENTS
    begun = time.monotonic()
    attacher.close()
    spent_s = time.monotonic() - begun
    LOG.info("%d attachments (%s) detached in %.2f s", ATTACHMENTS, shape, spent_s)
    assert spent_s <= deadline(5.0)
    assert descriptors() == before


@pytest.mark.timeout(300)
@pytest.mark.parametrize("files", [300, pytest.param(1000, marks=pytest.mark.full)])
def test_a_thousand_files_that_come_and_go_leave_no_descriptor_no_link_and_no_memory(
    user_object: Path, probed: Probed, files: int
) -> None:
    source = probed()
    made: set[int | None] = set()
    with Attacher(user_object, {"plain": "by_section", "nested": "by_section"}) as attacher:

        def churn(number: int) -> None:
            path = source.with_name(f"lib{number}.so")
            path.write_bytes(source.read_bytes())
            with path.open("rb") as opened:
                status = os.fstat(opened.fileno())
                file_id = FileId(os.major(status.st_dev), os.minor(status.st_dev), status.st_ino, number)
                file = ActiveFile(Library(str(path), file_id), os.dup(opened.fileno()))
            attacher.attach(file)
            file.close()
            (view,) = attacher.files()
            made.update(one.link_id for one in view.attachments)
            attacher.detach(file)
            path.unlink()

        for number in range(100):
            churn(number)
        gc.collect()
        before = descriptors()
        tracemalloc.start()
        try:
            for number in range(100, 200):
                churn(number)
            gc.collect()
            early = tracemalloc.get_traced_memory()[0]
            for number in range(200, files):
                churn(number)
            gc.collect()
            grown = tracemalloc.get_traced_memory()[0] - early
        finally:
            tracemalloc.stop()
        LOG.info("%d further files: %d bytes more", files - 200, grown)
        assert descriptors() == before
        assert grown < 100_000
        assert (attacher.stats.files, attacher.stats.attached, attacher.sites) == (0, 0, {})
        # The kernel numbers links upwards, so none of these is somebody else's now.
        assert made & {number for kind, number in bpfsys.all_ids() if kind == "link"} == set()
