"""Pluto's ``socket`` library: the same names, the same results.

For scripts, the REPL, and ports of Pluto programs::

    from trisock.pluto import scheduler, socket

    s = socket.connect("localhost", 8080)
    s.send("GET / HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
    print(s.recv())

What Pluto does in a coroutine, where calls yield, is done here in a Trio task, where they are
awaited: ``await s.recv()``. Outside of one its calls block, and so they do here outside Trio, where
one background thread does the work for the whole process. A socket stays on the side it was made
on: to use it on the other is a ``RuntimeError``.

Failures are Pluto's too: ``None`` and ``False`` in place of exceptions. The reasons are on the
logger ``trisock.pluto``, at the level INFO. Mistakes in the program (``TypeError``, two tasks
reading at once, a certificate that is none) are exceptions all the same. Data is ``bytes``; where
it goes out, ``str`` is taken as UTF-8.

For type checkers ``socket`` is what a script sees, whose calls give results, and ``async_socket``
what a Trio task sees, whose calls are awaited.

Source: Pluto's documentation, page "Socket". ``docs/dialects.md`` has what differs.
"""

from .scheduler import scheduler
from .socket import async_socket, listener, socket

__all__ = ["async_socket", "listener", "scheduler", "socket"]
