"""Programs nobody here wrote: what sowatch tells of them is what their /proc/PID/maps shows.

Each is watched from before it starts until after it ended, with every kind of mapped file.
"""

from __future__ import annotations

import http.server
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.follower import Follower
from support.programs import executable_images

PYTHON = "/usr/bin/python3"


@pytest.fixture
def follower(deadline, schema) -> Iterator[Follower]:
    with Follower(timeout_s=deadline(20), check=schema) as running:
        yield running
    assert running.lost == []


def needs(program: str) -> str:
    """Where the program is; not in everybody's PATH are those of the administrator."""
    found = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found


def images(pid: int) -> set[tuple[str, int]]:
    return {(image.dev, image.inode) for image in executable_images(pid)}


def agrees_with_proc(follower: Follower, pid: int) -> None:
    """Wait until the events of a process at rest add up to its /proc/PID/maps."""
    follower.wait_until(
        lambda: images(pid) and follower.mapped(pid) == images(pid),
        lambda: (
            f"{pid} maps {sorted(executable_images(pid))},\nwhere the events say {sorted(follower.mapped(pid))}:\n"
            + "\n".join(map(str, follower.about(pid)))
        ),
    )


def is_emptied(follower: Follower, pid: int) -> None:
    """Wait until everything the process had is told as unloaded, the last of it by its exit."""
    follower.wait_until(
        lambda: follower.about(pid) and not follower.mapped(pid),
        lambda: f"{pid} ended, but the events leave it {sorted(follower.mapped(pid))}",
    )
    assert follower.about(pid)[-1].cause == "exit"


def loaded(follower: Follower, pid: int, cause: str | None = None) -> set[str]:
    """Names of the files that were loaded, by one cause or by any."""
    return {
        Path(event.library.path).name
        for event in follower.about(pid)
        if event.event == "load" and (cause is None or event.cause == cause)
    }


def end(pid: int, timeout_s: float, number: signal.Signals = signal.SIGTERM) -> None:
    """End a process that is no child of ours and wait until it is gone."""
    watched = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(watched, number)
        assert select.select([watched], [], [], timeout_s)[0], f"{pid} did not end"
    finally:
        os.close(watched)


def children(pid: int) -> set[int]:
    return {
        int(child) for listed in Path(f"/proc/{pid}/task").glob("*/children") for child in listed.read_text().split()
    }


def answers(path: Path) -> bool:
    """Whether a server listens on the unix socket."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(os.fspath(path)) == 0


def test_python_that_imports_ssl_and_stays(follower, spawn, deadline):
    python = spawn([PYTHON, "-c", "import ssl, sys; print('up', flush=True); sys.stdin.read()"], stdin=-1, stdout=-1)
    assert python.stdout.readline() == b"up\n"
    agrees_with_proc(follower, python.pid)
    libraries = loaded(follower, python.pid, "mmap")
    assert {name for name in libraries if re.match(r"lib(ssl|crypto|c)\.so", name)} == {
        "libssl.so.3",
        "libcrypto.so.3",
        "libc.so.6",
    }
    assert any(name.startswith("_ssl.") for name in libraries)
    python.stdin.close()
    assert python.wait(deadline(20)) == 0
    is_emptied(follower, python.pid)


def test_python_that_imports_ssl_and_ends_at_once(follower, spawn, deadline):
    python = spawn([PYTHON, "-c", "import ssl"])
    assert python.wait(deadline(20)) == 0
    is_emptied(follower, python.pid)
    assert loaded(follower, python.pid, "mmap") >= {"libssl.so.3", "libcrypto.so.3", "libc.so.6"}
    kinds = {event.library.kind: Path(event.library.path).name for event in follower.about(python.pid)}
    assert kinds["executable"] == Path(PYTHON).resolve().name
    assert kinds["interpreter"].startswith("ld-")
    assert loaded(follower, python.pid, "exec") == {kinds["executable"], kinds["interpreter"]}


@contextmanager
def held_server() -> Iterator[tuple[str, threading.Event, threading.Event]]:
    """An HTTP server that answers only when told: its address, "asked" and "answer now"."""
    asked, answer = threading.Event(), threading.Event()

    class Held(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.set()
            answer.wait()
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Held) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", asked, answer
        finally:
            answer.set()
            server.shutdown()
            serving.join()


def test_curl_while_it_waits_for_an_answer(follower, spawn, deadline):
    program = needs("curl")
    with held_server() as (address, asked, answer):
        curl = spawn([program, "--silent", "--noproxy", "*", address])
        assert asked.wait(deadline(20))
        agrees_with_proc(follower, curl.pid)
        answer.set()
        assert curl.wait(deadline(20)) == 0
    is_emptied(follower, curl.pid)
    assert loaded(follower, curl.pid, "mmap") >= {"libssl.so.3", "libc.so.6"}


NGINX = """
daemon on;
user root;
worker_processes 2;
pid {directory}/pid;
error_log {directory}/error.log;
events {{ worker_connections 32; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{ listen 127.0.0.1:{port}; location / {{ return 200 "served"; }} }}
}}
"""


def test_nginx_as_a_daemon_whose_first_process_leaves(follower, spawn, wait_until, deadline, tmp_path):
    program = needs("nginx")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = tmp_path / "nginx.conf"
    config.write_text(NGINX.format(directory=tmp_path, port=port))
    first = spawn([program, "-p", tmp_path, "-c", config, "-e", tmp_path / "error.log"])
    assert first.wait(deadline(20)) == 0, (tmp_path / "error.log").read_text()
    master = int(wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip()))
    try:
        wait_until(lambda: len(children(master)) == 2, what="nginx has two workers")
        workers = children(master)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=deadline(20)) as answer:
            assert answer.read() == b"served"
        for pid in {master, *workers}:
            agrees_with_proc(follower, pid)
            assert loaded(follower, pid, "fork") >= {"nginx", "libssl.so.3", "libc.so.6"}
        is_emptied(follower, first.pid)
    finally:
        end(master, deadline(20))
    for pid in {master, *workers}:
        is_emptied(follower, pid)


def test_redis_and_the_child_that_saves_its_data(follower, spawn, wait_until, deadline, tmp_path):
    program = needs("redis-server")
    server = tmp_path / "s"
    redis = spawn([program, "--port", "0", "--unixsocket", server, "--dir", tmp_path, "--save", ""], stdout=-3)
    wait_until(lambda: answers(server), 20, "redis answers")
    agrees_with_proc(follower, redis.pid)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(deadline(20))
        client.connect(os.fspath(server))
        client.sendall(b"BGSAVE\r\n")
        assert client.recv(100).startswith(b"+Background saving started")
    wait_until((tmp_path / "dump.rdb").exists, 20, "redis saved its data")

    def savers() -> set[int]:
        return {event.process.pid for event in follower.events if event.process.ppid == redis.pid}

    follower.wait_until(savers, "no child of redis was told of")
    (saver,) = savers()
    is_emptied(follower, saver)
    assert loaded(follower, saver) == loaded(follower, saver, "fork") == loaded(follower, redis.pid)
    assert spawn.end(redis) == 0
    is_emptied(follower, redis.pid)


def copy_with_libraries(program: str, root: Path) -> None:
    """Put the program and what it needs to run below ``root``, each under the path it has here."""
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    for path in [program, *re.findall(r"(/\S+) \(0x", listed)]:
        copy = root / path.lstrip("/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)


def test_a_program_in_namespaces_and_a_root_of_its_own(follower, spawn, wait_until, deadline, tmp_path):
    unshare, program = needs("unshare"), needs("redis-server")
    root = tmp_path / "root"
    copy_with_libraries(program, root)
    alone = ["--mount", "--pid", "--fork", f"--root={root}"]
    outer = spawn([unshare, *alone, program, "--port", "0", "--unixsocket", "/s", "--save", ""], stdout=-3)
    wait_until(lambda: answers(root / "s"), 20, "redis answers from its own root")
    (inner,) = children(outer.pid)
    agrees_with_proc(follower, inner)
    for event in follower.about(inner):
        if event.event == "load" and event.cause in ("exec", "mmap"):
            assert not event.library.path.startswith(os.fspath(tmp_path))
            outside = root / event.library.path.lstrip("/")
            assert outside.stat().st_ino == event.library.id.inode
            assert event.library.host_path
            assert os.path.samefile(event.library.host_path, outside)
            assert event.process.ns_pid == 1
    end(inner, deadline(20))
    assert outer.wait(deadline(20)) == 0
    is_emptied(follower, inner)
    is_emptied(follower, outer.pid)
