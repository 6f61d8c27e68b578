"""The roots that a wheel is tried in, and the tests that run there. Plain data: this is the file to edit.

After a change run ``scripts/test-wheel --write``, which writes docs/pythons.md anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from msgspec import Struct

__all__ = [
    "CI_ROOTS",
    "FULL_UNIT",
    "LEFT_OUT",
    "LIBRARIES",
    "PROGRAMS",
    "PYTHONS",
    "ROOTS",
    "SMOKE",
    "TEST_PARTS",
    "UNIT",
    "Root",
]


class Root(Struct, frozen=True):
    """A system with its own Python, and nothing but what that needs.

    Attributes:
        name: for the command line.
        system: for people.
        python: its version.
        suite: of Debian or Ubuntu.
        machine: as `uname -m` names it; another than this one is emulated.
        is_ubuntu: its packages come from the mirror that SOWATCH_MIRROR_NOBLE names, or that apt here takes Ubuntu
            from; without either it is not made.
        may_be_absent: it changes every day, and for hours its packages may not fit together, or its packages come
            from elsewhere. Then it is not run, which is said and is no failure.
    """

    name: str
    system: str
    python: str
    suite: str
    machine: str = "x86_64"
    is_ubuntu: bool = False
    may_be_absent: bool = False


#: Every Python that is supported, oldest first: each has a root.
PYTHONS: Final = ("3.11", "3.12", "3.13", "3.14")
ROOTS: Final = (
    Root("bookworm", "Debian 12", "3.11", "bookworm"),
    Root("noble", "Ubuntu 24.04", "3.12", "noble", is_ubuntu=True, may_be_absent=True),
    Root("trixie", "Debian 13", "3.13", "trixie"),
    Root("sid", "Debian unstable", "3.14", "sid", may_be_absent=True),
)
#: What `.ci/run` has time for: not the Python that runs the whole suite there.
CI_ROOTS: Final = ("trixie",)

#: What depends most on what was built, and where.
UNIT: Final = (
    *(
        "tests/unit/bpf",
        "tests/unit/cli",
        "tests/unit/linux",
        "tests/unit/model",
        "tests/unit/sources",
        "tests/unit/uprobes",
    ),
    *("-n", "2"),
)
#: With ``--full``.
FULL_UNIT: Final = ("tests/unit", "-n", "2")
#: Beside them, where the kernel is one for the root's machine. Strategy runtime needs a compiler.
SMOKE: Final = ("tests/e2e/test_commands.py", "tests/kernel/sources/test_conformance.py", "-k", "not runtime")
#: What these need of tests/programs, and which libraries they make: this machine compiles both.
PROGRAMS: Final = ("loader", "mapper")
LIBRARIES: Final = ("libbrief.so", "libkept.so", "libtemplate.so")
#: What tests of those need, of the extra `dev`.
TEST_PARTS: Final = frozenset(
    {"cyclonedx-python-lib", "grpclib", "httpx", "hypothesis", "jsonschema", "orjson", "pydantic", "pyelftools", "pyte"}
    | {"pytest", "pytest-timeout", "pytest-xdist", "requests", "websockets"}
)
#: Tests that a root without compiler and without src/ cannot run, and why.
LEFT_OUT: Final[Mapping[str, str]] = {
    "tests/unit/bpf/test_architectures.py": "compiles the BPF programs",
    "tests/unit/bpf/test_build_programs.py": "compiles the BPF programs",
    "tests/unit/bpf/test_compile.py": "compiles the BPF programs",
    "tests/unit/deploy": "of the chart, not of the package",
    "tests/unit/docs": "of the documentation, and the words in the sources",
    **{
        f"tests/unit/fleet/{name}.py": "asks chdb: 860 MB of the extra `fleet`, for which other tests are"
        for name in ("test_ask", "test_page", "test_questions", "test_schema", "test_simulator")
    },
    "tests/unit/linux/test_elf_cross_check.py": "compares with nm",
    "tests/unit/linux/test_package_note.py::test_note_that_a_section_was_added_with_is_read": "needs objcopy",
    "tests/unit/linux/test_package_note.py::test_note_that_the_linker_writes_is_read": "needs a linker",
    "tests/unit/model/test_schema.py::test_the_schema_that_ships_is_made_of_the_types": "reads the sources",
    "tests/unit/packaging": "of what makes packages, which needs git, shtab and argparse-manpage",
    "tests/unit/telemetry/test_exporters.py::test_a_real_prometheus_scrapes_the_values_that_the_metrics_have": (
        "starts Prometheus"
    ),
    "tests/unit/test_harness.py": "of the suite, not of the package",
    "tests/unit/test_matrix.py": "of the suite, not of the package",
    "tests/unit/test_types_shown.py": "runs mypy over the documentation",
}
