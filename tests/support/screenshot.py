"""Makes docs/page.png: the inventory page of this host, with some programs started for it. See scripts/screenshot."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path

from sowatch import Rule, Watcher
from support.pages import PageServer, Visit, chromium
from support.programs import build

#: Maps a library of its own mount namespace, then lets an upgrade put another one in its place.
_UPGRADED = """
mount -t tmpfs none /opt && mkdir -p /opt/shop/lib && cd /opt/shop/lib
cp "$0" libcart.so.2 && cp "$0" new
exec /usr/bin/python3 -c 'import ctypes, os, sys
ctypes.CDLL("/opt/shop/lib/libcart.so.2"); os.rename("new", "libcart.so.2"); print(flush=True); sys.stdin.read()'
"""
_WORKER = "import ssl, sqlite3, lzma, sys; print(flush=True); sys.stdin.read()"
_TIMEOUT_S = 60.0


def main(made: Path) -> None:
    """Writes the picture."""
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        storm, loader, library = build("storm", scratch), build("loader", scratch), build_library(scratch)

        def start(*command: str | Path) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            stack.callback(process.wait)
            assert process.stdin is not None
            stack.callback(process.stdin.close)
            return process

        for process in [
            *(start("/usr/bin/python3", "-c", _WORKER) for _ in range(12)),
            start("unshare", "--mount", "sh", "-ec", _UPGRADED, library),
        ]:
            assert process.stdout is not None
            process.stdout.readline()
        watcher = stack.enter_context(Watcher(Rule(r"^/(usr/lib|opt)/", name="system"), exclude_self=True))
        server = stack.enter_context(PageServer(watcher, _TIMEOUT_S))
        browser = stack.enter_context(chromium())
        page = Visit(
            browser, server.url, _TIMEOUT_S, viewport={"width": 1200, "height": 700}, color_scheme="light"
        ).page
        page.click("th[data-key=stale] button")
        page.wait_for_selector(".badge")
        for count in (2000, 500, 4000, 900, 3000, 300, 5000, 700):
            subprocess.run(
                [storm, "1", str(count), loader, "/usr/lib/x86_64-linux-gnu/libz.so.1"],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        page.evaluate("document.activeElement.blur()")
        page.screenshot(path=made)


def build_library(directory: Path) -> Path:
    """A small library with a build id."""
    return build(
        "tiny_library", directory, flags=["-shared", "-fPIC", "-DNAME=cart", "-Wl,--build-id"], output="libcart.so"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
