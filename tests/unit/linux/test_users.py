"""Names of users out of lines of passwd(5)."""

from __future__ import annotations

import pwd

from msgspec.structs import replace

from sowatch.linux.users import _parsed, user_name
from support.scripted import PROCESS


def test_the_first_line_of_a_user_counts_and_what_is_no_line_names_nobody() -> None:
    text = "root:x:0:0:root:/root:/bin/sh\ntoor:x:0:0::/:/bin/sh\n+nis\n:x:7:7\nbad:x:seven:7\n\nweb:x:33:33"
    assert _parsed(text) == {0: "root", 33: "web"}


def test_the_host_names_users_of_its_own_processes_only() -> None:
    daemon = pwd.getpwnam("daemon")
    process = replace(PROCESS, uid=daemon.pw_uid, container=None)
    assert user_name(process) == "daemon"
    assert user_name(replace(process, container="c0ffee")) is None
    assert user_name(replace(process, uid=None)) is None
    assert user_name(replace(process, uid=4_000_000_000)) is None
