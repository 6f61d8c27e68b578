"""The version of this package, for what cannot import the root.

The build takes it from the tag (setuptools-scm) and writes it beside this module, so that no command has to import
importlib.metadata for it.
"""

from __future__ import annotations

from typing import Final

try:
    from sowatch.model._version import VERSION as _BUILT
except ImportError:
    _BUILT = "0.1.dev0"  # as `fallback_version` in pyproject.toml: this checkout was not built

__all__ = ["VERSION"]

#: As in the metadata of the package.
VERSION: Final = _BUILT
