"""Unpacks wheels into one directory: unpack.py DIRECTORY WHEEL...

Wheels of one release for several Pythons share their modules and differ in the compiled ones, whose names have the
Python in them. A file that two wheels have with different bytes is an error, but for what describes the wheel itself.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import sys
import zipfile
from pathlib import Path
from typing import Final

#: Of the wheel and not of the release.
_OF_THE_WHEEL: Final = ("WHEEL", "RECORD")


def main() -> int:
    """Returns the exit code."""
    target, *names = map(Path, sys.argv[1:])
    for name in names:
        with zipfile.ZipFile(name) as wheel:
            for path, data in _contents(wheel):
                if ".data/" in path or path.startswith("/") or ".." in Path(path).parts:
                    sys.exit(f"{name}: {path} does not belong into one directory of modules.")
                place = target / path
                if place.exists() and place.read_bytes() != data:
                    if place.parent.suffix == ".dist-info" and place.name in _OF_THE_WHEEL:
                        continue
                    sys.exit(f"{name}: another wheel has {path} with other bytes.")
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(data)
    return 0


def _contents(wheel: zipfile.ZipFile) -> list[tuple[str, bytes]]:
    """Its files, each compared with the hash that RECORD has of it."""
    (record,) = [name for name in wheel.namelist() if name.endswith(".dist-info/RECORD") and name.count("/") == 1]
    hashes = {row[0]: row[1] for row in csv.reader(io.StringIO(wheel.read(record).decode()))}
    found = []
    for name in sorted(wheel.namelist()):
        if name.endswith("/"):
            continue
        data = wheel.read(name)
        if name != record:
            method, _, expected = hashes[name].partition("=")
            digest = base64.urlsafe_b64encode(hashlib.new(method, data).digest()).decode().rstrip("=")
            if digest != expected:
                sys.exit(f"{wheel.filename}: {name} is not what its RECORD says.")
        found.append((name, data))
    return found


if __name__ == "__main__":
    sys.exit(main())
