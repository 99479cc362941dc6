"""A blocking ``starttls`` that an interrupt ends before its work must not leave plain text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import trisock


class Upgrade:
    """What is known about the ``starttls`` of a socket outside Trio.

    Invariant: ``announced`` from the call of ``starttls`` until that has ended. If another call
    finds it set and no ``starttls`` at work, an interrupt came before the work began. The program
    may not know, and must not go on in plain text: the socket has to be closed.
    """

    def __init__(self, sock: trisock.Socket) -> None:
        self._sock = sock
        self.announced = self._at_work = False

    def check(self) -> bool:
        """Abort the socket if a ``starttls`` was called and has not begun; False then."""
        if self.announced and not self._at_work:
            self._sock.abort()
            return False
        return True

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """Do the work of ``starttls`` in this block."""
        self._at_work = True
        try:
            yield
        finally:
            self.announced = self._at_work = False
