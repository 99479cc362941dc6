"""The HTTP client from Hammerspoon's page "hs.socket", with the tags of that page.

Pass a host. Also pass a port, unless it is 80:

    python examples/hammerspoon_http_client.py example.org
    python examples/hammerspoon_http_client.py 127.0.0.1 8080

Connection errors are logged to standard error.
"""

from __future__ import annotations

import argparse
import re

import trio

from trisock import hammerspoon

TAG_HTTP_HEADER, TAG_HTTP_CONTENT = 1, 2


async def get(host: str, port: int) -> None:
    def http_callback(data: bytes, tag: int) -> None:
        if tag == TAG_HTTP_HEADER:
            print(tag, "TAG_HTTP_HEADER")
            print(data.decode("latin-1"))
            content_length = re.search(rb"\r\nContent-Length: (\d+)\r\n", data, re.IGNORECASE)
            if content_length:
                client.read(int(content_length[1]), TAG_HTTP_CONTENT)
            else:
                client.disconnect()
        elif tag == TAG_HTTP_CONTENT:
            print(tag, "TAG_HTTP_CONTENT")
            print(data.decode("utf-8", "replace"))
            client.disconnect()

    async with hammerspoon.open_sockets() as hs:
        client = hs.new(http_callback)
        client.connect(host, port)
        client.write(f"GET /index.html HTTP/1.0\r\nHost: {host}\r\n\r\n")
        client.read("\r\n\r\n", TAG_HTTP_HEADER)
        # There is no callback for a disconnect, so poll. (A Hammerspoon script would use hs.timer.)
        while not client.info()["isDisconnected"]:  # noqa: ASYNC110
            await trio.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("host")
    parser.add_argument("port", nargs="?", type=int, default=80)
    args = parser.parse_args()
    trio.run(get, args.host, args.port)


if __name__ == "__main__":
    main()
