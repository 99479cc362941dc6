"""The client from Pluto's page on `socket.starttls`: a blocking script without `await`.

The script fetches a page and prints the response. With `--tls`, it uses TLS:

    python examples/pluto_client.py --port 8080
    SSL_CERT_FILE=ca.pem python examples/pluto_client.py --port 8443 --tls
"""

from __future__ import annotations

import argparse
import sys

from trisock.pluto import socket


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument(
        "--tls", action="store_true", help="use TLS and verify the server's certificate"
    )
    args = parser.parse_args()

    s = socket.connect(args.host, args.port)
    if s is None:
        sys.exit("Failed to connect.")
    if args.tls and not s.starttls(args.host):
        sys.exit("Failed to establish secure connection.")
    s.send(f"GET / HTTP/1.1\r\nHost: {args.host}\r\nConnection: close\r\n\r\n")
    while data := s.recv():
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
