"""Notices that the configuration file has changed, however it is changed.

watchfiles (inotify) watches directories, never the file itself: it may be written in place, replaced by a rename, or
be reached through links of which one is replaced, as Kubernetes does with ``..data``.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable
from typing import Final

from watchfiles import watch

from sowatch.linux.openat import open_regular

__all__ = ["FileWatch", "directories_of"]

LOG = logging.getLogger("sowatch.agent")

#: A file has to stay the same for so long: who writes in place is given the time to finish.
_QUIET_S: Final = 0.15
#: One that never does is taken as it is after so many.
_MAX_LOOKS: Final = 20
#: Read this often even without a notification: network file systems give none, and a change in the moment
#: before the directories are watched is not reported.
_EVERY_S: Final = 2.0
_MAX_LINKS: Final = 40


def directories_of(path: str) -> list[str]:
    """The directories in which a name may change so that ``path`` has other content, nearest first.

    Those of the file and of every link on the way, links within the path itself included.
    """
    found: dict[str, None] = {}
    path = os.path.abspath(path)
    for _ in range(_MAX_LINKS):
        parent = os.path.dirname(path)
        found[os.path.realpath(parent)] = None
        link = _first_link(path)
        if link is None:
            break
        found[os.path.realpath(os.path.dirname(link))] = None
        target = os.path.join(os.path.dirname(link), os.readlink(link))
        path = os.path.normpath(target + path[len(link) :])
    return [one for one in found if os.path.isdir(one)]


def _first_link(path: str) -> str | None:
    parts = path.split("/")
    for count in range(2, len(parts) + 1):
        prefix = "/".join(parts[:count])
        if os.path.islink(prefix):
            return prefix
    return None


class FileWatch:
    """A thread that calls back when the content of a file is another one than before, and once at its start.

    What was read before the start may have changed since, so the first check counts as a change.

    Args:
        path: the file; it need not be there.
        on_change: called on the thread.
    """

    def __init__(self, path: str, on_change: Callable[[], None]) -> None:
        self._path = path
        self._on_change = on_change
        self._stop = threading.Event()
        self._seen: bytes | str = b""
        self._thread = threading.Thread(target=self._run, name="sowatch-reload", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Ends it. Safe to call again."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(2.0)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._watch()
            except Exception:
                # Out of inotify watches, or a directory that went away at the wrong moment.
                LOG.exception("the configuration file cannot be watched; it is checked every %g s", _EVERY_S)
                self._stop.wait(_EVERY_S)
            self._look()

    def _watch(self) -> None:
        """Until something has happened in one of the directories, or for a while."""
        directories = directories_of(self._path) or ["/"]
        changes = watch(
            *directories,
            watch_filter=None,
            debounce=200,
            step=20,
            stop_event=self._stop,
            rust_timeout=int(_EVERY_S * 1000),
            yield_on_timeout=True,
            recursive=False,
            raise_interrupt=False,
        )
        self._look()  # what happened before the directories were watched
        for _ in changes:
            self._look()
            if directories_of(self._path) != directories:
                return  # a link leads elsewhere now

    def _look(self) -> None:
        now = _digest(self._path)
        for number in range(_MAX_LOOKS):
            if now == self._seen or self._stop.wait(_QUIET_S):
                return
            before, now = now, _digest(self._path)
            if now == before or number == _MAX_LOOKS - 1:
                self._seen = now
                self._on_change()


def _digest(path: str) -> bytes | str:
    """What distinguishes one content from another; of a file that cannot be read, why."""
    try:
        with open(open_regular(path), "rb") as file:
            return hashlib.sha256(file.read(2 << 20)).digest()
    except OSError as error:
        return error.strerror or "unreadable"
