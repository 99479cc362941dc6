"""An HTTP/1.1 client: h11 over a `Socket`, with keep-alive. Needs `pip install h11`.

h11 parses and writes HTTP and does no I/O. This file shows the loop between h11 and a socket.

Start the HTTPS server, and fetch three pages over one connection:

    python examples/https_server.py --port 8443 --write-ca ca.pem
    python examples/h11_client.py --ca ca.pem https://localhost:8443/one /two /three
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from urllib.parse import urlsplit

import h11
import trio

import trisock

TIMEOUT = 30  # seconds for one request and its response
MAX_BODY = 16 * 1024 * 1024  # bytes


class HTTPConnection:
    """HTTP/1.1 requests, one after the other, over one socket.

    Args:
      sock: a new connection to the server.
      host: the value of the header field Host.
    """

    def __init__(self, sock: trisock.Socket, host: str) -> None:
        self._sock = sock
        self._host = host
        self._http = h11.Connection(h11.CLIENT)

    @property
    def reusable(self) -> bool:
        """Whether the connection is ready for a request."""
        # No request is in progress, and h11 has received no extra bytes and no EOF.
        return self._http.our_state is h11.IDLE and self._http.trailing_data == (b"", False)

    async def get(self, target: str) -> tuple[h11.Response, bytes]:
        """Send a GET request, and return the response and its body.

        After any exception, including a cancellation, close the socket.

        Raises:
          h11.RemoteProtocolError: the server violates the protocol, or the response is cut short.
          EOFError: the server closed the connection before its response. Servers close idle
            connections. So if this was not the connection's first request, repeat the request over
            a new connection.
          ValueError: the body is larger than ``MAX_BODY``.
          trio.BrokenResourceError: the connection is broken.
        """
        request = h11.Request(method="GET", target=target, headers=[("Host", self._host)])
        await self._send(request, h11.EndOfMessage())
        while not isinstance(event := await self._next_event(), h11.Response):
            pass  # an InformationalResponse (1xx): the final response follows
        response = event
        body = bytearray()
        while isinstance(event := await self._next_event(), h11.Data):
            body += event.data
            if len(body) > MAX_BODY:
                raise ValueError(f"the body has more than {MAX_BODY} bytes")
        # The event is EndOfMessage.
        if self._http.our_state is self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
        return response, bytes(body)

    async def _send(self, *events: h11.Event) -> None:
        await self._sock.send(*[self._http.send(event) or b"" for event in events])

    async def _next_event(self) -> object:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            chunk = await self._sock.recv()
            if not chunk and self._http.their_state is h11.SEND_RESPONSE:
                raise EOFError("the server closed the connection before its response")
            self._http.receive_data(chunk)  # after b"", h11 knows whether the body is complete
        return event


async def fetch(url: str, more: list[str], ca: bytes | None) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        sys.exit(f"not an HTTP URL: {url}")
    host = parts.hostname
    tls = None
    if parts.scheme == "https":
        tls = trisock.ClientTLS(host, ca=ca, alpn_protocols=["http/1.1"])
    port = parts.port or (443 if tls else 80)
    targets = [parts._replace(scheme="", netloc="", path=parts.path or "/", fragment="").geturl()]
    targets += more
    while targets:
        async with await trisock.connect(host, port, tls=tls) as sock:
            connection = HTTPConnection(sock, parts.netloc.rpartition("@")[2])
            while targets and connection.reusable:
                with trio.fail_after(TIMEOUT):
                    response, body = await connection.get(targets.pop(0))
                print(response.status_code, response.reason.decode("latin-1"), flush=True)
                sys.stdout.buffer.write(body)
                sys.stdout.buffer.flush()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ca", metavar="FILE", help="trust this CA certificate (PEM)")
    parser.add_argument("url")
    parser.add_argument("more", nargs="*", metavar="/path", help="more pages of the same server")
    args = parser.parse_args()
    ca = Path(args.ca).read_bytes() if args.ca else None
    try:
        trio.run(fetch, args.url, args.more, ca)
    except trio.TooSlowError:
        sys.exit(f"no response within {TIMEOUT} seconds")
    except (OSError, EOFError, ValueError, trio.BrokenResourceError, h11.ProtocolError) as exc:
        sys.exit(str(exc))


if __name__ == "__main__":
    main()
