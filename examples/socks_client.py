"""A connection through a SOCKS proxy, with TLS from end to end. Needs `pip install python-socks`.

`python-socks` talks to the proxy, and the `Socket` adopts the connection. The proxy carries
only encrypted data, and TLS verifies the server behind the proxy.

Fetch a page over HTTPS through a proxy (`ssh -D 1080 HOST` and Tor are SOCKS proxies):

    python examples/socks_client.py --proxy socks5://127.0.0.1:1080 https://example.org/

In your program, call `connect_through_proxy`. For STARTTLS, omit `tls`, and call
`trisock.starttls.upgrade(sock, "imap", host)`. Do not use an HTTP proxy (`http://...`) if the
server speaks first: python-socks drops data that arrives together with the HTTP proxy's answer.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from urllib.parse import urlsplit

import python_socks
import trio
from python_socks.async_.trio import Proxy

import trisock

TIMEOUT = 30  # seconds for the whole exchange


async def connect_through_proxy(
    proxy_url: str, host: str, port: int, *, tls: trisock.TLSArgument | None = None
) -> trisock.Socket:
    """Connect to a server through a proxy.

    Args:
      proxy_url: ``socks5://user:password@host:port``, or ``socks4://host:port``.
      host: the server's name or address. The proxy resolves the name, so no DNS query leaves this
        machine (and ``getpeer()`` of the socket is the proxy's address).
      port: the server's port.
      tls: the TLS role, as in ``Socket.starttls``: usually ``host``. ``None`` means plain text.

    Raises:
      python_socks.ProxyError: the proxy refuses the request, or cannot reach the server.
      OSError: the connection to the proxy fails or breaks.
      trisock.TLSError: the TLS handshake failed.
    """
    proxy = Proxy.from_url(proxy_url, rdns=True)
    connection = await proxy.connect(host, port)
    try:
        sock = trisock.Socket(trio.SocketStream(connection))
    except OSError:  # the proxy has already reset the connection
        connection.close()
        raise
    if tls is not None:
        await sock.starttls(tls)  # on failure or cancellation, this closes the socket
    return sock


async def fetch(proxy_url: str, url: str, ca: bytes | None) -> None:
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname:
        sys.exit(f"not an https URL: {url}")
    host, port = parts.hostname, parts.port or 443
    target = parts._replace(scheme="", netloc="", path=parts.path or "/", fragment="").geturl()
    tls = trisock.ClientTLS(host, ca=ca, alpn_protocols=["http/1.1"])
    with trio.fail_after(TIMEOUT):
        async with await connect_through_proxy(proxy_url, host, port, tls=tls) as sock:
            await sock.send(f"GET {target} HTTP/1.0\r\nHost: {host}:{port}\r\n\r\n".encode())
            async for chunk in sock:
                sys.stdout.buffer.write(chunk)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--proxy", default="socks5://127.0.0.1:1080", help="the proxy's URL")
    parser.add_argument("--ca", metavar="FILE", help="trust this CA certificate (PEM)")
    parser.add_argument("url", help="an https URL")
    args = parser.parse_args()
    ca = Path(args.ca).read_bytes() if args.ca else None
    try:
        trio.run(fetch, args.proxy, args.url, ca)
    except trio.TooSlowError:
        sys.exit(f"no answer within {TIMEOUT} seconds")
    except (OSError, python_socks.ProxyError, trio.BrokenResourceError) as exc:
        sys.exit(str(exc))


if __name__ == "__main__":
    main()
