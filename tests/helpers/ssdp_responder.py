"""Run a command, and answer its first multicast search.

Run this file in a network namespace whose loopback interface has a route for multicast::

    python tests/helpers/ssdp_responder.py python examples/hammerspoon_ssdp.py
"""

from __future__ import annotations

import socket
import subprocess
import sys

GROUP, PORT = "239.255.255.250", 1900


def main() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("", PORT))
        membership = socket.inet_aton(GROUP) + socket.inet_aton("127.0.0.1")
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
        with subprocess.Popen(sys.argv[1:]) as command:
            sock.settimeout(30)
            search, address = sock.recvfrom(2000)
            if search.startswith(b"M-SEARCH * HTTP/1.1\r\n"):
                sock.sendto(b"HTTP/1.1 200 OK\r\nLOCATION: http://device/\r\n\r\n", address)
        sys.exit(command.returncode)


if __name__ == "__main__":
    main()
