"""A peer that needs no task, because its methods never block.

A script drives the peer. A script is a generator that yields after each step. ``alongside`` runs
the next step whenever all of Trio's tasks are blocked.
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
import ssl
import sys
import termios
from collections.abc import AsyncIterator, Iterator

import trio
import trio.testing

Script = Iterator[None]


@contextlib.asynccontextmanager
async def alongside(script: Script) -> AsyncIterator[None]:
    """Run a script's first step now, and each later step when all tasks are blocked."""
    next(script, None)

    async def run_steps() -> None:
        while True:
            await trio.testing.wait_all_tasks_blocked()
            try:
                next(script)
            except StopIteration:
                return

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_steps)
        yield
        nursery.cancel_scope.cancel()


class Peer:
    """A peer on a raw socket. It can upgrade to TLS, and return to plain text.

    Attributes:
      wire: all received bytes.
      heard: all received data, decrypted.
      gone: whether the connection has ended, cleanly or not.
      finished: whether the connection has ended cleanly: with FIN, or with TLS's ``close_notify``.
      secured: whether the TLS handshake is complete and TLS is in use.
      greeting: data that the peer sends together with its last handshake message.
    """

    def __init__(self, raw: socket.socket) -> None:
        raw.setblocking(False)
        self.raw = raw
        self.wire = bytearray()
        self.heard = bytearray()
        self.gone = self.finished = self.secured = False
        self.greeting = b""
        self._ssl: ssl.SSLObject | None = None
        self._deaf = False  # set when TLS fails, to ignore all further data
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.raw.close()

    def start_tls(
        self,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        server_hostname: str | None = None,
        after: int | None = None,
    ) -> None:
        """Start TLS. If ``after`` is given, TLS starts with the received ``heard[after:]``."""
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._ssl = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=server_side,
            server_hostname=server_hostname,
        )
        if after is not None:
            self._incoming.write(self.heard[after:])
            del self.heard[after:]

    def act(self) -> None:
        """Read all data that has arrived, and send the responses that TLS requires."""
        try:
            while chunk := self.raw.recv(65536):
                self.wire += chunk
                if self._ssl is not None:
                    self._incoming.write(chunk)
                elif not self._deaf:
                    self.heard += chunk
            self.gone = True
            self.finished |= self._ssl is None and not self._deaf
        except BlockingIOError:
            pass
        except ConnectionError:
            self.gone = True
        if self._ssl is not None:
            self._advance_tls(self._ssl)

    def _advance_tls(self, ssl_object: ssl.SSLObject) -> None:
        try:
            if not self.secured:
                ssl_object.do_handshake()
                self.secured = True
                if self.greeting:
                    ssl_object.write(self.greeting)
            while data := ssl_object.read(65536):
                self.heard += data
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self._answer_close_notify(ssl_object)
        except ssl.SSLError:  # for example, after an alert or a bad record
            self._ssl, self._deaf = None, True
        else:  # read() returned b"", which means close_notify
            self._answer_close_notify(ssl_object)
        self._flush()

    def _answer_close_notify(self, ssl_object: ssl.SSLObject) -> None:
        with contextlib.suppress(ssl.SSLError):
            ssl_object.unwrap()
        self.finished, self.secured, self._ssl = True, False, None
        self.heard += self._incoming.read()

    def encrypt(self, data: bytes) -> bytes:
        """Return data as it goes on the wire: encrypted if TLS is in use."""
        if self._ssl is None:
            return data
        self._ssl.write(data)
        return self._outgoing.read()

    def send(self, data: bytes) -> None:
        """Send as many of the bytes as fit, unchanged."""
        with contextlib.suppress(OSError):
            self.raw.send(data)

    def say(self, data: bytes) -> None:
        """Send data, encrypted if TLS is in use."""
        self.send(self.encrypt(data))

    def end(self) -> None:
        """End the peer's side with ``close_notify`` if TLS is in use, otherwise with FIN."""
        if self._ssl is None:
            with contextlib.suppress(OSError):
                self.raw.shutdown(socket.SHUT_WR)
        else:
            self.send(self.close_notify())

    def close_notify(self) -> bytes:
        """Return a ``close_notify`` to send."""
        assert self._ssl is not None
        with contextlib.suppress(ssl.SSLError):
            self._ssl.unwrap()
        return self._outgoing.read()

    def _flush(self) -> None:
        if self._outgoing.pending:
            self.send(self._outgoing.read())

    def arrived(self) -> int:
        """Return how many bytes have arrived, whether read or unread."""
        waiting = fcntl.ioctl(self.raw.fileno(), termios.FIONREAD, bytes(4))
        return len(self.wire) + int.from_bytes(waiting, sys.byteorder)

    def acting(self) -> Script:
        """Return a script that never ends, and calls ``act`` at each step."""
        while True:
            self.act()
            yield
