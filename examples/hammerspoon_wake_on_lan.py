"""A Wake-on-LAN sender in the style of Hammerspoon: it broadcasts a magic packet with `hs.udp`.

Pass the hardware address of the machine to wake:

    python examples/hammerspoon_wake_on_lan.py 00:11:22:33:44:55
    python examples/hammerspoon_wake_on_lan.py 00-11-22-33-44-55 --host 192.168.1.255 --port 7

Errors are logged to standard error.
"""

from __future__ import annotations

import argparse
import sys

import trio

from trisock import hammerspoon

SECONDS = 2  # how long to wait until the packet is sent


def magic_packet(mac: str) -> bytes:
    """Return six bytes of 0xFF, followed by 16 copies of the address."""
    address = bytes.fromhex(mac.replace(":", "").replace("-", ""))
    if len(address) != 6:
        raise ValueError("a hardware address has 6 bytes")
    return b"\xff" * 6 + address * 16


async def wake(packet: bytes, host: str, port: int) -> bool:
    """Send the packet. Return whether it was sent."""
    async with hammerspoon.open_sockets() as hs:
        sock = hs.udp.new()
        sock.broadcast()
        sent = trio.Event()

        def callback(tag: int) -> None:
            sock.close()
            sent.set()

        sock.send(packet, host, port, callback)
        # The callback is not called for a send that fails, so give up after a while.
        with trio.move_on_after(SECONDS):
            await sent.wait()
        return sent.is_set()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packet", metavar="mac", type=magic_packet)
    parser.add_argument("--host", default="255.255.255.255", help="a broadcast address")
    parser.add_argument("--port", type=int, default=9)
    args = parser.parse_args()
    if not trio.run(wake, args.packet, args.host, args.port):
        sys.exit(1)  # the reason has been logged


if __name__ == "__main__":
    main()
