"""What tells a mapped file from a copy that an overlay shows in its place: every row of the decision."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sowatch.inventory.copied_up import BuildIds, _has_same_content, is_mapped_file


def unasked() -> bool | None:
    raise AssertionError("what costs more was asked although the answer was known")


@pytest.mark.parametrize(
    ("mapped_ns", "build_ids", "layers", "is_it"),
    [
        # The change time is that of the mapped inode.
        (5, None, None, True),
        # The build ids of both are known: whatever the change time, as chmod changes it.
        (4, ("aa", "aa"), None, True),
        (0, ("aa", "aa"), None, True),
        (4, ("aa", "bb"), None, False),
        (0, ("aa", "bb"), None, False),
        # What lies there has none any more.
        (4, ("aa", ""), None, False),
        # One of them is unknown: the layers decide, which may not be reached.
        *((ns, ids, answer, answer) for ns in (0, 4) for ids in ((None, None), ("aa", None), (None, "aa"), (None, ""))
          for answer in ((True,), (False,), (None,))),
    ],
)  # fmt: skip
def test_the_change_time_confirms_then_the_build_ids_decide_then_the_layers(
    mapped_ns: int,
    build_ids: tuple[str | None, str | None] | None,
    layers: tuple[bool | None] | None,
    is_it: bool | tuple[bool | None],
) -> None:
    ask_ids: Callable[[], BuildIds] = unasked if build_ids is None else lambda: BuildIds(*build_ids)  # type: ignore[assignment]
    ask_layers = unasked if layers is None else lambda: layers[0]
    wanted = is_it[0] if isinstance(is_it, tuple) else is_it
    assert is_mapped_file(mapped_ns, 5, ask_ids, ask_layers) is wanted


@pytest.mark.parametrize(
    ("other", "is_same"),
    [(b"x" * (3 << 20), True), (b"x" * (3 << 20) + b"y", False), (b"x" * ((3 << 20) - 1) + b"y", False)],
    ids=["equal", "longer", "last byte"],
)
def test_two_files_have_the_same_content_if_every_byte_of_them_is_the_same(
    tmp_path: Path, other: bytes, is_same: bool
) -> None:
    fds = []
    for name, content in (("one", b"x" * (3 << 20)), ("other", other)):
        (tmp_path / name).write_bytes(content)
        fds.append(os.open(tmp_path / name, os.O_PATH))
    try:
        assert _has_same_content(*fds) is is_same
    finally:
        for fd in fds:
            os.close(fd)


def test_of_very_large_files_nothing_is_said(tmp_path: Path) -> None:
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 1 << 40)
    fd = os.open(tmp_path / "large", os.O_PATH)
    try:
        assert _has_same_content(fd, fd) is None
    finally:
        os.close(fd)
