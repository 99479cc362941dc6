"""A UDP echo server in the style of Pluto's `socket.udpserver`: a loop without `await`.

Run it, and talk to it:

    python examples/pluto_udp_echo.py --port 7777
    nc -u 127.0.0.1 7777

As with any server that answers over UDP, an attacker can forge a sender's address, and so make this
server send to that address. Each answer has the size of its datagram, so nothing is amplified.
"""

from __future__ import annotations

import argparse
import signal
import sys

from trisock.pluto import socket


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=7777, help="0 for any free port")
    args = parser.parse_args()

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: sys.exit())  # ends recv

    serv = socket.udpserver(args.port)
    if serv is None:
        sys.exit("Failed to bind the port.")
    print(f"listening on port {serv.port}", flush=True)
    while data := serv.recv():
        serv.send(data)


if __name__ == "__main__":
    main()
