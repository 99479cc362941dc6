"""Binary addresses, in the layouts of Linux and BSD."""

from __future__ import annotations

import socket
import sys

IPV4 = bytes([192, 0, 2, 1])
IPV6 = socket.inet_pton(socket.AF_INET6, "2001:db8::1")
PORT = (8080).to_bytes(2, "big")


def native(family: int) -> bytes:
    return family.to_bytes(2, sys.byteorder)


LINUX4 = native(2) + PORT + IPV4 + bytes(8)
LINUX6 = native(10) + PORT + bytes(4) + IPV6 + bytes(4)
BSD4 = bytes([16, 2]) + PORT + IPV4 + bytes(8)
BSD6 = bytes([28, 30]) + PORT + bytes(4) + IPV6 + bytes(4)
