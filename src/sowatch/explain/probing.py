"""What an explanation says of uprobes: where the kernel puts none, and what rules have attached. Values, no I/O."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal, TypeAlias

from msgspec import Struct

from sowatch.linux.proc_parse import MapRow
from sowatch.linux.tls_libraries import TlsLook

__all__ = [
    "AttachmentReport",
    "ProbeReport",
    "TlsAnswer",
    "TlsState",
    "Unprobed",
    "attachment_dict",
    "tls_answer",
    "tls_dict",
    "unprobed",
]

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


#: Why a process has no HTTP flows, or that it can have some. By its files alone: ``tappable``; ``no_tls``: nothing that
#: exports functions of OpenSSL, GnuTLS or NSS; ``unread``: they cannot be read; one of `OtherTls` in its place;
#: ``kernel_refuses``: its mapping of the library takes no probes. By who taps: ``off``; ``not_selected``; ``refused``,
#: for ``reason``; ``not_attached`` yet; ``no_call`` since; ``no_http`` in its calls; ``flows``.
TlsState: TypeAlias = Literal[
    "tappable",
    "no_tls",
    "unread",
    "kernel_refuses",
    "not_exported",
    "go",
    "rustls",
    "java",
    "static",
    "off",
    "not_selected",
    "refused",
    "not_attached",
    "no_call",
    "no_http",
    "flows",
]


class TlsAnswer(Struct, frozen=True):
    """Why a process has no HTTP flows; ``calls`` moved bytes since it is tapped, of which ``flows`` were made."""

    state: TlsState
    reason: str | None = None
    files: tuple[str, ...] = ()
    calls: int = 0
    flows: int = 0


def tls_answer(look: TlsLook, unprobed_paths: Collection[str]) -> TlsAnswer:
    """What the files of a process say.

    Args:
        look: at them.
        unprobed_paths: of those that the kernel puts no probes into.
    """
    files = tuple(one.path for one in look.files if one.speaks_tls)
    if files and all(one in unprobed_paths for one in files):
        return TlsAnswer("kernel_refuses", files=files)
    if files:
        return TlsAnswer("tappable", files=files)
    return TlsAnswer(look.others[0] if look.others else "no_tls")


def tls_dict(one: TlsAnswer) -> dict[str, Any]:
    """Why there are no flows, as explanations have it."""
    return {
        "state": one.state,
        "reason": one.reason,
        "libraries": list(one.files),
        "calls": one.calls,
        "flows": one.flows,
    }


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
