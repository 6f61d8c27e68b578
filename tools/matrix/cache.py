"""Where kernels, images and results are kept, outside the checkout; and the one error of this tool."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["ROOT", "MatrixError", "cache_directory", "only_one", "results_directory", "run"]

#: The checkout.
ROOT = Path(__file__).resolve().parents[2]


class MatrixError(Exception):
    """Something outside the tests went wrong; the message ends with the next step."""


def cache_directory(*parts: str) -> Path:
    """A directory below the cache, made if need be: $SOWATCH_MATRIX_CACHE, else the user's cache directory."""
    chosen = os.environ.get("SOWATCH_MATRIX_CACHE")
    base = (
        Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sowatch/matrix")
    )
    made = base.absolute().joinpath(*parts)
    try:
        made.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MatrixError(
            f"cannot make {made}: {error.strerror}. Set SOWATCH_MATRIX_CACHE to another place."
        ) from error
    return made


def results_directory(*parts: str) -> Path:
    """Like `cache_directory`, for what guests write; checkouts have one each, and may run at the same time."""
    return cache_directory("results", str(ROOT).strip("/").replace("/", "-"), *parts)


@contextlib.contextmanager
def only_one(directory: Path, next_step: str) -> Iterator[None]:
    """Within it no other process has the same directory.

    Raises:
        MatrixError: another has it.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise MatrixError(f"{directory} is in use by another run. {next_step}") from error
    finally:
        os.close(fd)


def run(command: Sequence[str | Path], *, next_step: str, directory: Path | None = None) -> str:
    """Runs a tool of the system, in ``directory``, and returns what it printed.

    Raises:
        MatrixError: it is missing or failed; its last words and ``next_step`` are in the message.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory)
    except OSError as error:
        raise MatrixError(f"cannot run {command[0]}: {error.strerror}. {next_step}") from error
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()
        raise MatrixError(f"{command[0]} failed: {words[-1] if words else done.returncode}. {next_step}")
    return done.stdout
