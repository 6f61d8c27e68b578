r"""What has to be restarted so that nothing runs on stale files any more, and by which command. Pure.

`restart_target` finds it in the path of a process's cgroup, `restart_groups` puts the stale files of processes under
it, and `plan` makes lines for a shell of that. Names of cgroups are chosen by who may make them, containers and users
among them: what is not the name of a unit or a container gets into no command.
docs/decisions/0048-who-must-restart.md has the rules.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final, Literal, NamedTuple, TypeAlias

from msgspec import Struct

from sowatch.inventory.staleness import StaleAnswer, Staleness
from sowatch.linux.cgroups import units_in, user_of_manager
from sowatch.linux.containers import NamedContainer, containers_in
from sowatch.model.escape import one_line
from sowatch.model.events import Library, Process
from sowatch.model.identity import FileId, ProcessId

__all__ = ["RestartGroup", "RestartTarget", "StaleFile", "TargetKind", "plan", "restart_groups", "restart_target"]

#: ``session``: of a login; ``process``: neither a unit nor a container is known.
TargetKind: TypeAlias = Literal["unit", "container", "session", "process"]

_ID_LENGTH: Final = 12
#: What may stand in a command. Units: systemd.unit(5); those that begin with a dash would be options.
_UNIT: Final = re.compile(r"[A-Za-z0-9:_.\\@][A-Za-z0-9:_.\\@-]{0,254}")
_CONTAINER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}")
_SESSION: Final = re.compile(r"session-([a-z]?[0-9]+)\.scope")
#: What a runtime runs beside a container, for that one only.
_HELPER: Final = re.compile(r"(?:^|/)(libpod|crio)-conmon-([0-9a-f]{64})\.scope(?=/|$)")
#: Services below which a runtime of root's puts containers. Below any other that is delegated, its user makes any path.
_RUNTIME_SERVICES: Final = re.compile(
    r"(?:containerd|docker|cri-docker|crio|kubelet|podman|k3s|k3s-agent|k0s(?:controller|worker)|rke2-(?:server|agent)"
    r"|snap\.(?:docker|microk8s)\..+)\.service"
)
#: Units whose end is that of login sessions, or of what they talk to.
_ENDS_SESSIONS: Final = re.compile(
    r"(?:dbus|dbus-broker|systemd-logind|display-manager|gdm3?|lightdm|sddm|lxdm|xdm|(?:serial-|console-)?getty@.*"
    r"|autovt@.*)\.service"
)
#: By the prefix of a scope, or the middle of a path that was taken literally, the command of the runtime.
_TOOLS: Final = {
    "docker": "docker",
    "nerdctl": "nerdctl",
    "cri-containerd": "crictl",
    "crio": "crictl",
    "libpod": "podman",
}
_NO_NAME: Final = "its name is none that may stand in a command"


class RestartTarget(Struct, frozen=True):
    """What is restarted as one.

    Attributes:
        kind: what it is.
        name: of the unit, the session's scope, or the container (its whole id); empty for ``process``.
        unit: the systemd unit; of a container one inside it. None if there is none.
        uid: of the user whose service manager has the unit; None for any other manager.
        container: the id, as in `sowatch.model.events.Process`, or that of the container that a helper such as conmon
            serves.
        command: restarts it, as root, in a shell. None where there is no such command.
        advice: what to do instead; None where there is a command.
    """

    kind: TargetKind
    name: str = ""
    unit: str | None = None
    uid: int | None = None
    container: str | None = None
    command: str | None = None
    advice: str | None = None

    @property
    def label(self) -> str:
        """For people: the name, with whose it is. Not escaped."""
        if self.kind == "process":
            return "(no unit)"
        container = None if self.container is None else _short(self.container)
        if self.unit is None:
            return container or self.name
        manager = "" if self.uid is None else f" (user@{self.uid}.service)"
        return self.unit + manager + (f" in {container}" if container else "")


class StaleFile(Struct, frozen=True):
    """A file that a process has mapped and that is not the one on disk, or of which that is unknown."""

    process: Process
    library: Library
    answer: StaleAnswer
    package: str | None = None

    @property
    def path(self) -> str:
        """The name under which the file is stale, or else its own."""
        return self.answer.path or self.library.path

    @property
    def key(self) -> tuple[ProcessId, FileId, str]:
        """Which process has which file under which path."""
        return self.process.id, self.library.id, self.library.path


class RestartGroup(Struct, frozen=True):
    """What has to be restarted, and the stale files of its processes, by process and path."""

    target: RestartTarget
    files: tuple[StaleFile, ...]

    @property
    def processes(self) -> tuple[Process, ...]:
        """Each once, by pid."""
        return tuple({one.process.id: one.process for one in self.files}.values())

    @property
    def why_not(self) -> str | None:
        """Why a restart is not called for; None: it is."""
        certain = [one for one in self.files if one.answer.stale != Staleness.UNKNOWN]
        if not certain:
            return "it cannot be determined whether its files are stale"
        if all(one.answer.is_same_build for one in certain):
            return "what is on disk is the same build"
        return None


@lru_cache(8192)
def restart_target(cgroup: str | None) -> RestartTarget:
    """What is restarted for the sake of a process.

    Args:
        cgroup: that of the process, as in `sowatch.model.events.Process`.

    >>> restart_target("/system.slice/nginx.service").command
    'systemctl restart nginx.service'
    >>> restart_target("/user.slice/user-1000.slice/user@1000.service/app.slice/syncthing.service").command
    'systemctl --user --machine=1000@ restart syncthing.service'
    >>> restart_target("/system.slice/docker-" + "0" * 64 + ".scope").command
    'docker restart 000000000000'
    >>> restart_target("/user.slice/user-1000.slice/session-3.scope").advice
    'log out of session 3'
    """
    path = (cgroup or "").removesuffix(" (deleted)")
    named = containers_in(path)
    if not named:
        helper = _HELPER.search(path)
        if helper is None:
            return _of_unit(units_in(path), (), None)
        found = [_Container(_TOOLS[helper[1]], helper[2])]
        return _of_container(helper[2], _restart(found, path[: helper.start()]))
    before = path[: named[0].begin]
    found = [_Container(_tool(path, one), one.id if _CONTAINER.fullmatch(one.id) else None) for one in named]
    innermost = found[-1]
    units = units_in(path)
    if units and innermost.tool == "machinectl" and innermost.name is not None:
        return _of_unit(units, _reach(found[:-1], before), named[-1].id, machine=innermost.name)
    if units:
        return _of_unit(units, _reach(found, before), named[-1].id)
    around = units_in(before)
    if around and path[named[0].begin :].startswith("libpod-payload-"):
        # The unit runs the container itself, and makes it anew (podman-systemd.unit(5)).
        command = _of_unit(around, (), None).command
        return _of_container(named[-1].id, None if command is None else shlex.split(command))
    return _of_container(named[-1].id, _restart(found, before))


def restart_groups(files: Iterable[StaleFile]) -> list[RestartGroup]:
    """Stale files under what has to be restarted: service managers, units, containers, sessions, the rest; by name."""
    found: dict[RestartTarget, list[StaleFile]] = {}
    for one in sorted(files, key=lambda one: (one.process.id, one.path, one.library.id)):
        found.setdefault(restart_target(one.process.cgroup), []).append(one)
    return [RestartGroup(target, tuple(found[target])) for target in sorted(found, key=_rank)]


def plan(groups: Iterable[RestartGroup]) -> list[str]:
    """Lines for a shell, each once: commands, and comments where there is none, or where none is called for."""
    lines: dict[str, None] = {}
    for group in groups:
        target, why_not = group.target, group.why_not
        if target.command is not None and why_not is None:
            lines[target.command] = None
            continue
        who = ", ".join(f"{one.pid} {one.comm or '?'}" for one in group.processes)
        what = why_not or target.advice
        lines[one_line(f"# {target.label}: {what} ({who})" if target.name else f"# {who}: {what}")] = None
    return list(lines)


# ---- what a path says ---------------------------------------------------------------------------


def _of_unit(
    units: Sequence[str], inside: Sequence[str] | None, container: str | None, *, machine: str = ""
) -> RestartTarget:
    """Of the unit that its manager knows: what is nested deeper was made by the unit itself.

    ``inside``: the words that run a command where ``systemctl`` is, None if they are not known; ``machine``: where
    that goes from there.
    """
    if not units:
        return RestartTarget("process", advice="end it and start it again")
    uid = user_of_manager(units[0])
    name = units[0]
    if uid is not None and len(units) > 1:
        name = units[1]
    else:
        uid = None
    session = _SESSION.fullmatch(name)
    kind: TargetKind = "session" if session is not None else "unit"
    command = advice = None
    if session is not None:
        advice = f"log out of session {session[1]}"
    elif not _UNIT.fullmatch(name):
        advice = f"{_NO_NAME}: end it and start it again"
    elif (of_user := user_of_manager(name)) is not None:
        advice = f"log out: it runs all services of user {of_user}"
    elif name.endswith(".scope") and name != "init.scope":
        advice = "a scope cannot be restarted: end what runs in it and start that again"
    else:
        words = ["daemon-reexec"] if name == "init.scope" else ["restart", name]
        user = "" if uid is None else f"{uid}@"
        manager = [*(["--user"] if user else []), *([f"--machine={user}{machine}"] if user or machine else [])]
        text = shlex.join([*(inside or ()), "systemctl", *manager, *words])
        if _ENDS_SESSIONS.fullmatch(name):
            advice = f"`{text}` ends login sessions: choose the moment, or reboot"
        elif inside is None:
            advice = f"inside the container: `{text}`"
        else:
            command = text
    return RestartTarget(kind, name, name, uid, container, command, advice)


def _of_container(name: str, words: Sequence[str] | None) -> RestartTarget:
    if words is None:
        return RestartTarget(
            "container", name, container=name, advice="restart the container with what started it: which is not known"
        )
    return RestartTarget("container", name, container=name, command=shlex.join(words))


class _Container(NamedTuple):
    """The command of its runtime, and its id or name; None where it is not known, or may not be used."""

    tool: str | None
    name: str | None


def _restart(containers: Sequence[_Container], before: str) -> list[str] | None:
    """The words that restart the innermost container; None if they are not known."""
    tool, name = containers[-1]
    reach = _reach(containers[:-1], before)
    if tool is None or name is None or reach is None:
        return None
    if tool == "machinectl":
        return [*reach, tool, "reboot", name]
    # The kubelet starts what crictl has stopped.
    return [*reach, tool, "stop" if tool == "crictl" else "restart", _short(name)]


def _reach(containers: Sequence[_Container], before: str) -> list[str] | None:
    """The words before a command that is to run inside the containers; None if they are not known.

    ``before`` is the path up to the first one. Whoever has made it decides whose containers they are.
    """
    units = units_in(before)
    uid = user_of_manager(units[0]) if units else None
    if uid is None and not all(_RUNTIME_SERVICES.fullmatch(one) for one in units if one.endswith(".service")):
        return None
    # The runtime of a user without privileges answers only within that user's service manager.
    words = [] if uid is None else ["systemd-run", "--user", f"--machine={uid}@", "--wait"]
    for tool, name in containers:
        if tool is None or name is None:
            return None
        is_machine = tool == "machinectl"
        words += ["systemd-run", f"--machine={name}", "--wait"] if is_machine else [tool, "exec", _short(name)]
    return words


def _tool(path: str, container: NamedContainer) -> str | None:
    """The command of the runtime that has a container, as far as its cgroup says."""
    if container.runtime.startswith("systemd-"):
        return "machinectl"
    if container.runtime == "cgroupfs":
        parents = path[: container.begin].split("/")[:-1]
        if any(one.startswith("kubepods") for one in parents):
            return "crictl"
        parent = parents[-1] if parents else ""
        return {"docker": "docker", "libpod_parent": "podman", "default": "nerdctl"}.get(parent)
    text = path[container.begin : container.end]
    return next(
        (tool for prefix, tool in _TOOLS.items() if text.startswith(f"{prefix}-") or f":{prefix}:" in text), None
    )


def _short(container: str) -> str:
    return container[:_ID_LENGTH] if re.fullmatch("[0-9a-f]{64}", container) else container


def _rank(target: RestartTarget) -> tuple[int, int, str, int, str]:
    kinds: tuple[TargetKind, ...] = ("unit", "container", "session", "process")
    is_manager = target.unit == "init.scope"
    return kinds.index(target.kind), not is_manager, target.name, target.uid or -1, target.container or ""
