"""OpenSSL's error queue, which belongs to the thread."""

from __future__ import annotations

import contextlib
import ssl
import threading


def clear_error_queue() -> None:
    """Clear OpenSSL's error queue, which all connections of a thread share.

    Whatever failed before, or succeeded and left an error behind, makes OpenSSL report the next
    WANT_READ as that error. A handshake clears the queue, both when it starts and when it has
    nothing to read.
    """
    with contextlib.suppress(ssl.SSLWantReadError):
        _spare.ssl_object.do_handshake()


class _Spare(threading.local):
    """An SSLObject that waits for a client for good; one for each thread, like the queue."""

    def __init__(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.ssl_object = context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_side=True)


_spare = _Spare()
