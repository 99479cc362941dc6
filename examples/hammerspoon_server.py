"""A server in the style of hs.socket. It sends every received line to all clients.

Run it, and talk to it from several terminals:

    python examples/hammerspoon_server.py --port 7777
    nc 127.0.0.1 7777

An hs.socket server object represents all its clients: it reads from each client, writes to all
clients, and does not tell them apart. `chat_room.py` shows a server that tells clients apart.
"""

from __future__ import annotations

import argparse
import sys

import trio

import trisock
from trisock import hammerspoon


async def greet(server: hammerspoon.Socket) -> None:
    # There is no callback for a new client, so poll. (A Hammerspoon script would use hs.timer.) If
    # a client leaves while another connects, the number of clients stays the same. Then the new
    # client gets no greeting until the number changes.
    known = 0
    while True:
        if server.connections() != known:
            known = server.connections()
            server.write(f"* hello, {known} online\r\n")
            server.read("\n")
        await trio.sleep(0.02)


async def serve(port: int) -> None:
    def callback(data: bytes, tag: int) -> None:
        server.write(b"> " + data)
        server.read("\n")

    async with hammerspoon.open_sockets() as hs, trisock.open_service() as service:
        server = hs.server(port, callback)
        if server.info()["isDisconnected"]:
            sys.exit(1)  # the reason has been logged
        service.nursery.start_soon(greet, server)
        print(f"listening on port {server.info()['localPort']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=7777, help="0 for any free port")
    args = parser.parse_args()
    trio.run(serve, args.port)


if __name__ == "__main__":
    main()
