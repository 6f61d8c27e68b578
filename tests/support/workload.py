"""A mixed workload: several hundred processes, most of which live for a few milliseconds.

``python workload.py SEED DIRECTORY ROUNDS`` runs it, four things at a time in an order that SEED shuffles, with the
programs and libraries that `prepare` put into DIRECTORY.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.programs import Mapper, build, make_libraries

__all__ = ["prepare"]

PYTHON = "/usr/bin/python3"


def prepare(directory: Path) -> None:
    """Compile what the workload runs."""
    for program in ("mapper", "loader", "churn", "storm"):
        build(program, directory)
    make_libraries(directory, 8)
    library = make_libraries(directory, 1)[0]
    build("loader", directory, flags=["-DLINKED", str(library), f"-Wl,-rpath,{directory}"], output="loader-linked")


class Workload:
    """The things that are done; each method starts processes and waits until they ended."""

    def __init__(self, directory: Path, scratch: Path) -> None:
        self.directory = directory
        self.scratch = scratch
        self.libraries = [directory / f"libtiny{number}.so" for number in range(8)]

    def tiny_program(self) -> None:
        """A process that maps the C library and ends."""
        os.waitpid(os.posix_spawn("/bin/true", ["true"], os.environ), 0)

    def pipeline(self) -> None:
        """A shell that forks, and children that fork and execute."""
        subprocess.run(["/bin/sh", "-c", "(echo a; true) | cat | wc -c >/dev/null"], check=True)

    def exec_chain(self) -> None:
        """One process that is three programs in turn."""
        subprocess.run(["/bin/sh", "-c", "exec /bin/sh -c 'exec env true'"], check=True)

    def import_ssl(self) -> None:
        """An interpreter that maps a dozen extension modules."""
        subprocess.run([PYTHON, "-c", "import ssl"], check=True)

    def dlopen_in_threads(self) -> None:
        """Libraries that come and go in four threads at once."""
        command: list[str | Path] = [self.directory / "churn", "4", "50", *self.libraries[:4]]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def load_and_exit(self) -> None:
        """A process that ends as soon as it has opened two libraries."""
        subprocess.run([self.directory / "loader", *random.sample(self.libraries, 2)], check=True)

    def linked(self) -> None:
        """A process whose library was mapped by ld.so."""
        subprocess.run([self.directory / "loader-linked"], check=True)

    def storm(self) -> None:
        """Forty processes as fast as they can be run."""
        command: list[str | Path] = [self.directory / "storm", "2", "40", self.directory / "loader", self.libraries[0]]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def fork_without_exec(self) -> None:
        """A child of a small parent that opens a library its parent does not have."""
        with Mapper(self.directory / "mapper", self.scratch) as parent:
            parent.emit("dlopen", self.libraries[1])
            with parent.fork() as child:
                child.emit("dlopen", self.libraries[2])
                with child.fork() as grandchild:
                    grandchild.map(self.libraries[3])

    def fork_of_threaded(self) -> None:
        """Children of a process whose other thread maps and unmaps meanwhile."""
        with Mapper(self.directory / "mapper", self.scratch) as parent:
            parent.emit("thread", "loop", self.libraries[4])
            for _ in range(3):
                with parent.fork() as child:
                    child.map(self.libraries[5])
            parent.emit("thread", "stop")

    def fork_in_python(self) -> None:
        """A forked interpreter that opens a library and ends without exec."""
        script = (
            "import ctypes, os, sys\n"
            "child = os.fork()\n"
            "if child == 0:\n"
            "    ctypes.CDLL(sys.argv[1]); os._exit(0)\n"
            "os.waitpid(child, 0)\n"
        )
        subprocess.run([PYTHON, "-S", "-c", script, self.libraries[6]], check=True)

    def other_ways_to_map(self) -> None:
        """What is not dlopen: mprotect, MAP_FIXED, mremap, memfd, a deleted and a spaced file."""
        odd = Path(tempfile.mkdtemp(dir=self.scratch), "lib with space.so")
        shutil.copy(self.libraries[7], odd)
        with Mapper(self.directory / "mapper", self.scratch) as mapper:
            at, length = mapper.map(self.libraries[0], "noexec")
            mapper.protect(at, length, "rx")
            mapper.map(self.libraries[1], "at", f"{at:x}")
            mapper.map(self.libraries[2], "noexec")
            moved, length = mapper.map(self.libraries[3])
            mapper.emit("remap", f"{moved:x}", length, length + 65536)
            mapper.emit("memfd", "some name", self.libraries[4])
            mapper.map(odd)
            odd.unlink()
            mapper.exec()
            mapper.map(self.libraries[5])

    def threads_that_interfere(self) -> None:
        """A leader that leaves first, exec from another thread, an fd replaced under mmap."""
        with Mapper(self.directory / "mapper", self.scratch) as mapper:
            mapper.emit("leaderexit")
            mapper.map(self.libraries[1])
            mapper.exec(how="execthread")
            mapper.emit("thread", "anon", "-")
            mapper.emit("dup2race", self.libraries[2], self.libraries[3], 300)
            mapper.emit("thread", "stop")

    def ways_to_start(self) -> None:
        """Children by vfork and posix_spawn of a process with mappings of its own."""
        with Mapper(self.directory / "mapper", self.scratch) as mapper:
            mapper.map(self.libraries[0])
            for how in ("vfork", "spawn"):
                (pid,) = mapper.emit(how, self.directory / "loader", self.libraries[1])
                mapper.emit("wait", pid)

    def plan(self, rounds: int) -> list[Callable[[], None]]:
        """Everything to do, in no particular order: some 350 processes a round."""
        once = [
            *[self.tiny_program] * 60,
            *[self.load_and_exit] * 30,
            *[self.linked] * 20,
            *[self.pipeline] * 20,
            *[self.exec_chain] * 10,
            *[self.storm] * 2,
            *[self.dlopen_in_threads] * 4,
            *[self.import_ssl] * 4,
            *[self.fork_without_exec] * 6,
            *[self.fork_of_threaded] * 4,
            *[self.fork_in_python] * 4,
            *[self.other_ways_to_map] * 4,
            *[self.threads_that_interfere] * 4,
            *[self.ways_to_start] * 4,
        ]
        return once * rounds


def main(seed: int, directory: Path, rounds: int) -> None:
    """Run the workload and print the number of things done."""
    random.seed(seed)
    # This process too maps files while its threads fork: of the kind that is easy to get wrong.
    with tempfile.TemporaryDirectory(prefix="wl-") as scratch, ThreadPoolExecutor(4) as workers:
        workload = Workload(directory, Path(scratch))
        plan = workload.plan(rounds)
        random.shuffle(plan)
        done = [workers.submit(thing) for thing in plan]
        ctypes.CDLL(os.fspath(workload.libraries[7]))
        for one in done:
            one.result()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
