"""The files that are mapped, with what names them in a bill of materials: build or hash, and package."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final, Literal

from msgspec import Struct

from sowatch.inventory.packages import HasFile, PackageIdentity, Packages
from sowatch.inventory.sbom import LoadedFile
from sowatch.linux.memory_files import is_memory
from sowatch.model.identity import FileId

__all__ = ["LoadedAnswer", "PlaceKey", "loaded_files", "place_of"]

#: Distinguishes one entry from another: the file under its path, in its container.
PlaceKey = tuple[FileId, str, str | None, str | None]
#: Of the processes that have a file so many are asked for it.
_MOST_PROCESSES: Final = 3


class LoadedAnswer(Struct, frozen=True, kw_only=True):
    """What an agent answers to ``GET /sbom``.

    Attributes:
        time: of the answer, as in events.
        since: when the watch began.
        files: what is loaded, or was since then.
        open_ends: why it is not complete; none: it is.
        limits: of the watch.
        rules: by which it watches.
    """

    schema: int
    event: Literal["loaded"]
    time: str
    since: str
    host: str
    host_id: str | None
    boot_id: str | None
    version: str | None
    files: tuple[LoadedFile, ...]
    open_ends: tuple[str, ...]
    limits: tuple[str, ...]
    rules: tuple[str, ...]


def place_of(one: HasFile) -> PlaceKey:
    """That of what is mapped."""
    return one.library.id, one.library.path, one.library.build_id, one.process.container


def loaded_files(mapped: Iterable[HasFile], packages: Packages, stale: Collection[PlaceKey] = ()) -> list[LoadedFile]:
    """One entry for each file, path and container, with the number of processes. What is in memory only is left out.

    Args:
        mapped: what is mapped now.
        packages: finds their packages.
        stale: those that have been replaced or deleted.
    """
    groups: dict[PlaceKey, list[HasFile]] = {}
    for one in mapped:
        if one.library.path.startswith("/") and not is_memory(one.library.id):
            groups.setdefault(place_of(one), []).append(one)
    firsts = [group[0] for group in groups.values()]
    identities: Iterable[PackageIdentity | None] = packages.identify(firsts)
    return [
        LoadedFile(
            group[0].library.path,
            group[0].library.kind,
            next((name for one in group[:_MOST_PROCESSES] if (name := packages.content_name(one))), None),
            group[0].library.soname,
            group[0].process.container,
            identity,
            len({one.process.id for one in group}),
            key in stale,
        )
        for (key, group), identity in zip(groups.items(), identities, strict=True)
    ]
