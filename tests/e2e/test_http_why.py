"""Why a process has no HTTP flows: by `sowatch http --pid`, by `sowatch explain`, and by the agent."""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.agent import NewAgent
from support.printed import printed
from support.tls import LIBRARIES, Server, Tls, find

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="BPF programs need root")


@pytest.fixture
def tls(tmp_path: Path, spawn: Any, wait_until: Any) -> Tls:
    made = Tls(tmp_path, spawn, wait_until)
    made.hold()
    return made


def curl(tls: Tls, server: Server, path: str) -> None:
    url = f"https://127.0.0.1:{server.port}{path}"
    tls.run(find("curl"), "-sS", "-o", "/dev/null", "--cacert", str(tls.certificate), url)


NOTHING = "import sys; print(flush=True); sys.stdin.read()"
#: A TLS connection over which no HTTP goes, to nobody: both ends in memory.
NO_HTTP = """
import ssl, sys
def context(side): return ssl.SSLContext(side)
server = context(ssl.PROTOCOL_TLS_SERVER); server.load_cert_chain(*sys.argv[1:3])
client = context(ssl.PROTOCOL_TLS_CLIENT); client.check_hostname = False; client.verify_mode = ssl.CERT_NONE
a, b = ssl.MemoryBIO(), ssl.MemoryBIO()
ends = [client.wrap_bio(a, b), server.wrap_bio(b, a, server_side=True)]
for _ in range(4):
    for end in ends:
        try: end.do_handshake()
        except ssl.SSLWantReadError: pass
print(flush=True)
for line in sys.stdin:
    ends[0].write(b"PING"); ends[1].read(100); print(flush=True)
"""
NO_CALL = "import ssl, sys; print(flush=True); sys.stdin.read()"


def idle(tls: Tls, *command: str) -> Any:
    """A process that does what it was started for and then waits."""
    child = tls.spawn(command, env=tls.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "\n"
    return child


@pytest.mark.parametrize("as_json", [False, True])
def test_each_process_that_was_named_and_has_no_flows_is_named_with_the_reason(tls: Tls, as_json: bool) -> None:
    server = tls.python()
    no_tls = idle(tls, sys.executable, "-c", NOTHING)
    no_call = idle(tls, sys.executable, "-c", NO_CALL)
    no_http = idle(tls, sys.executable, "-c", NO_HTTP, str(tls.certificate), str(tls.key))
    named = [server.process.pid, no_tls.pid, no_call.pid, no_http.pid]
    words = [word for pid in named for word in ("--pid", str(pid))]
    command = tls.spawn(
        [sys.executable, "-m", "sowatch", "http", *(["--json"] if as_json else []), *words, f"^{tls.libraries}/"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with selectors.DefaultSelector() as selector:
        selector.register(command.stdout, selectors.EVENT_READ)
        while not selector.select(0.3):
            curl(tls, server, "/one")
    no_http.stdin.write("\n")
    no_http.stdin.flush()
    assert no_http.stdout.readline() == "\n"
    no_tls.stdin.close()
    no_tls.wait(timeout=20)  # what was known of it at the beginning holds
    command.send_signal(signal.SIGINT)
    output, errors = command.communicate(timeout=30)
    assert command.returncode == 0, errors
    library = str(tls.libraries / "libssl.so.3")
    if as_json:
        stats = printed(output.splitlines()[-1])
        assert stats["event"] == "http_stats"
        found = {one["pid"]: (one["state"], one["libraries"], one["flows"]) for one in stats["without_flows"]}
        assert found == {
            no_tls.pid: ("no_tls", [], 0),
            no_call.pid: ("no_call", [library], 0),
            no_http.pid: ("no_http", [library], 0),
        }
        assert errors == ""
    else:
        said = re.findall(r"flows of process (\d+): none(?: yet)?: (.*)", errors)
        assert [int(pid) for pid, _ in said] == [no_tls.pid, no_call.pid, no_http.pid]
        assert said[0][1].startswith("nothing that it has mapped exports")
        assert said[1][1].startswith("its TLS library is attached")
        assert said[1][1].endswith(library)
        assert said[2][1].startswith("it has read or written by its TLS library")


def test_a_process_that_is_not_there_is_refused_and_a_pattern_that_keeps_one_out_is_named(tls: Tls) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sowatch", "http", "--pid", "4194303"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr == "sowatch: there is no process 4194303 in /proc. Find the right one with `ps -e`.\n"
    child = idle(tls, sys.executable, "-c", NO_CALL)
    done = subprocess.run(
        [sys.executable, "-m", "sowatch", "http", "--pid", str(child.pid), "--duration", "0.1", "^/nowhere/"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    assert "its TLS library is not attached: no PATTERN matches its path" in done.stderr


def explained(pid: int, *words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "sowatch", "explain", "--json", str(pid), *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    found: dict[str, Any] = json.loads(done.stdout)["http"]
    return found


def test_explain_without_an_agent_says_what_the_files_of_a_process_say(tls: Tls) -> None:
    no_tls = idle(tls, sys.executable, "-c", NOTHING)
    nothing = {"reason": None, "calls": 0, "flows": 0, "call_count": 0, "flow_count": 0}
    assert explained(no_tls.pid) == {"state": "no_tls", "libraries": [], "paths": [], **nothing}
    no_call = idle(tls, sys.executable, "-c", NO_CALL)
    library = str(tls.libraries / "libssl.so.3")
    assert explained(no_call.pid) == {"state": "tappable", "libraries": [library], "paths": [library], **nothing}
    command = [sys.executable, "-m", "sowatch", "explain", "--format", "text", str(no_call.pid)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    line = f"http       it can have flows: `sowatch http --pid` shows its requests. {library}"
    assert line in done.stdout.splitlines()


AS_NOBODY = """
import encodings.ascii, encodings.latin_1, importlib, os, pkgutil, sys
import sowatch
from sowatch.cli import main
for package in ("cli", "engine", "explain", "linux", "model", "sources", "watcher"):  # nobody may not read them
    for one in pkgutil.iter_modules(importlib.import_module(f"sowatch.{package}").__path__):
        importlib.import_module(f"sowatch.{package}.{one.name}")
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.exit(main(["explain", *sys.argv[1:]]))
"""


def test_explain_says_why_it_does_not_know_of_flows(tls: Tls) -> None:
    child = idle(tls, sys.executable, "-c", NO_CALL)
    for words, in_text in ((["--json"], False), (["--format", "text"], True)):
        command = [sys.executable, "-c", AS_NOBODY, str(child.pid), "--strategy", "procfs", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        if in_text:
            line = "http       none that is known: what it has mapped cannot be read: not permitted. Run it as root."
            assert line in done.stdout.splitlines(), done.stderr
        else:
            found = json.loads(done.stdout)["http"]
            assert (found["state"], found["reason"]) == ("unread", "not permitted. Run it as root.")
    kernel_thread = explained(2)
    assert (kernel_thread["state"], kernel_thread["reason"]) == ("no_tls", None)


def test_the_agent_says_why_a_process_has_no_flows(tls: Tls, new_agent: NewAgent, wait_until: Any) -> None:
    section = f"[http]\nenabled = true\nlibraries = '^{re.escape(str(tls.libraries))}/'\n"
    agent = new_agent("").start()
    server = tls.python()
    no_tls = idle(tls, sys.executable, "-c", NOTHING)
    no_call = idle(tls, sys.executable, "-c", NO_CALL)
    no_http = idle(tls, sys.executable, "-c", NO_HTTP, str(tls.certificate), str(tls.key))
    library = str(tls.libraries / "libssl.so.3")

    def state(child: Any) -> str:
        found = agent.get(f"/explain?pid={child.pid}").json["http"]
        assert found["libraries"] == ([] if child is no_tls else [library])
        said: str = found["state"]
        return said

    def configure(text: str) -> None:
        loaded = agent.get("/readyz").json["config"]["loaded"]
        new = agent.config_path.with_name(".new")
        new.write_text(text, encoding="utf-8")
        new.rename(agent.config_path)
        wait_until(lambda: agent.get("/readyz").json["config"]["loaded"] != loaded, 20, "taken over")

    assert [state(one) for one in (no_tls, no_call, server.process)] == ["no_tls", "off", "off"]
    configure(section)
    wait_until(lambda: (agent.get("/readyz").json["http"] or {"files": 0})["files"] >= LIBRARIES, 20, "tapped")
    wait_until(lambda: state(no_call) == "no_call", 20, "attached")
    assert [state(one) for one in (no_tls, no_call, no_http)] == ["no_tls", "no_call", "no_call"]
    no_http.stdin.write("\n")
    no_http.stdin.flush()
    assert no_http.stdout.readline() == "\n"
    curl(tls, server, "/one")
    wait_until(lambda: state(no_http) == "no_http", 20, "calls")
    wait_until(lambda: state(server.process) == "flows", 20, "a flow")
    assert state(no_call) == "no_call"
    answer = agent.get(f"/explain?pid={server.process.pid}").json["http"]
    assert answer["flows"] >= 1
    assert answer["calls"] >= 2
    configure(section + "process = '^curl$'\n")
    wait_until(lambda: state(server.process) == "not_selected", 20, "filtered")
    assert [state(one) for one in (no_tls, no_call)] == ["no_tls", "not_selected"]
    configure("")
    wait_until(lambda: state(server.process) == "off", 20, "off again")


NOBODY = """
import os, sys
import sowatch.explain, sowatch.explain.looks, sowatch.linux.tls_libraries  # nobody may not read them
from sowatch.cli._http_why import Named, why_no_flows
from sowatch.explain.probing import tls_line
from sowatch.http.taps import HttpTap
from sowatch.linux.proc import ProcFs
pid = int(sys.argv[1])
tap = HttpTap(print, pids=[pid])
os.setgroups([]); os.setgid(65534); os.setuid(65534)
print(why_no_flows(tls_line(Named(ProcFs(), [pid], None, None).without_flows(tap)[pid])))
"""


def test_a_process_that_may_not_be_read_is_not_said_to_have_no_tls_library(tls: Tls) -> None:
    child = idle(tls, sys.executable, "-c", NO_CALL)
    done = subprocess.run(
        [sys.executable, "-c", NOBODY, str(child.pid)], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "none that is known: what it has mapped cannot be read: not permitted. Run it as root.\n"
