"""SMTP submission in production: STARTTLS on port 587, and TLS from the first byte on port 465.

Before STARTTLS, port 587 accepts no password and no mail (RFC 8314).

systemd opens both ports (`examples/systemd/`), so the program needs no privileges, and no client is
lost while it restarts. SIGTERM stops the program: it answers the requests that have begun, and
sends a 421 to idle clients under TLS. On SIGHUP, it reads the certificate's files again. To try it
without systemd:

    python examples/submission_server.py --cert chain.pem --key key.pem --ports 1587 1465
"""

from __future__ import annotations

import argparse
import functools
import ipaddress
import logging

import trio
from smtp_server import Session, handle

import trisock

# Clients from these networks are rejected right after they have connected.
DENIED = [ipaddress.ip_network("192.0.2.0/24")]

MAX_CONNECTIONS = 1_000  # on each port
MAX_CONNECTIONS_PER_HOST = 20


def admit(address: trisock.Address) -> bool:
    client = ipaddress.ip_address(address.host)
    return not any(client in network for network in DENIED)


async def handle_after_starttls(tls: trisock.ServerTLS, sock: trisock.Socket) -> None:
    await trisock.starttls.accept(sock, "smtp", tls)
    await Session(sock, tls).serve()


async def listeners(ports: list[int]) -> list[trisock.Listener]:
    """Return the listeners for submission and for submissions (RFC 8314, section 3.3)."""
    if ports:
        return [await trisock.listen(port) for port in ports]
    return [trisock.Listener.from_systemd(name) for name in ("submission", "submissions")]


async def serve(tls: trisock.ServerTLS, ports: list[int]) -> None:
    starttls, implicit = await listeners(ports)
    async with trisock.open_service(grace=30, reload=[tls]) as service:
        bind = functools.partial(
            service.bind,
            max_connections=MAX_CONNECTIONS,
            max_connections_per_host=MAX_CONNECTIONS_PER_HOST,
            admit=admit,
        )
        await bind(starttls, functools.partial(handle_after_starttls, tls))
        await bind(implicit, functools.partial(handle, tls), tls=tls)
        print(f"listening on ports {starttls.port} {implicit.port}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cert", required=True, metavar="FILE", help="certificate chain (PEM)")
    parser.add_argument("--key", metavar="FILE", help="the private key (PEM)")
    parser.add_argument(
        "--ports",
        type=int,
        nargs=2,
        default=[],
        metavar=("STARTTLS", "TLS"),
        help="listen on these ports, instead of the sockets from systemd (0 for any free port)",
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    certificate = trisock.Certificate.from_files(args.cert, args.key)
    trio.run(serve, trisock.ServerTLS(certificate), args.ports)


if __name__ == "__main__":
    main()
