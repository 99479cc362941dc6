"""HTTP and HTTPS on one port. The client's first byte shows which protocol the client speaks.

Run it with a certificate that it creates, and talk to it over HTTP and HTTPS:

    python examples/http_and_https.py --port 8080 --write-ca ca.pem
    curl http://localhost:8080/
    curl --cacert ca.pem https://localhost:8080/

Or use your own certificate: `--cert chain.pem --key key.pem`.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import trio

import trisock
from trisock.testing import Authority

TIMEOUT = 20  # seconds for the whole connection
MAX_HEAD = 16 * 1024  # bytes in the request line and header

# The first byte of a ClientHello (RFC 8446, section 5.1). No HTTP method begins with it.
TLS_HANDSHAKE = b"\x16"


async def start_tls_if_client_hello(sock: trisock.Socket, tls: trisock.ServerTLS) -> None:
    first = await sock.peek(wait=True)  # the TLS handshake or the HTTP request stays unread
    if first.startswith(TLS_HANDSHAKE):
        await sock.starttls(tls)


async def answer(sock: trisock.Socket) -> None:
    try:
        head = await sock.recv_until(b"\r\n\r\n", max_bytes=MAX_HEAD)
    except trisock.IncompleteReadError:
        return
    except trisock.LimitExceededError:
        head = b""
    if head.split(b"\r\n")[0].endswith((b" HTTP/1.0", b" HTTP/1.1")):
        status, text = (
            "200 OK",
            f"HTTPS with {sock.tls.version}" if sock.tls else "HTTP, unencrypted",
        )
    else:
        status, text = "400 Bad Request", "this is neither HTTP nor HTTPS"
    await sock.send(
        f"HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {len(text) + 1}\r\n"
        f"Connection: close\r\n\r\n{text}\n".encode()
    )


async def handle(tls: trisock.ServerTLS, sock: trisock.Socket) -> None:
    with trio.move_on_after(TIMEOUT):
        await start_tls_if_client_hello(sock, tls)
        await answer(sock)


async def serve(host: str, port: int, tls: trisock.ServerTLS) -> None:
    handler = functools.partial(handle, tls)
    async with trisock.open_service(grace=1, reload=[tls]) as service:
        server = await service.bind(port, handler, host=host, max_connections=500)
        print(f"listening on port {server.port}", flush=True)


def create_test_certificate(ca_file: str | None) -> trisock.Certificate:
    """Create a certificate for localhost. If ``ca_file`` is given, write the CA to this file."""
    try:
        authority = Authority()
    except ImportError:
        sys.exit("no certificate: give --cert and --key, or install trustme to create one")
    if ca_file is not None:
        Path(ca_file).write_bytes(authority.ca)
    return authority.certificate()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080, help="0 for any free port")
    parser.add_argument("--cert", metavar="FILE", help="certificate chain (PEM)")
    parser.add_argument(
        "--key",
        metavar="FILE",
        help="the private key (PEM), if the --cert file does not contain it",
    )
    parser.add_argument(
        "--write-ca", metavar="FILE", help="write the test certificate's CA to this file"
    )
    args = parser.parse_args()
    if args.cert:
        certificate = trisock.Certificate.from_files(args.cert, args.key)
    else:
        certificate = create_test_certificate(args.write_ca)
    trio.run(
        serve, args.host, args.port, trisock.ServerTLS(certificate, alpn_protocols=["http/1.1"])
    )


if __name__ == "__main__":
    main()
