"""Records of a fleet: keys, units, and attributes that any receiver can hold."""

from __future__ import annotations

import pytest

from sowatch.fleet.records import GroupFacts, GroupState, Package, WatchState, group_attributes, group_key, unit_of
from sowatch.fleet.records import heartbeat_attributes as heartbeat
from support.fleet_records import Group

USER = "/user.slice/user-1000.slice"


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        ("/system.slice/nginx.service", "nginx.service"),
        ("/system.slice/nginx.service/workers", "nginx.service"),
        (f"{USER}/user@1000.service/app.slice/syncthing.service", "user@1000.service/syncthing.service"),
        (f"{USER}/session-3.scope", "session"),
        (f"{USER}/user@1000.service/app.slice/app-firefox-4711.scope", "session"),
        ("/system.slice/run-u123.service", "session"),
        ("/init.scope", "init.scope"),
        ("/system.slice/system-sshd.slice/sshd@7-10.0.0.1:22-10.0.0.2:4711.service", "sshd@.service"),
        ("/system.slice/system-postgresql.slice/postgresql@15-main.service", "postgresql@15-main.service"),
        ("/system.slice/docker-" + "0" * 64 + ".scope", ""),
        ("/", ""),
        (None, ""),
    ],
)
def test_a_unit_is_one_that_comes_again(cgroup: str | None, unit: str) -> None:
    assert unit_of(cgroup) == unit


def facts(path: str = "/usr/lib/libssl.so.3", **more: str) -> GroupFacts:
    known = {"kind": "library", "container": "", "unit": "nginx.service", "exe": "/usr/sbin/nginx"}
    return GroupFacts(**{**known, "exe_build_id": "ee", "build_id": "ab", "path": path, **more})


def test_a_key_is_that_of_decision_69_and_of_its_host() -> None:
    theirs = Group(path="/usr/lib/libssl.so.3", build_id="ab", exe_build_id="ee").key("host")
    assert group_key(facts(), "host") == theirs
    assert len({group_key(facts(), "host"), group_key(facts(), "other"), group_key(facts(unit=""), "host")}) == 3
    # What is no part of the group changes nothing.
    assert group_key(facts(soname="libssl.so.3", pod="web-1"), "host") == theirs


def test_what_is_not_known_is_left_out() -> None:
    found = group_attributes("00", facts(exe="", exe_build_id="", unit=""), GroupState(0))
    assert found == {
        "sowatch.library.key": "00",
        "sowatch.library.build_id": "ab",
        "sowatch.library.path": "/usr/lib/libssl.so.3",
        "sowatch.library.kind": "library",
        "sowatch.library.processes": 0,
    }


def test_all_that_is_known_is_there() -> None:
    package = Package("libssl3", "3.0.11-1", "openssl", "pkg:deb/debian/libssl3@3.0.11-1", "dpkg")
    state = GroupState(3, (7, 8, 9), "replaced", 5, "tcp:443,udp:443", package, 12, 4)
    found = group_attributes("00", facts(container="c", pod="p", pod_uid="u", namespace="n", soname="s"), state)
    theirs = Group(
        path="/usr/lib/libssl.so.3", build_id="ab", exe_build_id="ee", soname="s", container="c", pod="p", pod_uid="u",
        namespace="n", processes=3, pids=(7, 8, 9), stale="replaced", stale_since_ns=5, listen="tcp:443,udp:443",
        package=package, short_lived=12, since_ns=4,
    ).attributes("host")  # fmt: skip
    assert {name: str(value) for name, value in found.items()} == {**theirs, "sowatch.library.key": "00"}


def test_names_that_are_no_text_are_shown_as_such() -> None:
    found = group_attributes("00", facts(path="/tmp/\udcff\n.so"), GroupState(1))
    assert found["sowatch.library.path"] == r"/tmp/\xff\n.so"
    assert len(group_key(facts(path="/tmp/\udcff\n.so"), "host")) == 16


def test_mappings_that_were_left_out_are_lost_and_not_repaired() -> None:
    found = heartbeat(WatchState("core", "exact", ("a", "b"), lost=1), interval_s=30, groups=2, dropped=0, left_out=3)
    assert found["sowatch.watch.lost"] == 4
    assert found["sowatch.watch.is_repaired"] is False
    assert found["sowatch.watch.limits"] == "a; b"
