"""container_id: every form a runtime gives a cgroup, and what only looks like one."""

from __future__ import annotations

import pytest

from sowatch.linux.containers import CONTAINER_FORMS, container_id

# -- containers ------------------------------------------------------------------------------

HEX = "0123456789abcdef" * 4
OTHER = "f" * 64


@pytest.mark.parametrize(
    ("form", "expected"),
    list(
        zip(
            CONTAINER_FORMS,
            [
                *(HEX, HEX, HEX, HEX, HEX, HEX, "0123456789abcdef0123456789abcdef-1234567890"),
                *("01234567-89ab-cdef-0123-4567", "01234567-89ab-cdef-0123-456789abcdef", "web", "web", "web"),
                *("web", "web-1", "web-1"),
            ],
            strict=True,
        )
    ),
    ids=[form.runtime for form in CONTAINER_FORMS],
)
def test_each_form_gives_the_id_of_its_example(form, expected):
    assert container_id(form.example) == expected


@pytest.mark.parametrize(
    ("cgroup", "expected"),
    [
        (f"/kubepods/burstable/pod12345678-1234-1234-1234-123456789abc/{HEX}", HEX),
        (f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/docker-{HEX}.scope", HEX),
        (f"/user.slice/user-1000.slice/user@1000.service/user.slice/docker-{HEX}.scope", HEX),
        (f"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{HEX}.scope/container", HEX),
        (f"/system.slice/web.service/libpod-payload-{HEX}", HEX),
        (f"/libpod_parent/libpod-{HEX}", HEX),
        (f"/system.slice/nerdctl-{HEX}.scope", HEX),
        (f"/default/{HEX}", HEX),
        ("/default/web-1.a_b/init.scope", "web-1.a_b"),
        ("/garden/01234567-89ab-cdef-0123-4567", "01234567-89ab-cdef-0123-4567"),
        ("/garden/good/01234567-89ab-cdef-0123-4567/init", "01234567-89ab-cdef-0123-4567"),
        (f"/kubepods/pod1/crio-{HEX}", HEX),
        (f"/system.slice/docker-{HEX}.scope/init.scope", HEX),
        (f"docker-{HEX}.scope", HEX),
        (f"/docker/{HEX} (deleted)", HEX),
        (f"/../../docker/{HEX}", HEX),
        ("/lxc/web", "web"),
        ("/lxc.payload/web/init.scope", "web"),
        ("/lxc.payload.web (deleted)", "web"),
        (f"/docker/{OTHER}/kubelet/kubepods/pod1/{HEX}", HEX),
        (f"/lxc.payload.web/docker/{HEX}", HEX),
    ],
)
def test_other_spellings_and_the_innermost_of_nested_containers(cgroup, expected):
    assert container_id(cgroup) == expected


@pytest.mark.parametrize(
    "cgroup",
    [
        None,
        "",
        "/",
        "/user.slice/user-1000.slice/session-3.scope",
        "/system.slice/docker.service",
        "/docker/0123456789abcdef",
        f"/docker/{HEX}0",
        f"/docker/{HEX.upper()}",
        f"/system.slice/docker-{HEX}.service",
        f"/machine.slice/libpod-conmon-{HEX}.scope",
        f"/system.slice/crio-conmon-{HEX}.scope",
        "/default",
        "/default/-x",
        "/user.slice/default/web",
        "/kubepods/pod01234567-89ab-cdef-0123-4567",
        "/system.slice/01234567-89ab-cdef-0123-456789abcdef",
        "/lxc.monitor.web",
        "/lxc.monitor/web",
        r"/machine.slice/machine-qemu\x2d1\x2dvm.scope/libvirt",
        "/machine.slice/machine-web.scope/supervisor",
        "/machine.slice/systemd-nspawn@web.service/supervisor",
    ],
)
def test_what_is_no_container_has_no_id(cgroup):
    assert container_id(cgroup) is None
