"""The command: `scripts/test-wheel --help`.

Exit codes: 0 each root that has to be there was tried, and all passed; 1 one was not as it should be; 2 wrong usage;
75 nothing failed, but where packages come from could not be reached.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from outside import UNREACHED, OutsideError, UnreachedError
from roots import page
from roots.root import Entered, open_root
from roots.suite import Result, compile_programs, download, facts, install, run_tests, watch
from roots.table import CI_ROOTS, FULL_UNIT, ROOTS, SMOKE, UNIT, Root
from wheels.place import PLATFORM, ROOT, cache_directory

PAGE: Final = ROOT / "docs" / "pythons.md"


def main(words: Sequence[str] | None = None) -> int:
    """Runs what is asked for; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/test-wheel", description="Runs the suite against an installed wheel, in roots of other systems."
    )
    names = [root.name for root in ROOTS]
    parser.add_argument("roots", nargs="*", metavar="ROOT", help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--ci", action="store_true", help="what .ci/run has time for")
    parser.add_argument("--full", action="store_true", help="all unit tests, not only those of the lower packages")
    parser.add_argument("--write", action="store_true", help="write docs/pythons.md anew")
    given = sys.argv[1:] if words is None else list(words)
    cut = given.index("--") if "--" in given else len(given)
    args, tests = parser.parse_args(given[:cut]), given[cut + 1 :]
    unknown = [name for name in args.roots if name not in names]
    if unknown:
        parser.error(f"unknown root {unknown[0]!r}; known: {', '.join(names)}")
    if args.write and (args.roots or args.ci or args.full or tests):
        parser.error("--write goes with every root and the tests of the table.")
    chosen = args.roots or (CI_ROOTS if args.ci else names)
    runs, is_failed, is_unreached = [], False, False
    for root in (one for one in ROOTS if one.name in chosen):
        try:
            runs.append(_try(root, tests, FULL_UNIT if args.full else UNIT))
        except UnreachedError as error:
            _say(f"{root.name}: not tried: {error}")
            is_unreached = is_unreached or not root.may_be_absent or bool(args.roots)
        except OutsideError as error:
            _say(f"{root.name}: {error}")
            is_failed = is_failed or not root.may_be_absent or bool(args.roots)
    for run in runs:
        print(
            f"{run.root}: Python {run.python}, glibc {run.glibc}: {run.unit} unit tests and {run.kernel} others passed"
        )
    if args.write and not is_failed and not is_unreached:
        PAGE.write_text(page.render(runs), encoding="utf-8")
        _say(f"wrote {PAGE.relative_to(ROOT)}")
    return 1 if is_failed else UNREACHED if is_unreached else 0


def _try(root: Root, tests: Sequence[str], unit_tests: Sequence[str]) -> page.Run:
    """Everything that is tried in one root.

    Raises:
        OutsideError: it cannot be made, the wheel does not work in it, or a test failed.
    """
    wheel = _wheel_for(root.machine)
    _say(f"{root.name}: {wheel.name} on {root.system}, Python {root.python}")
    packages = download(root, wheel)
    with open_root(root) as entered, tempfile.TemporaryDirectory(dir=cache_directory("work")) as name:
        install(entered, packages)
        python, glibc = facts(entered)
        if root.machine == os.uname().machine:
            print(watch(entered), flush=True)
        compile_programs(Path(name))
        if tests:
            return page.Run(root.name, python, glibc, _run(entered, Path(name), tests).passed, 0)
        unit = _run(entered, Path(name), unit_tests).passed
        others = _run(entered, Path(name), SMOKE).passed if root.machine == os.uname().machine else 0
    return page.Run(root.name, python, glibc, unit, others)


def _run(entered: Entered, programs: Path, words: Sequence[str]) -> Result:
    result = run_tests(entered, programs, words)
    if result.failed or not result.passed:
        names = ", ".join(result.names_of_failed) or "none ran"
        raise OutsideError(f"{result.failed} tests failed in the root: {names}")
    return result


def _wheel_for(machine: str) -> Path:
    """The wheel in dist/, built if it is missing or older than what it is made of."""
    made = ROOT / "dist"
    found = sorted(made.glob(f"sowatch-*-{PLATFORM}_{machine}.whl"), key=lambda path: path.stat().st_mtime)
    said = subprocess.run(
        ["git", "ls-files", "-z", "src", "setup.py", "pyproject.toml", "tools/wheels"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    newest = max((ROOT / name).stat().st_mtime for name in said.split("\0") if name and (ROOT / name).is_file())
    if not found or found[-1].stat().st_mtime < newest:
        code = subprocess.run([ROOT / "scripts" / "wheels", machine], check=False).returncode
        if code:
            raise (UnreachedError if code == UNREACHED else OutsideError)("scripts/wheels failed, see above.")
        found = sorted(made.glob(f"sowatch-*-{PLATFORM}_{machine}.whl"), key=lambda path: path.stat().st_mtime)
    return found[-1]


def _say(what: str) -> None:
    print(f"test-wheel: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    # By `timeout`, too, it ends so that the copy of the root is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
