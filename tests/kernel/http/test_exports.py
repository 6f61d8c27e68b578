"""Each function that is probed, by a call of it in a real library: its arguments and result are those of its header."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from sowatch.http.capture import TAPS
from support.hostile import compile_c
from support.library_clients import CLIENTS
from support.tls import LIBRARIES, Server, Tap, Tls, library

PAIRS = {
    "openssl": (
        ("SSL_write", "SSL_read"),
        ("SSL_write_ex", "SSL_read_ex"),
        ("SSL_write_ex2", "SSL_read"),
        ("SSL_write", "SSL_read_ex"),
    ),
    "gnutls": (
        ("gnutls_record_send", "gnutls_record_recv"),
        ("gnutls_record_send2", "gnutls_record_recv_seq"),
        ("gnutls_record_send", "gnutls_record_recv_packet"),
        ("gnutls_record_send", "gnutls_record_recv"),
    ),
    "nss": (("PR_Write", "PR_Read"), ("PR_Send", "PR_Recv"), ("PR_Writev", "PR_Read")),
}
#: Those that no request is made by here, and where they are called instead.
ELSEWHERE = {
    "SSL_peek": "before SSL_read",
    "SSL_peek_ex": "before SSL_read_ex",
    "SSL_do_handshake": "by Python, in nearly every test",
    "SSL_connect": "before the requests",
    "SSL_accept": "by the servers of test_http_compatibility.py",
    "SSL_write_early_data": "test_early_data_of_openssl",
    "SSL_read_early_data": "test_early_data_of_openssl",
    "gnutls_handshake": "before the requests",
    "gnutls_record_send_early_data": "test_early_data_of_gnutls",
    "gnutls_record_recv_early_data": "test_early_data_of_gnutls",
}


def test_every_function_that_is_probed_has_a_test() -> None:
    """ANOLISA #1511, fluent-bit #11793: the _ex forms were forgotten."""
    called = {name for pairs in PAIRS.values() for pair in pairs for name in pair}
    assert called | set(ELSEWHERE) == set(TAPS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, module_spawn: Any, wait_until: Any) -> Iterator[tuple[Tap, Server]]:
    tls = Tls(tmp_path_factory.mktemp("exports"), module_spawn, wait_until)
    wheel = [Path(str(one.locate())) for one in metadata.files("psycopg2-binary") or () if ".libs/" in str(one)]
    for path in wheel:
        if path.name.startswith(("libssl-", "libcrypto-")):
            tls.add(path)
    tls.add(library("libnss3.so"))
    tls.add(library("libnspr4.so"))
    more = [*tls.libraries.glob("libssl-*"), tls.libraries / "libnss3.so", tls.libraries / "libnspr4.so"]
    server = tls.python()
    tls.hold(*more)
    with Tap(tls) as tap:
        tap.wait_attached(LIBRARIES + 4)
        yield tap, server


@pytest.mark.parametrize("family", PAIRS)
def test_arguments_and_results_of_each_function_are_taken_as_its_header_has_them(
    made: tuple[Tap, Server], family: str
) -> None:
    """bpf-developer-tutorial #169, eBPF-Discovery #83: the _ex forms were taken for the others."""
    tap, server = made
    (libssl,) = tap.tls.libraries.glob("libssl-*")
    path = {"openssl": libssl, "gnutls": tap.tls.libraries / "libgnutls.so.30", "nss": tap.tls.libraries}[family]
    names = [name for pair in PAIRS[family] for name in pair]
    del tap.flows[:]
    tap.tls.run(sys.executable, "-c", CLIENTS[family], str(path), str(server.port), *names)
    found = [one.flow for one in tap.wait_for("client", len(names) // 2)]
    shown = [(one.path, one.status, one.response_bytes, one.is_complete) for one in found if one.path]
    # Where the packet is, the call does not say: that it moved something is all that is known.
    unseen = ("gnutls_record_recv_packet",)
    expected = [
        (f"/{write}/{read}", None, 0, False) if read in unseen else (f"/{write}/{read}", 200, 10, True)
        for write, read in PAIRS[family]
    ]
    assert shown == expected
    assert all(one.peer and one.peer.port == server.port for one in found)


#: As AWS-LC and LibreSSL do, which no package has: the _ex forms call the others, and here those call OpenSSL's.
NESTED = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>

int SSL_read(void *ssl, void *buffer, int size)
{
	return ((int (*)(void *, void *, int))dlsym(RTLD_NEXT, "SSL_read"))(ssl, buffer, size);
}

int SSL_write(void *ssl, const void *buffer, int size)
{
	return ((int (*)(void *, const void *, int))dlsym(RTLD_NEXT, "SSL_write"))(ssl, buffer, size);
}

int SSL_read_ex(void *ssl, void *buffer, size_t size, size_t *moved)
{
	int result = SSL_read(ssl, buffer, (int)size);

	*moved = result > 0 ? result : 0;
	return result > 0;
}

int SSL_write_ex(void *ssl, const void *buffer, size_t size, size_t *moved)
{
	int result = SSL_write(ssl, buffer, (int)size);

	*moved = result > 0 ? result : 0;
	return result > 0;
}
"""


def test_of_calls_within_calls_only_the_outermost_counts(made: tuple[Tap, Server], spawn: Any) -> None:
    tap, server = made
    flags = ("-shared", "-fPIC", "-Wl,--no-as-needed", f"-L{tap.tls.libraries}", "-l:libssl.so.3", "-l:libcrypto.so.3")
    path = compile_c(NESTED, tap.tls.libraries / "libssl-nested.so", *flags)
    names = ("SSL_write_ex", "SSL_read_ex", "SSL_write", "SSL_read")
    files = tap.tap.attached.files
    client = spawn(
        [sys.executable, "-c", CLIENTS["openssl"], str(path), str(server.port), "pause", "-", *names],
        env=tap.tls.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert client.stdout.readline() == b"\n"
    tap.wait_attached(files + 1)
    del tap.flows[:]
    before = tap.tap.stats()
    client.stdin.close()
    assert client.wait(timeout=60) == 0
    found = tap.wait_for("client", 2)
    assert [(one.flow.path, one.flow.status, one.flow.response_bytes) for one in found] == [
        ("/SSL_write_ex/SSL_read_ex", 200, 10),
        ("/SSL_write/SSL_read", 200, 10),
    ]
    assert {one.library and one.library.path for one in found} == {str(path)}
    assert tap.tap.stats()["resyncs"] == before["resyncs"]
