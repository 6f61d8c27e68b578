"""Every Python example of README and docs runs, beside a process that has what it asks for."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from support.callers import Caller
from support.doc_blocks import Block, blocks, prelude_of
from support.programs import build, compile_bpf
from support.receivers import free_port
from support.tls import Tls, find

#: Opens libssl by the module, says so, and ends when its standard input does.
USER_OF_LIBSSL = "import ssl, sys; print('ready', flush=True); sys.stdin.read()"
SPECIAL = ("sowatch.uprobes", "sowatch.http", "starlette")
EXAMPLES = [block for block in blocks() if block.language == "python" and not any(one in block.text for one in SPECIAL)]
FLOWS = [block for block in blocks() if block.language == "python" and "sowatch.http" in block.text]
(APPLICATION,) = [block for block in blocks() if block.language == "python" and "starlette" in block.text]
PROBES = [block for block in blocks() if block.language == "python" and "sowatch.uprobes" in block.text]


@pytest.fixture(scope="session")
def compile_probes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_bpf("user_probes", tmp_path_factory.mktemp("bpf"))


def test_there_are_examples() -> None:
    assert len([block for block in EXAMPLES if block.page == "README.md"]) >= 2


@pytest.mark.parametrize("block", EXAMPLES, ids=str)
def test_an_example_runs_and_shows_the_process_that_has_the_library(block: Block, spawn: Any, deadline: Any) -> None:
    user = spawn([sys.executable, "-c", USER_OF_LIBSSL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert user.stdout.readline() == "ready\n"
    example = spawn(
        [sys.executable, "-u", "-W", "error", "-c", prelude_of(block) + block.text],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # Others on this host may have what the example watches, too.
    assert any("libssl" in line for line in example.stdout), example.stderr.read()
    if block.text.startswith("for ") or "\nfor event in" in block.text:
        example.send_signal(signal.SIGINT)  # it goes on for ever
        _, errors = example.communicate(timeout=deadline(20))
        assert errors == "" or errors.rstrip().endswith("KeyboardInterrupt")
    else:
        _, errors = example.communicate(timeout=deadline(30))
        assert (example.returncode, errors) == (0, "")


def test_the_application_of_the_docs_answers_with_what_is_mapped(spawn: Any, wait_until: Any, deadline: Any) -> None:
    user = spawn([sys.executable, "-c", USER_OF_LIBSSL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert user.stdout.readline() == "ready\n"
    port = free_port()
    serving = f"\nimport uvicorn\nuvicorn.run(app, port={port}, log_level='warning')\n"
    server = spawn([sys.executable, "-W", "error", "-c", APPLICATION.text + serving])

    def libraries() -> list[str]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=deadline(20))
        with contextlib.closing(connection), contextlib.suppress(ConnectionError):
            connection.request("GET", "/libraries")
            found: list[str] = json.loads(connection.getresponse().read())
            return found
        return []

    wait_until(lambda: any("libssl" in path for path in libraries()))
    server.send_signal(signal.SIGTERM)
    server.wait(deadline(20))


@pytest.mark.parametrize("block", PROBES, ids=str)
def test_an_example_with_probes_runs_on_a_library_of_the_tests_own(
    block: Block, spawn: Any, programs: Any, place: Path, deadline: Any, compile_probes: Any
) -> None:
    library = build("probed", place, flags=["-shared", "-fPIC", "-O1"], output="libprobed.so")
    text = block.text.replace("libz\\.so", re.escape(str(library))).replace("deflate", "plain")
    text = text.replace("probes.bpf.o", str(compile_probes)).replace("on_plain", "by_section")
    caller = Caller(spawn, programs["caller"], library)
    example = spawn([sys.executable, "-u", "-W", "error", "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while example.poll() is None:  # it waits for some seconds, and shows what it has counted
        caller.call("plain", times=10)
        time.sleep(0.05)
    output, errors = example.communicate(timeout=deadline(20))
    assert (example.returncode, errors) == (0, b"")
    assert b"libprobed" in output


@pytest.mark.parametrize("block", FLOWS, ids=str)
def test_an_example_with_flows_shows_a_request(block: Block, spawn: Any, wait_until: Any, tmp_path: Path) -> None:
    tls = Tls(tmp_path, spawn, wait_until)
    server = tls.python()
    program = block.text.replace("/srv/app/lib/", f"{tls.libraries}/")
    assert program != block.text
    example = spawn([sys.executable, "-u", "-W", "error", "-c", program], stdout=subprocess.PIPE, text=True)
    while example.poll() is None:
        tls.run(find("curl"), "-s", "--cacert", str(tls.certificate), f"https://127.0.0.1:{server.port}/seen")
    assert "GET /seen 200" in example.stdout.read()
    assert example.returncode == 0
