"""The stream that ``trio.SSLStream`` uses as its transport."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

import trio

from .._tls.engine import TLSEngine
from .transport import Transport


class EndOfTransport(Exception):
    """The connection has reached EOF in the middle of a TLS handshake or shutdown."""


class CiphertextStream(trio.abc.Stream):
    """The transport of ``SSLStream``.

    A call is a checkpoint only if it has to wait. That is enough, because ``SSLStream`` acquires a
    lock before each call, and acquiring a lock is a checkpoint. EOF raises ``EndOfTransport``, to
    distinguish the end of the connection from the end of the encrypted stream.

    Args:
      transport: the connection.
      engine: the TLS engine, which holds the ciphertext that has arrived.
      send: the function that sends ciphertext.
    """

    def __init__(
        self, transport: Transport, engine: TLSEngine, send: Callable[[bytes], Awaitable[None]]
    ) -> None:
        self._transport = transport
        self._engine = engine
        self._send = send

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return whole records, or part of one record. If cancelled, it consumes nothing."""
        incoming = self._engine.incoming
        if not incoming.pending:
            self._engine.check()
            try:
                data = self._transport.receive_nowait()
            except BlockingIOError:
                data = await self._transport.wait_and_receive()
            self._received(data)
        return bytes(incoming.take_many()[0])

    def _received(self, data: bytes) -> None:
        if not data:
            raise EndOfTransport
        self._engine.incoming.write(data)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        # TLSStream reports a failed send when SSLStream has finished. Until then, SSLStream can
        # still read earlier data from the peer, such as an alert.
        with contextlib.suppress(trio.BrokenResourceError):
            await self._send(bytes(data))
        # If the handshake needs the peer's answer next, receive the answer here. Otherwise
        # SSLStream would call OpenSSL before any data has arrived, and then acquire another lock,
        # which is a checkpoint (benchmark row tls-handshakes).
        engine = self._engine
        if engine.awaits_peer and not engine.incoming.pending:
            engine.check()
            self._received(await self._transport.wait_and_receive())

    async def wait_send_all_might_not_block(self) -> None:
        """Do nothing: the Socket waits on the Transport directly."""

    async def aclose(self) -> None:
        """Do nothing: the Connection closes the Transport."""
