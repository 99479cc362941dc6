"""An echo server, which sends back everything that a client sends.

Run it, and talk to it:

    python examples/echo_server.py --port 7777
    nc 127.0.0.1 7777

Ctrl-C or SIGTERM stops it. Clients then have a second to finish.
"""

from __future__ import annotations

import argparse

import trio

import trisock


async def echo(sock: trisock.Socket) -> None:
    async for chunk in sock:  # until EOF from the client
        await sock.send(chunk)


async def serve(host: str, port: int) -> None:
    async with trisock.open_service(grace=1) as service:
        server = await service.bind(port, echo, host=host, max_connections=500)
        print(f"listening on port {server.port}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7777, help="0 for any free port")
    args = parser.parse_args()
    trio.run(serve, args.host, args.port)


if __name__ == "__main__":
    main()
