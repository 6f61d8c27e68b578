"""`LibraryCache`: one `Library` value for all processes that have a file mapped under one name."""

from __future__ import annotations

from typing import Final

from sowatch.engine.address_space import MappedFile
from sowatch.engine.file_inspector import FileFacts, host_path
from sowatch.model.events import Library
from sowatch.model.literals import Kind

__all__ = ["LibraryCache"]

#: Values that are kept; some 300 bytes each.
MAX_LIBRARIES: Final = 5_000


class LibraryCache:
    """Makes the `Library` of an event, the same object for each process where every field is the same.

    Args:
        proc_root: for host paths.
    """

    def __init__(self, proc_root: str) -> None:
        self._proc_root = proc_root
        self._known: dict[tuple[int, str], tuple[MappedFile, Library]] = {}

    def get(self, pid: int, name: MappedFile, kind: Kind, facts: FileFacts) -> Library:
        """What an event says of a file that this process has mapped."""
        # Where the path does not lead to the file from here, the host path is only that process's.
        is_shared = facts.place == "own"
        if is_shared:
            known = self._known.get((id(name), kind))
            # The id of an object may be reused once it is gone, so the entry keeps the object itself.
            if (
                known is not None
                and known[0] is name
                and (known[1].build_id, known[1].soname) == (facts.build_id, facts.soname)
            ):
                return known[1]
        library = Library(
            path=name.path,
            id=name.file_id,
            host_path=host_path(self._proc_root, pid, name, facts),
            kind=kind,
            build_id=facts.build_id,
            soname=facts.soname,
            deleted=name.is_deleted,
            path_partial=name.is_partial,
            changed_ns=max(0, name.changed_ns),
        )
        if is_shared:
            if len(self._known) >= MAX_LIBRARIES:
                self._known.clear()
            self._known[(id(name), kind)] = (name, library)
        return library
