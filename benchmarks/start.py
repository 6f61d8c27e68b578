"""How long `sowatch watch --json` takes to say `ready`, and `sowatch --help` to end.

Both as a user starts them: the installed command, a new process each time.
"""

from __future__ import annotations

import compileall
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import Figure, main, median, spread

import sowatch

COMMAND = Path(sys.executable).parent / "sowatch"
#: For half a second after a watch has ended the kernel takes its tracepoints down, and one that begins meanwhile waits
#: (docs/decisions/0046-ending.md): that is no part of a start.
REST_S = 1.0


def measure(is_quick: bool, directory: Path) -> list[Figure]:
    del directory
    compile_package()
    rounds = 2 if is_quick else 20
    python, ready, help_shown = [], [], []
    for _ in range(rounds):
        python.append(time_to_end(sys.executable, "-c", ""))
        ready.append(time_to_ready())
        help_shown.append(time_to_end(COMMAND, "--help"))
    return [
        Figure("sowatch watch --json to ready", median(ready), "s", spread(ready), aim=0.45),
        Figure("sowatch --help", median(help_shown), "s", spread(help_shown), aim=0.15),
        Figure("... of that, an empty Python", median(python), "s", spread(python)),
    ]


def compile_package() -> None:
    """Makes the byte code of the package, which every installation but an editable one has."""
    compileall.compile_dir(Path(sowatch.__file__).parent, quiet=1)


def time_to_ready() -> float:
    time.sleep(REST_S)
    start = time.monotonic()
    with subprocess.Popen([COMMAND, "watch", "--json"], stdout=subprocess.PIPE) as running:
        assert running.stdout
        for line in running.stdout:
            if b'"event":"ready"' in line:
                break
        else:
            raise RuntimeError("sowatch ended without ready")
        taken = time.monotonic() - start
        running.terminate()
        running.stdout.read()
    return taken


def time_to_end(*command: str | Path) -> float:
    start = time.monotonic()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - start


if __name__ == "__main__":
    main("start", measure)
