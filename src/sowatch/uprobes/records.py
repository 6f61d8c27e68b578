"""What an attacher says of itself: sites, files, failures, gauges. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from sowatch.model.events import Library

__all__ = ["AttachedFile", "AttacherStats", "Attachment", "Failure", "Site", "State"]

#: ``attached``: the kernel has it. ``retrying``: the surroundings were at fault, and it is tried again.
#: ``failed``: it can never be attached to this file.
State = Literal["attached", "retrying", "failed"]


class Site(NamedTuple):
    """A function that is probed: ``cookie`` is what bpf_get_attach_cookie gives there.

    Of a movable probe (`sowatch.uprobes.probes.Probe`) it is the lower half of that; the upper half, signed, is
    ``stack_bytes``: how far the return address is above the stack pointer when the program runs.
    """

    cookie: int
    library: Library
    symbol: str
    offset: int
    program: str
    is_return: bool
    stack_bytes: int = 0

    @property
    def link_cookie(self) -> int:
        """What bpf_get_attach_cookie gives."""
        return self.cookie | (self.stack_bytes & 0xFFFFFFFF) << 32


class Failure(NamedTuple):
    """A probe that could not be attached to a file, and why; a transient failure is tried again."""

    library: Library
    symbol: str
    reason: str
    is_permanent: bool


class Attachment(NamedTuple):
    """One probe on one file, as it is now.

    ``offset`` (in the file, bytes) and ``cookie`` are None if the function was not found; ``link_id`` is the kernel's
    number of the link, None without a link or where links have none (perf events before 5.15).
    """

    symbol: str
    program: str
    is_return: bool
    state: State
    reason: str | None = None
    offset: int | None = None
    cookie: int | None = None
    link_id: int | None = None


class AttachedFile(NamedTuple):
    """One real file, as it is now.

    ``state`` is ``failed`` for a file that was refused (``reason`` says why, nothing is attached), ``retrying`` while
    some probe is, else ``attached``; then probes that the file does not have are among ``attachments``.
    ``users`` are activations; ``is_lingering``: without users, detached soon; ``is_armed``: attached without users
    because it is asked for by name.
    """

    library: Library
    state: State
    reason: str | None
    users: int
    is_lingering: bool
    is_armed: bool
    attachments: tuple[Attachment, ...]

    def count(self, state: State) -> int:
        """How many probes are in this state."""
        return sum(one.state == state for one in self.attachments)


@dataclass(frozen=True, slots=True)
class AttacherStats:
    """Gauges: ``files`` that are held, ``expected`` and ``attached`` probes, ``failed`` ones, ``refused`` files.

    ``expected`` are the probes that the files have a place for; ``expected - attached`` are being retried. ``failed``
    are probes that a file has no place for. Counters since the attacher was made: ``repaired`` links that the kernel
    did not have any more (or elsewhere), ``retries`` of transient failures.

    ``armed`` files are attached because they are asked for by name, ``lingering`` ones have no users any more.
    ``self_test_error`` says why a probe of sowatch's own did not run when it was last tried, None if it did.
    """

    files: int = 0
    expected: int = 0
    attached: int = 0
    failed: int = 0
    repaired: int = 0
    retries: int = 0
    refused: int = 0
    armed: int = 0
    lingering: int = 0
    self_test_error: str | None = None
