"""Why a process has no HTTP flows, as a sentence for people."""

from __future__ import annotations

# Heavy modules (explanations) are imported only where they are used.
import os
import re
from collections.abc import Collection, Iterator
from functools import partial
from typing import TYPE_CHECKING, Final

from sowatch.linux.containers import container_id
from sowatch.linux.proc import Miss, ProcFs
from sowatch.model.escape import visible
from sowatch.model.plural import counted

if TYPE_CHECKING:
    from sowatch.explain.probing import TlsAnswer
    from sowatch.http.taps import HttpTap
    from sowatch.linux.tls_libraries import TlsLook
    from sowatch.model import wire_explain
    from sowatch.model.events import Process

__all__ = ["Named", "why_no_flows"]

_WHY: Final = {
    "tappable": "it can have flows: `sowatch http --pid` shows its requests.",
    "no_tls": "none: nothing that it has mapped exports the functions of OpenSSL, GnuTLS or NSS; "
    "HTTP without TLS is not seen.",
    "unread": "none that is known: what it has mapped cannot be read.",
    "kernel_refuses": "none: the kernel puts no probes into its mapping of the TLS library.",
    "not_exported": "none: OpenSSL is linked into its program, which does not export it.",
    "go": "none: it is a Go program, which brings a TLS of its own.",
    "rustls": "none: rustls is linked into its program, and has no functions that could be probed.",
    "java": "none: it is a Java machine, which brings a TLS of its own.",
    "static": "none: its program is static and has no symbols, so nobody can find a TLS library in it.",
    "off": 'none: [http] of the agent is off. Set enabled = true there, or use "sowatch http".',
    "not_selected": "none: [http] of the agent selects other processes.",
    "refused": "none: its TLS library could not be tapped",
    "not_attached": "none yet: its TLS library is not attached.",
    "no_call": "none yet: its TLS library is attached, and it has not read or written by it since.",
    "no_http": "none: it has read or written by its TLS library, and that was no HTTP so far.",
    "flows": "it has flows.",
}


def why_no_flows(answer: wire_explain.Tls) -> str:
    """One sentence, with the libraries that it is about."""
    said = _WHY[answer.state]
    if answer.reason is not None:
        said = f"{said.rstrip('.')}: {visible(answer.reason)}"
    if answer.calls:
        said += f" ({counted(answer.calls, 'call')}, {counted(answer.flows, 'flow')})"
    return said + "".join(f" {visible(path)}" for path in answer.libraries[:3])


class Named:
    """The processes that ``--pid`` names: why those have no flows that have none.

    They are examined at the beginning, too: at the end some are gone.

    Args:
        proc: the host's.
        pids: of the processes.
        pattern: what paths of libraries have to match.
        container: what ids of containers have to begin with.

    Raises:
        SowatchError: there is no such process.
        UsageError: the id of a thread.
    """

    def __init__(self, proc: ProcFs, pids: Collection[int], pattern: str | None, container: str | None) -> None:
        from sowatch.explain import check_process

        self._proc = proc
        self._pattern = pattern
        self._container = container
        self._processes: dict[int, Process] = {}
        for pid in dict.fromkeys(pids):
            check_process(proc, pid)
            if (process := proc.process(pid, container_of=container_id)) is not None:
                self._processes[pid] = process
        self._first = dict(self._answers())

    def without_flows(self, tap: HttpTap) -> dict[int, TlsAnswer]:
        """By pid; after `HttpTap.finish`, before it is closed."""
        from sowatch.explain.probing import TlsAnswer

        last = dict(self._answers())
        failures = {one.library.path: one.reason for one in tap.failures}
        found: dict[int, TlsAnswer] = {}
        for pid, process in self._processes.items():
            activity = tap.activity(process.id)
            answer = _latest(last.get(pid), self._first.get(pid))
            if activity is not None and activity.flows:
                continue
            if activity is not None and (activity.calls or answer.state == "tappable"):
                reasons = [failures[path] for path in answer.files if path in failures]
                if reasons and not activity.calls:
                    answer = TlsAnswer("refused", reasons[0], answer.files)
                else:
                    answer = TlsAnswer(
                        "no_http" if activity.calls else "no_call", files=answer.files, calls=activity.calls
                    )
            elif answer.state == "tappable":
                answer = TlsAnswer("not_attached", self._why_not_attached(process, answer), answer.files)
            found[pid] = answer
        return found

    def _why_not_attached(self, process: Process, answer: TlsAnswer) -> str | None:
        if self._container is not None and not (process.container or "").startswith(self._container):
            return "the process is not in the container that --container names"
        if self._pattern is not None and not any(re.search(self._pattern, path) for path in answer.files):
            return "no PATTERN matches its path"
        return None

    def _answers(self) -> Iterator[tuple[int, TlsAnswer]]:
        """What the files of those say that are still there, and whose file systems answer."""
        from sowatch.explain.looks import TimeoutWorker
        from sowatch.explain.probing import unread_answer

        with TimeoutWorker() as worker:
            for pid, process in self._processes.items():
                answer = worker.run(partial(self._answer, pid))
                now = self._proc.process(pid)
                if now is not None and now.id == process.id:
                    yield pid, unread_answer(None) if answer is None else answer

    def _answer(self, pid: int) -> TlsAnswer:
        from sowatch.explain.probing import tls_answer, unprobed, unread_answer
        from sowatch.linux.tls_libraries import look_for_tls

        look: TlsLook | Miss = look_for_tls(self._proc, pid)
        rows = self._proc.executable_maps(pid)
        if isinstance(look, Miss):
            return unread_answer(look)
        if isinstance(rows, Miss):
            return unread_answer(rows)
        # Below another root they are longer than what the process sees.
        refused = [os.fsdecode(row.path) for row in rows if unprobed([row], is_hugetlb=False)]
        return tls_answer(look, {one.path for one in look.files if any(path.endswith(one.path) for path in refused)})


def _latest(last: TlsAnswer | None, first: TlsAnswer | None) -> TlsAnswer:
    """What was known of a process that may have ended since, or may be read no more."""
    from sowatch.explain.probing import unread_answer

    known = [one for one in (last, first) if one is not None]
    return next((one for one in known if one.state != "unread"), known[0] if known else unread_answer(Miss.GONE))
