"""What an explanation says of uprobes: where the kernel puts none, and what rules have attached. Values, no I/O."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from msgspec import Struct

from sowatch.linux.proc import Miss
from sowatch.linux.proc_parse import MapRow
from sowatch.linux.tls_libraries import TlsLook
from sowatch.model import wire_explain as wire
from sowatch.model.wire_explain import TlsState, Unprobed

__all__ = [
    "AttachmentReport",
    "ProbeReport",
    "TlsAnswer",
    "TlsState",
    "Unprobed",
    "attachment_line",
    "tls_answer",
    "tls_line",
    "unprobed",
    "unread_answer",
]


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


class TlsAnswer(Struct, frozen=True):
    """Why a process has no HTTP flows; ``calls`` moved bytes since it is tapped, of which ``flows`` were made."""

    state: TlsState
    reason: str | None = None
    files: tuple[str, ...] = ()
    calls: int = 0
    flows: int = 0


_UNREAD: Final = {
    Miss.GONE: "it has ended. Take another one.",
    Miss.DENIED: "not permitted. Run it as root.",
    Miss.HUNG: "the kernel or a file system does not answer. Try it again later.",
}


def unread_answer(why: Miss | None) -> TlsAnswer:
    """What is known of a process whose mappings were not read; None: nobody answered in time."""
    if why is Miss.ABSENT:
        return TlsAnswer("no_tls")  # a kernel thread or a zombie has none
    return TlsAnswer("unread", _UNREAD[Miss.HUNG if why is None else why])


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


def tls_line(one: TlsAnswer) -> wire.Tls:
    """Why there are no flows, as explanations have it."""
    return wire.Tls(one.state, one.reason, list(one.files), one.calls, one.flows, list(one.files), one.calls, one.flows)


def unprobed(rows: Sequence[MapRow], *, is_hugetlb: bool) -> tuple[Unprobed, ...]:
    """Why the kernel puts no probes into some of these executable mappings of one file."""
    found: list[Unprobed] = ["shared"] if any(row.perms.endswith("s") for row in rows) else []
    found += ["writable"] if any("w" in row.perms for row in rows) else []
    return (*found, "hugetlb") if is_hugetlb else tuple(found)


def attachment_line(one: AttachmentReport) -> wire.Attachment:
    """What a rule has attached to a file, as explanations have it."""
    probes = [
        wire.Probe(probe.symbol, probe.program, probe.is_return, probe.state, probe.reason, probe.offset)
        for probe in one.probes
    ]
    return wire.Attachment(one.rule, one.state, one.reason, one.users, one.is_lingering, probes)
