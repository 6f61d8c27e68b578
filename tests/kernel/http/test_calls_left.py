"""A call of the TLS library that is left without a return hides no later one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.hostile import compile_c
from support.tls import Tap, Tls

#: A handshake is left by longjmp from the callback of the library; then, deeper on the stack, one request is made.
LEAVES_A_HANDSHAKE = r"""
#include <arpa/inet.h>
#include <dlfcn.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static jmp_buf back;
static void *library;
#define CALL(type, name, ...) ((type(*)())dlsym(library, name))(__VA_ARGS__)

static void leave(const void *ssl, int where, int what)
{
	(void)ssl, (void)where, (void)what;
	longjmp(back, 1);
}

static void *connected(void *context, int port)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
	void *ssl = CALL(void *, "SSL_new", context);
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if (connect(fd, (void *)&address, sizeof(address)))
		exit(2);
	CALL(int, "SSL_set_fd", ssl, fd);
	return ssl;
}

static __attribute__((noinline)) int request(void *context, int port)
{
	volatile char deeper[65536];
	char answer[4096];
	void *ssl = connected(context, port);
	const char *text = "GET /deeper HTTP/1.1\r\nHost: localhost\r\n\r\n";
	int size, found = 0;

	deeper[0] = 0;
	if (CALL(int, "SSL_connect", ssl) != 1)
		return 3 + deeper[0];
	CALL(int, "SSL_write", ssl, text, (int)strlen(text));
	while (!found && (size = CALL(int, "SSL_read", ssl, answer, (int)sizeof(answer))) > 0)
		found = memmem(answer, size, "0123456789", 10) != NULL;
	return found ? 0 : 4;
}

int main(int count, char **words)
{
	void *context, *volatile ssl;

	library = dlopen("libssl.so.3", RTLD_NOW);
	if (count != 2 || !library)
		return 1;
	context = CALL(void *, "SSL_CTX_new", CALL(void *, "TLS_client_method"));
	ssl = connected(context, atoi(words[1]));
	CALL(void, "SSL_set_info_callback", ssl, leave);
	if (!setjmp(back)) {
		CALL(int, "SSL_connect", ssl);
		return 5;
	}
	close(CALL(int, "SSL_get_fd", ssl)); /* the server waits for it */
	return request(context, atoi(words[1]));
}
"""


def test_a_handshake_that_was_left_by_a_jump_hides_no_request(tmp_path: Path, spawn: Any, wait_until: Any) -> None:
    """Beyla #1627: a probe on the return of SSL_do_handshake was waited for, and never came."""
    tls = Tls(tmp_path, spawn, wait_until)
    client = compile_c("#define _GNU_SOURCE\n" + LEAVES_A_HANDSHAKE, tmp_path / "client", "-Wno-clobbered", "-ldl")
    tls.hold()
    with Tap(tls) as tap:
        server = tls.python()
        tap.wait_attached()
        tls.run(str(client), str(server.port))
        (found,) = tap.wait_for("client", 1)
        assert (found.flow.path, found.flow.status, found.flow.is_complete) == ("/deeper", 200, True)
        assert found.flow.peer is not None
        assert found.flow.peer.port == server.port
