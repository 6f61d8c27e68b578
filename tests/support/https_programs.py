"""HTTPS programs that tests start: servers that log each request as ``METHOD TARGET STATUS IN OUT``, and clients.

Sizes are those of the bodies. Servers get a port, a certificate and its key.
"""

from __future__ import annotations

from support.tls import SERVE_BY_ASYNCIO

__all__ = [
    "AIOHTTP_CLIENT",
    "AIOHTTP_SERVER",
    "CONNECT_PROXY",
    "GRPCIO_CLIENT",
    "GRPC_CLIENT",
    "GRPC_SERVER",
    "HYPERCORN_SERVER",
    "LIBCURL_CLIENT",
    "OPENSSL_CLIENT",
    "PIPELINING_CLIENT",
    "UVICORN_SERVER",
    "WEBSOCKET_CLIENT",
    "WEBSOCKET_SERVER",
]

#: ``/events`` begins an answer that ends once somebody asks for ``/go``.
AIOHTTP_SERVER = """
import asyncio, ssl, sys
from aiohttp import web
goes_on = asyncio.Event()
def log(request, status, size, sent):
    print(request.method, request.path_qs, status, size, sent, flush=True)
async def answer(request):
    size = len(await request.read())
    if request.path == "/events":
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(b"data: 1\\n\\n")
        await goes_on.wait()
        await response.write(b"data: 2\\n\\n")
        await response.write_eof()
        log(request, 200, size, 18)
        return response
    if request.path == "/go":
        goes_on.set()
    status = 404 if "missing" in request.path else 200
    log(request, status, size, 0 if request.method == "HEAD" else 10)
    return web.Response(status=status, body=b"0123456789")
async def main():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*sys.argv[2:4])
    application = web.Application(client_max_size=1 << 24)
    application.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", int(sys.argv[1]), ssl_context=context).start()
    await asyncio.Event().wait()
asyncio.run(main())
"""

_ASGI = """
import asyncio, sys
async def application(scope, receive, send):
    if scope["type"] != "http":
        return
    size = 0
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        if not message.get("more_body"): break
    target = scope["raw_path"].decode() + ("?" + scope["query_string"].decode() if scope["query_string"] else "")
    status = 404 if "missing" in target else 200
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"10")]})
    await send({"type": "http.response.body", "body": b"0123456789"})
    print(scope["method"], target, status, size, 10, flush=True)
"""

HYPERCORN_SERVER = (
    _ASGI
    + """
from hypercorn.asyncio import serve
from hypercorn.config import Config
config = Config()
config.bind = ["127.0.0.1:" + sys.argv[1]]
config.certfile, config.keyfile = sys.argv[2:4]
asyncio.run(serve(application, config))
"""
)

UVICORN_SERVER = (
    _ASGI
    + """
import uvicorn
uvicorn.run(application, host="127.0.0.1", port=int(sys.argv[1]), ssl_certfile=sys.argv[2], ssl_keyfile=sys.argv[3],
            log_level="critical", lifespan="off")
"""
)

AIOHTTP_CLIENT = """
import aiohttp, asyncio, ssl, sys
async def main():
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=ssl.create_default_context())) as session:
        for url in sys.argv[1:]:
            async with session.get(url) as response: await response.read()
asyncio.run(main())
"""

#: By libcurl of any TLS library: its path, then URLs; without any they come from stdin, for one connection of HTTP/1.1.
#: Constants are those of curl/curl.h.
LIBCURL_CLIENT = """
import ctypes, sys
curl = ctypes.CDLL(sys.argv[1])
curl.curl_easy_init.restype = ctypes.c_void_p
handle = ctypes.c_void_p(curl.curl_easy_init())
write = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p)
take = write(lambda data, size, count, _: size * count)
curl.curl_easy_setopt(handle, 64, ctypes.c_long(0))
curl.curl_easy_setopt(handle, 81, ctypes.c_long(0))
curl.curl_easy_setopt(handle, 20011, take)
if not sys.argv[2:]: curl.curl_easy_setopt(handle, 84, ctypes.c_long(2))
for url in sys.argv[2:] or map(str.strip, sys.stdin):
    curl.curl_easy_setopt(handle, 10002, url.encode())
    assert curl.curl_easy_perform(handle) == 0
    print("done", flush=True)
curl.curl_easy_cleanup(handle)
"""

#: By a library with OpenSSL's functions: its path, a port, which functions (plain, ex, ex2), then targets. What is read
#: is peeked at before.
OPENSSL_CLIENT = """
import ctypes, socket, sys
path, port, form, *targets = sys.argv[1:]
library, pointer, size = ctypes.CDLL(path), ctypes.c_void_p, ctypes.c_size_t
def function(name, result, *arguments):
    found = getattr(library, name)
    found.restype, found.argtypes = result, arguments
    return found
context = function("SSL_CTX_new", pointer, pointer)(function("TLS_client_method", pointer)())
ssl = function("SSL_new", pointer, pointer)(context)
plain = socket.create_connection(("127.0.0.1", int(port)))
function("SSL_set_fd", ctypes.c_int, pointer, ctypes.c_int)(ssl, plain.fileno())
assert function("SSL_connect", ctypes.c_int, pointer)(ssl) == 1
buffer = ctypes.create_string_buffer(65536)
moved = size()
def write(data):
    if form == "plain":
        assert function("SSL_write", ctypes.c_int, pointer, pointer, ctypes.c_int)(ssl, data, len(data)) == len(data)
    elif form == "ex":
        assert function("SSL_write_ex", ctypes.c_int, pointer, pointer, size, pointer)(
            ssl, data, len(data), ctypes.byref(moved)) == 1
    else:
        assert function("SSL_write_ex2", ctypes.c_int, pointer, pointer, size, ctypes.c_uint64, pointer)(
            ssl, data, len(data), 0, ctypes.byref(moved)) == 1
def read():
    function("SSL_peek", ctypes.c_int, pointer, pointer, ctypes.c_int)(ssl, buffer, 5)
    if form == "plain":
        length = function("SSL_read", ctypes.c_int, pointer, pointer, ctypes.c_int)(ssl, buffer, len(buffer))
    else:
        assert function("SSL_read_ex", ctypes.c_int, pointer, pointer, size, pointer)(
            ssl, buffer, len(buffer), ctypes.byref(moved)) == 1
        length = moved.value
    assert length > 0
    return buffer.raw[:length]
for target in targets:
    write(f"GET {target} HTTP/1.1\\r\\nHost: 127.0.0.1:{port}\\r\\n\\r\\n".encode())
    answer = read()
    while b"\\r\\n\\r\\n" not in answer: answer += read()
    head, _, body = answer.partition(b"\\r\\n\\r\\n")
    fields = dict(line.split(b": ", 1) for line in head.lower().split(b"\\r\\n")[1:])
    length = int(fields[b"content-length"])
    while len(body) < length: body += read()
function("SSL_shutdown", ctypes.c_int, pointer)(ssl)
function("SSL_free", None, pointer)(ssl)
"""

#: All requests in one write; a port, how many answers of ten bytes to read, then targets.
PIPELINING_CLIENT = """
import socket, ssl, sys
port, *targets = sys.argv[1:]
with ssl.create_default_context().wrap_socket(
    socket.create_connection(("127.0.0.1", int(port))), server_hostname="127.0.0.1"
) as tls:
    host = f"Host: 127.0.0.1:{port}"
    tls.sendall("".join(f"GET {target} HTTP/1.1\\r\\n{host}\\r\\n\\r\\n" for target in targets).encode())
    answers = b""
    while answers.count(b"HTTP/1.1 ") < len(targets) or not answers.endswith((b"0123456789", b"</html>\\r\\n")):
        answers += tls.recv(65536)
"""

#: A proxy behind TLS that knows CONNECT only.
CONNECT_PROXY = """
import asyncio, ssl, sys
async def relay(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()
async def serve(reader, writer):
    head = await reader.readuntil(b"\\r\\n\\r\\n")
    method, target, _ = head.split(b" ", 2)
    host, _, port = target.decode().rpartition(":")
    near, far = await asyncio.open_connection(host, int(port))
    print(method.decode(), target.decode(), 200, 0, 0, flush=True)
    writer.write(b"HTTP/1.1 200 Connection established\\r\\n\\r\\n")
    await asyncio.gather(relay(reader, far), relay(near, writer), return_exceptions=True)
"""
CONNECT_PROXY += SERVE_BY_ASYNCIO

WEBSOCKET_SERVER = """
import asyncio, ssl, sys
from websockets.asyncio.server import serve
async def echo(connection):
    async for message in connection: await connection.send(message)
    print("GET", connection.request.path, 101, 0, 0, flush=True)
async def main():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*sys.argv[2:4])
    async with serve(echo, "127.0.0.1", int(sys.argv[1]), ssl=context):
        await asyncio.Event().wait()
asyncio.run(main())
"""

#: A URL; what is echoed looks like HTTP.
WEBSOCKET_CLIENT = """
import asyncio, ssl, sys
from websockets.asyncio.client import connect
async def main():
    async with connect(sys.argv[1], ssl=ssl.create_default_context()) as connection:
        for number in range(20):
            await connection.send(f"GET /{number} HTTP/1.1\\r\\n\\r\\n")
            assert await connection.recv()
asyncio.run(main())
"""

_GRPC = """
import asyncio, ssl, sys
from grpclib.const import Cardinality, Handler, Status
from grpclib.encoding.base import CodecBase
class Bytes(CodecBase):
    __content_subtype__ = "proto"
    def encode(self, message, message_type): return message
    def decode(self, data, message_type): return data
"""

GRPC_SERVER = (
    _GRPC
    + """
from grpclib.exceptions import GRPCError
from grpclib.server import Server
class Demo:
    async def hello(self, stream):
        await stream.recv_message()
        await stream.send_message(b"0123456789")
        print("POST /demo.Demo/Hello 200", flush=True)
    async def missing(self, stream):
        await stream.recv_message()
        print("POST /demo.Demo/Missing 200", flush=True)
        raise GRPCError(Status.NOT_FOUND)
    def __mapping__(self):
        return {
            "/demo.Demo/Hello": Handler(self.hello, Cardinality.UNARY_UNARY, bytes, bytes),
            "/demo.Demo/Missing": Handler(self.missing, Cardinality.UNARY_UNARY, bytes, bytes),
        }
async def main():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*sys.argv[2:4])
    context.set_alpn_protocols(["h2"])
    server = Server([Demo()], codec=Bytes())
    await server.start("127.0.0.1", int(sys.argv[1]), ssl=context)
    await server.wait_closed()
asyncio.run(main())
"""
)

#: Of grpcio, whose BoringSSL is stripped: a port and a certificate; waits at the end.
GRPCIO_CLIENT = """
import grpc, sys
from pathlib import Path
port, certificate = sys.argv[1:]
credentials = grpc.ssl_channel_credentials(Path(certificate).read_bytes())
with grpc.secure_channel(f"127.0.0.1:{port}", credentials) as channel:
    assert channel.unary_unary("/demo.Demo/Hello")(b"hello", timeout=30) == b"0123456789"
    print(flush=True)
    sys.stdin.readline()
"""

GRPC_CLIENT = (
    _GRPC
    + """
from grpclib.client import Channel, UnaryUnaryMethod
from grpclib.exceptions import GRPCError
async def main():
    context = ssl.create_default_context()
    context.set_alpn_protocols(["h2"])
    channel = Channel("127.0.0.1", int(sys.argv[1]), ssl=context, codec=Bytes())
    assert await UnaryUnaryMethod(channel, "/demo.Demo/Hello", bytes, bytes)(b"hello") == b"0123456789"
    try:
        await UnaryUnaryMethod(channel, "/demo.Demo/Missing", bytes, bytes)(b"hello")
    except GRPCError as error:
        assert error.status is Status.NOT_FOUND
    channel.close()
asyncio.run(main())
"""
)
