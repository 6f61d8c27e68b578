"""Files that nobody can read any more: who asks again and again leaves no more threads behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sowatch import Rule
from sowatch.explain.audit import _Images
from sowatch.explain.looks import TimeoutWorker
from sowatch.linux.disk_calls import HangingCalls
from sowatch.linux.proc import ProcFs
from sowatch.model.errors import SowatchError
from support.asked import Watch
from support.silent_fs import SilentFileSystem


def left_behind(name: str) -> set[int | None]:
    return {thread.ident for thread in threading.enumerate() if thread.name == name}


def test_explanations_of_a_process_whose_file_system_hangs_leave_nothing_more_behind_each_time(
    watch: Watch, make_library: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mnt").mkdir()
    with SilentFileSystem(tmp_path / "mnt", make_library("libserved.so")) as silent:
        watcher = watch(Rule(r"/libsilent\.so$"))
        path = f"/proc/{silent.pid}/root{silent.path}"

        def states() -> list[str]:
            report = watcher.explain(silent.pid)
            found = [one.look.elf for one in report.mappings if one.library.path == str(silent.path)]
            with pytest.raises(SowatchError, match="the file system does not answer"):
                watcher.explain(path)
            watcher.audit()
            return found

        silent.fall_silent()
        monkeypatch.setattr(TimeoutWorker.__init__, "__defaults__", (0.2, None))
        assert states() == ["no_answer"]
        left = left_behind("sowatch-explain")
        assert left
        for _ in range(3):
            assert states() == ["no_answer"]
            assert left_behind("sowatch-explain") == left


def test_audits_leave_nothing_more_behind_for_a_program_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, wait_until: Any
) -> None:
    over, hanging, proc = threading.Event(), HangingCalls(), ProcFs()
    rows = proc.executable_maps(os.getpid())
    assert isinstance(rows, list)
    monkeypatch.setattr(_Images, "_read", lambda *_: over.wait() and None)
    monkeypatch.setattr("sowatch.explain.audit.READ_TIMEOUT_S", 0.05)
    left = []
    for _ in range(3):
        images = _Images(proc, hanging)
        assert images.can_be(os.getpid(), rows[0], "executable")
        images.close()
        left.append(left_behind("sowatch-audit"))
    assert left[0]
    assert left == [left[0]] * 3
    over.set()
    wait_until(lambda: not left_behind("sowatch-audit"), what="the end of what was left")
