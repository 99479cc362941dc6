"""A WebSocket client: trio-websocket over a `Socket`. Needs `pip install trio-websocket`.

The client sends each argument as a message, and prints the answers:

    python examples/websocket_server.py --port 9000
    python examples/websocket_client.py ws://127.0.0.1:9000/ "first message" "second message"

trio-websocket can also connect without trisock. With a `Socket` underneath, the connection can go
through a proxy (`socks_client.py`), start with STARTTLS, or use the options of `ClientTLS`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import trio
from trio_websocket import (
    ConnectionClosed,
    ConnectionRejected,
    WebSocketConnection,
    wrap_client_stream,
)

import trisock

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

TIMEOUT = 20  # seconds for the opening handshake, and for each answer
CLOSE_TIMEOUT = 5  # seconds for the closing handshake
MAX_MESSAGE = 1024 * 1024  # bytes


@asynccontextmanager
async def websocket_over(
    sock: trisock.Socket, host: str, resource: str
) -> AsyncIterator[WebSocketConnection]:
    """Open a WebSocket over a connection, and close both when the block ends.

    Args:
      sock: a new connection to the server, with TLS for ``wss``.
      host: the value of the header field Host.
      resource: the path and the query, such as ``/chat?room=1``.

    All exceptions are in an exception group, because a nursery surrounds the block.

    Raises:
      trio.TooSlowError: no complete response came in time, or the server hung up.
      trio_websocket.ConnectionRejected: the server refused to open a WebSocket.
    """
    async with sock, trio.open_nursery() as nursery:  # for the task that reads frames
        with trio.fail_after(TIMEOUT):
            # trio-websocket accepts any Trio stream, although its annotation does not say so.
            stream = cast(Any, sock)
            websocket = await wrap_client_stream(
                nursery, stream, host, resource, max_message_size=MAX_MESSAGE
            )
        try:
            yield websocket
        finally:
            with trio.move_on_after(CLOSE_TIMEOUT):
                await websocket.aclose()


async def talk(url: str, messages: list[str], ca: bytes | None) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("ws", "wss") or not parts.hostname:
        sys.exit(f"not a WebSocket URL: {url}")
    tls = None
    if parts.scheme == "wss":
        tls = trisock.ClientTLS(parts.hostname, ca=ca, alpn_protocols=["http/1.1"])
    sock = await trisock.connect(parts.hostname, parts.port or (443 if tls else 80), tls=tls)
    resource = parts._replace(scheme="", netloc="", path=parts.path or "/", fragment="").geturl()
    async with websocket_over(sock, parts.netloc.rpartition("@")[2], resource) as websocket:
        for message in messages:
            with trio.fail_after(TIMEOUT):
                await websocket.send_message(message)
                print(await websocket.get_message(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ca", metavar="FILE", help="trust this CA certificate (PEM)")
    parser.add_argument("url")
    parser.add_argument("messages", nargs="+")
    args = parser.parse_args()
    ca = Path(args.ca).read_bytes() if args.ca else None
    try:
        trio.run(talk, args.url, args.messages, ca)
    except (OSError, trio.BrokenResourceError) as exc:
        sys.exit(str(exc))
    except ExceptionGroup as group:
        sys.exit("; ".join(map(describe, group.exceptions)))


def describe(exc: Exception) -> str:
    if isinstance(exc, ConnectionClosed):
        return "the server closed the WebSocket"
    if isinstance(exc, ConnectionRejected):
        return f"the server refused to open a WebSocket: status {exc.status_code}"
    if isinstance(exc, trio.TooSlowError):
        return f"no answer within {TIMEOUT} seconds"
    raise exc


if __name__ == "__main__":
    main()
