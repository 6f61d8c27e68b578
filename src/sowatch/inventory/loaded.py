"""The files that are mapped, with what names them in a bill of materials: build or hash, and package."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final, Literal

from msgspec import Struct

from sowatch.inventory.packages import HasFile, PackageIdentity, Packages
from sowatch.inventory.sbom import LoadedFile
from sowatch.linux.memory_files import is_memory
from sowatch.model.identity import FileId
from sowatch.model.literals import Kind
from sowatch.model.plural import counted
from sowatch.model.rules import Rule

__all__ = ["LoadedAnswer", "PlaceKey", "is_file", "limits_of_memory", "limits_of_rules", "loaded_files", "place_of"]

#: Distinguishes one entry from another: the file under its path, in its container; without a build id also when it was
#: changed last, as other content may have been written into it.
PlaceKey = tuple[FileId, str, str | None, str | None, int]
#: What a rule without a pattern has to be about to leave out nothing.
_ALL_KINDS: Final = frozenset[Kind]({"library", "executable", "interpreter"})
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
        rule_limits: what these leave out; None: it does not say.
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
    rule_limits: tuple[str, ...] | None = None


def place_of(one: HasFile) -> PlaceKey:
    """That of what is mapped."""
    library = one.library
    return (
        library.id,
        library.path,
        library.build_id,
        one.process.container,
        0 if library.build_id else library.changed_ns,
    )


def limits_of_rules(rules: Iterable[Rule]) -> tuple[str, ...]:
    """What rules leave out, one sentence each; none if those without a pattern want every kind that a document has."""
    found = list(rules)
    if frozenset[str]().union(*(one.kind for one in found if not one.pattern and not one.exports)) >= _ALL_KINDS:
        return ()
    return tuple(
        f"rule {one.name}: only files of kind {', '.join(sorted(one.kind))}"
        + (f" with {one.pattern} in their path" if one.pattern else "")
        + (f" that export {', '.join(sorted(one.exports))}" if one.exports else "")
        for one in found
    )


def limits_of_memory(mapped: Iterable[HasFile]) -> tuple[str, ...]:
    """That there are executable mappings of what was never a file in a directory, which no document has."""
    count = sum(not is_file(one) for one in mapped)
    return (f"{counted(count, 'executable mapping')} of memory only: not there",) if count else ()


def is_file(one: HasFile) -> bool:
    """Whether it may be in a document: what is in memory only is not."""
    return one.library.path.startswith("/") and not is_memory(one.library.id)


def loaded_files(mapped: Iterable[HasFile], packages: Packages, stale: Collection[PlaceKey] = ()) -> list[LoadedFile]:
    """One entry for each file, path and container, with the number of processes. What is in memory only is left out.

    Args:
        mapped: what is mapped now.
        packages: finds their packages.
        stale: those that have been replaced or deleted.
    """
    groups: dict[PlaceKey, list[HasFile]] = {}
    for one in mapped:
        if is_file(one):
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
