"""The server from Pluto's page on `socket.bind`, which greets each client over HTTP.

Run it, and talk to it:

    python examples/pluto_hello_server.py --port 8080
    curl http://localhost:8080/
"""

from __future__ import annotations

import argparse
import signal

import trio

from trisock.pluto import async_socket, scheduler, socket


async def hello(s: async_socket) -> None:
    content = "Hello, world!"
    await s.send(
        f"HTTP/1.1 200 OK\r\nConnection: Close\r\nContent-Length: {len(content)}\r\n\r\n" + content
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8080, help="0 for any free port")
    args = parser.parse_args()

    sched = scheduler()
    server = socket.bind(sched, args.port, hello)

    async def until_stopped() -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            print(f"listening on port {server.port}", flush=True)
            await anext(signals)
        server.close()

    sched.add(until_stopped)
    sched.run()


if __name__ == "__main__":
    main()
