"""What has to be restarted, by the path of a cgroup alone, and the lines that a shell is given for it."""

from __future__ import annotations

import shlex
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sowatch.inventory.restarts import RestartGroup, StaleFile, plan, restart_groups, restart_target
from sowatch.inventory.staleness import StaleAnswer, Staleness
from sowatch.linux.cgroups import unit_of
from sowatch.linux.containers import CONTAINER_FORMS, container_id
from sowatch.model.events import Library, Process
from sowatch.model.identity import FileId

HEX = "0123456789abcdef" * 4
OTHER = "fedcba9876543210" * 4
ID, OTHER_ID = HEX[:12], OTHER[:12]
USER = "/user.slice/user-1000.slice/user@1000.service"

REPLACED = StaleAnswer(Staleness.REPLACED)
LIBRARY = Library("/usr/lib/libssl.so.3", FileId(8, 1, 42))


@pytest.mark.parametrize(
    ("cgroup", "label", "command"),
    [
        ("/system.slice/nginx.service", "nginx.service", "systemctl restart nginx.service"),
        ("/system.slice/nginx.service/workers", "nginx.service", "systemctl restart nginx.service"),
        ("/system.slice/nginx.service (deleted)", "nginx.service", "systemctl restart nginx.service"),
        (
            "/system.slice/system-postgresql.slice/postgresql@15-main.service",
            "postgresql@15-main.service",
            "systemctl restart postgresql@15-main.service",
        ),
        (r"/system.slice/a\x2db.service", r"a\x2db.service", r"systemctl restart 'a\x2db.service'"),
        ("/init.scope", "init.scope", "systemctl daemon-reexec"),
        (
            f"{USER}/app.slice/dropbox.service",
            "dropbox.service (user@1000.service)",
            "systemctl --user --machine=1000@ restart dropbox.service",
        ),
        (
            f"{USER}/init.scope",
            "init.scope (user@1000.service)",
            "systemctl --user --machine=1000@ daemon-reexec",
        ),
        # A service may make cgroups below its own that look like units: the system's manager knows none of them.
        ("/system.slice/ci.service/sshd.service", "ci.service", "systemctl restart ci.service"),
        (
            f"{USER}/app.slice/ci.service/sshd.service",
            "ci.service (user@1000.service)",
            "systemctl --user --machine=1000@ restart ci.service",
        ),
    ],
)
def test_a_unit_is_restarted_by_its_own_manager(cgroup: str, label: str, command: str) -> None:
    target = restart_target(cgroup)

    assert (target.kind, target.label, target.command, target.advice) == ("unit", label, command, None)


@pytest.mark.parametrize(
    ("cgroup", "command"),
    [
        (f"/docker/{HEX}", f"docker restart {ID}"),
        (f"/system.slice/docker.service/docker/{HEX}", f"docker restart {ID}"),
        (f"/system.slice/docker-{HEX}.scope", f"docker restart {ID}"),
        (f"/system.slice/nerdctl-{HEX}.scope", f"nerdctl restart {ID}"),
        (f"/default/{HEX}", f"nerdctl restart {ID}"),
        (f"/machine.slice/libpod-{HEX}.scope/container", f"podman restart {ID}"),
        (f"/libpod_parent/libpod-{HEX}", f"podman restart {ID}"),
        (f"/kubepods.slice/kubepods-pod1.slice/cri-containerd-{HEX}.scope", f"crictl stop {ID}"),
        (f"/kubepods.slice/kubepods-pod1.slice/crio-{HEX}.scope", f"crictl stop {ID}"),
        (f"/kubepods/burstable/pod1/{HEX}", f"crictl stop {ID}"),
        (f"/system.slice/containerd.service/kubepods-pod1.slice:cri-containerd:{HEX}", f"crictl stop {ID}"),
        (r"/machine.slice/machine-web\x2d1.scope/payload", "machinectl reboot web-1"),
        (r"/machine.slice/systemd-nspawn@web.service/payload", "machinectl reboot web"),
        # The runtime of a user without privileges.
        (
            f"{USER}/user.slice/libpod-{HEX}.scope/container",
            f"systemd-run --user --machine=1000@ --wait podman restart {ID}",
        ),
        # A unit that runs the container itself (Quadlet).
        (f"/system.slice/web.service/libpod-payload-{HEX}", "systemctl restart web.service"),
        (
            f"{USER}/app.slice/web.service/libpod-payload-{HEX}",
            "systemctl --user --machine=1000@ restart web.service",
        ),
        # What serves one container only.
        (f"/machine.slice/libpod-conmon-{HEX}.scope", f"podman restart {ID}"),
        (f"/kubepods.slice/crio-conmon-{HEX}.scope", f"crictl stop {ID}"),
        # Of nested ones the innermost.
        (f"/docker/{OTHER}/docker/{HEX}", f"docker exec {OTHER_ID} docker restart {ID}"),
        (
            f"/docker/{OTHER}/kubelet.slice/kubelet-kubepods.slice/cri-containerd-{HEX}.scope",
            f"docker exec {OTHER_ID} crictl stop {ID}",
        ),
        (
            f"/machine.slice/machine-web.scope/payload/docker/{HEX}",
            f"systemd-run --machine=web --wait docker restart {ID}",
        ),
    ],
)
def test_a_container_is_restarted_by_its_runtime(cgroup: str, command: str) -> None:
    target = restart_target(cgroup)

    assert (target.kind, target.unit, target.command, target.advice) == ("container", None, command, None)
    assert target.container == target.name
    assert target.name == (container_id(cgroup) or HEX)


@pytest.mark.parametrize(
    ("cgroup", "label", "command"),
    [
        (
            f"/system.slice/docker-{HEX}.scope/system.slice/nginx.service",
            f"nginx.service in {ID}",
            f"docker exec {ID} systemctl restart nginx.service",
        ),
        (
            "/machine.slice/machine-web.scope/payload/system.slice/nginx.service",
            "nginx.service in web",
            "systemctl --machine=web restart nginx.service",
        ),
        (
            f"/machine.slice/machine-web.scope/payload{USER}/app.slice/a.service",
            "a.service (user@1000.service) in web",
            "systemctl --user --machine=1000@web restart a.service",
        ),
        (f"/docker/{HEX}/init.scope", f"init.scope in {ID}", f"docker exec {ID} systemctl daemon-reexec"),
    ],
)
def test_a_unit_inside_a_container_is_restarted_there(cgroup: str, label: str, command: str) -> None:
    target = restart_target(cgroup)

    assert (target.kind, target.label, target.command) == ("unit", label, command)
    assert target.container == container_id(cgroup)


@pytest.mark.parametrize(
    ("cgroup", "kind", "advice"),
    [
        ("/user.slice/user-1000.slice/session-3.scope", "session", "log out of session 3"),
        ("/user.slice/user-1000.slice/session-c2.scope", "session", "log out of session c2"),
        (USER, "unit", "log out: it runs all services of user 1000"),
        (
            f"{USER}/app.slice/app-firefox-1.scope",
            "unit",
            "a scope cannot be restarted: end what runs in it and start that again",
        ),
        (
            "/system.slice/dbus.service",
            "unit",
            "`systemctl restart dbus.service` ends login sessions: choose the moment, or reboot",
        ),
        (
            "/system.slice/system-getty.slice/getty@tty1.service",
            "unit",
            "`systemctl restart getty@tty1.service` ends login sessions: choose the moment, or reboot",
        ),
        (
            "/lxc.payload.web/system.slice/nginx.service",
            "unit",
            "inside the container: `systemctl restart nginx.service`",
        ),
        (
            "/lxc.payload.web/start",
            "container",
            "restart the container with what started it: which is not known",
        ),
        (
            f"/lxc.payload.web/docker/{HEX}",
            "container",
            "restart the container with what started it: which is not known",
        ),
        ("/", "process", "end it and start it again"),
        ("/kubepods", "process", "end it and start it again"),
        (None, "process", "end it and start it again"),
    ],
)
def test_what_no_command_restarts_has_an_advice(cgroup: str | None, kind: str, advice: str) -> None:
    target = restart_target(cgroup)

    assert (target.kind, target.command, target.advice) == (kind, None, advice)


@pytest.mark.parametrize("form", CONTAINER_FORMS, ids=lambda form: form.runtime)
def test_a_container_of_any_form_is_named_and_has_no_unit_of_its_runtime(form) -> None:
    cgroup = form.example.removesuffix("/system.slice/nginx.service").removesuffix("/init.scope")

    target = restart_target(cgroup)

    assert unit_of(cgroup) is None
    assert (target.kind, target.name, target.unit) == ("container", container_id(cgroup), None)
    assert (target.command is None) != (target.advice is None)


@pytest.mark.parametrize("name", ["$(reboot)", "a;b", "a b", "-a", "--now", "a'b", "a\nb", "ä", "`b`"])
def test_a_name_that_somebody_chose_gets_into_no_command(name: str) -> None:
    for cgroup in (f"/system.slice/{name}.service", f"{USER}/{name}.service"):
        assert restart_target(cgroup).command is None
        assert restart_target(cgroup).kind == "unit"
    for cgroup in (f"/lxc.payload.{name}", f"/docker/{HEX}/{name}.service"):
        assert restart_target(cgroup).command is None


@given(st.text(st.characters(blacklist_characters="\0"), max_size=80), st.sampled_from(["", ".service", ".scope"]))
def test_whatever_a_cgroup_is_named_a_command_is_one_line_of_plain_words(text: str, suffix: str) -> None:
    target = restart_target(f"/{text}{suffix}")

    assert (target.command is None) != (target.advice is None)
    if target.command is not None:
        assert target.command.isascii()
        assert target.command.isprintable()
        assert shlex.join(shlex.split(target.command)) == target.command


def stale(pid: int, cgroup: str | None, answer: StaleAnswer = REPLACED, *, path: str = LIBRARY.path) -> StaleFile:
    library = Library(path, LIBRARY.id)
    return StaleFile(Process(pid, 1, comm=f"p{pid}", cgroup=cgroup), library, answer)


def test_groups_are_managers_units_containers_sessions_and_the_rest_each_by_name() -> None:
    cgroups = [
        "/",
        "/user.slice/user-0.slice/session-1.scope",
        f"/docker/{HEX}",
        "/system.slice/b.service",
        "/system.slice/a.service",
        "/init.scope",
    ]

    groups = restart_groups(stale(pid, cgroup) for pid, cgroup in enumerate(cgroups, 1))

    assert [group.target.label for group in groups] == [
        "init.scope",
        "a.service",
        "b.service",
        ID,
        "session-1.scope",
        "(no unit)",
    ]


def test_a_group_has_its_processes_once_and_its_files_by_process_and_path() -> None:
    unit = "/system.slice/a.service"
    files = [stale(2, unit), stale(1, unit, path="/z"), stale(1, unit, path="/a"), stale(3, f"{unit}/worker")]

    (group,) = restart_groups(files)

    assert [(one.process.pid, one.path) for one in group.files] == [
        (1, "/a"),
        (1, "/z"),
        (2, LIBRARY.path),
        (3, LIBRARY.path),
    ]
    assert [one.pid for one in group.processes] == [1, 2, 3]
    assert group.why_not is None


def test_units_of_two_users_with_one_name_are_two_groups() -> None:
    files = [stale(uid, f"/user.slice/user-{uid}.slice/user@{uid}.service/x.service") for uid in (7, 1000)]

    assert [group.target.command for group in restart_groups(files)] == [
        "systemctl --user --machine=7@ restart x.service",
        "systemctl --user --machine=1000@ restart x.service",
    ]


SAME = StaleAnswer(Staleness.REPLACED, is_same_build=True)
UNKNOWN = StaleAnswer(Staleness.UNKNOWN, "its file system does not answer")


@pytest.mark.parametrize(
    ("answers", "why_not"),
    [
        ((REPLACED, UNKNOWN, SAME), None),
        ((StaleAnswer(Staleness.MODIFIED),), None),
        ((SAME, SAME), "what is on disk is the same build"),
        ((SAME, UNKNOWN), "what is on disk is the same build"),
        ((UNKNOWN,), "it cannot be determined whether its files are stale"),
    ],
)
def test_a_restart_is_called_for_if_one_file_is_another_for_certain(
    answers: tuple[StaleAnswer, ...], why_not: str | None
) -> None:
    files = tuple(stale(1, "/system.slice/a.service", answer) for answer in answers)

    assert RestartGroup(restart_target("/system.slice/a.service"), files).why_not == why_not


def test_a_plan_is_commands_and_comments_that_a_shell_takes() -> None:
    groups = restart_groups(
        [
            stale(1, "/init.scope"),
            stale(10, r"/system.slice/a\x2db.service"),
            stale(11, r"/system.slice/a\x2db.service"),
            stale(12, "/system.slice/same.service", SAME),
            stale(13, f"/docker/{HEX}"),
            stale(14, "/user.slice/user-0.slice/session-1.scope"),
            stale(15, "/system.slice/x\nreboot.service"),
            stale(16, "/"),
        ]
    )

    lines = plan(groups)

    assert lines == [
        "systemctl daemon-reexec",
        r"systemctl restart 'a\x2db.service'",
        "# same.service: what is on disk is the same build (12 p12)",
        r"# x\nreboot.service: its name is none that may stand in a command: end it and start it again (15 p15)",
        f"docker restart {ID}",
        "# session-1.scope: log out of session 1 (14 p14)",
        "# 16 p16: end it and start it again",
    ]
    shell = 'systemctl() { echo "systemctl $*"; }; docker() { echo "docker $*"; }\n' + "\n".join(lines)
    done = subprocess.run(["/bin/sh", "-eu", "-c", shell], stdout=subprocess.PIPE, check=True, text=True)
    assert done.stdout.splitlines() == [
        "systemctl daemon-reexec",
        r"systemctl restart a\x2db.service",
        f"docker restart {ID}",
    ]


@pytest.mark.parametrize(
    "delegated", [USER + "/app.slice", "/system.slice/ci.service", "/system.slice/ci.service/a.scope"]
)
@pytest.mark.parametrize("scope", ["", f"/x-{HEX}.scope"])
@pytest.mark.parametrize(
    "below",
    [
        "ssh.service",
        "systemd-reboot.service",
        "init.scope",
        f"docker-{OTHER}.scope",
        f"docker/{OTHER}",
        f"docker-{OTHER}.scope/system.slice/ssh.service",
        f"libpod-conmon-{OTHER}.scope",
        "machine-web.scope/payload",
    ],
)
def test_whoever_makes_paths_below_what_is_delegated_to_him_reaches_nothing_of_roots(
    delegated: str, scope: str, below: str
) -> None:
    target = restart_target(f"{delegated}{scope}/{below}")
    if target.command is None:
        assert target.advice
    elif delegated.startswith("/system.slice"):
        assert target.command == "systemctl restart ci.service"
    else:
        assert target.command.startswith(("systemctl --user --machine=1000@ ", "systemd-run --user --machine=1000@ "))


@pytest.mark.parametrize("service", ["containerd", "docker", "k3s", "k3s-agent", "rke2-server", "crio"])
def test_a_container_below_the_service_of_its_runtime_is_restarted(service: str) -> None:
    assert restart_target(f"/system.slice/{service}.service/docker/{OTHER}").command == f"docker restart {OTHER_ID}"
