"""A plan of restarts: what is still running, which ports, and that a shell gets nothing but commands and comments."""

from __future__ import annotations

import shlex
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from sowatch.inventory.restart_plan import planned, shell_lines
from sowatch.inventory.restarts import StaleFile, restart_groups
from sowatch.inventory.staleness import StaleAnswer, Staleness
from sowatch.linux.listeners import Listener, Listening
from sowatch.model.events import Library, Pod, Process
from sowatch.model.identity import FileId
from support.advisories import debian

HEX = "0123456789abcdef" * 4
REPLACED = StaleAnswer(Staleness.REPLACED)
SSL = Library("/usr/lib/libssl.so.3", FileId(8, 1, 42), build_id="ab" * 20)
ZLIB = Library("/usr/lib/libz.so.1", FileId(8, 1, 43))
NGINX = Process(10, 1, comm="nginx", cgroup="/system.slice/nginx.service")
WORKER = replace(NGINX, pid=11)
POD = Pod("0f0e0d0c-1111-2222-3333-444455556666", "web-0", "shop")
CONTAINER = f"/kubepods.slice/kubepods-pod0f0e0d0c_1111_2222_3333_444455556666.slice/cri-containerd-{HEX}.scope"
IN_POD = Process(12, 1, comm="server", cgroup=CONTAINER, container=HEX, pod=POD)


def lines(*files: StaleFile, packages: object = None, listening: object = None) -> list[str]:
    return shell_lines(planned(restart_groups(files), packages or {}, listening or {}))  # type: ignore[arg-type]


def test_a_comment_has_what_still_runs_and_what_listens() -> None:
    files = [StaleFile(NGINX, SSL, REPLACED), StaleFile(NGINX, ZLIB, REPLACED), StaleFile(WORKER, SSL, REPLACED)]
    old = debian("3.0.11-1~deb12u1", "libssl3", "openssl")
    sockets = Listening((Listener("tcp", 80, "0.0.0.0", 1), Listener("tcp", 443, "::", 2)))
    assert lines(*files, packages={files[0].key: old, files[2].key: old}, listening={10: sockets, 11: sockets}) == [
        (
            "# nginx.service: 2 processes (nginx, 10, 11); still run libssl3 3.0.11-1~deb12u1 (libssl.so.3), "
            "libz.so.1; listen on tcp:80,tcp:443"
        ),
        "systemctl restart nginx.service",
    ]


def test_without_a_package_the_build_is_named() -> None:
    assert lines(StaleFile(NGINX, SSL, REPLACED))[0] == (
        "# nginx.service: 1 process (nginx, 10); still runs libssl.so.3 (build abababababab)"
    )


def test_many_files_and_processes_are_counted() -> None:
    files = [
        StaleFile(replace(NGINX, pid=100 + number), replace(ZLIB, path=f"/usr/lib/lib{number}.so"), REPLACED)
        for number in range(9)
    ]
    comment, _ = lines(*files)
    assert "9 processes (nginx, 100, 101, 102, 103, 104 and 4 more)" in comment
    assert "lib0.so, lib1.so, lib2.so, lib3.so, lib4.so and 4 more" in comment


def test_a_pod_is_named_with_what_the_cluster_can_do_and_no_owner_is_guessed() -> None:
    assert lines(StaleFile(IN_POD, SSL, REPLACED), listening={12: None}) == [
        f"# {HEX[:12]}: 1 process (server, 12); still runs libssl.so.3 (build abababababab); pod shop/web-0",
        (
            f"# {HEX[:12]}: in the cluster: `kubectl --namespace shop delete pod web-0`, or "
            "`kubectl rollout restart` of what has made it"
        ),
        f"crictl stop {HEX[:12]}",
    ]


@pytest.mark.parametrize(
    "pod",
    [
        Pod(POD.uid),  # its name is not known
        Pod("0123456789abcdef" * 2, "etcd-node1", "kube-system"),  # a file on the node: deleting it restarts nothing
        Pod(POD.uid, "$(reboot)", "shop"),
        Pod(POD.uid, "web-0", "--all"),
    ],
)
def test_no_command_of_the_cluster_is_advised_that_would_not_do(pod: Pod) -> None:
    text = "\n".join(lines(StaleFile(replace(IN_POD, pod=pod), SSL, REPLACED)))
    assert "kubectl" not in text


def test_where_no_restart_is_called_for_there_is_one_comment() -> None:
    same = StaleAnswer(Staleness.REPLACED, is_same_build=True)
    assert lines(StaleFile(NGINX, SSL, same)) == ["# nginx.service: what is on disk is the same build (10 nginx)"]


NAMES = st.text(st.characters(codec="utf-8"), max_size=30) | st.sampled_from(
    ["\n", "\nreboot", "`reboot`", "$(reboot)", "x\r\nreboot", "#", "'", '"']
)


@given(st.lists(st.tuples(NAMES, NAMES, NAMES, NAMES), min_size=1, max_size=4))
def test_a_shell_gets_nothing_but_commands_and_comments(names: list[tuple[str, str, str, str]]) -> None:
    files = [
        StaleFile(
            Process(number, 1, comm=comm, cgroup=f"/system.slice/{unit}.service", pod=Pod("1", pod, "x")),
            Library(f"/usr/lib/{path}", FileId(8, 1, number)),
            REPLACED,
        )
        for number, (comm, unit, path, pod) in enumerate(names, 1)
    ]
    packages = {one.key: debian("1", names[0][0]) for one in files}
    text = "".join(f"{line}\n" for line in lines(*files, packages=packages))
    assert text.isprintable() or set(text) - {"\n"} == {one for one in text if one.isprintable()}
    for line in text.splitlines():
        assert line.startswith("# ") or shlex.split(line)[:2] in (
            ["systemctl", "restart"],
            ["systemctl", "daemon-reexec"],
        )


def test_a_shell_takes_the_comments() -> None:
    text = "\n".join(line for line in lines(StaleFile(IN_POD, SSL, REPLACED)) if line.startswith("#"))
    done = subprocess.run(["sh", "-euc", text], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
