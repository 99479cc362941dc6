"""Blocking calls that must end a connection, or change it, even if an interrupt comes first."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import trisock


class Announced:
    """What is known about the ``starttls``, or the ``close``, of a socket outside Trio.

    Invariant: ``announced`` from the call until its work has ended. If another call finds it set
    and nothing at work, an interrupt came before the work began. The program may not know, and must
    not go on with an open connection, or in plain text: the socket has to be aborted.
    """

    def __init__(self, sock: trisock.Socket) -> None:
        self._sock = sock
        self.announced = self._at_work = False

    def check(self) -> bool:
        """Abort the socket if the call was made and its work has not begun; False then."""
        if self.announced and not self._at_work:
            self._sock.abort()
            return False
        return True

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """Do the work of the call in this block."""
        self._at_work = True
        try:
            yield
        finally:
            self.announced = self._at_work = False
