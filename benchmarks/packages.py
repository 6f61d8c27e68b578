"""What it costs to know the packages of mapped files.

Of a Debian root with 1,500 packages, and 300 libraries of 150 of them. In a process of its own for each size, so that
memory is that of this only. The root is made for it; lists, MD5 sums and status have the size of Debian's.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.common import Figure, main

#: Of a Debian 12 with a desktop: 130 files a package.
FILES = 130
LIBRARIES = 2

CHILD = """
import json, os, sys, time
sys.path.insert(0, "tests")
from pathlib import Path
import subprocess
from sowatch.inventory.packages import Packages
from support.package_roots import Jailed, add_dpkg, elf

def rss():
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith(("Private_Dirty", "Private_Clean"))) / 1000

root, packages = Path(sys.argv[1]), int(sys.argv[2])
jailed = Jailed(subprocess.Popen, root)
paths = json.loads(sys.argv[3])
mapped = [jailed.map(path) for path in paths]
found = {}
with Packages() as asked:
    asked.identify(mapped[:0])
    def measured(name, wanted):
        before = time.process_time()
        known = sum(one is not None for one in asked.identify(wanted))
        found[name] = (time.process_time() - before) * 1000
        assert known == len(wanted), (name, known)
    found["before"] = rss()
    measured("first", mapped[:-1])
    found["after"] = rss()
    measured("again", mapped[:-1])
    measured("one_more", mapped[-1:])
    for turn in range(10):
        status = root / "var/lib/dpkg/status"
        (root / "status-new").write_bytes(status.read_bytes())
        (root / "status-new").rename(status)
        path = f"/usr/lib/extra{turn}.so"
        add_list = root / f"var/lib/dpkg/info/package0.list"
        content = elf(10**6 + turn)
        (root / path[1:]).write_bytes(content)
        (root / "list-new").write_text(add_list.read_text() + path + "\\n")
        (root / "list-new").rename(add_list)
        measured("after_change", [jailed.map(path)])
    found["later"] = rss()
jailed.process.kill(); jailed.process.wait()
print(json.dumps(found))
"""


def measure(is_quick: bool, directory: Path) -> list[Figure]:
    figures = []
    for packages in (50,) if is_quick else (150, 1500):
        root = directory / f"root{packages}"
        paths = make_root(root, packages)
        done = subprocess.run(
            [sys.executable, "-c", CHILD, root, str(packages), json.dumps(paths)],
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
        found = json.loads(done.stdout)
        what = f"{packages} packages"
        figures += [
            Figure(f"CPU, {len(paths) - 1} files asked for the first time, {what}", found["first"], "ms"),
            Figure(f"CPU, the same again, {what}", found["again"], "ms"),
            Figure(f"CPU, one more file, {what}", found["one_more"], "ms"),
            Figure(f"CPU, one more file after dpkg has changed a package, {what}", found["after_change"], "ms"),
            Figure(f"memory that the first time takes, {what}", found["after"] - found["before"], "MB", aim=10),
            Figure(f"memory after ten changes of dpkg, {what}", found["later"] - found["before"], "MB", aim=10),
        ]
    return figures


def make_root(root: Path, packages: int) -> list[str]:
    """A root as dpkg leaves it; returns the paths of libraries of every tenth package."""
    from support.package_roots import elf

    info = root / "var/lib/dpkg/info"
    info.mkdir(parents=True)
    (root / "var/lib/dpkg/updates").mkdir()
    (root / "etc").mkdir()
    (root / "etc/os-release").write_text("ID=debian\nVERSION_ID=12\n")
    (root / "usr/lib").mkdir(parents=True)
    paths, stanzas = [], []
    for number in range(packages):
        names = [f"/usr/share/package{number}/directory/file-of-a-package-{at}.txt" for at in range(FILES - LIBRARIES)]
        sums = [f"{at:032x}  {name[1:]}" for at, name in enumerate(names)]
        for at in range(LIBRARIES):
            path = f"/usr/lib/libpackage{number}-{at}.so.1"
            names.append(path)
            content = elf(number * LIBRARIES + at)
            sums.append(f"{hashlib.md5(content, usedforsecurity=False).hexdigest()}  {path[1:]}")
            if number % 10 == 0:
                (root / path[1:]).write_bytes(content)
                paths.append(path)
        (info / f"package{number}.md5sums").write_text("\n".join(sums) + "\n")
        (info / f"package{number}.list").write_text("\n".join(["/.", *names]) + "\n")
        text = "A description of a package, as long as those of Debian are.\n " * 12
        stanzas.append(
            f"Package: package{number}\nStatus: install ok installed\nArchitecture: amd64\nSource: source{number}\n"
            f"Version: 1.{number}-1\nDescription: {text}\n"
        )
    (root / "var/lib/dpkg/status").write_text("\n".join(stanzas))
    return paths


if __name__ == "__main__":
    main("packages", measure)
