"""A chat room: every client receives every line, in the same order.

Run it, and join from several terminals:

    python examples/chat_room.py --port 6000
    nc 127.0.0.1 6000

The example shows three things. A slow client cannot delay a broadcast for long. The length of a
line is limited. When the server stops, the handlers return immediately, even while they wait for a
client.
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import trio

import trisock

MAX_LINE = 512  # bytes
MAX_NAME = 20  # characters
NAME_TIMEOUT = 60  # seconds for a client to choose a name
BROADCAST_TIMEOUT = 2  # seconds for a client to receive a line; a slower client is disconnected


def printable(line: bytes) -> str:
    """Return a line as text without control characters, which could affect other terminals."""
    text = line.decode("utf-8", "replace")
    return "".join(character for character in text if character.isprintable()).strip()


@asynccontextmanager
async def cancelled_by(event: trio.Event) -> AsyncIterator[None]:
    """Cancel the ``async with`` block when the event is set.

    An exception in the block propagates in an exception group.
    """
    async with trio.open_nursery() as nursery:

        async def cancel() -> None:
            await event.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(cancel)
        yield
        nursery.cancel_scope.cancel()


class ChatRoom:
    """The clients' names, and a channel of lines to broadcast.

    The channel has no buffer, so a handler waits until ``tell_all`` takes its line.
    """

    server: trisock.Server

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.say, self.said = trio.open_memory_channel[str](0)

    async def tell_all(self) -> None:
        # A single task broadcasts, so all clients receive lines in the same order. A client that
        # leaves does not cancel the broadcast of its last line.
        async for text in self.said:
            await self.server.broadcast(f"{text}\n".encode(), timeout=BROADCAST_TIMEOUT)

    async def visit(self, sock: trisock.Socket) -> None:
        """Serve one client until it leaves or the server stops."""
        async with cancelled_by(self.server.closing):
            await self.chat(sock)
        if self.server.closing.is_set():
            await sock.send(b"* the room is closing\n")

    async def chat(self, sock: trisock.Socket) -> None:
        name = await self.ask_name(sock)
        if name is None:
            return
        self.names.add(name)
        try:
            await self.say.send(f"* {name} is here")
            await self.listen(sock, name)
            await self.say.send(f"* {name} has left")
        finally:
            self.names.remove(name)

    async def ask_name(self, sock: trisock.Socket) -> str | None:
        await sock.send(b"* who are you?\n")
        with (
            trio.move_on_after(NAME_TIMEOUT),
            suppress(trisock.LimitExceededError, trisock.IncompleteReadError),
        ):
            async for line in sock.lines(max_bytes=MAX_LINE):
                name = printable(line)
                if 0 < len(name) <= MAX_NAME and name not in self.names:
                    return name
                await sock.send(b"* empty, too long, or in use. who are you?\n")
        return None

    async def listen(self, sock: trisock.Socket, name: str) -> None:
        """Broadcast a client's lines until EOF, an error, or a line that is too long."""
        try:
            async for line in sock.lines(max_bytes=MAX_LINE):
                if text := printable(line):
                    await self.say.send(f"{name}: {text}")
        except trisock.LimitExceededError:
            await sock.send(f"* a line has at most {MAX_LINE} bytes\n".encode())
        except trisock.IncompleteReadError:
            pass  # the client left in the middle of a line
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client vanished, or was too slow for a broadcast


async def serve(host: str, port: int) -> None:
    room = ChatRoom()
    async with trisock.open_service(grace=5) as service:
        room.server = await service.bind(port, room.visit, host=host, max_connections=500)
        service.nursery.start_soon(room.tell_all)  # cancelled when the last client has left
        print(f"listening on port {room.server.port}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=6000, help="0 for any free port")
    args = parser.parse_args()
    trio.run(serve, args.host, args.port)


if __name__ == "__main__":
    main()
