"""Hammerspoon's ``hs.socket``: calls that do not wait, queues, callbacks and tags.

Use it for code with callbacks, and to port Hammerspoon programs::

    from trisock import hammerspoon

    async with hammerspoon.open_sockets() as hs:
        client = hs.new(print).connect("localhost", 8080)
        client.write("GET / HTTP/1.0\\r\\n\\r\\n")
        client.read("\\r\\n\\r\\n")
        await trio.sleep(1)

Reads and writes are queued, and run in order in the background. ``startTLS`` waits for the reads
and writes queued before it. The callbacks of one object also run in order. A callback is a plain or
an async function. If a callback raises an exception, the exception is logged and affects nothing
else. Leaving the ``open_sockets`` block closes all sockets and ends all background work.

``hs.udp`` is Hammerspoon's ``hs.socket.udp``, for datagrams::

        hs.udp.server(9001, print).receive()
        hs.udp.new().send("hello", "localhost", 9001)

Received data is ``bytes``. ``str`` is encoded as UTF-8 when sent. hs.socket's log messages go to
the logger ``trisock.hammerspoon``. Source: Hammerspoon's documentation, pages "hs.socket" and
"hs.socket.udp". ``docs/hammerspoon.md`` lists the differences.
"""

from .socket import Callback, Info, ParsedAddress, Socket, Sockets, open_sockets
from .udp.info import UDPInfo
from .udp.socket import UDPSocket, UDPSockets

__all__ = [
    "Callback",
    "Info",
    "ParsedAddress",
    "Socket",
    "Sockets",
    "UDPInfo",
    "UDPSocket",
    "UDPSockets",
    "open_sockets",
]
