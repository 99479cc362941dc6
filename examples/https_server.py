"""A small HTTPS server: HTTP/1.1 with keep-alive, and limits on all sizes and times.

Run it with a certificate that it creates, and talk to it:

    python examples/https_server.py --port 8443 --write-ca ca.pem
    curl --cacert ca.pem https://localhost:8443/some/path
    curl --cacert ca.pem https://localhost:8443/ --data "comes back"
    openssl s_client -crlf -CAfile ca.pem -connect localhost:8443

Or use your own certificate: `--cert chain.pem --key key.pem`.

How TLS ends: on a connection of `bind(tls=...)`, each side ends TLS with close_notify, so that an
attacker cannot truncate the data unnoticed. But an HTTP message states its own length, so some
clients close the connection without close_notify. Then the server's read raises `TLSError`, which
is a `trio.BrokenResourceError`, and the server counts a peer error. This is harmless. For a server
that neither expects nor sends close_notify, pass `https_compatible=True` to `bind`.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from pathlib import Path

import trio

import trisock
from trisock.testing import Authority

MAX_HEAD = 16 * 1024  # bytes in the request line and header
MAX_BODY = 1024 * 1024  # bytes
IDLE_TIMEOUT = 60  # seconds between two requests
EXCHANGE_TIMEOUT = 60  # seconds from the first byte of a request to the last byte of its response

# Tell clients to use only HTTPS for a year, and not to guess the content type. A client ignores the
# first field if it does not trust the certificate (RFC 6797).
SECURITY_FIELDS = (
    "Strict-Transport-Security: max-age=31536000\r\nX-Content-Type-Options: nosniff\r\n"
)

# RFC 9110, section 5.6.2, and RFC 9112, sections 3 and 5. The patterns are strict: if a proxy
# parses a request differently, an attacker can smuggle a second request past the proxy.
TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rf"({TOKEN}) ([!-~]+) HTTP/1\.([01])")
FIELD = re.compile(rf"({TOKEN}):([\t -~\x80-\xff]*)")
ONLY_ONCE = {"content-length", "host"}


# ---- the application: replace this with your own ----


def respond(request: Request) -> tuple[HTTPStatus, bytes]:
    if request.method in ("GET", "HEAD"):
        return HTTPStatus.OK, f"Hello! You asked for {request.target}\n".encode()
    if request.method == "POST":
        return HTTPStatus.OK, request.body
    return HTTPStatus.NOT_IMPLEMENTED, b"GET, HEAD and POST only\n"


# ---- HTTP/1.1 without I/O ----


class HTTPError(Exception):
    """A bad request. The server responds with ``status`` and closes the connection."""

    def __init__(self, status: HTTPStatus) -> None:
        super().__init__(status.phrase)
        self.status = status


@dataclass
class Request:
    method: str
    target: str
    keep_alive: bool
    fields: dict[str, str]
    body: bytes = b""

    @property
    def content_length(self) -> int:
        if "transfer-encoding" in self.fields:
            raise HTTPError(HTTPStatus.NOT_IMPLEMENTED)
        value = self.fields.get("content-length", "0")
        if not re.fullmatch("[0-9]{1,18}", value):
            raise HTTPError(HTTPStatus.BAD_REQUEST)
        if int(value) > MAX_BODY:
            raise HTTPError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        return int(value)


def parse_head(head: bytes) -> Request:
    # Ignore an empty line before the request (RFC 9112, section 2.2).
    first, *rest = (
        head.decode("latin-1").removeprefix("\r\n").removesuffix("\r\n\r\n").split("\r\n")
    )
    request_line = REQUEST_LINE.fullmatch(first)
    if request_line is None:
        raise HTTPError(HTTPStatus.BAD_REQUEST)
    fields: dict[str, str] = {}
    for line in rest:
        field = FIELD.fullmatch(line)
        if field is None:
            raise HTTPError(HTTPStatus.BAD_REQUEST)
        name, value = field[1].lower(), field[2].strip(" \t")
        if name in fields:
            if name in ONLY_ONCE:
                raise HTTPError(HTTPStatus.BAD_REQUEST)
            value = f"{fields[name]}, {value}"
        fields[name] = value
    method, target, minor_version = request_line.groups()
    if minor_version == "1" and "host" not in fields:
        raise HTTPError(HTTPStatus.BAD_REQUEST)
    options = {option.strip().lower() for option in fields.get("connection", "").split(",")}
    return Request(method, target, minor_version == "1" and "close" not in options, fields)


# ---- the connection ----


async def read_request(sock: trisock.Socket) -> Request:
    try:
        head = await sock.recv_until(b"\r\n\r\n", max_bytes=MAX_HEAD)
    except trisock.LimitExceededError:
        raise HTTPError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE) from None
    request = parse_head(head)
    length = request.content_length
    if length and request.fields.get("expect", "").lower() == "100-continue":
        await sock.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.body = await sock.recv_exactly(length)
    return request


async def send_response(
    sock: trisock.Socket, status: HTTPStatus, body: bytes, *, keep_alive: bool, head_only: bool
) -> None:
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\n"
        f"Date: {formatdate(usegmt=True)}\r\n"
        "Content-Type: text/plain; charset=utf-8\r\n"
        f"Content-Length: {len(body)}\r\n"
        f"Connection: {'keep-alive' if keep_alive else 'close'}\r\n"
        f"{SECURITY_FIELDS}"
        "\r\n"
    )
    await sock.send(head.encode(), b"" if head_only else body)


def is_stopping(sock: trisock.Socket) -> bool:
    return sock.server is not None and sock.server.closing.is_set()


async def exchange(sock: trisock.Socket) -> bool:
    """Respond to one request. Return whether another request may follow."""
    try:
        request = await read_request(sock)
        status, body = respond(request)
        keep_alive = request.keep_alive and not is_stopping(sock)
        head_only = request.method == "HEAD"
    except HTTPError as exc:
        status, body = exc.status, f"{exc}\n".encode()
        keep_alive = head_only = False
    except trisock.IncompleteReadError:
        return False
    await send_response(sock, status, body, keep_alive=keep_alive, head_only=head_only)
    return keep_alive


async def request_begins(sock: trisock.Socket) -> bool:
    """Wait for a request. Return False at EOF, or after IDLE_TIMEOUT."""
    try:
        with sock.idle(IDLE_TIMEOUT):  # this wait ends if the server stops
            return bool(await sock.peek(wait=True))
    except trisock.IdleTimeoutError:
        return False


async def converse(sock: trisock.Socket) -> None:
    """Respond to the requests of one connection, one after the other."""
    keep_alive = True
    while keep_alive and await request_begins(sock):
        keep_alive = False
        with trio.move_on_after(EXCHANGE_TIMEOUT):
            keep_alive = await exchange(sock)


async def serve(host: str, port: int, tls: trisock.ServerTLS) -> None:
    async with trisock.open_service(grace=10) as service:
        server = await service.bind(port, converse, host=host, tls=tls, max_connections=500)
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
    parser.add_argument("--port", type=int, default=8443, help="0 for any free port")
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
    tls = trisock.ServerTLS(certificate, alpn_protocols=["http/1.1"])
    trio.run(serve, args.host, args.port, tls)


if __name__ == "__main__":
    main()
