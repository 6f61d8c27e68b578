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
