"""An SSDP discovery in the style of Hammerspoon: it prints the UPnP devices of the network.

It asks all devices by multicast. For each device that answers, it prints the address and location:

    python examples/hammerspoon_ssdp.py
    python examples/hammerspoon_ssdp.py --target upnp:rootdevice --seconds 5

To ask only one device, pass its address as `--host`.
"""

from __future__ import annotations

import argparse
import re

import trio

from trisock import hammerspoon

GROUP, PORT = "239.255.255.250", 1900


def search(target: str, seconds: int) -> str:
    """Return the search message (UPnP Device Architecture, section 1.3.2)."""
    return (
        "M-SEARCH * HTTP/1.1\r\n"
        f"HOST: {GROUP}:{PORT}\r\n"
        'MAN: "ssdp:discover"\r\n'
        f"MX: {min(5, max(1, seconds - 1))}\r\n"  # a device may take this many seconds to answer
        f"ST: {target}\r\n"
        "\r\n"
    )


async def discover(target: str, seconds: int, host: str, port: int) -> None:
    async with hammerspoon.open_sockets() as hs:
        found = set()

        def callback(data: bytes, sockaddr: bytes) -> None:
            # Anyone can answer, so accept only visible characters.
            location = re.search(rb"(?im)^location:[ \t]*([!-~]+)", data)
            device = hs.parseAddress(sockaddr)
            if not data.startswith(b"HTTP/1.1 200 ") or not location or not device:
                return
            line = f"{device['host']} {location[1].decode()}"
            if line not in found:  # a device may answer several times
                found.add(line)
                print(line, flush=True)

        sock = hs.udp.new(callback)
        sock.send(search(target, seconds), host, port).receive()
        await trio.sleep(seconds)  # a Hammerspoon script would use hs.timer.doAfter
        sock.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="ssdp:all", help="what to search for")
    parser.add_argument("--seconds", type=int, default=3, help="how long to wait for answers")
    parser.add_argument("--host", default=GROUP)
    parser.add_argument("--port", type=int, default=PORT)
    args = parser.parse_args()
    trio.run(discover, args.target, args.seconds, args.host, args.port)


if __name__ == "__main__":
    main()
