"""FileFacts: what a file is to a process, and the path that leads to it from here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sowatch.engine.file_inspector import FileFacts, host_path


@pytest.mark.parametrize(
    ("facts", "claimed", "path", "is_anonymous", "kind"),
    [
        (FileFacts(True), "library", "/a.so", False, "library"),
        (FileFacts(True), "library", "/memfd:a", True, "library"),
        (FileFacts(False), "library", "/a.cache", False, "other"),
        (FileFacts(None), "library", "/a.so", False, "library"),
        (FileFacts(None), "library", "/memfd:a", True, "other"),
        (FileFacts(True, image_kinds=frozenset({"executable"})), "executable", "/bin/a", False, "executable"),
        (FileFacts(True, image_kinds=frozenset({"interpreter"})), "executable", "/bin/a", False, "library"),
        (FileFacts(True), "interpreter", "/lib/ld-linux.so.2", False, "library"),
        (FileFacts(None), "executable", "/bin/a", False, "executable"),
        (FileFacts(None), "interpreter", "/lib64/ld-linux-x86-64.so.2", False, "interpreter"),
        (FileFacts(None), "interpreter", "/lib/libc.musl-x86_64.so.1", False, "interpreter"),
        (FileFacts(None), "interpreter", "/tmp/evil.so", False, "library"),
        (FileFacts(False), "executable", "/bin/script", False, "executable"),
        (FileFacts(False), "other", "/a", False, "other"),
    ],
)
def test_a_file_is_what_its_process_claims_only_if_it_can_be(
    facts: FileFacts, claimed: Any, path: str, is_anonymous: bool, kind: str
) -> None:
    assert facts.kind(claimed, path, is_anonymous=is_anonymous) == kind


@pytest.mark.parametrize(
    ("facts", "path"),
    [
        (FileFacts(place="own"), "/lib/a.so"),
        (FileFacts(place="root"), "/host/proc/7/root/lib/a.so"),
        (FileFacts(place="link", link="/host/proc/7/map_files/1-2"), "/host/proc/7/map_files/1-2"),
        (FileFacts(), None),
    ],
)
def test_a_host_path_is_the_way_by_which_the_file_was_opened(facts: FileFacts, path: str | None) -> None:
    name = SimpleNamespace(path="/lib/a.so")
    assert host_path("/host/proc", 7, name, facts) == path  # type: ignore[arg-type]
