"""OpenSSL's error queue, which belongs to the thread."""

from __future__ import annotations

import contextlib
import ssl
import threading


def clear_error_queue() -> None:
    """Clear OpenSSL's error queue, which all connections of a thread share.

    An earlier call that failed, or that succeeded but left an error behind, makes OpenSSL report
    the next WANT_READ as that error. A handshake clears the queue when it starts, and when it has
    nothing to read.
    """
    with contextlib.suppress(ssl.SSLWantReadError):
        _idle_server.ssl_object.do_handshake()


class _IdleServer(threading.local):
    """An SSLObject that waits for a client forever. One for each thread, like the queue."""

    def __init__(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.ssl_object = context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_side=True)


_idle_server = _IdleServer()
