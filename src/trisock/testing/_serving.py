"""serving: run a handler behind a real server, and raise the handler's exceptions."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator
from typing import Any

import trio
import trio.testing

import trisock

from .. import Handler, Listener, Server, Socket, TLSArgument
from ._authority import client_tls_of
from ._logged_errors import LoggedErrors

if sys.version_info < (3, 11):  # pragma: no cover (each version runs one of the two branches)
    from exceptiongroup import BaseExceptionGroup  # installed with Trio, which depends on it

# How long handlers may keep running after the block, in seconds. A handler that ends at all does so
# within milliseconds, or within a second on a busy machine.
_GRACE_SECONDS = 5

# Wait at most this long (seconds) until all tasks are blocked. Some task may never block.
_SETTLE_SECONDS = 1

# In seconds. Unless it is busy, the kernel delivers over loopback at once. In tests, 10 ms were
# enough.
_DELIVERY_SECONDS = 0.01

# Where to connect if the server listens on all addresses. (Windows cannot connect to 0.0.0.0 or ::)
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104

# An error names at most this many peers.
_MAX_NAMED = 10


class Serving:
    """What ``serving`` yields.

    Attributes:
      server: the ``trisock.Server``.
    """

    def __init__(self, server: Server, tls: TLSArgument | None) -> None:
        self.server = server
        self._starts_tls = tls is not None
        self._client_tls = None if tls is None else client_tls_of(tls)
        self._clients: list[Socket] = []

    async def connect(self, **arguments: Any) -> Socket:
        """Connect to the server. The end of the block closes the client, if it is still open.

        When this returns, the handler has started, and is blocked or has ended. Until it ends,
        ``server.connections`` and ``server.broadcast`` include the connection. (This is not true
        for a server that has reached its ``max_connections``.)

        Args:
          arguments: the keyword arguments of ``trisock.connect`` or, if the server listens on a
            Unix socket, of ``trisock.connect_unix``. If the server uses TLS with a certificate
            that an ``Authority`` has issued, the client by default trusts this authority, and
            verifies the first name of the certificate. ``tls=None`` connects in plain text.

        Raises:
          ValueError: the server uses TLS with another certificate, and ``tls`` is not given.
          OSError, TLSError: as in ``trisock.connect``.

        If cancelled, the connection may stay open until the end of the block.
        """
        if self._starts_tls and "tls" not in arguments:
            if self._client_tls is None:
                raise ValueError(
                    "the server's certificate is not from a trisock.testing.Authority, so tls must "
                    "be given: a ClientTLS, or None to connect in plain text"
                )
            arguments["tls"] = self._client_tls
        host, port = self.server.addresses[0]
        if port == 0:
            client = await trisock.connect_unix(host, **arguments)
        else:
            client = await trisock.connect(_LOOPBACK.get(host, host), port, **arguments)
        self._clients.append(client)
        await _settle()
        if client.getlocal() not in {each.getpeer() for each in self.server.connections}:
            # Has the handler ended already, or is a busy kernel still delivering the connection?
            await _settle(_DELIVERY_SECONDS)
        return client

    async def _finish(self) -> None:
        """Close the clients, let the handlers end, and stop the server."""
        async with trio.open_nursery() as nursery:
            for client in self._clients:
                nursery.start_soon(client.close)
        # Let handlers that only wait for EOF end here, before the server starts to close.
        await _settle()
        self.server.stop()
        with trio.move_on_after(_GRACE_SECONDS):
            await self.server.wait_closed()
        running = self.server.connections
        if running:
            peers = [str(sock.getpeer()) for sock in running[:_MAX_NAMED]]
            if len(running) > _MAX_NAMED:
                peers.append("...")
            raise AssertionError(
                f"handlers still ran {_GRACE_SECONDS} seconds after serving had closed its clients "
                f"and stopped the server. Their peers: {', '.join(peers)}. If these handlers never "
                "end by themselves, end the block with s.server.stop(grace=0)."
            )

    def _abort(self) -> None:
        self.server.stop(grace=0)
        for client in self._clients:
            client.abort()


@contextlib.asynccontextmanager
async def serving(handler: Handler, **bind_arguments: Any) -> AsyncIterator[Serving]:
    """Run a handler behind a real server on loopback, for a test::

        async with serving(handler) as s:
            client = await s.connect()
            await client.send(b"hello\\n")
            assert await client.recv_line() == b"hello"

    ``s.server`` is the ``Server``. ``s.connect()`` connects a client to it (see below).

    The end of the block closes the clients of ``s.connect`` gracefully. Their handlers read EOF,
    and end. Then the server stops, as with ``Server.stop``. Handlers that still run may continue
    for 5 seconds. Then they are cancelled, and an ``AssertionError`` names their peers: a handler
    that hangs fails the test. Handlers that never end by themselves need
    ``s.server.stop(grace=0)`` as the last line of the block. If the block raises or is cancelled,
    the clients are aborted, and the handlers are cancelled immediately.

    Args:
      handler: the handler, as for ``trisock.bind``. It may be a ``Script``.
      bind_arguments: further arguments of ``trisock.bind``, such as ``tls``. The default of
        ``port_or_listener`` is any free port, and the default of ``host`` is ``"127.0.0.1"``.

    Raises:
      Exception: at the end of the block, each error that ``bind`` logs at ERROR. These are the
        exceptions of handlers, except those that a peer caused. They are both logged and raised.
        Several exceptions are raised in a group.
      AssertionError: a handler did not end (see above).
      BaseException: whatever the block raised. If handlers failed as well, a group contains the
        block's exception first, and then the handlers' exceptions. The group hides nothing: the
        handler's error is often the cause of the block's error.

    ``s.connect(**arguments)`` takes the keyword arguments of ``trisock.connect``. When it returns,
    the handler has started, and is blocked or has ended. If the server uses TLS with a certificate
    of an ``Authority``, the client trusts this authority by default. With another certificate,
    ``tls`` must be given. ``tls=None`` connects in plain text.
    """
    arguments: dict[str, Any] = {"port_or_listener": 0, **bind_arguments}
    if not isinstance(arguments["port_or_listener"], Listener):
        arguments.setdefault("host", "127.0.0.1")
    logged = LoggedErrors()
    server: Server | None = None
    failures: list[BaseException] = []
    with logged.installed():
        try:
            async with trio.open_nursery() as nursery:
                with logged.of_tasks_started_here():
                    server = await trisock.bind(nursery, handler=handler, **arguments)
                s = Serving(server, arguments.get("tls"))
                try:
                    yield s
                    await s._finish()
                except Exception as exc:  # keep it from the nursery, which would wrap it in a group
                    failures.append(exc)
                    s._abort()
                except BaseException:  # Cancelled, which has to reach its cancel scope
                    s._abort()
                    raise
        except BaseException as exc:
            failures.append(_unwrapped(exc))
    if server is not None:
        failures += logged.found(server)
    try:
        if len(failures) > 1:
            raise BaseExceptionGroup("several errors of a serving block", failures)
        if failures:
            raise failures[0]
    finally:
        del failures, logged  # the tracebacks refer to this frame


def _unwrapped(exc: BaseException) -> BaseException:
    """Remove the groups that nurseries have added around one exception."""
    while isinstance(exc, BaseExceptionGroup) and len(exc.exceptions) == 1:
        exc = exc.exceptions[0]
    return exc


async def _settle(cushion: float = 0.0) -> None:
    """Wait until all other tasks are blocked, and have been blocked for ``cushion`` seconds."""
    with trio.move_on_after(_SETTLE_SECONDS):
        await trio.testing.wait_all_tasks_blocked(cushion)
