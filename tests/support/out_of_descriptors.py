"""Watches a process that maps and unmaps, runs out of descriptors meanwhile, and says what became of the watch.

Its arguments are the directory of the libraries, the program that maps, fields of `Config` as JSON, and for how many
seconds it waits for what it expects.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sowatch import Config, Rule, Watcher
from support.programs import Mapper, make_libraries


def mapped(watcher: Watcher, pid: int) -> list[str]:
    return sorted(one.library.path for one in watcher.snapshot() if one.process.pid == pid)


def wait(what: Callable[[], bool]) -> None:
    until_s = time.monotonic() + float(sys.argv[4])
    while not what():
        if time.monotonic() > until_s:
            raise TimeoutError(f"what was expected did not come within {sys.argv[4]} s")
        time.sleep(0.05)


def main(directory: Path, program: Path, fields: dict[str, Any]) -> None:
    first, second, third = make_libraries(directory, 3)
    with (
        Mapper(program, directory) as mapper,
        Mapper(program, directory) as ending,
        Watcher(Rule(f"^{directory}/"), config=Config(**fields)) as watcher,
    ):
        at = mapper.map(first)
        ending.map(first)
        wait(lambda: len(watcher.snapshot()) >= 2)
        own = os.listdir("/proc/self/fd")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(own) + 50, hard))
        taken = []
        try:
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        except OSError as error:
            reason = error.strerror
        until_s = time.monotonic() + 3
        mapper.unmap(*at)
        mapper.map(second)
        ending.exit()
        while time.monotonic() < until_s:
            mapper.unmap(*mapper.map(third))
            time.sleep(0.001)
        was_running = watcher.is_running
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        wait(lambda: mapped(watcher, mapper.pid) == [str(second)] and not mapped(watcher, ending.pid))
        wait(lambda: watcher.is_repaired)
        report = watcher.audit()
        print(  # noqa: T201 - for the test
            json.dumps(
                {
                    "reason": reason,
                    "was_running": was_running,
                    "differences": [str(one) for one in report.differences],
                    "losses": watcher.stats.losses._asdict(),
                    "rereads": watcher.stats.rereads,
                }
            )
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
