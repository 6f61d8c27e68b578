"""`NamedVerdicts`: the answers that a source remembers which finds files in ``/proc``."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from types import TracebackType
from typing import Self

from sowatch.sources.base import Verdict
from sowatch.sources.proc_scan import FileName

__all__ = ["NamedVerdicts"]


class NamedVerdicts:
    """`sowatch.sources.base.Verdicts` as they were when this was made: they do not grow old.

    Args:
        verdicts: by `FileName`, whether it is wanted.
    """

    def __init__(self, verdicts: Mapping[Hashable, bool]) -> None:
        self._verdicts = dict(verdicts)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def look_up(self, key: Hashable) -> Verdict | None:
        is_match = self._verdicts.get(key)
        if is_match is None:
            return None
        assert isinstance(key, FileName)
        return Verdict(key.file_id, key.view, is_match, None)

    def of_inodes(self, inodes: Collection[int]) -> list[Verdict]:
        return [
            Verdict(key.file_id, key.view, is_match, None)
            for key, is_match in self._verdicts.items()
            if isinstance(key, FileName) and key.file_id.inode in inodes
        ]

    def close(self) -> None:
        self._verdicts = {}
