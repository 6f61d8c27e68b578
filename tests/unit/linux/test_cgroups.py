"""Which cgroup is shown, whatever the order in which hierarchies are listed, and the unit that a path lies in."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sowatch.bpf.records import paths_of, text_of
from sowatch.linux.cgroups import Unit, choose_cgroup, parse_cgroup, unit_of

HEX = "0123456789abcdef" * 4


def test_a_container_in_any_hierarchy_is_found_in_whatever_order_they_are_listed() -> None:
    others = (f"/docker/{HEX}", "/user.slice/user-1000.slice/session-3.scope/and/much/more/than/the/other", "/")
    for order in permutations(others):
        assert choose_cgroup(("/system.slice/containerd.service", *order)) == f"/docker/{HEX}"
        assert choose_cgroup(("/", *order)) == f"/docker/{HEX}"


def test_without_a_container_version_2_is_shown_unless_it_is_the_root() -> None:
    assert choose_cgroup(("/a.service", "/much/longer")) == "/a.service"
    assert choose_cgroup(("/", "/b", "/a", "/")) == "/a"
    assert choose_cgroup(("/",)) == "/"


names = st.text(st.characters(blacklist_characters="\0/\n", max_codepoint=0x2FF), min_size=1, max_size=5)
paths = st.lists(names, max_size=4).map(lambda parts: "/" + "/".join(parts))


@given(paths, st.lists(paths.filter(lambda path: path != "/"), max_size=4, unique=True))
def test_the_paths_that_the_programs_send_are_read_back(unified: str, others: list[str]) -> None:
    # The programs end each component with a NUL and write none for the root.
    written = [
        b"" if path == "/" else b"\0".join(p.encode() for p in path[1:].split("/")[::-1]) + b"\0"
        for path in (unified, *others)
    ]
    assert paths_of(b"\0".join(written)) == (unified, *others)


@given(paths)
def test_a_path_that_user_space_writes_as_text_is_read_back(path: str) -> None:
    assert choose_cgroup(paths_of(text_of(path.encode()))) == path


def test_proc_and_the_programs_lead_to_the_same_path() -> None:
    lines = f"3:cpu:/b\n2:pids:/c\n1:name=systemd:/docker/{HEX}\n0::/system.slice/x.service\n"
    sent = b"x.service\0system.slice\0\0" + f"{HEX}\0docker\0\0c\0\0b\0".encode()
    assert parse_cgroup(lines.encode()) == choose_cgroup(paths_of(sent)) == f"/docker/{HEX}"


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        ("/system.slice/nginx.service", Unit("nginx.service")),
        ("/system.slice/nginx.service/workers/1", Unit("nginx.service")),
        ("/system.slice/system-getty.slice/getty@tty1.service", Unit("getty@tty1.service")),
        ("/init.scope", Unit("init.scope")),
        ("/user.slice/user-1000.slice/session-3.scope", Unit("session-3.scope")),
        ("/user.slice/user-1000.slice/user@1000.service", Unit("user@1000.service")),
        (
            "/user.slice/user-1000.slice/user@1000.service/app.slice/dbus.service",
            Unit("dbus.service", "user@1000.service", 1000),
        ),
        (
            "/user.slice/user-1000.slice/user@1000.service/init.scope",
            Unit("init.scope", "user@1000.service", 1000),
        ),
        ("/system.slice/docker-3f2a.scope", Unit("docker-3f2a.scope")),
        ("/system.slice/docker-3f2a.scope/system.slice/nginx.service", Unit("nginx.service", "docker-3f2a.scope")),
        (
            "/user.slice/user-7.slice/user@7.service/user.slice/libpod-3f2a.scope/container/init.scope",
            Unit("init.scope", "libpod-3f2a.scope"),
        ),
        # The runtime's own units are none of the container's process.
        (f"/system.slice/docker-{HEX}.scope", None),
        (f"/system.slice/containerd.service/kubepods-pod1.slice:cri-containerd:{HEX}", None),
        (f"/user.slice/user-7.slice/user@7.service/user.slice/libpod-{HEX}.scope/container", None),
        (f"/user.slice/user-7.slice/user@7.service/user.slice/libpod-conmon-{HEX}.scope", None),
        (f"/system.slice/docker-{HEX}.scope/system.slice/nginx.service", Unit("nginx.service")),
        (r"/system.slice/dev-disk\x2dby.swap", Unit(r"dev-disk\x2dby.swap")),
        ("/system.slice/_cpu.service", Unit("cpu.service")),
        ("/system.slice/nginx.service (deleted)", Unit("nginx.service")),
        ("/kubepods/besteffort/pod1/3f2a", None),
        ("/system.slice", None),
        ("/.service", None),
        ("/", None),
        ("", None),
        (None, None),
    ],
)
def test_the_unit_is_the_innermost_one_and_says_whose_it_is(cgroup: str | None, unit: Unit | None) -> None:
    assert unit_of(cgroup) == unit
