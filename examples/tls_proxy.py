"""A TLS-terminating proxy between a load balancer and a backend that speaks plain text.

The balancer sends a PROXY header, which names the client, before the client's TLS. This proxy
terminates TLS, and names the client to the backend in its own PROXY header:

    client -- TLS --> HAProxy -- PROXY header, TLS --> tls_proxy -- PROXY header, plain --> backend

Run it behind HAProxy (`mode tcp`, with `server tls 127.0.0.1:8443 send-proxy-v2`), in front of a
server with `bind(..., trusted_proxies=["127.0.0.1"])`:

    python examples/tls_proxy.py --cert cert.pem --key key.pem --backend 127.0.0.1:8001
"""

from __future__ import annotations

import argparse
import logging
import signal
from dataclasses import dataclass

import trio

import trisock

CONNECT_TIMEOUT = 10  # seconds to connect to the backend
IDLE_TIMEOUT = 300  # seconds without a byte from either side

# Types of TLVs, and a bit of the SSL TLV (the PROXY protocol's specification, section 2.2)
AUTHORITY, SSL, SSL_VERSION, SSL_CIPHER = 0x02, 0x20, 0x21, 0x23
CLIENT_SSL = 1

logger = logging.getLogger("tls_proxy")


def header_for_backend(client: trisock.Socket) -> trisock.ProxyHeader:
    """Return the header that tells the backend who the client is, and how the client uses TLS."""
    received, tls = client.proxy_header, client.tls
    assert received is not None
    assert tls is not None
    if received.source is None:  # the balancer's health check
        return trisock.ProxyHeader(command="LOCAL")
    fields = ((SSL_VERSION, tls.version.encode()), (SSL_CIPHER, tls.cipher.encode()))
    # verify=1: no certificate of the client was verified
    tlvs = [(SSL, trisock.ProxySSL(client=CLIENT_SSL, verify=1, tlvs=fields).to_bytes())]
    if tls.server_hostname is not None:
        tlvs.append((AUTHORITY, tls.server_hostname.encode()))
    return trisock.ProxyHeader(
        source=received.source, destination=received.destination, tlvs=tuple(tlvs)
    )


@dataclass
class TLSProxy:
    """Passes each connection on to the backend."""

    host: str
    port: int

    async def handle(self, client: trisock.Socket) -> None:
        header = header_for_backend(client)
        try:
            with trio.fail_after(CONNECT_TIMEOUT):
                backend = await trisock.connect(self.host, self.port, proxy_header=header)
        except (OSError, trio.BrokenResourceError, trio.TooSlowError) as exc:
            why = str(exc) or f"no answer from the backend within {CONNECT_TIMEOUT} seconds"
            logger.warning("reset the connection with %s: %s", client.getpeer(), why)
            client.abort()
            return
        try:
            await trisock.relay(client, backend, idle_timeout=IDLE_TIMEOUT)
        except trio.BrokenResourceError as exc:
            logger.info("%s", exc)


async def serve(
    host: str, port: int, tls: trisock.ServerTLS, trusted_proxies: list[str], proxy: TLSProxy
) -> None:
    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            server = await trisock.bind(
                nursery,
                port,
                proxy.handle,
                host=host,
                tls=tls,
                max_connections=1000,
                trusted_proxies=trusted_proxies,
                handshake_timeout=10,
            )
            print(f"listening on port {server.port}", flush=True)
            await anext(signals)
        server.stop(grace=5)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8443, help="0 for any free port")
    parser.add_argument("--cert", required=True, metavar="FILE", help="certificate chain (PEM)")
    parser.add_argument("--key", metavar="FILE", help="private key (PEM)")
    parser.add_argument("--backend", required=True, metavar="HOST:PORT")
    parser.add_argument(
        "--trust",
        action="append",
        metavar="NETWORK",
        help="where the balancer connects from (repeat the option for more; default: this machine)",
    )
    args = parser.parse_args()
    backend_host, _, backend_port = args.backend.rpartition(":")
    proxy = TLSProxy(backend_host.strip("[]"), int(backend_port))
    tls = trisock.ServerTLS(trisock.Certificate.from_files(args.cert, args.key))
    trusted = args.trust or ["127.0.0.0/8", "::1"]
    trio.run(serve, args.host, args.port, tls, trusted, proxy)


if __name__ == "__main__":
    main()
