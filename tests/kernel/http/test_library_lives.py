"""Processes that fork, containers that share a library, one that is upgraded: of GnuTLS, NSS and BoringSSL."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sowatch.http.taps import HttpFlow
from support.library_clients import CLIENTS
from support.tls import LIBRARIES, Server, Tap, Tls, library

#: By family of functions: the files whose functions are called, and those that the client calls.
KINDS = {
    "boring": ("openssl", ("libssl.so.0", "libcrypto.so.0"), ("SSL_write", "SSL_read")),
    "gnutls": ("gnutls", ("libgnutls.so.30",), ("gnutls_record_send", "gnutls_record_recv")),
    "nss": ("nss", ("libnspr4.so", "libnss3.so"), ("PR_Write", "PR_Read")),
}


class Bench:
    """Copies of the libraries, a server, and one tap on whatever lies below a directory."""

    def __init__(self, tls: Tls) -> None:
        self.tls = tls
        for name in ("libnss3.so", "libnspr4.so", "android/libssl.so.0", "android/libcrypto.so.0"):
            source = library(name)
            shutil.copyfile(source, tls.libraries / Path(name).name)
        # Softoken of NSS refuses to work in a child that does not begin anew.
        tls.environment["NSS_STRICT_NOFORK"] = "DISABLED"
        tls.hold(*(tls.libraries / name for _, names, _ in KINDS.values() for name in names))
        self.server: Server = tls.python()
        self.tap = Tap(tls, place=tls.place)

    def wait_attached(self, directory: Path, kind: str) -> None:
        """Until the libraries of a kind in a directory are attached."""
        inodes = {(directory / name).stat().st_ino for name in KINDS[kind][1]}

        def are_attached() -> bool:
            files = self.tap.tap._capture.attacher.files()
            return inodes <= {one.library.id.inode for one in files if one.library.id and one.state == "attached"}

        self.tls.wait_until(are_attached, what=f"{kind} in {directory} attached")

    def start(self, kind: str, directory: Path, *words: str) -> Any:
        """A client whose libraries lie in a directory; waits where it pauses first."""
        family, names, pair = KINDS[kind]
        more = [word for name in words for word in (pair if name == "ask" else (name, "-"))]
        client = self.tls.spawn(
            [sys.executable, "-c", CLIENTS[family], str(directory / names[0]), str(self.server.port), *more],
            env={**self.tls.environment, "LD_LIBRARY_PATH": str(directory)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert client.stdout.readline() == b"\n"
        return client

    def go_on(self, client: Any) -> None:
        client.stdin.close()
        assert client.wait(timeout=60) == 0

    def flows(self, kind: str, number: int) -> list[HttpFlow]:
        """So many flows of the client, all of them right."""
        found = self.tap.wait_for("client", number)
        assert len(found) == number
        expected = (f"/{'/'.join(KINDS[kind][2])}", 200, 10, True)
        for one in found:
            flow = one.flow
            assert (flow.path, flow.status, flow.response_bytes, flow.is_complete) == expected
            assert flow.peer is not None
            assert flow.peer.port == self.server.port
        return found


@pytest.fixture(scope="module")
def module_bench(tmp_path_factory: pytest.TempPathFactory, module_spawn: Any, wait_until: Any) -> Iterator[Bench]:
    bench = Bench(Tls(tmp_path_factory.mktemp("lives"), module_spawn, wait_until))
    with bench.tap:
        bench.tap.wait_attached(LIBRARIES + 4)
        yield bench


@pytest.fixture
def bench(module_bench: Bench, spawn: Any) -> Bench:
    module_bench.tls.spawn = spawn
    module_bench.tap.flows.clear()
    return module_bench


@pytest.mark.parametrize("kind", KINDS)
def test_a_connection_that_a_child_goes_on_with_is_the_childs(bench: Bench, kind: str) -> None:
    client = bench.start(kind, bench.tls.libraries, "pause", "ask", "fork", "ask", "ask")
    bench.go_on(client)
    parent, *child = bench.flows(kind, 3)
    assert parent.process.pid == client.pid
    assert len({one.flow.key.process.pid for one in child}) == 1
    assert child[0].flow.key.process.pid != client.pid


@pytest.mark.parametrize("kind", KINDS)
def test_a_library_that_containers_share_is_probed_once_and_each_request_seen_once(bench: Bench, kind: str) -> None:
    merged: list[Path] = []
    clients: list[Any] = []
    place = bench.tls.place / f"overlays-{kind}"
    try:
        for number in range(2):
            upper, work, at = (place / f"{name}{number}" for name in ("upper", "work", "merged"))
            for directory in (upper, work, at):
                directory.mkdir(parents=True)
            options = f"lowerdir={bench.tls.libraries},upperdir={upper},workdir={work}"
            subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(at)], check=True)
            merged.append(at)
        files = bench.tap.tap.attached.files
        clients += [bench.start(kind, at, "pause", "ask", "ask") for at in merged]
        for client in clients:
            bench.go_on(client)
        found = bench.flows(kind, 4)
        assert [one.process.pid for one in found] == [clients[0].pid] * 2 + [clients[1].pid] * 2
        assert bench.tap.tap.attached.files == files
    finally:
        for client in clients:
            client.kill()
            client.wait()
        for at in merged:
            subprocess.run(["umount", str(at)], check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_library_that_is_upgraded_by_rename_is_probed_in_both_versions(bench: Bench, kind: str) -> None:
    directory = bench.tls.place / f"upgraded-{kind}"
    shutil.copytree(bench.tls.libraries, directory)
    old = bench.start(kind, directory, "pause", "ask")
    bench.wait_attached(directory, kind)
    for name in KINDS[kind][1]:
        shutil.copyfile(directory / name, directory / "new")
        (directory / "new").rename(directory / name)
    new = bench.start(kind, directory, "pause", "ask")
    bench.wait_attached(directory, kind)
    bench.go_on(old)
    bench.go_on(new)
    found = bench.flows(kind, 2)
    assert [one.process.pid for one in found] == [old.pid, new.pid]
    assert len({one.library and one.library.id for one in found}) == 2
