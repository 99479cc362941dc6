"""A pool of client connections. It limits their number, and reuses idle connections.

Start the echo server (`python examples/echo_server.py --port 7777`). Then run this client. It sends
each argument as a line. The lines are sent concurrently, over at most two connections:

    python examples/connection_pool.py --port 7777 --size 2 one two three four five

To use the pool in your program, copy the class `Pool`:

    async with Pool(functools.partial(trisock.connect, host, port, tls=True), size=10) as pool:
        with trio.fail_after(30):
            async with pool.connection() as sock:
                await sock.send(b"PING\\r\\n")
                answer = await sock.recv_line(delimiter=b"\\r\\n")
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

import trisock

TIMEOUT = 10  # seconds for one request: the wait for a connection, the request and its answer


class Pool:
    """A pool of connections to one server.

    Args:
      connect: an async function that returns a new connection, ready for its first request. If the
        protocol starts with a greeting, a login or STARTTLS, do that in this function.
      size: the maximum number of connections.

    Leaving ``async with Pool(...)`` closes the idle connections.
    """

    def __init__(self, connect: Callable[[], Awaitable[trisock.Socket]], size: int) -> None:
        self._connect = connect
        self._slots = trio.Semaphore(size, max_value=size)
        self._idle: list[trisock.Socket] = []  # the most recently used connection is the last
        self._closed = False

    async def __aenter__(self) -> Pool:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closed = True
        async with trio.open_nursery() as nursery:
            while self._idle:
                nursery.start_soon(self._idle.pop().close)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[trisock.Socket]:
        """Wait for a free connection, and lend it to the block.

        If the block ends normally, the connection becomes idle. If an exception leaves the block,
        the connection is dropped, because an answer may be half read. So put a timeout around the
        block, not into it, and read the whole answer before the block ends: the pool cannot
        recognize an answer that arrives later.

        The server may close an idle connection just as the next request is sent. Then that request
        fails with ``trio.BrokenResourceError`` or ``trisock.IncompleteReadError``. Only the caller
        knows whether the request may be repeated.
        """
        async with self._slots:
            if self._closed:
                raise trio.ClosedResourceError("this pool was already closed")
            sock = await self._take_idle() or await self._connect()
            try:
                yield sock
            except BaseException:  # also trio.Cancelled
                sock.abort()
                raise
            if self._closed:
                sock.abort()
            else:
                self._idle.append(sock)

    async def _take_idle(self) -> trisock.Socket | None:
        while self._idle:
            sock = self._idle.pop()
            try:
                if await is_idle(sock):
                    return sock
            except BaseException:
                sock.abort()
                raise
            sock.abort()
        return None


async def is_idle(sock: trisock.Socket) -> bool:
    """Return whether a connection is open in both directions and nothing is unread."""
    try:
        await sock.send(b"")  # raises if sending is over, for example after a send was cut short
        # peek() returns None if neither data nor EOF has arrived. It also returns None after an
        # error, such as a reset, but then isopen() is False.
        return await sock.peek() is None and sock.isopen()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return False


async def ask(pool: Pool, line: str, failures: list[str]) -> None:
    try:
        with trio.fail_after(TIMEOUT):
            async with pool.connection() as sock:
                await sock.send(f"{line}\n".encode())
                answer = await sock.recv_line()
                print(f"from port {sock.getlocal().port}: {answer.decode()}", flush=True)
    except trio.TooSlowError:
        failures.append(f"{line}: no answer within {TIMEOUT} seconds")
    except (OSError, EOFError, trio.BrokenResourceError) as exc:
        failures.append(f"{line}: {exc}")


async def ask_all(host: str, port: int, size: int, lines: list[str]) -> list[str]:
    failures: list[str] = []
    async with Pool(functools.partial(trisock.connect, host, port), size) as pool:
        async with trio.open_nursery() as nursery:
            for line in lines:
                nursery.start_soon(ask, pool, line, failures)
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7777)
    parser.add_argument("--size", type=int, default=2, help="the maximum number of connections")
    parser.add_argument("lines", nargs="+", help="lines to send")
    args = parser.parse_args()
    if failures := trio.run(ask_all, args.host, args.port, args.size, args.lines):
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
