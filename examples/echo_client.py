"""A client that sends lines and prints the responses at the same time.

Start the echo server (`python examples/echo_server.py --port 7777`). Then run the client. It sends
each argument as a line. Without arguments, it sends standard input:

    python examples/echo_client.py --port 7777 "first line" "second line"
    ls | python examples/echo_client.py --port 7777
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import AsyncIterator

import trio

import trisock


async def standard_input() -> AsyncIterator[bytes]:
    # Do not use sys.stdin: if this read is cancelled, its thread continues. The thread would keep
    # the lock of sys.stdin, and Python could abort at exit.
    while chunk := await trio.to_thread.run_sync(os.read, 0, 65536, abandon_on_cancel=True):
        yield chunk


async def send(sock: trisock.Socket, lines: list[str]) -> None:
    if lines:
        await sock.send(*(f"{line}\n".encode() for line in lines))
    else:
        async for chunk in standard_input():
            await sock.send(chunk)
    await sock.send_eof()  # talk() keeps reading, because responses may be in flight


async def talk(host: str, port: int, lines: list[str]) -> None:
    async with await trisock.connect(host, port) as sock, trio.open_nursery() as nursery:
        nursery.start_soon(send, sock, lines)
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
    parser.add_argument("lines", nargs="*", help="lines to send (default: standard input)")
    args = parser.parse_args()
    try:
        trio.run(talk, args.host, args.port, args.lines)
    except OSError as exc:
        sys.exit(str(exc))


if __name__ == "__main__":
    main()
