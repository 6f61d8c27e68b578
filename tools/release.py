"""Builds everything that a release consists of, checks it, and says what is published where.

  scripts/release                 of a commit that has a tag (v1.2.3) and nothing that is not committed
  scripts/release --snapshot      of any commit, to try it: what stands against a release is only named
  scripts/release --dry-run       builds nothing: the steps, the checks, and what stands against a release

What is made is in dist/, with its hashes in dist/SHA256SUMS. Nothing is uploaded: that is for a person with the
right to, who has read what this prints.

How a release begins: `towncrier build --version 1.2.3` puts news/ into CHANGELOG.md; commit that, tag the commit
v1.2.3.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["PARTS", "Fault", "Part", "main", "obstacles", "sums"]

ROOT: Final = Path(__file__).resolve().parents[1]
_BIN: Final = ".venv/bin"
_TAG: Final = re.compile(r"v(\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?)")


class Fault(Exception):
    """The release cannot be; the message ends with the next step."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a release.

    Attributes:
        name: for people.
        build: the command, run in the checkout; SOWATCH_VERSION in its environment is the version of the release.
        makes: patterns below dist/, each of which matches something after the build.
        checks: commands by the pattern of the files that they get as further arguments.
        publish: what a person does with them.
    """

    name: str
    build: tuple[str, ...]
    makes: tuple[str, ...] = ()
    publish: str = ""
    checks: tuple[tuple[str, tuple[str, ...]], ...] = ()


_SDIST: Final = "sowatch-*.tar.gz"
_WHEELS: Final = "sowatch-*.whl"
#: In the order in which they are built. Man pages and completions are made for the sdist, and are in all that follows.
PARTS: Final = (
    Part(
        "sdist and wheels",
        ("scripts/wheels",),
        (_SDIST, _WHEELS),
        "to the Python package index: twine upload",
        (
            (_SDIST, (f"{_BIN}/twine", "check", "--strict")),
            (_WHEELS, (f"{_BIN}/twine", "check", "--strict")),
            (_WHEELS, (f"{_BIN}/abi3audit", "--strict")),
        ),
    ),
    # lintian is run by it, where the package is built.
    Part("Debian package", ("scripts/deb",), ("sowatch_*.deb",), "to the page of the release, or an apt repository"),
    Part(
        "chart",
        (f"{_BIN}/python", "tools/pack.py", "chart"),
        ("charts/sowatch-*.tgz",),
        "to the registry or repository of charts: helm push",
    ),
    Part(
        "documentation site",
        (f"{_BIN}/python", "tools/pack.py", "site"),
        ("site/sowatch-*-site.tar.gz",),
        "unpacked, to the web space of the documentation",
    ),
)


def obstacles(root: Path, version: str) -> Iterator[str]:
    """What stands against a release of what is checked out, each as a sentence with the next step."""
    tags = [_TAG.fullmatch(tag) for tag in _git(root, "tag", "--points-at", "HEAD").split()]
    tagged = [tag[1] for tag in tags if tag]
    if not tagged:
        yield "this commit has no tag. Tag it: git tag -s v1.2.3"
    elif version not in tagged:
        yield f"the tag says {tagged[0]} and the build {version}. Run scripts/setup, and commit what is not committed."
    if _git(root, "status", "--porcelain"):
        yield "something is not committed. Commit it, or remove it: git status"
    fragments = sorted(path.name for path in (root / "news").glob("*.*.md"))
    if fragments:
        yield f"news/ has {len(fragments)} fragments. Before the tag: towncrier build --version {version}"
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changes, flags=re.MULTILINE):
        next_step = f"Before the tag: towncrier build --version {version}"
        yield f"CHANGELOG.md has no section of {version} with a date. {next_step}"
    control = (root / "deploy/debian/control").read_text(encoding="utf-8")
    if ".example>" in control:
        yield "Maintainer in deploy/debian/control is a placeholder. Write the address of those who answer."


def sums(directory: Path, files: Sequence[Path]) -> str:
    """The lines of the directory's SHA256SUMS, as sha256sum writes and checks them."""
    hashes = {path.relative_to(directory): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}
    return "".join(f"{digest}  {path}\n" for path, digest in hashes.items())


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout


def _version(root: Path) -> str:
    """As the build finds it."""
    command = [f"{_BIN}/python", "-m", "setuptools_scm"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()


def _run(words: Sequence[str]) -> None:
    print(f"release: {shlex.join(words)}", flush=True)
    if subprocess.run(words, cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode:
        raise Fault(f"{words[0]} failed, see above.")


def _build(part: Part, dist: Path) -> list[Path]:
    _run(part.build)
    made = []
    for pattern in part.makes:
        found = sorted(dist.glob(pattern))
        if not found:
            raise Fault(f"{part.build[0]} has made no {pattern} in {dist}.")
        made += found
    for pattern, check in part.checks:
        _run([*check, *map(str, sorted(dist.glob(pattern)))])
    return made


def _say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/release", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="build nothing, and say what would be done")
    mode.add_argument("--snapshot", action="store_true", help="build what is no release")
    args = parser.parse_args()
    version = _version(ROOT)
    against = list(obstacles(ROOT, version))
    _say(f"sowatch {version}")
    for one in against:
        _say(f"  not a release: {one}")
    if args.dry_run:
        return _show()
    if against and not args.snapshot:
        print("release: nothing was built. With --snapshot it is built all the same.", file=sys.stderr)
        return 1
    try:
        _release(version)
    except Fault as fault:
        print(f"release: {fault}", file=sys.stderr)
        return 1
    return 0


def _show() -> int:
    missing = False
    for part in PARTS:
        is_there = all((ROOT / word).exists() for word in part.build if "/" in word)
        missing |= not is_there
        _say(f"{part.name}: {shlex.join(part.build)}{'' if is_there else '  (not in this checkout)'}")
        for pattern, check in part.checks:
            _say(f"  check {shlex.join(check)} dist/{pattern}")
        if part.publish:
            _say(f"  publish {', '.join(part.makes)} {part.publish}")
    _say("all: dist/SHA256SUMS, published beside each of them")
    return int(missing)


def _release(version: str) -> None:
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    dist.mkdir()
    os.environ["SOWATCH_VERSION"] = version
    # Two builds of one commit are the same.
    os.environ["SOURCE_DATE_EPOCH"] = _git(ROOT, "log", "-1", "--format=%ct").strip()
    began = time.monotonic()
    made = {part: _build(part, dist) for part in PARTS}
    files = [path for some in made.values() for path in some]
    (dist / "SHA256SUMS").write_text(sums(dist, files), encoding="ascii")
    _say(f"\nsowatch {version}: {len(files)} files in dist/, after {time.monotonic() - began:.0f} s. To publish:")
    for part, some in made.items():
        for path in some:
            _say(f"  {path.relative_to(dist)!s:<66} {part.publish}")
    _say(f"  {'SHA256SUMS':<66} beside each of them")


if __name__ == "__main__":
    sys.exit(main())
