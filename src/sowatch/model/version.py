"""The version of this package, for what cannot import the root."""

from __future__ import annotations

from typing import Final

__all__ = ["VERSION"]

#: As in pyproject.toml; a test compares them.
VERSION: Final = "0.1.0"
