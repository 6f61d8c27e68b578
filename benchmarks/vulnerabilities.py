"""What data of vulnerabilities cost: 100,000 advisories in an archive read, kept, and asked of.

The advisories are generated: as long as those of a distribution (2 kB of text, three releases, 40 versions each). Each
load runs in a process of its own, beside one that only unpacks the same archive and runs `json.loads` over it; CPU
time, user and system. Judged are 2,000 packages with 5 to 10 advisories each, for the first time and again.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from benchmarks.common import Figure, main, median, spread

PACKAGES = 12_000
LOADED = """
import json, resource, sys, time, zipfile
before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[1] == "json":
    with zipfile.ZipFile(sys.argv[2]) as archive:
        begun_s = time.process_time()
        for entry in archive.infolist():
            json.loads(archive.read(entry))
else:
    from sowatch.inventory.osv import load_osv
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun_s = time.process_time()
    data = load_osv([sys.argv[2]], packs=sys.argv[1] == "packed")
    assert data.is_complete
used_s = time.process_time() - begun_s
resident_kb = int(open("/proc/self/statm").read().split()[1]) * 4
print(json.dumps([used_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb, resident_kb - before_kb]))
"""


def advisory(number: int, rng: random.Random) -> dict[str, object]:
    name = f"source-{number % PACKAGES}"
    affected = []
    for release in ("11", "12", "13"):
        versions = [f"{rng.randrange(9)}.{minor}.{rng.randrange(30)}-1+deb{release}u{minor % 5}" for minor in range(40)]
        affected.append(
            {
                "package": {
                    "ecosystem": f"Debian:{release}",
                    "name": name,
                    "purl": f"pkg:deb/debian/{name}?arch=source",
                },
                "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": versions[-1]}]}],
                "versions": versions,
                "ecosystem_specific": {"urgency": "not yet assigned"},
            }
        )
    return {
        "schema_version": "1.7.0",
        "id": f"DEBIAN-CVE-1900-{number:06}",
        "modified": "2026-01-02T03:04:05Z",
        "upstream": [f"CVE-1900-{number:06}"],
        "details": " ".join(f"word{rng.randrange(2_000)}" for _ in range(220)),
        "severity": [{"type": "CVSS_V3", "score": "CVSS:3.1/AV:N/AC:L/PR:N/UI:N/S:U/C:H/I:H/A:H"}],
        "affected": affected,
    }


def loaded(how: str, path: Path) -> tuple[float, float, float]:
    done = subprocess.run([sys.executable, "-c", LOADED, how, path], capture_output=True, text=True, check=True)
    used_s, peak_kb, kept_kb = json.loads(done.stdout)
    return used_s, peak_kb / 1024, kept_kb / 1024


def judged(path: Path) -> tuple[float, float]:
    """Microseconds for a package: the first time, and again."""
    from sowatch.inventory.osv import load_osv
    from sowatch.inventory.packages import PackageIdentity
    from sowatch.inventory.vulnerabilities import Vulnerabilities

    data = Vulnerabilities(load_osv([str(path)]))
    asked = [
        PackageIdentity(
            f"lib{number}",
            "4.5.6-1+deb12u1",
            f"source-{number}",
            f"pkg:deb/debian/lib{number}@1?distro=debian-12",
            "dpkg",
        )
        for number in range(2_000)
    ]
    taken = []
    for _ in range(2):
        begun_s = time.process_time()
        for one in asked:
            data.findings(one, "ab" * 20)
        taken.append((time.process_time() - begun_s) / len(asked) * 1e6)
    return taken[0], taken[1]


def measure(is_quick: bool, directory: Path) -> list[Figure]:
    count, rounds = (2_000, 1) if is_quick else (100_000, 3)
    rng = random.Random(1)  # noqa: S311 - the same data each time
    path = directory / "all.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(count):
            archive.writestr(f"{number}.json", json.dumps(advisory(number, rng)))
    taken: dict[str, list[tuple[float, float, float]]] = {"json": [], "packed": [], "plain": []}
    for _ in range(rounds):
        for how, found in taken.items():
            found.append(loaded(how, path))
    first_us, again_us = judged(path)
    figures = [Figure(f"archive of {count} advisories", path.stat().st_size / 2**20, "MiB")]
    for how, what in (("packed", "load, as the agent does"), ("plain", "load, as the command does")):
        ratios = [one[0] / other[0] for one, other in zip(taken[how], taken["json"], strict=True)]
        used = [one[0] for one in taken[how]]
        figures += [
            Figure(f"{what}, CPU", median(used), "s", spread(used)),
            Figure("... to unpack and json.loads of the same", median(ratios), "x", spread(ratios)),
            Figure("... memory at the most", median([one[1] for one in taken[how]]), "MiB"),
            Figure("... memory once it is loaded", median([one[2] for one in taken[how]]), "MiB"),
        ]
    return [
        *figures,
        Figure("judge a package for the first time", first_us, "µs"),
        Figure("... again", again_us, "µs"),
    ]


if __name__ == "__main__":
    main("vulnerabilities", measure)
