"""What an attacher has on one real file, and how it gets there: links of the kernel, one or more a file."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from sowatch.bpf.probe_object import Link, ProbeObject
from sowatch.linux.descriptors import close_fd
from sowatch.model.errors import BpfError
from sowatch.model.events import Library
from sowatch.uprobes.records import AttachedFile, Attachment, Site, State

__all__ = ["FIRST_RETRY_S", "File", "Group", "Linker", "PlannedSite", "close_links"]

#: A failure of the surroundings is tried again after this, then after twice that, up to the second.
FIRST_RETRY_S: Final = 1.0
_SLOWEST_RETRY_S: Final = 60.0
#: Failures that say nothing of the file.
TRANSIENT: Final = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.EINTR,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENOMEM,
        errno.ENOSPC,
        errno.ESRCH,
    }
)
#: Links that are closed at once, by all attachers. Each close waits for the kernel; those of uprobe.multi links wait at
#: the same time (200 in 0.5 s), perf events below one lock of the kernel (event_mutex), one after the other.
_MAX_CLOSERS: Final = 32
_closers = threading.BoundedSemaphore(_MAX_CLOSERS)


class PlannedSite(NamedTuple):
    """A site that is to be attached. ``is_return_probe``: by the kernel's return probe."""

    site: Site
    is_return_probe: bool
    is_optional: bool


@dataclass(slots=True)
class Group:
    """What one link attaches: one program on some sites of one file. ``link`` is None until that has worked.

    ``own_object`` is there where programs cannot distinguish sites: the object loaded once more, for this site only.
    ``error`` says why there is no link.
    """

    program: str
    is_return_probe: bool
    is_optional: bool
    sites: list[Site]
    link: Link | None = None
    own_object: ProbeObject | None = None
    error: BpfError | None = None

    @property
    def state(self) -> State:
        """Whether it is attached, or will be tried again."""
        if self.link is not None:
            return "attached"
        return "failed" if self.error is not None and self.error.errno not in TRANSIENT else "retrying"

    def is_in_place(self, fd: int) -> bool:
        """Whether the kernel still has the link, on the file that a descriptor is open on and on these very offsets.

        As far as it says so: of a perf event it does not remember the file, and older kernels remember less.
        """
        if self.link is None or not self.link.is_attached:
            return False
        place = self.link.place(len(self.sites))
        if place is None:
            return True
        offsets = sorted(site.offset for site in self.sites)
        if place.total != len(offsets) or sorted(place.offsets) != offsets:
            return False
        # Both paths are of the same kind; the file may be renamed between the two.
        return place.path in (None, _shown_path(fd)) or self._shows(fd) or self._shows(fd)

    def _shows(self, fd: int) -> bool:
        place = None if self.link is None else self.link.place(len(self.sites))
        return place is not None and place.path == _shown_path(fd)


def _shown_path(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


@dataclass(slots=True)
class File:
    """One real file: who uses it, and its links. ``fd`` is our own descriptor of it."""

    library: Library
    fd: int
    users: int = 0
    is_armed: bool = False
    lingers_until: float | None = None
    groups: list[Group] = field(default_factory=list)
    missing: list[Attachment] = field(default_factory=list)
    retry_at: float | None = None
    _retries: int = 0

    @property
    def sites(self) -> list[Site]:
        """Every site, attached or not."""
        return [site for group in self.groups for site in group.sites]

    @property
    def is_held(self) -> bool:
        """Whether somebody uses it, or it is to stay attached without users."""
        return self.users > 0 or self.is_armed

    @property
    def is_deleted(self) -> bool:
        """Whether no name leads to it any more, so that only who has it open or mapped can use it."""
        try:
            return os.fstat(self.fd).st_nlink == 0
        except OSError:  # a file system may refuse it, or be gone
            return False

    def become(self, library: Library) -> None:
        """Another description of the same file: what the kernel knows of it, instead of what stat says."""
        self.library = library
        for group in self.groups:
            group.sites = [site._replace(library=library) for site in group.sites]

    def plan_retry(self, now: float) -> None:
        """Sets when to try again what is not attached; later each time."""
        if all(group.state != "retrying" for group in self.groups):
            self.retry_at, self._retries = None, 0
            return
        self.retry_at = now + min(_SLOWEST_RETRY_S, FIRST_RETRY_S * 2**self._retries)
        self._retries = min(self._retries + 1, 16)

    def view(self) -> AttachedFile:
        """How it is now."""
        attachments = [
            Attachment(
                site.symbol,
                site.program,
                site.is_return,
                group.state,
                None if group.error is None else str(group.error),
                site.offset,
                site.cookie,
                None if group.link is None else group.link.id,
            )
            for group in self.groups
            for site in group.sites
        ]
        attachments += self.missing
        waiting = next((one.reason for one in attachments if one.state == "retrying"), None)
        return AttachedFile(
            self.library,
            "attached" if waiting is None else "retrying",
            waiting,
            self.users,
            is_lingering=not self.is_held and self.lingers_until is not None,
            is_armed=self.is_armed,
            attachments=tuple(attachments),
        )

    def close(self) -> None:
        """Detaches, and gives back the descriptor."""
        close_files([self])


class Linker:
    """Makes the links of files.

    Args:
        loaded: the object in the kernel.
        is_multi: one uprobe.multi link for many sites, else a perf event for each.
        has_cookies: programs can ask which site runs them.
        load_for: gives the object once more, for the site with this cookie only; None: never.
    """

    def __init__(
        self,
        loaded: ProbeObject,
        *,
        is_multi: bool,
        has_cookies: bool,
        load_for: Callable[[int], ProbeObject] | None,
    ) -> None:
        self._loaded = loaded
        self._is_multi = is_multi
        self._has_cookies = has_cookies
        self._load_for = None if has_cookies else load_for

    def groups(self, sites: Iterable[PlannedSite]) -> list[Group]:
        """What each link attaches. A program is put on one place once, by whatever names it was asked for."""
        found: dict[tuple[object, ...], Group] = {}
        seen = set()
        for site, is_return_probe, is_optional in sorted(sites, key=lambda one: one.is_optional):
            place = site.program, is_return_probe, site.offset
            if place in seen:
                continue
            seen.add(place)
            key = (site.program, is_return_probe, is_optional) if self._is_multi else place
            found.setdefault(key, Group(site.program, is_return_probe, is_optional, [])).sites.append(site)
        return list(found.values())

    def link(self, file: File) -> BpfError | None:
        """Attaches what is not attached yet.

        Returns:
            Why something that is required can never be attached; else None.
        """
        # Returns first: else a call between the two has an entry whose return nobody sees.
        for group in sorted(file.groups, key=lambda one: not one.sites[0].is_return):
            if group.link is None and group.state != "failed":
                self._try(file, group)
        # A uprobe.multi link is attached as a whole: of several optional sites the good ones get links of their own.
        for group in [one for one in file.groups if one.state == "failed" and len(one.sites) > 1]:
            file.groups.remove(group)
            parts = [Group(group.program, group.is_return_probe, group.is_optional, [site]) for site in group.sites]
            file.groups += parts
            for part in parts:
                self._try(file, part)
        return next((one.error for one in file.groups if one.state == "failed" and not one.is_optional), None)

    def _try(self, file: File, group: Group) -> None:
        try:
            group.link = self._attach(file, group)
        except BpfError as error:
            group.error = error
        else:
            group.error = None

    def _attach(self, file: File, group: Group) -> Link:
        if self._is_multi:
            offsets = [site.offset for site in group.sites]
            cookies = [site.link_cookie for site in group.sites]
            return self._loaded.link_multi(group.program, file.fd, offsets, cookies, is_return=group.is_return_probe)
        (site,) = group.sites
        cookie = site.link_cookie if self._has_cookies else None
        return self._object_for(file, group).link_one(
            group.program, file.fd, site.offset, cookie, is_return=group.is_return_probe
        )

    def _object_for(self, file: File, group: Group) -> ProbeObject:
        """What is attached for a site: an object of its own, for entry and return, where programs have no cookies."""
        if self._load_for is None:
            return self._loaded
        cookie = group.sites[0].cookie
        for other in file.groups:
            if other.own_object is not None and other.sites[0].cookie == cookie:
                return other.own_object
        group.own_object = self._load_for(cookie)
        return group.own_object


def close_files(files: Iterable[File]) -> None:
    """Detaches files, and gives back their descriptors and what was loaded for them."""
    files = list(files)
    close_links(group.link for file in files for group in file.groups if group.link is not None)
    for file in files:
        fd, file.fd = file.fd, -1
        close_fd(fd)
        for group in file.groups:
            if group.own_object is not None:
                group.own_object.close()


def close_links(links: Iterable[Link]) -> None:
    """Detaches; some at once, as the kernel makes each wait."""
    links = list(links)
    if len(links) == 1:
        _close(links[0])
    elif links:
        with ThreadPoolExecutor(min(_MAX_CLOSERS, len(links)), thread_name_prefix="sowatch-detach") as pool:
            list(pool.map(_close, links))


def _close(link: Link) -> None:
    with _closers:
        link.close()
