"""Clearing OpenSSL's error queue. Each thread has its own queue."""

from __future__ import annotations

import contextlib
import ssl
import threading


def clear_error_queue() -> None:
    """Clear OpenSSL's error queue, which all connections of a thread share.

    An OpenSSL call may leave an error in the queue even if the call succeeds. Python does not clear
    the queue then (https://github.com/python/cpython/issues/81891). So Python reports the next
    WANT_READ as this error. OpenSSL clears the queue when a handshake starts, and when there is
    nothing to read. So we do a handshake that never has anything to read.
    """
    with contextlib.suppress(ssl.SSLWantReadError):
        _idle_server.ssl_object.do_handshake()


class _IdleServer(threading.local):
    """An SSLObject that waits for a client forever. Each thread has one, to clear its own queue."""

    def __init__(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.ssl_object = context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_side=True)


_idle_server = _IdleServer()
