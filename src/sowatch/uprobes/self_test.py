"""A probe of our own, on a function of sowatch's own: whether probes run here at all, and still do."""

from __future__ import annotations

import logging
import os
from typing import Final

from sowatch.bpf.binding import PROGRAMS, Variable
from sowatch.bpf.probe_object import Link, ProbeObject, run_self_test, self_test_address
from sowatch.model.errors import BpfError

__all__ = ["SelfTest"]

LOG = logging.getLogger("sowatch.uprobes")

_PROGRAM: Final = "self_test"


class SelfTest:
    """A program that counts, on a function of this process. One thread at a time may use it.

    Args:
        is_multi: by a uprobe.multi link, else by a perf event.
    """

    def __init__(self, *, is_multi: bool) -> None:
        self._is_multi = is_multi
        self._object: ProbeObject | None = None
        self._link: Link | None = None
        self._runs: Variable | None = None
        #: Why the probe did not run when that was last tried, None if it did.
        self.error: str | None = None
        #: How often it was attached anew, as it did not run any more.
        self.repaired = 0

    def run(self) -> bool:
        """Calls the function; attaches the probe if need be, and anew if it does not run."""
        before = self.error
        try:
            self.error = None
            if self._link is not None and not self._passes():
                LOG.warning("the kernel did not run a probe of sowatch's own; it is attached anew")
                self.repaired += 1
                self._link.close()
                self._link = None
            if self._link is None:
                self._attach()
                if not self._passes():
                    self.error = "the kernel does not run a probe of sowatch's own"
        except BpfError as error:
            self.error = str(error)
        if self.error is not None and self.error != before:
            LOG.warning("the self-test of probes failed: %s", self.error)
        return self.error is None

    def close(self) -> None:
        """Detaches it. Safe to call again."""
        link, self._link = self._link, None
        loaded, self._object = self._object, None
        if link is not None:
            link.close()
        if loaded is not None:
            loaded.close()

    def _passes(self) -> bool:
        assert self._runs is not None
        before = self._runs.value
        run_self_test()
        return self._runs.value > before

    def _attach(self) -> None:
        loaded = self._load()
        fd, offset = _place()
        try:
            if self._is_multi:
                self._link = loaded.link_multi(_PROGRAM, fd, [offset], [0], is_return=False)
            else:
                self._link = loaded.link_one(_PROGRAM, fd, offset, None, is_return=False)
        finally:
            os.close(fd)

    def _load(self) -> ProbeObject:
        if self._object is None:
            loaded = ProbeObject(str(PROGRAMS / "probes.bpf.o"))
            try:
                for program in loaded.programs():
                    if program.name == _PROGRAM:
                        loaded.want(program.name)
                    else:
                        loaded.skip(program.name)
                loaded.use_uprobe(_PROGRAM, multi=self._is_multi)
                loaded.load()
                self._runs = loaded.variable(".bss", "self_test_runs")
            except BaseException:
                loaded.close()
                raise
            self._object = loaded
        return self._object


def _place() -> tuple[int, int]:
    """A descriptor of the file that the function is in, and its offset there; the caller closes it."""
    address = self_test_address()
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as rows:
        for row in rows:
            # 7f1-7f2 r-xp 00001000 08:01 42   /path
            fields = row.rstrip("\n").split(None, 5)
            start, end = (int(one, 16) for one in fields[0].split("-"))
            if start <= address < end and len(fields) == 6:
                try:
                    fd = os.open(fields[5], os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise BpfError("opening sowatch's own library for the self-test", error.errno or 2) from error
                return fd, address - start + int(fields[2], 16)
    raise BpfError("finding sowatch's own library for the self-test", 2)
