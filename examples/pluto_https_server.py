"""The TLS server from Pluto's page on `socket.starttls`, with a certificate that it creates.

Run it, and talk to it:

    python examples/pluto_https_server.py --port 8443 --write-ca ca.pem
    curl --cacert ca.pem https://localhost:8443/
"""

from __future__ import annotations

import argparse
import signal
import sys

import trio

from trisock.pluto import async_socket, scheduler, socket


def create_test_certificate(ca_file: str | None) -> dict[str, bytes]:
    """Create a certificate for localhost. If ``ca_file`` is given, write the CA to this file."""
    try:
        import trustme
    except ImportError:
        sys.exit("no certificate: install trustme to create one")
    ca = trustme.CA()
    if ca_file is not None:
        ca.cert_pem.write_to_path(ca_file)
    issued = ca.issue_cert("localhost", "127.0.0.1", "::1")
    chain = b"".join(pem.bytes() for pem in issued.cert_chain_pems)
    return {"chain": chain, "private_key": issued.private_key_pem.bytes()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8443, help="0 for any free port")
    parser.add_argument(
        "--write-ca", metavar="FILE", help="write the test certificate's CA to this file"
    )
    args = parser.parse_args()

    certs = [create_test_certificate(args.write_ca)]

    async def hello(s: async_socket) -> None:
        if await s.starttls(certs):
            content = "Hello, world!"
            await s.send(
                "HTTP/1.1 200 OK\r\nConnection: Close\r\n"
                f"Content-Length: {len(content)}\r\n\r\n" + content
            )

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
