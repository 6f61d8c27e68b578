"""A plan of restarts: what each of them is for, and what is not served meanwhile. Nothing is restarted here. Pure.

`planned` puts together what is known of the groups of `sowatch.inventory.restarts`, `shell_lines` makes lines for a
shell of that. docs/decisions/0079-restart-plan.md has the rules.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from msgspec import Struct

from sowatch.inventory.packages import PackageIdentity
from sowatch.inventory.restarts import RestartGroup, StaleFile, plan
from sowatch.linux.listeners import Listener, Listening, ports_of
from sowatch.model.escape import one_line
from sowatch.model.events import Pod, Process
from sowatch.model.identity import FileId, ProcessId
from sowatch.model.plural import counted

__all__ = ["FileInUse", "PlannedProcess", "PlannedRestart", "planned", "shell_lines"]

#: Files and pids that a comment names; the others are counted.
_NAMED: Final = 5
#: What may stand in a command: RFC 1123, as Kubernetes has names of pods and namespaces.
_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?")
#: The uid of a pod that is a file on the node: deleting it in the cluster restarts nothing.
_STATIC_UID: Final = re.compile("[0-9a-f]{32}")


class FileInUse(Struct, frozen=True):
    """A stale file, and the package that it was of when it was mapped; None: that is not known."""

    file: StaleFile
    package: PackageIdentity | None = None

    @property
    def label(self) -> str:
        """What still runs: package and version, else the build; not escaped."""
        name = os.path.basename(self.file.path)
        if self.package is not None:
            return f"{self.package.name} {self.package.version} ({name})"
        build = self.file.library.build_id
        return name if build is None else f"{name} (build {build[:12]})"


class PlannedProcess(Struct, frozen=True):
    """A process that has to be restarted; ``listening`` is None where its sockets could not be read."""

    process: Process
    listening: Listening | None
    files: tuple[FileInUse, ...]


class PlannedRestart(Struct, frozen=True):
    """What is restarted as one."""

    group: RestartGroup
    processes: tuple[PlannedProcess, ...]

    @property
    def listeners(self) -> tuple[Listener, ...]:
        """What is not served while it restarts."""
        sockets = {one for process in self.processes if process.listening for one in process.listening.sockets}
        return tuple(sorted(sockets))

    @property
    def pods(self) -> tuple[Pod, ...]:
        """The pods of Kubernetes that its processes are of, each once."""
        return tuple({one.process.pod.uid: one.process.pod for one in self.processes if one.process.pod}.values())

    @property
    def pod_advice(self) -> str | None:
        """What to do in the cluster; None: it is of no pod whose name is known, or of one that the node itself has.

        Which controller has a pod is not known here, and the name of a pod does not say.
        """
        for pod in self.pods:
            if pod.name is None or pod.namespace is None or _STATIC_UID.fullmatch(pod.uid):
                continue
            if _NAME.fullmatch(pod.name) and _NAME.fullmatch(pod.namespace):
                return (
                    f"in the cluster: `kubectl --namespace {pod.namespace} delete pod {pod.name}`, or `kubectl rollout "
                    "restart` of what has made it"
                )
        return None

    @property
    def advice(self) -> str | None:
        """What to do where there is no command, or what is better than it."""
        return "; ".join(filter(None, (self.group.target.advice, self.pod_advice))) or None


def planned(
    groups: Iterable[RestartGroup],
    packages: Mapping[tuple[ProcessId, FileId, str], PackageIdentity | None],
    listening: Mapping[int, Listening | None],
) -> list[PlannedRestart]:
    """What is known of groups, put together.

    Args:
        groups: of stale files.
        packages: by process and file, see `sowatch.inventory.restarts.StaleFile.key`, what was mapped.
        listening: by pid, what it listens on.
    """
    found = []
    for group in groups:
        files: dict[Process, list[FileInUse]] = {}
        for one in group.files:
            files.setdefault(one.process, []).append(FileInUse(one, packages.get(one.key)))
        processes = (PlannedProcess(one, listening.get(one.pid), tuple(of)) for one, of in files.items())
        found.append(PlannedRestart(group, tuple(processes)))
    return found


def shell_lines(restarts: Iterable[PlannedRestart]) -> list[str]:
    """Lines for a shell, each once: commands, and comments before them on what they are for."""
    lines: dict[str, None] = {}
    for one in restarts:
        if one.group.why_not is None:
            lines[_comment(one)] = None
            if one.pod_advice is not None:
                lines[one_line(f"# {one.group.target.label}: {one.pod_advice}")] = None
        lines |= dict.fromkeys(plan([one.group]))
    return list(lines)


def _comment(one: PlannedRestart) -> str:
    pids = _some([str(process.process.pid) for process in one.processes])
    names = ", ".join(dict.fromkeys(process.process.comm or "?" for process in one.processes))
    runs = list(dict.fromkeys(used.label for process in one.processes for used in process.files))
    ports = ports_of(one.listeners)
    parts = [
        f"# {one.group.target.label}: {counted(len(one.processes), 'process', 'processes')} ({names}, {pids})",
        f"still {'runs' if len(one.processes) == 1 else 'run'} {_some(runs)}",
        *([f"{'listens' if len(one.processes) == 1 else 'listen'} on {ports}"] if ports else []),
        *(f"pod {pod.namespace}/{pod.name}" for pod in one.pods if pod.name),
    ]
    return one_line("; ".join(parts))


def _some(texts: Sequence[str]) -> str:
    more = len(texts) - _NAMED
    return ", ".join(texts[:_NAMED]) + (f" and {more} more" if more > 0 else "")
