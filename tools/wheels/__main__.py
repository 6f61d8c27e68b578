"""The command: `scripts/wheels --help`."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from outside import UNREACHED, OutsideError, UnreachedError
from wheels import bundle, libraries, package, sources, verify
from wheels.place import MACHINES, ROOT, cache_directory


def main(words: Sequence[str] | None = None) -> int:
    """Builds and checks; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/wheels", description="Builds the sdist and the wheels that need no compiler, and checks them."
    )
    parser.add_argument("machines", nargs="*", metavar="MACHINE", help=f"{' or '.join(MACHINES)}; default: both")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", metavar="DIR", help="default: dist/")
    parser.add_argument("--sdist", action="store_true", help="the sdist only")
    args = parser.parse_args(words)
    unknown = [machine for machine in args.machines if machine not in MACHINES]
    if unknown:
        parser.error(f"unknown machine {unknown[0]!r}; known: {', '.join(MACHINES)}")
    # The same input gives the same archives.
    os.environ.setdefault("SOURCE_DATE_EPOCH", _commit_time())
    try:
        faults = _build(tuple(args.machines) or MACHINES, args.out.absolute(), is_sdist_only=args.sdist)
    except OutsideError as error:
        print(f"wheels: {error}", file=sys.stderr)
        return UNREACHED if isinstance(error, UnreachedError) else 1
    for fault in faults:
        print(f"wheels: {fault}", file=sys.stderr)
    return 1 if faults else 0


def _build(machines: Sequence[str], output: Path, *, is_sdist_only: bool) -> list[str]:
    """Everything into ``output``; returns what is wrong with it."""
    if is_sdist_only:
        # BPF objects of all machines are compiled with the headers of libbpf, which are those of any.
        machines = machines[:1]
    # Several builds at once share what is in the cache, so one makes it.
    with (cache_directory() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _say("sources of the C libraries")
        fetched = sources.fetch()
        prefixes = {}
        for machine in machines:
            _say(f"{', '.join(f'{source.name} {source.version}' for source in fetched)} for {machine}")
            prefixes[machine] = libraries.build_libraries(machine, fetched)
    output.mkdir(parents=True, exist_ok=True)
    faults = []
    with tempfile.TemporaryDirectory(dir=cache_directory("work")) as name:
        work = Path(name)
        _say("BPF objects and the sdist")
        sdist = package.make_sdist(work / "sdist", next(iter(prefixes.values())) / "include")
        objects = _objects_of(sdist)
        for machine in () if is_sdist_only else machines:
            _say(f"wheel for {machine}")
            for part in ("build", "unpacked"):
                (work / machine / part).mkdir(parents=True)
            made = package.make_wheel(machine, sdist, prefixes[machine], work / machine / "build")
            made = bundle.complete(made, fetched, work / machine / "unpacked", work / machine / "done")
            faults += [f"{made.name}: {fault}" for fault in verify.faults_of(made, objects)]
            _keep(made, output)
        _keep(sdist, output)
    return faults


def _objects_of(sdist: Path) -> dict[str, dict[str, str]]:
    """By machine the SHA-256 of each BPF object in an sdist."""
    found: dict[str, dict[str, str]] = {machine: {} for machine in MACHINES}
    with tarfile.open(sdist) as archive:
        for member in archive:
            parts = Path(member.name).parts
            if parts[1:2] == ("prebuilt",) and member.name.endswith(".bpf.o"):
                file = archive.extractfile(member)
                assert file is not None
                found[parts[2]][parts[3]] = hashlib.sha256(file.read()).hexdigest()
    return found


def _keep(made: Path, output: Path) -> None:
    kept = output / made.name
    shutil.copyfile(made, kept)
    print(f"{hashlib.sha256(kept.read_bytes()).hexdigest()}  {kept}")


def _commit_time() -> str:
    said = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True, check=False)
    return said.stdout.strip() or "315532800"


def _say(what: str) -> None:
    print(f"wheels: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
