"""Pluto's ``socket`` library: the same names and the same results.

Use it in scripts and the REPL, and to port Pluto programs::

    from trisock.pluto import scheduler, socket

    s = socket.connect("localhost", 8080)
    s.send("GET / HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
    print(s.recv())

In Pluto, calls yield inside a coroutine and block outside. Here, calls are awaited inside a Trio
task (``await s.recv()``) and block outside Trio. One background thread runs all blocking calls of
the process. A socket that was made inside Trio works only inside Trio, and a socket that was made
outside works only outside. In the wrong place, its calls raise ``RuntimeError``.

As in Pluto, a call that fails returns ``None`` or ``False``, and raises no exception. The reason is
logged on the logger ``trisock.pluto`` at INFO. Programming errors (``TypeError``, two tasks reading
at once, an invalid certificate) still raise exceptions. Received data is ``bytes``. ``str`` is
encoded as UTF-8 when sent.

For type checkers, ``socket`` has blocking calls and ``async_socket`` has calls that are awaited.

Source: Pluto's documentation, pages "Socket" and "Scheduler". ``docs/pluto.md`` lists the
differences.
"""

from .scheduler import coroutine, scheduler
from .server import server
from .socket import async_socket, listener, socket

__all__ = ["async_socket", "coroutine", "listener", "scheduler", "server", "socket"]
