"""Several tasks write to one connection.

Only one task at a time may send on a `Socket`. A second task gets `trio.BusyResourceError`,
because otherwise the two messages could mix. There are two ways to share a connection:

- `send_from` is the only task that sends. The writers hand it whole messages through a channel. A
  cancelled writer never harms the connection: its message is sent whole, or not at all. Use this
  way unless a writer must know when the kernel has its data.
- `LockedSender` holds a lock while it sends. When its `send` returns, the kernel has the data. But
  if a writer is cancelled in the middle of a message, an unknown part of the message has been sent.
  Nothing can be sent after that, and every other writer gets `trio.BrokenResourceError`.

Start the echo server (`python examples/echo_server.py --port 7777`). Then run this client, whose
writers send numbered lines at the same time:

    python examples/many_writers.py --port 7777 --writers 3 --lines 5
    python examples/many_writers.py --port 7777 --writers 3 --lines 5 --lock
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Awaitable, Callable

import trio

import trisock

MAX_WAITING = 16  # messages in the channel; when it is full, writers wait until the peer reads more


async def send_from(messages: trio.MemoryReceiveChannel[bytes], sock: trisock.Socket) -> None:
    """Send all messages, in order, until every writer has closed its end of the channel.

    If sending fails, writers get ``trio.BrokenResourceError`` too, because the channel is closed.
    """
    async with messages:
        async for message in messages:
            await sock.send(message)


class LockedSender:
    """Lets several tasks send on one socket, in the order in which they called ``send``."""

    def __init__(self, sock: trisock.Socket) -> None:
        self._sock = sock
        self._lock = trio.Lock()

    async def send(self, message: bytes) -> None:
        async with self._lock:
            await self._sock.send(message)


async def write(name: str, lines: int, send: Callable[[bytes], Awaitable[None]]) -> None:
    """Replace this with your own writers, such as a heartbeat and the answers to requests."""
    for number in range(1, lines + 1):
        await send(f"{name}: line {number}\n".encode())


async def write_through_channel(sock: trisock.Socket, writers: int, lines: int) -> None:
    send_channel, receive_channel = trio.open_memory_channel[bytes](MAX_WAITING)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_from, receive_channel, sock)
        # When the last writer has ended, this closes the channel, and then send_from ends.
        async with send_channel, trio.open_nursery() as writing:
            for number in range(1, writers + 1):
                writing.start_soon(write, f"writer {number}", lines, send_channel.send)


async def write_with_lock(sock: trisock.Socket, writers: int, lines: int) -> None:
    sender = LockedSender(sock)
    async with trio.open_nursery() as writing:
        for number in range(1, writers + 1):
            writing.start_soon(write, f"writer {number}", lines, sender.send)


async def send(sock: trisock.Socket, writers: int, lines: int, lock: bool) -> None:
    await (write_with_lock if lock else write_through_channel)(sock, writers, lines)
    await sock.send_eof()


async def talk(host: str, port: int, writers: int, lines: int, lock: bool) -> None:
    async with await trisock.connect(host, port) as sock, trio.open_nursery() as nursery:
        nursery.start_soon(send, sock, writers, lines, lock)
        async for chunk in sock:
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
        nursery.cancel_scope.cancel()  # the server has closed the connection: stop sending


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7777)
    parser.add_argument("--writers", type=int, default=3)
    parser.add_argument("--lines", type=int, default=5, help="the number of lines of each writer")
    parser.add_argument("--lock", action="store_true", help="share a lock instead of a channel")
    args = parser.parse_args()
    try:
        trio.run(talk, args.host, args.port, args.writers, args.lines, args.lock)
    except OSError as exc:
        sys.exit(str(exc))


if __name__ == "__main__":
    main()
