"""The server that restarts.py restarts. It logs each request before it answers.

    python restart_server.py PORT_OR_DESCRIPTOR

These environment variables are the other options: REQUEST_LOG (a file), CERTIFICATE and KEY (for
TLS), INHERITED and PROXIED (set or not). gunicorn imports ``handler`` from here.
"""

from __future__ import annotations

import os
import socket
import sys

import trio

import trisock

# Each request is in flight for at least this many seconds.
SERVICE_SECONDS = 0.15

# An answer has several packets, so that a restart could cut it short.
_ANSWER_LINES = 500

_log = os.open(os.environ["REQUEST_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def answer(request: bytes) -> bytes:
    return b" ".join([request] * _ANSWER_LINES) + b"\n"


async def handler(sock: trisock.Socket) -> None:
    async for request in sock.lines(idle=True):
        os.write(_log, request + b"\n")
        await trio.sleep(SERVICE_SECONDS)
        await sock.send(answer(request))


def main() -> None:
    number = int(sys.argv[1])
    where = (
        trisock.Listener([socket.socket(fileno=number)]) if "INHERITED" in os.environ else number
    )
    tls = None
    if "CERTIFICATE" in os.environ:
        tls = trisock.Certificate.from_files(os.environ["CERTIFICATE"], os.environ["KEY"])
    proxies = ["127.0.0.1"] if "PROXIED" in os.environ else None
    trisock.run(where, handler, tls=tls, trusted_proxies=proxies)


if __name__ == "__main__":
    main()
