"""The rules for code from where programs may write, on a process that loads it from there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from sowatch import Load, Watcher
from sowatch.agent.settings import load_settings
from support.agent import short_directory

SHIPPED = Path(__file__).resolve().parents[3] / "deploy" / "security.toml"

#: Once told to, loads argv[1] from a file in memory, then under its name.
LOADER = """
import ctypes, os, sys
sys.stdin.readline()
fd = os.memfd_create("payload")
with open(sys.argv[1], "rb") as file:
    os.write(fd, file.read())
ctypes.CDLL(f"/proc/self/fd/{fd}")
ctypes.CDLL(sys.argv[1])
sys.stdin.read()
"""


def test_a_library_in_memory_and_one_for_temporary_files_are_named_by_their_rules(
    spawn: Any, make_library: Any, wait_until: Any
) -> None:
    rules = [one.make() for one in load_settings(str(SHIPPED), environment={}).rules]
    with short_directory() as place:
        library = place / "libx.so"
        library.write_bytes(make_library().read_bytes())
        loader = spawn([sys.executable, "-c", LOADER, str(library)], stdin=subprocess.PIPE)
        with Watcher(*rules, pids=[loader.pid]) as watcher:
            found: dict[str, str] = {}
            subscription = watcher.subscribe(events=("load",), control=False)
            loader.stdin.write(b"\n")
            loader.stdin.flush()

            def has_both() -> bool:
                while isinstance(event := subscription.get(0), Load):
                    if event.rule != "all":
                        found[event.rule] = event.library.path
                return len(found) == 2

            wait_until(has_both)
    assert found == {"memory": "/memfd:payload", "temporary": str(library)}
