"""A Wake-on-LAN sender in the style of Pluto's UDP sockets: it wakes a sleeping machine.

The network card of the machine waits for six bytes of `ff`, followed by 16 copies of its own MAC
address:

    python examples/pluto_wake_on_lan.py 00:11:22:33:44:55
    python examples/pluto_wake_on_lan.py 00:11:22:33:44:55 --host 192.168.1.255
"""

from __future__ import annotations

import argparse
import re
import sys

from trisock.pluto import socket


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mac", help="the machine's MAC address, such as 00:11:22:33:44:55")
    parser.add_argument("--host", default="255.255.255.255", help="the broadcast address")
    parser.add_argument("--port", type=int, default=9)
    args = parser.parse_args()

    if not re.fullmatch("([0-9A-Fa-f]{2}[:-]?){5}[0-9A-Fa-f]{2}", args.mac):
        sys.exit("This is not a MAC address.")
    mac = bytes.fromhex(re.sub("[:-]", "", args.mac))

    s = socket.connect(args.host, args.port, "udp")
    if s is None:
        sys.exit("Failed to connect.")
    if not s.send(b"\xff" * 6 + mac * 16):
        sys.exit("Failed to send the packet.")
    s.close()


if __name__ == "__main__":
    main()
