"""Hammerspoon's ``hs.socket``: calls that return at once, queues, callbacks and tags.

For callback code, and ports of Hammerspoon programs::

    from trisock import hammerspoon

    async with hammerspoon.open_sockets() as hs:
        client = hs.new(print).connect("localhost", 8080)
        client.write("GET / HTTP/1.0\\r\\n\\r\\n")
        client.read("\\r\\n\\r\\n")
        await trio.sleep(1)

Reads and writes queue, and are done in order in the background, as is ``startTLS``, which waits for
those before it; the callbacks of one object come in order, too. A callback is a plain or an async
function; one that raises is logged and harms nothing else. Leaving ``open_sockets`` ends it all.

Data is ``bytes``; ``str`` is taken as UTF-8 where it goes out. What hs.socket logs is on the logger
``trisock.hammerspoon``. Source: Hammerspoon's documentation, page "hs.socket"; ``docs/dialects.md``
has what differs.
"""

from .socket import Callback, Info, ParsedAddress, Socket, Sockets, open_sockets

__all__ = ["Callback", "Info", "ParsedAddress", "Socket", "Sockets", "open_sockets"]
