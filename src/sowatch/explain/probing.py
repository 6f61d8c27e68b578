"""What an explanation says of uprobes: where the kernel puts none, and what rules have attached. Values, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from msgspec import Struct

from sowatch.linux.proc_parse import MapRow

__all__ = ["AttachmentReport", "ProbeReport", "Unprobed", "attachment_dict", "unprobed"]

#: Why the kernel puts no uprobe into an executable mapping (valid_vma of kernel/events/uprobes.c): it is MAP_SHARED;
#: it is writable, too; its file is of huge pages (hugetlbfs, MFD_HUGETLB).
Unprobed: TypeAlias = Literal["shared", "writable", "hugetlb"]


class ProbeReport(Struct, frozen=True):
    """One program on one function of a file. ``state``: attached, retrying or failed, for ``reason``.

    ``offset`` in the file, in bytes; None if the function was not found.
    """

    symbol: str
    program: str
    is_return: bool
    state: str
    reason: str | None
    offset: int | None


class AttachmentReport(Struct, frozen=True):
    """What a rule has attached to a file, or why nothing; ``state`` as of `ProbeReport`.

    ``users`` are activations; ``is_lingering``: the last process is gone, and it is detached soon.
    """

    rule: str
    state: str
    reason: str | None
    users: int
    is_lingering: bool
    probes: tuple[ProbeReport, ...]


def unprobed(rows: Sequence[MapRow], *, is_hugetlb: bool) -> tuple[Unprobed, ...]:
    """Why the kernel puts no probes into some of these executable mappings of one file."""
    found: list[Unprobed] = ["shared"] if any(row.perms.endswith("s") for row in rows) else []
    found += ["writable"] if any("w" in row.perms for row in rows) else []
    return (*found, "hugetlb") if is_hugetlb else tuple(found)


def attachment_dict(one: AttachmentReport) -> dict[str, Any]:
    """What a rule has attached to a file, as explanations have it."""
    return {
        "rule": one.rule,
        "state": one.state,
        "reason": one.reason,
        "users": one.users,
        "lingering": one.is_lingering,
        "probes": [
            {
                "symbol": probe.symbol,
                "program": probe.program,
                "return": probe.is_return,
                "state": probe.state,
                "reason": probe.reason,
                "offset": probe.offset,
            }
            for probe in one.probes
        ],
    }
