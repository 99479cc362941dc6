"""SSLStreamRunner: runs the handshake and the shutdown of TLS in ``trio.SSLStream``."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from typing import TypeVar, cast

import trio

from .._errors import TLSError
from .._text import message_without_peer
from .._tls.engine import TLSEngine
from .ciphertext_stream import CiphertextStream, EndOfTransport
from .transport import Transport

ResultT = TypeVar("ResultT")


class SSLStreamRunner:
    """The ``trio.SSLStream`` of a connection. All its errors become ``TLSError``.

    Args:
      transport: the connection.
      engine: serves as the context of the ``SSLStream``.
      send: the function that sends ciphertext.

    Invariant: ``_running`` is set while a task is inside the ``SSLStream``. Once the transport is
    closing and ``_running`` is not set, the ``SSLStream`` is empty (``break_cycle``).
    """

    __slots__ = ("_engine", "_running", "_ssl_stream", "_transport")

    def __init__(
        self, transport: Transport, engine: TLSEngine, send: Callable[[bytes], Awaitable[None]]
    ) -> None:
        self._transport = transport
        self._engine = engine
        self._ssl_stream = trio.SSLStream(
            CiphertextStream(transport, engine, send),
            cast(ssl.SSLContext, engine),
            server_side=engine.server_side,
        )
        self._running = False

    async def do_handshake(self) -> None:
        """Do the handshake."""
        await self._run(self._receive_and_handshake(), at_end="the peer closed the connection")

    async def _receive_and_handshake(self) -> None:
        engine = self._engine
        if engine.server_side and not engine.incoming.pending:
            # The client sends first, so wait for its data before OpenSSL is called.
            engine.incoming.write(await self._transport.receive())
            if not engine.incoming.pending:
                raise EndOfTransport
        await self._ssl_stream.do_handshake()

    async def unwrap(self) -> bytes:
        """Exchange ``close_notify``.

        Returns bytes that ``SSLStream`` received after the peer's ``close_notify``.
        """
        at_end = "the peer ended the connection without close_notify"
        _, trailing = await self._run(self._ssl_stream.unwrap(), at_end=at_end)
        return bytes(trailing)

    async def _run(self, operation: Awaitable[ResultT], *, at_end: str) -> ResultT:
        """Run one operation, and convert its errors. ``at_end``: the message for EOF."""
        self._running = True
        try:
            return await operation
        except EndOfTransport:
            raise self._engine.fail(at_end) from None
        except TLSError:
            raise
        except trio.BrokenResourceError as exc:
            why = message_without_peer(exc) or str(exc) or "the connection broke"
            raise self._engine.fail(why) from exc.__cause__
        finally:
            self._running = False
            if self._transport.closing:
                self.break_cycle()

    def break_cycle(self) -> None:
        """Break the reference cycle of ``SSLStream``, which is no longer used.

        The ``SSLStream`` refers to itself by a bound method. If we kept this cycle, every closed
        connection (and a server's context with its sessions) would stay in memory until the garbage
        collector runs.
        """
        if not self._running:
            vars(self._ssl_stream).clear()
