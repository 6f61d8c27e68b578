"""What is known of mapped files beside the map: are they stale, who owns them, what has to be restarted."""

from __future__ import annotations

import os
from collections.abc import Iterable

from msgspec import Struct

from sowatch.inventory.restarts import RestartTarget, restart_target
from sowatch.inventory.staleness import Disk, StaleAnswer
from sowatch.linux.proc import ProcFs
from sowatch.model.stats import Mapped

__all__ = ["MappedFacts", "facts_of"]


class MappedFacts(Struct, frozen=True):
    """What is known of one mapped file.

    Attributes:
        mapped: what was asked.
        stale: whether the file is still the one on disk; ``stale.stale`` is None if it is.
        restart: the systemd unit or the container that runs the process, and the command that restarts it.
        package: the package that owns the file in the root of the process; None: none does, none is known, or it was
            not asked.
    """

    mapped: Mapped
    stale: StaleAnswer
    restart: RestartTarget
    package: str | None = None


def facts_of(
    mapped: Iterable[Mapped], *, packages: bool = False, proc_root: str | os.PathLike[str] = "/proc"
) -> list[MappedFacts]:
    """Compares mapped files with the disk, as it is now.

    Takes some 50 us for each; of a file system that does not answer a second, once. Read-only, in the caller's thread.

    Args:
        mapped: as `Watcher.snapshot` gives them.
        packages: also read the databases of dpkg, rpm and apk: a second or so for each root.
        proc_root: where the host's proc file system is mounted.

    Raises:
        ProcRootError: it is not there.

    >>> with Watcher() as watcher:  # doctest: +SKIP
    ...     for one in facts_of(watcher.snapshot()):
    ...         if one.stale.stale is not None:
    ...             print(one.mapped.process.pid, one.mapped.library.path, one.stale.stale, one.restart.command)
    """
    asked = list(mapped)
    with Disk(ProcFs(proc_root)) as disk:
        answers = disk.staleness_of_all(asked)
        wanted = [
            (one.process.pid, answer.path or one.library.path) for one, answer in zip(asked, answers, strict=True)
        ]
        owners = disk.owners(wanted) if packages else {}
    return [
        MappedFacts(one, answer, restart_target(one.process.cgroup), owners.get(key))
        for one, answer, key in zip(asked, answers, wanted, strict=True)
    ]
