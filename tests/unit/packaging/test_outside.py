"""What the tools say of a mirror that cannot be reached, and how long they wait for one."""

from __future__ import annotations

import subprocess

import pytest

from outside import OutsideError, UnreachedError, apt_options, run


def test_apt_tries_again_and_does_not_wait_long(tmp_path) -> None:
    said = subprocess.run(
        ["apt-config", *apt_options(tmp_path, ["deb {keys} http://127.0.0.1/debian trixie main"]), "dump"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert 'Acquire::Retries "5";' in said
    assert 'Acquire::http::Timeout "30";' in said


def test_a_mirror_that_does_not_answer_is_told_apart(tmp_path) -> None:
    # Port 9 (discard) of loopback: nothing listens there.
    apt = apt_options(tmp_path, ["deb {keys} http://127.0.0.1:9/debian trixie main"])
    quick = ["-o", "Acquire::Retries=0", "-o", "Acquire::http::Proxy=DIRECT"]
    with pytest.raises(UnreachedError, match="Run it again"):
        run(["apt-get", *apt, *quick, "-qq", "--error-on=any", "update"], next_step="Run it again.")


def test_another_failure_is_none_of_the_network() -> None:
    with pytest.raises(OutsideError, match="no such package") as found:
        run(["sh", "-c", "echo E: no such package >&2; exit 100"], next_step="Run it again.")
    assert not isinstance(found.value, UnreachedError)
