"""An AnyIO byte stream over a `Socket`, for libraries that need AnyIO. Needs `pip install anyio`.

To use it in your program, copy the class `AnyIOStream` and the functions above it. It works under
Trio only: with `trio.run(main)` or `anyio.run(main, backend="trio")`.

Start the echo server (`python examples/echo_server.py --port 7777`). Then run this client. It sends
each argument as a line, and reads the answers with AnyIO's buffered stream:

    python examples/anyio_stream.py --port 7777 "first line" "second line"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import anyio
import trio
from anyio.abc import ByteStream, SocketAttribute
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.tls import TLSAttribute

import trisock

T = TypeVar("T")


async def translated(operation: Awaitable[T]) -> T:
    """Await a method of a ``Socket``. Turn Trio exceptions and ``b""`` into AnyIO exceptions."""
    try:
        result = await operation
    except trio.BrokenResourceError as exc:
        raise anyio.BrokenResourceError(str(exc)) from exc
    except trio.ClosedResourceError as exc:
        raise anyio.ClosedResourceError(str(exc)) from exc
    except trio.BusyResourceError as exc:
        raise anyio.BusyResourceError("using") from exc
    if result == b"":
        raise anyio.EndOfStream
    return result


def attributes(sock: trisock.Socket) -> Mapping[Any, Callable[[], Any]]:
    """Return AnyIO's typed attributes of a ``Socket``. Omit those that the socket lacks."""
    values: dict[Any, Any] = {
        SocketAttribute.family: sock.socket.family,
        SocketAttribute.local_address: plain(sock.getlocal()),
        SocketAttribute.remote_address: plain(sock.getpeer()),
    }
    if sock.getpeer().port:
        values[SocketAttribute.local_port] = sock.getlocal().port
        values[SocketAttribute.remote_port] = sock.getpeer().port
    if sock.tls:
        values[TLSAttribute.alpn_protocol] = sock.tls.alpn_protocol
        values[TLSAttribute.tls_version] = sock.tls.version
        values[TLSAttribute.peer_certificate_binary] = sock.tls.peer_certificate
    return {name: lambda value=value: value for name, value in values.items()}  # type: ignore[misc]


def plain(address: trisock.Address) -> tuple[str, int] | str:
    """Return an address in AnyIO's form. For a Unix socket (port 0), this is only the path."""
    return (address.host, address.port) if address.port else address.host


class AnyIOStream(ByteStream):
    def __init__(self, sock: trisock.Socket) -> None:
        self.sock = sock

    async def receive(self, max_bytes: int = 65536) -> bytes:
        return await translated(self.sock.recv(max_bytes))

    async def send(self, item: bytes) -> None:
        await translated(self.sock.send(item))

    async def send_eof(self) -> None:
        await translated(self.sock.send_eof())

    async def aclose(self) -> None:
        await self.sock.aclose()

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        return attributes(self.sock)


async def talk(host: str, port: int, lines: list[str]) -> None:
    async with AnyIOStream(await trisock.connect(host, port)) as stream:
        answers = BufferedByteReceiveStream(stream)
        for line in lines:
            await stream.send(f"{line}\n".encode())
            answer = await answers.receive_until(b"\n", max_bytes=65536)
            print(answer.decode(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7777)
    parser.add_argument("lines", nargs="+", help="lines to send")
    args = parser.parse_args()
    try:
        trio.run(talk, args.host, args.port, args.lines)
    except (OSError, anyio.BrokenResourceError, anyio.IncompleteRead) as exc:
        sys.exit(str(exc))


if __name__ == "__main__":
    main()
