"""The table of docs/http.md: which program was seen with which library, as the tests that passed say.

With SOWATCH_WRITE_HTTP_TABLE=1 it is written anew from the tests of a session; else each of them needs its row.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["PASSED", "Row", "documented", "is_written", "passed", "write"]

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "http.md"
_BEGIN, _END = "<!-- table of tests/support/http_table.py -->\n", "<!-- end of the table -->\n"
#: By name of a file the family of its library, and the expression of Python (`lib` is loaded) that gives its version.
_FAMILIES: Final = (
    (r"libssl\.so\.3", "OpenSSL", "lib.OpenSSL_version_num"),
    (r"libssl-\w+\.so\.3", "OpenSSL of a wheel", "lib.OpenSSL_version_num"),
    (r"node", "OpenSSL in node", None),
    (r"libssl\.so\.0", "BoringSSL (Android's)", None),
    (r"libgnutls\.so\.30", "GnuTLS", "lib.gnutls_check_version"),
    (r"libnspr4\.so", "NSS", "ctypes.CDLL(path.replace('libnspr4', 'libnss3')).NSS_GetVersion"),
)


class Row(NamedTuple):
    """What one test shows."""

    library: str
    side: str
    program: str
    protocol: str


#: What passed in this session, and by library which version that was.
PASSED: Final[set[Row]] = set()
_VERSIONS: Final[dict[str, str]] = {}


def passed(library: str, side: str, program: str, protocol: str) -> None:
    """Notes that every request of a program was there once, and right; its row has to stand in the page."""
    name = Path(library).name
    (found,) = [(family, asked) for pattern, family, asked in _FAMILIES if re.fullmatch(pattern, name)]
    row = Row(found[0], side, program, protocol)
    PASSED.add(row)
    if is_written():
        _VERSIONS.setdefault(row.library, _version(library, found[1]))
    else:
        assert row in documented(), f"docs/http.md has no {row}: run tests/e2e/test_http*.py with {_WRITE}=1"


_WRITE: Final = "SOWATCH_WRITE_HTTP_TABLE"


def is_written() -> bool:
    return os.environ.get(_WRITE) == "1"


def _version(path: str, asked: str | None) -> str:
    if asked is None:
        return "-"
    program = (
        f"import ctypes, sys; path = sys.argv[1]; lib = ctypes.CDLL(path); asked = {asked}\n"
        "if asked.__name__ == 'OpenSSL_version_num':\n"
        "    asked.restype = ctypes.c_ulong; number = asked()\n"
        "    print(f'{number >> 28}.{number >> 20 & 255}.{number >> 4 & 65535}')\n"
        "else: asked.restype = ctypes.c_char_p; print(asked(*[None][: asked.__name__ != 'NSS_GetVersion']).decode())"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(Path(path).parent)}
    done = subprocess.run(
        [sys.executable, "-c", program, path], env=environment, check=True, capture_output=True, text=True, timeout=60
    )
    return done.stdout.strip()


def documented() -> set[Row]:
    """The rows of the page."""
    table = PAGE.read_text().partition(_BEGIN)[2].partition(_END)[0]
    rows = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in table.splitlines()[2:]]
    return {
        Row(library, side, program, protocol)
        for library, _, side, protocol, programs in rows
        for program in programs.split(", ")
    }


def write() -> None:
    """Puts what passed into the page."""
    groups: dict[tuple[str, str, str], set[str]] = {}
    for row in PASSED:
        groups.setdefault((row.library, row.side, row.protocol), set()).add(row.program)
    lines = ["| library | version | side | protocol | programs |", "|---|---|---|---|---|"]
    lines += [
        f"| {library} | {_VERSIONS.get(library, '-')} | {side} | {protocol} | {', '.join(sorted(programs))} |"
        for (library, side, protocol), programs in sorted(groups.items())
    ]
    before, begin, rest = PAGE.read_text().partition(_BEGIN)
    assert begin, f"{PAGE} has no {_BEGIN.strip()}"
    PAGE.write_text(before + begin + "\n".join(lines) + "\n" + _END + rest.partition(_END)[2])
