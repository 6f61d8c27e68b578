"""Runs the kernel tests under other kernels, each in a guest (QEMU) that shares this machine's root.

  scripts/matrix [KERNEL...] [-- PYTEST-ARGUMENT...]
  scripts/matrix prepare [KERNEL...]      fetch the newest kernels and make the images, or search for newer ones
  scripts/matrix start KERNEL             a shell in a guest; it ends when the shell does

Without kernels: all of them. After `--`: run these tests and not the chosen ones. Kernels, images and
what guests wrote are kept in ~/.cache/sowatch/matrix, or where SOWATCH_MATRIX_CACHE says.

Exit codes: 0 each guest is as the table (tools/matrix/kernels.py) says; 1 one is not, or could not be run;
2 wrong usage. The newest kernel moves on by itself: a release that docs/kernels.md does not have yet may differ.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import shutil
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from matrix.cache import ROOT, cache_directory, only_one, results_directory
from matrix.guest import GuestHangs, run_guest
from matrix.image import make_image
from matrix.judge import Verdict, judge, judge_unfinished, step_of
from matrix.kernels import CELLS, CI_KERNELS, CI_WITHOUT_CELLS, KERNELS, TESTS, Kernel
from matrix.packages import Unpacked, fetch, unpacked
from matrix.page import Run, is_news, render
from outside import OutsideError, run

PAGE: Final = ROOT / "docs/kernels.md"
#: Each has two virtual CPUs but emulates them in one thread.
GUESTS_AT_ONCE: Final = 2
#: With less time than this no guest is begun: it would boot and find out what the kernel can do, and be ended.
LEAST_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Ready:
    """A kernel that can be started."""

    kernel: Kernel
    unpacked: Unpacked
    image: Path


def main() -> int:
    """Returns the exit code."""
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    args = _arguments(words[:cut])
    asked = words[cut + 1 :]
    try:
        if args.verb == "prepare":
            return 0 if _prepare(args.kernels, anew=True)[1] else 1
        if args.verb == "start":
            return _start(args.kernels[0])
        with only_one(results_directory(), "Wait for it to end."):
            return _run(args.kernels, asked, is_ci=args.ci, write=args.write, time_s=args.time)
    except OutsideError as error:
        print(f"matrix: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130


def _arguments(words: list[str]) -> argparse.Namespace:
    verb = words.pop(0) if words[:1] in (["prepare"], ["start"]) else "run"
    parser = argparse.ArgumentParser(
        prog="scripts/matrix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    by_name = {kernel.name: kernel for kernel in KERNELS}
    parser.add_argument("names", nargs="*", metavar="KERNEL", help=f"one of {', '.join(by_name)}")
    parser.add_argument("--ci", action="store_true", help="the kernels that .ci/run has time for")
    parser.add_argument(
        "--time",
        type=float,
        metavar="SECONDS",
        help="with --ci: begin no guest and end those that run when this time is up. What they found wrong until then "
        "fails the run, what they did not get to is named and does not",
    )
    parser.add_argument("--write", action="store_true", help="write docs/kernels.md after a run without faults")
    args = parser.parse_args(words)
    for name in args.names:
        if name not in by_name:
            parser.error(f"there is no kernel {name!r} in the table. Use: {', '.join(by_name)}.")
    names = [*args.names, *(CI_KERNELS if args.ci else ())] or list(by_name)
    args.verb = verb
    args.kernels = [by_name[name] for name in dict.fromkeys(names)]
    if verb == "start" and len(args.names) != 1:
        parser.error("start takes one kernel.")
    if args.time is not None and not args.ci:
        parser.error("--time goes with --ci.")
    if args.write and (verb != "run" or args.ci):
        parser.error("--write goes with a run, and not with --ci.")
    return args


def _prepare(kernels: list[Kernel], *, anew: bool) -> tuple[list[Ready], bool]:
    """The kernels that can be started, and whether those are all that must.

    Args:
        kernels: wanted.
        anew: ask the mirror for newer ones; otherwise only for those that are not in the cache.
    """
    if platform.machine() != "x86_64":
        raise OutsideError(f"guests run this machine's programs on x86-64 kernels; here is {platform.machine()}.")
    found = []
    is_complete = True
    for kernel in kernels:
        try:
            try:
                one = fetch(kernel) if anew else unpacked(kernel)
            except OutsideError:
                if anew:
                    raise
                one = fetch(kernel)
        except OutsideError as error:
            print(f"{kernel.name}: not run: {error}", flush=True)
            is_complete = is_complete and kernel.may_be_absent
            continue
        # Made each time, because it takes less than it would to find out whether it is still right.
        image = cache_directory("images") / f"{kernel.name}.cpio.gz"
        fresh = image.with_suffix(f".{os.getpid()}")
        make_image(one, fresh)
        fresh.rename(image)
        print(f"{kernel.name}: {one.release}", flush=True)
        found.append(Ready(kernel, one, image))
    return found, is_complete


def _start(kernel: Kernel) -> int:
    (ready,), _ = _prepare([kernel], anew=False)
    out = results_directory(kernel.name)
    print("The checkout is read-only in the guest; /tmp, /var/tmp and /run/out can be written to.", flush=True)
    rc = asyncio.run(run_guest(ready.unpacked, ready.image, ["bash", "-i"], out, progress=None))
    return 1 if rc is None else rc


def _run(kernels: list[Kernel], asked: list[str], *, is_ci: bool, write: bool, time_s: float | None = None) -> int:
    end_s = None if time_s is None else time.monotonic() + time_s
    if time_s is not None and time_s < LEAST_S:
        names = [kernel.name for kernel in kernels]
        print(f"no guest was begun: {time_s:g} s are too few. Run `scripts/matrix {' '.join(names)}`.")
        return 0
    ready, is_complete = _prepare(kernels, anew=False)
    _warm()
    chosen = {one.kernel.name: asked or _tests_of_ci(one.kernel, is_ci=is_ci) for one in ready}
    found = asyncio.run(_run_all(ready, chosen, end_s))
    verdicts = [(one.kernel, verdict) for one, verdict in zip(ready, found, strict=True) if verdict is not None]
    _say_what_ran([one.kernel.name for one in ready], dict(zip([one.kernel.name for one in ready], found, strict=True)))
    is_flawless = is_complete and bool(verdicts) and not any(one.faults or not one.is_done for _, one in verdicts)
    is_good = is_complete and (bool(verdicts) or time_s is not None)
    for kernel, verdict in verdicts:
        if verdict.faults and is_news(kernel, verdict.release, PAGE.read_text(encoding="utf-8")):
            print(
                f"{kernel.name}: {verdict.release} is not the release of {PAGE.relative_to(ROOT)}, so this is no "
                "failure. Read it, correct the table, and run `scripts/matrix --write`."
            )
        elif verdict.faults:
            is_good = False
    if write and is_flawless and not asked:
        PAGE.write_text(
            render([Run(kernel.name, one.release, one.passed) for kernel, one in verdicts]), encoding="utf-8"
        )
        print(f"wrote {PAGE.relative_to(ROOT)}")
    elif write:
        print(
            f"{PAGE.relative_to(ROOT)} is left as it was: it is written after a run of the chosen tests without faults"
        )
    return 0 if is_good else 1


def _say_what_ran(names: list[str], found: dict[str, Verdict | None]) -> None:
    words = []
    for name in names:
        verdict = found[name]
        if verdict is None:
            words.append(f"{name} not begun")
        elif verdict.is_done:
            words.append(f"{name} to its end")
        else:
            words.append(f"{name} in part ({verdict.passed} tests passed)")
    print(f"ran: {', '.join(words)}")
    left = [name for name, verdict in found.items() if verdict is None or not verdict.is_done]
    if left:
        print(f"the time was up before all was done. Run `scripts/matrix {' '.join(left)}`.")


def _tests_of_ci(kernel: Kernel, *, is_ci: bool) -> list[str]:
    """The tests to which a run is limited; none if it is not."""
    return [*TESTS] if is_ci and kernel.name in CI_WITHOUT_CELLS else []


def _warm() -> None:
    """Has Python and pytest compile every module now: a guest cannot keep it, and needs many times as long."""
    python = Path(sys.executable)
    run(
        [python, "-m", "pytest", "-q", "--collect-only", "tests/kernel", "tests/e2e"],
        next_step="Run `scripts/setup --for matrix`.",
        directory=ROOT,
    )


async def _run_all(ready: list[Ready], asked: dict[str, list[str]], end_s: float | None) -> list[Verdict | None]:
    """A verdict for each, in the order of the table; None where the time was up before it could begin."""
    task = asyncio.current_task()
    assert task is not None
    # So that the guests end with us, as they do on SIGINT.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    free = asyncio.Semaphore(GUESTS_AT_ONCE)

    async def run_one(one: Ready) -> Verdict | None:
        async with free:
            if end_s is None:
                return await _run_one(one, asked[one.kernel.name])
            left_s = end_s - time.monotonic()
            if left_s < LEAST_S:
                return None
            try:
                async with asyncio.timeout(left_s):
                    return await _run_one(one, asked[one.kernel.name])
            except TimeoutError:
                out = results_directory(one.kernel.name)
                cells = () if asked[one.kernel.name] else CELLS
                verdict = judge_unfinished(one.kernel.name, out, cells)
                _say(one, verdict, f"ended after {left_s:.0f} s, in {step_of(out)}")
                return verdict

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(run_one(one)) for one in ready]
    return [task.result() for task in tasks]


async def _run_one(one: Ready, asked: list[str]) -> Verdict:
    """Runs a guest, once more if it died, and says what came of it."""
    begin_s = time.monotonic()
    again = ""
    verdict = await _attempt(one, asked)
    if verdict is None:
        again = ", at the second try"
        # Its last words are worth reading even if the second one lives.
        shutil.copy(
            results_directory(one.kernel.name) / "console.log", results_directory() / f"{one.kernel.name}.died.log"
        )
        verdict = await _attempt(one, asked)
    if verdict is None:
        verdict = Verdict("", 0, (f"the guest died twice; see {results_directory(one.kernel.name)}/console.log",))
    _say(one, verdict, f"{time.monotonic() - begin_s:.0f} s{again}")
    return verdict


def _say(one: Ready, verdict: Verdict, how: str) -> None:
    word = "fails" if verdict.faults else "ok" if verdict.is_done else "nothing wrong so far"
    print(f"{one.kernel.name}: {word}, {verdict.passed} tests passed, {how}")
    for fault in verdict.faults:
        print("  " + fault.replace("\n", "\n    "))
    sys.stdout.flush()


async def _attempt(one: Ready, asked: list[str]) -> Verdict | None:
    """None: the guest died, which emulated ones sometimes do."""
    out = results_directory(one.kernel.name)
    shutil.rmtree(out)
    out.mkdir()
    command = ["env", f"PYTHONPATH={ROOT / 'tools'}", "PYTHONDONTWRITEBYTECODE=1"]
    command += [sys.executable, "-m", "matrix.inside", one.kernel.name, "/run/out", *asked]
    cells = () if asked else CELLS
    try:
        rc = await run_guest(
            one.unpacked, one.image, command, out, progress=lambda: [p.stat().st_size for p in out.glob("*.progress")]
        )
    except GuestHangs as hang:
        verdict = judge_unfinished(one.kernel.name, out, cells)
        words = f"it hangs in {step_of(out)}: {hang}; see {out / 'console.log'}"
        return replace(verdict, faults=(*verdict.faults, words), is_done=True)
    if rc:
        return Verdict("", 0, (f"reading it ended with {rc}; see {out / 'console.log'}",))
    return None if rc is None else judge(one.kernel.name, out, cells)


if __name__ == "__main__":
    sys.exit(main())
