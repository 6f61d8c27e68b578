"""The lines `mapping` of schema 1: one process and file with whether that is stale; written and read back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

from msgspec import UNSET, UnsetType

from sowatch.inventory.restarts import restart_target
from sowatch.inventory.staleness import StaleAnswer
from sowatch.linux.cgroups import unit_of
from sowatch.model import wire
from sowatch.model.lines import library_from, library_line, process_from, process_line, ranges_from, ranges_list
from sowatch.model.stats import Mapped
from sowatch.model.wire import SCHEMA

if TYPE_CHECKING:
    from sowatch.inventory.packages import IdentifiedBy, PackageIdentity
    from sowatch.model.events import Library, Process

__all__ = ["answer_from", "mapped_from", "mapping_line", "package_from", "package_line"]


class MappedLike(Protocol):
    """One entry of `sowatch.watcher.watcher.Watcher.snapshot`."""

    @property
    def process(self) -> Process: ...
    @property
    def library(self) -> Library: ...
    @property
    def rule(self) -> str: ...
    @property
    def ranges(self) -> tuple[tuple[int, int], ...]: ...
    @property
    def range_count(self) -> int | None: ...


def mapping_line(
    mapped: MappedLike,
    answer: StaleAnswer,
    package: str | None,
    seq: int,
    *,
    with_owner: bool,
    mapped_package: wire.Package | UnsetType | None = UNSET,
    listen: list[str] | UnsetType | None = UNSET,
) -> wire.Mapping:
    """The line; ``with_owner``: with package, unit and how that is restarted."""
    cgroup = mapped.process.cgroup
    unit, target = unit_of(cgroup), restart_target(cgroup)
    return wire.Mapping(
        SCHEMA,
        "mapping",
        seq,
        mapped.rule,
        process_line(mapped.process),
        library_line(mapped.library),
        ranges_list(mapped.ranges),
        answer.stale,
        answer.reason,
        answer.path or UNSET,
        UNSET if mapped.range_count is None else mapped.range_count,
        package=package if with_owner else UNSET,
        unit=(unit and unit.name) if with_owner else UNSET,
        unit_manager=(unit and unit.manager) if with_owner else UNSET,
        unit_uid=(unit and unit.uid) if with_owner else UNSET,
        same_build=UNSET if answer.is_same_build is None else answer.is_same_build,
        restart=target.command if with_owner else UNSET,
        restart_advice=target.advice if with_owner else UNSET,
        mapped_package=mapped_package,
        listen=listen,
    )


def mapped_from(line: wire.Mapping) -> Mapped:
    """What is mapped, of a line that was read."""
    return Mapped(
        process_from(line.process),
        library_from(line.library),
        line.rule,
        ranges_from(line.ranges),
        range_count=None if line.range_count is UNSET else line.range_count,
    )


def answer_from(line: wire.Mapping) -> StaleAnswer:
    """Whether it is stale, of a line that was read."""
    return StaleAnswer(
        line.stale,
        None if line.stale_reason is UNSET else line.stale_reason,
        None if line.stale_path is UNSET else line.stale_path,
        None if line.same_build is UNSET else line.same_build,
    )


def package_line(package: PackageIdentity | None) -> wire.Package | None:
    """A package as JSON has it."""
    if package is None:
        return None
    return wire.Package(package.name, package.version, package.source, package.purl, package.identified_by)


def package_from(line: wire.Package | UnsetType | None) -> PackageIdentity | None:
    """A package, of a line that was read."""
    from sowatch.inventory.packages import PackageIdentity

    if line is UNSET or line is None:
        return None
    return PackageIdentity(line.name, line.version, line.source, line.purl, cast("IdentifiedBy", line.identified_by))
