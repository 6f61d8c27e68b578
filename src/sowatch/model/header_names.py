"""Header fields that HTTP flows keep because somebody named them: which may be named, and how their values are kept."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from sowatch.model.errors import UsageError

__all__ = ["MAX_NAMES", "MAX_VALUE", "NEVER_KEPT", "header_names", "kept_value"]

#: Hold what lets somebody act as another one (RFC 9110, section 11; RFC 6265; RFC 2965 for those that end with 2).
NEVER_KEPT: Final = frozenset(
    {"authorization", "cookie", "cookie2", "proxy-authorization", "set-cookie", "set-cookie2"}
)
#: As many may be named: each flow has every one of them.
MAX_NAMES: Final = 32
#: Characters of a value that are kept; one that is longer ends with ``…``.
MAX_VALUE: Final = 1024
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+")


def header_names(names: Iterable[str]) -> tuple[str, ...]:
    """The names in lower case, sorted, each once.

    Raises:
        UsageError: one of `NEVER_KEPT`, one that is no name of a field, or more than `MAX_NAMES`.

    >>> header_names(["X-Request-Id", "x-request-id", "Accept"])
    ('accept', 'x-request-id')
    """
    found = sorted({name.strip().lower() for name in names})
    for name in found:
        if name in NEVER_KEPT:
            raise UsageError(
                f"the header {name} is never kept: who has it can act as the user that sent it. "
                "Leave it out; docs/privacy.md has what may be named."
            )
        if not _TOKEN.fullmatch(name):
            raise UsageError(f"{name!r} is no name of a header. Write one as x-request-id.")
    if len(found) > MAX_NAMES:
        raise UsageError(f"{len(found)} headers are named. Name {MAX_NAMES} at most.")
    return tuple(found)


def kept_value(values: Iterable[str]) -> str:
    r"""The value of a field that may stand in several lines (RFC 9110, section 5.3); what is no UTF-8 as ``\xNN``.

    >>> kept_value(["a", "b"]), kept_value(["caf\udce9"])
    ('a, b', 'caf\\xe9')
    """
    joined = ", ".join(values).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return joined if len(joined) <= MAX_VALUE else joined[:MAX_VALUE] + "…"
