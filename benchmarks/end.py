"""How long a command takes to give the prompt back: `sowatch watch` after SIGINT, and `Watcher.stop`.

Another watcher on the host hides part of the cost: what two have in common stays in the kernel.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import Figure, main, median, spread
from benchmarks.start import COMMAND

#: No library has this name.
NOTHING = "^/no/such/library$"
WATCHER = f"""
import time
from sowatch import Rule, Watcher
watcher = Watcher(Rule({NOTHING!r}))
watcher.start()
begun = time.monotonic()
watcher.stop()
print(time.monotonic() - begun)
"""


def measure(is_quick: bool, directory: Path) -> list[Figure]:
    del directory
    rounds = 2 if is_quick else 20
    interrupted, stopped = [], []
    for _ in range(rounds):
        interrupted.append(time_to_prompt(COMMAND, "watch", "--json", NOTHING))
        stopped.append(float(subprocess.run([sys.executable, "-c", WATCHER], capture_output=True, check=True).stdout))
    return [
        Figure("sowatch watch: SIGINT to its end", median(interrupted), "s", spread(interrupted), aim=0.3),
        Figure("Watcher.stop()", median(stopped), "s", spread(stopped), aim=0.3),
    ]


def time_to_prompt(*command: str | Path) -> float:
    """From SIGINT, once it is ready, until the process has ended and is reaped."""
    with subprocess.Popen(command, stdout=subprocess.PIPE) as running:
        assert running.stdout
        if not any(b'"event":"ready"' in line for line in running.stdout):
            raise RuntimeError("sowatch ended without ready")
        begun = time.monotonic()
        running.send_signal(signal.SIGINT)
        running.stdout.read()
        running.wait()
        return time.monotonic() - begun


if __name__ == "__main__":
    main("end", measure)
