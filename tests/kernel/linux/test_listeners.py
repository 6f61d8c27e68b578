"""Ports of processes in network namespaces of their own, and of a socket that was made in another one."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from sowatch.linux.listeners import Listeners, Listening
from sowatch.linux.proc import Miss, ProcFs

SERVER = """
import socket, sys
server = socket.create_server(("0.0.0.0", int(sys.argv[1])))
print("ready", flush=True)
sys.stdin.read()
"""
LISTENER = """
import socket, sys
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
sys.stdin.read()
"""
#: Opens the socket in one namespace and goes on in another, as a service with PrivateNetwork= that is given a socket.
MOVED = """
import ctypes, socket, sys
server = socket.create_server(("127.0.0.1", 0))
assert ctypes.CDLL(None).unshare(0x40000000) == 0
print(server.getsockname()[1], flush=True)
sys.stdin.read()
"""


#: Beyond what the kernel gives (PID_MAX_LIMIT).
NOBODY = 1 << 30


def start(spawn: Any, *words: str) -> tuple[Any, str]:
    child = spawn(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return child, child.stdout.readline().strip()


def ports(found: Listeners, pid: int) -> str:
    of = found.of(pid)
    assert isinstance(of, Listening)
    return str(of)


def test_the_same_port_in_two_namespaces_belongs_to_the_process_of_each(spawn: Any) -> None:
    one, _ = start(spawn, "unshare", "--net", sys.executable, "-c", SERVER, "443")
    two, _ = start(spawn, "unshare", "--net", sys.executable, "-c", SERVER, "443")
    other, _ = start(spawn, "unshare", "--net", sys.executable, "-c", SERVER, "8080")

    found = Listeners(ProcFs())
    assert [ports(found, child.pid) for child in (one, two, other)] == ["tcp:443", "tcp:443", "tcp:8080"]
    own = found.of(os.getpid())
    assert isinstance(own, Listening)
    assert {443, 8080} & {socket.port for socket in own.sockets} == set()


def test_a_socket_of_our_namespace_is_known_of_a_process_in_another(spawn: Any) -> None:
    child, port = start(spawn, sys.executable, "-c", MOVED)
    assert ports(Listeners(ProcFs()), child.pid) == f"tcp:{port}"


class EndingLeader(ProcFs):
    """Proc where the leader ends after it was found alive: a thread that is gone, then the one that goes on."""

    asked = 0

    def live_thread(self, pid: int) -> int | Miss:
        self.asked += 1
        return NOBODY if self.asked == 1 else super().live_thread(pid)


def test_a_process_whose_leader_ends_while_it_is_read_listens_on(spawn: Any) -> None:
    child, port = start(spawn, sys.executable, "-c", LISTENER)
    proc = EndingLeader()
    assert ports(Listeners(proc), child.pid) == f"tcp:{port}"
    assert proc.asked == 2


def test_a_process_whose_leader_has_ended_listens_on(spawn: Any) -> None:
    program = """
import ctypes, os, socket, sys, threading
server = socket.create_server(("127.0.0.1", 0))
def stay():
    print(server.getsockname()[1], flush=True)
    sys.stdin.read()
threading.Thread(target=stay).start()
ctypes.CDLL(None).syscall(60 if os.uname().machine == "x86_64" else 93, 0)
"""
    child, port = start(spawn, sys.executable, "-c", program)
    assert ports(Listeners(ProcFs()), child.pid) == f"tcp:{port}"
