"""A WebSocket server: trio-websocket over a `Socket`. Needs `pip install trio-websocket`.

The server sends every message back. Run it, and talk to it:

    python examples/websocket_server.py --port 9000
    python examples/websocket_client.py ws://127.0.0.1:9000/ "first message" "second message"

With `--cert chain.pem --key key.pem` it serves `wss://`. On Ctrl-C or SIGTERM it closes every
WebSocket with code 1001 (going away).
"""

from __future__ import annotations

import argparse
import sys

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_server_stream

import trisock

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

HANDSHAKE_TIMEOUT = 20  # seconds for the opening handshake
CLOSE_TIMEOUT = 5  # seconds for the closing handshake
MAX_MESSAGE = 1024 * 1024  # bytes


async def echo(websocket: WebSocketConnection) -> None:
    """Replace this with your own application."""
    while True:
        await websocket.send_message(await websocket.get_message())


async def handle(stopping: trio.Event, sock: trisock.Socket) -> None:
    try:
        async with trio.open_nursery() as nursery:  # for the task that reads frames
            with trio.move_on_after(HANDSHAKE_TIMEOUT) as handshake:
                request = await wrap_server_stream(nursery, sock, max_message_size=MAX_MESSAGE)
                websocket = await request.accept()
            if not handshake.cancelled_caught:
                nursery.start_soon(say_goodbye, stopping, websocket)
                await echo(websocket)
                with trio.move_on_after(CLOSE_TIMEOUT):
                    await websocket.aclose()
            nursery.cancel_scope.cancel()
    except ExceptionGroup as group:
        # ConnectionClosed means that the client has left, or that say_goodbye has closed the
        # WebSocket. Any of the tasks may raise it.
        _, other = group.split(ConnectionClosed)
        if other is not None:
            raise other from None


async def say_goodbye(stopping: trio.Event, websocket: WebSocketConnection) -> None:
    await stopping.wait()
    await websocket.aclose(code=1001, reason="the server is stopping")


async def serve(host: str, port: int, tls: trisock.ServerTLS | None) -> None:
    async def handler(sock: trisock.Socket) -> None:
        await handle(server.closing, sock)

    async with trisock.open_service(grace=1) as service:
        server = await service.bind(port, handler, host=host, tls=tls, max_connections=500)
        print(f"listening on port {server.port}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9000, help="0 for any free port")
    parser.add_argument("--cert", metavar="FILE", help="certificate chain (PEM)")
    parser.add_argument(
        "--key",
        metavar="FILE",
        help="the private key (PEM), if the --cert file does not contain it",
    )
    args = parser.parse_args()
    tls = None
    if args.cert:
        certificate = trisock.Certificate.from_files(args.cert, args.key)
        tls = trisock.ServerTLS(certificate, alpn_protocols=["http/1.1"])
    trio.run(serve, args.host, args.port, tls)


if __name__ == "__main__":
    main()
