"""HTTPS clients in Python that call the functions of one TLS library by ctypes.

Their words: the path of the library (of NSS anything: it is found by LD_LIBRARY_PATH), the port of a server of
`support.tls` on this machine, then pairs of functions: by the first the request ``/FIRST/SECOND`` is written, by the
second its answer is read. Instead of a pair: ``pause -`` prints an empty line and waits for one, ``fork -`` goes on in
a child.
"""

from __future__ import annotations

__all__ = ["CLIENTS"]

_START = """
import ctypes, os, socket, sys
from ctypes import byref, c_char, c_int, c_size_t, c_uint, c_uint64, c_void_p
directory, port, *names = sys.argv[1:]
def request(name):
    return f"GET /{name} HTTP/1.1\\r\\nHost: 127.0.0.1:{port}\\r\\n\\r\\n".encode()
def run(write, read):
    for at in range(0, len(names), 2):
        if names[at] == "pause":
            print(flush=True)
            sys.stdin.readline()
            continue
        if names[at] == "fork":
            if child := os.fork():
                sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            continue
        data, answer = request("/".join(names[at : at + 2])), b""
        assert write(names[at], data) == len(data)
        while not answer.endswith(b"0123456789"):
            answer += read(names[at + 1])
buffer, moved = ctypes.create_string_buffer(65536), c_size_t()
"""

_OPENSSL = """
library = ctypes.CDLL(directory)
def function(name, result, *arguments):
    found = getattr(library, name)
    found.restype, found.argtypes = result, arguments
    return found
context = function("SSL_CTX_new", c_void_p, c_void_p)(function("TLS_client_method", c_void_p)())
ssl = function("SSL_new", c_void_p, c_void_p)(context)
plain = socket.create_connection(("127.0.0.1", int(port)))
function("SSL_set_fd", c_int, c_void_p, c_int)(ssl, plain.fileno())
assert function("SSL_connect", c_int, c_void_p)(ssl) == 1
def write(name, data):
    if name == "SSL_write":
        return function(name, c_int, c_void_p, c_void_p, c_int)(ssl, data, len(data))
    more = [0] if name == "SSL_write_ex2" else []
    types = [c_void_p, c_void_p, c_size_t, *([c_uint64] if more else []), c_void_p]
    assert function(name, c_int, *types)(ssl, data, len(data), *more, byref(moved)) == 1
    return moved.value
def read(name):
    if name == "SSL_read":
        assert function("SSL_peek", c_int, c_void_p, c_void_p, c_int)(ssl, buffer, 5) == 5
        length = function(name, c_int, c_void_p, c_void_p, c_int)(ssl, buffer, len(buffer))
    else:
        types = c_void_p, c_void_p, c_size_t, c_void_p
        assert function("SSL_peek_ex", c_int, *types)(ssl, buffer, 5, byref(moved)) == 1
        assert function(name, c_int, *types)(ssl, buffer, len(buffer), byref(moved)) == 1
        length = moved.value
    return buffer.raw[:length]
run(write, read)
"""

_GNUTLS = """
tls = ctypes.CDLL(directory)
for name in ("gnutls_record_send", "gnutls_record_send2", "gnutls_record_recv", "gnutls_record_recv_seq",
             "gnutls_record_recv_packet"):
    getattr(tls, name).restype = ctypes.c_ssize_t
session, credentials = c_void_p(), c_void_p()
assert tls.gnutls_init(byref(session), 2) == 0
assert tls.gnutls_set_default_priority(session) == 0
assert tls.gnutls_certificate_allocate_credentials(byref(credentials)) == 0
assert tls.gnutls_credentials_set(session, 1, credentials) == 0
plain = socket.create_connection(("127.0.0.1", int(port)))
tls.gnutls_transport_set_int2(session, plain.fileno(), plain.fileno())
while (result := tls.gnutls_handshake(session)) != 0: assert result in (-28, -52), result
def write(name, data):
    if name == "gnutls_record_send":
        return tls.gnutls_record_send(session, data, c_size_t(len(data)))
    return tls.gnutls_record_send2(session, data, c_size_t(len(data)), c_size_t(0), c_uint(0))
class Datum(ctypes.Structure):
    _fields_ = [("data", ctypes.POINTER(c_char)), ("size", c_uint)]
def read(name):
    sequence, packet, datum = (c_char * 8)(), c_void_p(), Datum()
    while True:
        if name == "gnutls_record_recv":
            length = tls.gnutls_record_recv(session, buffer, c_size_t(len(buffer)))
        elif name == "gnutls_record_recv_seq":
            length = tls.gnutls_record_recv_seq(session, buffer, c_size_t(len(buffer)), sequence)
        else:
            length = tls.gnutls_record_recv_packet(session, byref(packet))
        if length > 0: break
        assert length in (-28, -52), length
    if not packet: return buffer.raw[:length]
    tls.gnutls_packet_get(packet, byref(datum), None)
    data = datum.data[: datum.size]
    tls.gnutls_packet_deinit(packet)
    return data
run(write, read)
"""

_NSS = """
nspr, nss, ssl = (ctypes.CDLL(name) for name in ("libnspr4.so", "libnss3.so", "libssl3.so"))
assert nss.NSS_NoDB_Init(b".") == 0 and ssl.NSS_SetDomesticPolicy() == 0
nspr.PR_OpenTCPSocket.restype = ssl.SSL_ImportFD.restype = c_void_p
address = ctypes.create_string_buffer(256)
assert nspr.PR_StringToNetAddr(b"127.0.0.1", address) == 0
address[2:4] = int(port).to_bytes(2, "big")
socket_ = c_void_p(ssl.SSL_ImportFD(None, c_void_p(nspr.PR_OpenTCPSocket(2))))
accept = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_int, c_int)(lambda *_: 0)
assert ssl.SSL_AuthCertificateHook(socket_, accept, None) == 0
assert ssl.SSL_SetURL(socket_, b"localhost") == 0
forever = c_uint(0xFFFFFFFF)
assert nspr.PR_Connect(socket_, address, forever) == 0
assert ssl.SSL_ResetHandshake(socket_, 0) == 0
class Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_char_p), ("size", c_int)]
def write(name, data):
    if name == "PR_Write":
        return nspr.PR_Write(socket_, data, len(data))
    if name == "PR_Send":
        return nspr.PR_Send(socket_, data, len(data), 0, forever)
    parts = (Vector * 2)(Vector(data[:7], 7), Vector(data[7:], len(data) - 7))
    return nspr.PR_Writev(socket_, parts, 2, forever)
def read(name):
    if name == "PR_Read":
        length = nspr.PR_Read(socket_, buffer, len(buffer))
    else:
        assert nspr.PR_Recv(socket_, buffer, 5, 2, forever) == 5  # PR_MSG_PEEK
        length = nspr.PR_Recv(socket_, buffer, len(buffer), 0, forever)
    assert length > 0
    return buffer.raw[:length]
run(write, read)
"""

#: By the family of a library. BoringSSL's has the functions of OpenSSL.
CLIENTS = {"openssl": _START + _OPENSSL, "gnutls": _START + _GNUTLS, "nss": _START + _NSS}
