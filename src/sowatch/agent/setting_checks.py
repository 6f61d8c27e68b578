"""Checks that tables of the configuration share."""

from __future__ import annotations

import importlib.util

from sowatch.model.errors import ConfigError

__all__ = ["in_range", "missing_module"]


def missing_module(*modules: str) -> str | None:
    """The first that is not installed; none is imported."""
    return next((one for one in modules if importlib.util.find_spec(one) is None), None)


def in_range(key: str, value: float, low: float, high: float, *, or_zero: str | None = None) -> None:
    """Refuses a number outside of its range; ``or_zero`` says what 0 stands for where it may be given.

    Raises:
        ConfigError: it is out of range.
    """
    if not low <= value <= high:
        also = "" if or_zero is None else f", or 0 {or_zero}"
        raise ConfigError(key, f"{value} is out of range. Use a number from {low} to {high}{also}.")
