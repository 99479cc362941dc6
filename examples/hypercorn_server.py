"""ASGI applications on trisock's server: hypercorn over a `Socket`. Needs `pip install hypercorn`.

Run the application in this file, or your own, and talk to it:

    python examples/hypercorn_server.py --port 8080
    curl http://localhost:8080/
    python examples/hypercorn_server.py --port 8080 --app package.module:app

With `--cert chain.pem --key key.pem`, the server uses TLS, and ALPN selects HTTP/2 or HTTP/1.1. On
Ctrl-C or SIGTERM, requests in progress have three seconds to finish (`Config.graceful_timeout`).

hypercorn opens its own listening sockets. Its public function `hypercorn.trio.serve` does not take
connections that another server has accepted. So this file uses four parts of hypercorn that are not
in its documentation: `TCPServer`, `WorkerContext`, `Lifespan` and `wrap_app`. It is tested with
hypercorn 0.18. Pin the version (`hypercorn ~= 0.18.0`).

With trisock's server, you can reload certificates, limit the number of connections, serve other
protocols on the same port, and read a connection's first bytes before hypercorn gets it.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from typing import Any, cast

import trio
from hypercorn.config import Config
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState, Framework, LifespanState
from hypercorn.utils import wrap_app

import trisock


async def hello(scope: Any, receive: Any, send: Any) -> None:
    """The application, if ``--app`` is not given."""
    if scope["type"] == "lifespan":
        for event in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{event}.complete"})
        return
    if scope["type"] != "http":
        raise NotImplementedError(
            f"this application does not support the scope type {scope['type']}"
        )
    text = f"Hello! You asked for {scope['path']} over HTTP/{scope['http_version']}\n".encode()
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(text))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": text})


class TLSConnection:
    """Wraps a ``Socket`` after its TLS handshake, so that hypercorn recognizes the TLS connection.

    These are the attributes of a ``trio.SSLStream`` that hypercorn uses. There is no ``send_eof``,
    because TLS has no half-closed state.
    """

    def __init__(self, sock: trisock.Socket) -> None:
        self.transport_stream = sock  # hypercorn gets the addresses from its ``socket``
        self.send_all = sock.send_all
        self.receive_some = sock.receive_some
        self.aclose = sock.aclose
        self._alpn_protocol = sock.tls.alpn_protocol if sock.tls else None

    async def do_handshake(self) -> None:
        await trio.lowlevel.checkpoint()  # the handshake is already complete

    def selected_alpn_protocol(self) -> str | None:
        return self._alpn_protocol


async def handle(
    app: AppWrapper,
    config: Config,
    context: WorkerContext,
    state: LifespanState,
    sock: trisock.Socket,
) -> None:
    stream = cast(Any, TLSConnection(sock) if sock.istls() else sock)
    await TCPServer(app, config, context, ConnectionState(state.copy()), stream)


async def serve(
    framework: Framework, config: Config, host: str, port: int, tls: trisock.ServerTLS | None
) -> None:
    app = wrap_app(framework, config.wsgi_max_body_size, None)
    context = WorkerContext(max_requests=None)
    state: LifespanState = {}
    lifespan = Lifespan(app, config, state)
    handler = functools.partial(handle, app, config, context, state)
    async with trio.open_nursery() as lifespan_nursery:
        await lifespan_nursery.start(lifespan.handle_lifespan)
        await lifespan.wait_for_startup()
        async with trisock.open_service(grace=config.graceful_timeout) as service:
            server = await service.bind(port, handler, host=host, tls=tls, max_connections=500)
            service.nursery.start_soon(finish, server, context, config.graceful_timeout)
            print(f"listening on port {server.port}", flush=True)
        await lifespan.wait_for_shutdown()
        lifespan_nursery.cancel_scope.cancel()


async def finish(server: trisock.Server, context: WorkerContext, grace: float) -> None:
    """Finish hypercorn's connections when the server stops."""
    await server.closing.wait()
    await context.terminated.set()  # hypercorn closes idle connections immediately
    with trio.move_on_after(grace):
        await server.wait_closed()
    for sock in server.connections:
        sock.abort()  # ends a stuck send, which hypercorn shields from cancellation


def load(path: str) -> Framework:
    sys.path.insert(0, "")
    module, _, name = path.partition(":")
    return cast(Framework, getattr(importlib.import_module(module), name or "app"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080, help="0 for any free port")
    parser.add_argument("--app", metavar="MODULE:NAME", help="an ASGI application")
    parser.add_argument("--cert", metavar="FILE", help="certificate chain (PEM)")
    parser.add_argument(
        "--key",
        metavar="FILE",
        help="the private key (PEM), if the --cert file does not contain it",
    )
    args = parser.parse_args()
    app = load(args.app) if args.app else cast(Framework, hello)
    tls = None
    if args.cert:
        certificate = trisock.Certificate.from_files(args.cert, args.key)
        tls = trisock.ServerTLS(certificate, alpn_protocols=["h2", "http/1.1"])
    trio.run(serve, app, Config(), args.host, args.port, tls)


if __name__ == "__main__":
    main()
