"""What this kernel and this user can do with uprobes, found out by trying on memory of our own that nobody runs."""

from __future__ import annotations

import errno
import functools
import os
from typing import Final

from sowatch.bpf.binding import PROGRAMS
from sowatch.bpf.features import UNTRIED, Answer, Probe
from sowatch.bpf.probe_object import ProbeObject, has_attach_cookie, has_uprobe_multi, may_return_probe_kill
from sowatch.linux.capabilities import SYS_ADMIN, effective_capabilities, without
from sowatch.model.errors import BpfError

__all__ = ["attaching_needs_admin", "run_probes", "try_attaching", "why_not_attach"]

_REFUSED: Final = frozenset({errno.EPERM, errno.EACCES})
_ADMIN_MASK: Final = 1 << SYS_ADMIN


def try_attaching(*, multi: bool) -> BpfError | None:
    """Attaches a program to a place in memory that nobody runs, and takes it away; gives what went wrong.

    Args:
        multi: by a uprobe.multi link, else by a perf event.
    """
    page = os.memfd_create("sowatch-probe", os.MFD_CLOEXEC)
    try:
        os.ftruncate(page, 4096)
        with ProbeObject(str(PROGRAMS / "probe_calls.bpf.o")) as probe:
            for program in probe.programs():
                probe.use_uprobe(program.name, multi=multi)
            probe.load()
            if multi:
                probe.link_multi("calls_entered", page, [0], [1], is_return=False).close()
            else:
                probe.link_one("calls_entered", page, 0, None, is_return=False).close()
    except BpfError as error:
        return error
    finally:
        os.close(page)
    return None


def why_not_attach() -> str | None:
    """Why this thread cannot attach probes, with the next step; None: it can."""
    failure = try_attaching(multi=bool(has_uprobe_multi()))
    if failure is None:
        return None
    if failure.errno in _REFUSED and not effective_capabilities() & _ADMIN_MASK:
        return (
            f"{failure.operation} failed: {os.strerror(failure.errno)}. Without uprobe.multi (6.6) this kernel asks "
            "for CAP_SYS_ADMIN, as `sowatch doctor` shows. Start again with it; an agent keeps it if a rule attaches."
        )
    return str(failure)


def attaching_needs_admin() -> bool:
    """Whether probes can be attached here with CAP_SYS_ADMIN only.

    So it is where there is no uprobe.multi (before 6.6), and perf-event uprobes ask for it: mainline and the stable
    kernels that have the answer to CVE-2025-38466 (5.10.240, 5.15.189, 6.1.146, 6.6.99, 6.12.39, 6.15.7).
    """
    return not has_uprobe_multi() and _perf_event_needs_admin() is True


@functools.cache
def _perf_event_needs_admin() -> bool | None:
    """None: attaching does not work at all, or nobody can determine."""
    refusal = without(_ADMIN_MASK, lambda: try_attaching(multi=False))
    if refusal is None:
        return False
    if refusal.errno not in _REFUSED or not effective_capabilities() & _ADMIN_MASK:
        return None
    return True if try_attaching(multi=False) is None else None


def run_probes() -> list[Probe]:
    """As `sowatch.bpf.features.run_probes`; takes some hundredths of a second."""
    multi, cookie = has_uprobe_multi(), has_attach_cookie()
    failure = try_attaching(multi=bool(multi))
    needs_admin = _perf_event_needs_admin()
    found = [
        Probe(
            "uprobes",
            "yes" if failure is None else "unknown" if failure.errno in _REFUSED else "no",
            "" if failure is None else f"{failure.operation}: {os.strerror(failure.errno)}",
            "trace, and rules that attach",
        ),
        Probe(
            "uprobe.multi (6.6)", _answer(multi), _untried(multi), "attaching many functions at once, and soon ended"
        ),
        Probe("attach cookie (5.15)", _answer(cookie), _untried(cookie), "one program for many functions"),
    ]
    detail = {
        True: "perf-event uprobes ask for CAP_SYS_ADMIN here (CVE-2025-38466); uprobe.multi does not",
        None: UNTRIED,
    }.get(needs_admin, "")
    without_admin = None if needs_admin is None else not needs_admin
    needed_for = "trace and an agent without CAP_SYS_ADMIN" + ("; not used, as uprobe.multi is there" if multi else "")
    kills = may_return_probe_kill()
    is_safe = None if kills is None else not kills
    seccomp = (
        "a filter that does not know uretprobe(2) ends the process (6.11 until 6.14): return instructions are probed"
    )
    found += [
        Probe("perf-event uprobes with CAP_PERFMON", _answer(without_admin), detail, needed_for),
        Probe(
            "return probes below seccomp filters",
            _answer(is_safe),
            seccomp if kills else _untried(is_safe),
            "times of calls in sandboxed processes by the kernel's return probes",
        ),
    ]
    return [one._replace(feature="probing") for one in found]


def _answer(value: bool | None) -> Answer:
    return "unknown" if value is None else "yes" if value else "no"


def _untried(value: bool | None) -> str:
    return "" if value is not None else UNTRIED
