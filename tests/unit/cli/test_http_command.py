"""`sowatch http` before it watches anything."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("package", ["ddsketch", "hpack", "httptools"])
def test_a_package_of_the_extra_that_is_missing_is_named_with_the_way_to_install_it(package: str) -> None:
    program = f"import sys; sys.modules[{package!r}] = None; from sowatch.cli import main; sys.exit(main(['http']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        f"sowatch: {package} is not installed, and HTTP cannot be decoded without it. "
        "Install it: pip install 'sowatch[http]'.\n"
    )


@pytest.mark.parametrize("name", ["Cookie", "authorization"])
def test_a_header_with_secrets_is_refused_before_anything_is_watched(name: str) -> None:
    words = [sys.executable, "-m", "sowatch", "http", "--header", "accept", "--header", name]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"sowatch: the header {name.lower()} is never kept: ")
    assert done.stderr.endswith("Leave it out; docs/privacy.md has what may be named.\n")
