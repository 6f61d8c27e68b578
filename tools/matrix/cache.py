"""Where kernels, images and results are kept, outside the checkout. Imports only ``outside``."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from outside import OutsideError

__all__ = ["ROOT", "cache_directory", "only_one", "results_directory"]

#: The checkout.
ROOT = Path(__file__).resolve().parents[2]


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
        raise OutsideError(
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
        OutsideError: another has it.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise OutsideError(f"{directory} is in use by another run. {next_step}") from error
    finally:
        os.close(fd)
