"""The table of docs/http.md: which program was seen with which library, as the tests that passed say.

With SOWATCH_WRITE_HTTP_TABLE=1 it is written anew from the tests of a session; else each of them needs its row, and
each row a test. A plugin of pytest, which also adds up what tests that run side by side have shown.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

__all__ = ["passed", "pytest_sessionfinish", "pytest_testnodedown"]

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "http.md"
_BEGIN, _END = "<!-- table of tests/support/http_table.py -->\n", "<!-- end of the table -->\n"
_MODULES: Final = ("tests/e2e/test_http.py", "tests/e2e/test_http_compatibility.py")
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
_PASSED: Final[set[Row]] = set()
_VERSIONS: Final[dict[str, str]] = {}


def passed(library: str, side: str, program: str, protocol: str) -> None:
    """Notes that every request of a program was there once, and right; its row has to stand in the page."""
    name = Path(library).name
    (found,) = [(family, asked) for pattern, family, asked in _FAMILIES if re.fullmatch(pattern, name)]
    row = Row(found[0], side, program, protocol)
    _PASSED.add(row)
    if _is_written():
        _VERSIONS.setdefault(row.library, _version(library, found[1]))
    else:
        assert row in _documented(), f"docs/http.md has no {row}: run tests/e2e/test_http*.py with {_WRITE}=1"


_WRITE: Final = "SOWATCH_WRITE_HTTP_TABLE"


def _is_written() -> bool:
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


def _documented() -> set[Row]:
    """The rows of the page."""
    table = PAGE.read_text().partition(_BEGIN)[2].partition(_END)[0]
    rows = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in table.splitlines()[2:]]
    return {
        Row(library, side, program, protocol)
        for library, _, side, protocol, programs in rows
        for program in programs.split(", ")
    }


def _write() -> None:
    """Puts what passed into the page."""
    groups: dict[tuple[str, str, str], set[str]] = {}
    for row in _PASSED:
        groups.setdefault((row.library, row.side, row.protocol), set()).add(row.program)
    lines = ["| library | version | side | protocol | programs |", "|---|---|---|---|---|"]
    lines += [
        f"| {library} | {_VERSIONS.get(library, '-')} | {side} | {protocol} | {', '.join(sorted(programs))} |"
        for (library, side, protocol), programs in sorted(groups.items())
    ]
    before, begin, rest = PAGE.read_text().partition(_BEGIN)
    assert begin, f"{PAGE} has no {_BEGIN.strip()}"
    PAGE.write_text(before + begin + "\n".join(lines) + "\n" + _END + rest.partition(_END)[2])


def _all_passed(session: pytest.Session) -> bool:
    """Whether each test function of the modules has passed, with some of its parameters at least."""
    if not _PASSED or session.config.option.keyword:
        return False
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    shown = {one.nodeid.partition("[")[0] for one in reporter.stats.get("passed", ())}
    root = PAGE.parents[1]
    wanted = {
        f"{module}::{node.name}"
        for module in _MODULES
        for node in ast.parse((root / module).read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    return wanted <= shown


def pytest_testnodedown(node: Any) -> None:
    """A process of tests that ran side by side has ended."""
    output = getattr(node, "workeroutput", {})
    _PASSED.update(Row(*row) for row in output.get("http_rows", ()))
    _VERSIONS.update(output.get("http_versions", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes the table, or fails the session if a row is shown by no test any more."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput |= {"http_rows": [tuple(row) for row in _PASSED], "http_versions": _VERSIONS}
    elif _all_passed(session):
        if _is_written():
            _write()
        # Debian has no libcurl with NSS any more from 13 on.
        libraries = {row.library for row in _PASSED}
        stale = {row for row in _documented() - _PASSED if row.library != "NSS" or "NSS" in libraries}
        if stale:
            reporter = session.config.pluginmanager.get_plugin("terminalreporter")
            reporter.write_line(f"\n{PAGE}: no test shows {sorted(stale)}. Run these with {_WRITE}=1.", red=True)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
