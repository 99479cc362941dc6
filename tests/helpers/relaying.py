"""A relay between two connections, and what its two peers do."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio

import trisock
from helpers.pairs import closing, read_all, unix_pair
from helpers.raw_tls import upgrade
from trisock import Socket, TLSError
from trisock._tls.engine import TLSState
from trisock.testing import Authority, socket_pair

PLAIN_OR_TLS = ["plain", "tls"]


@dataclass
class Relayed:
    """A relay between the sockets ``a`` and ``b``.

    ``x`` is the peer of ``a``, and ``y`` is the peer of ``b``.

    Attributes:
      outcome: what ``relay`` returned or raised, once ``done`` is set.
    """

    x: Socket
    a: Socket
    b: Socket
    y: Socket
    outcome: Any = None
    done: trio.Event = field(default_factory=trio.Event)

    async def run(self, idle_timeout: float | None) -> None:
        try:
            self.outcome = await trisock.relay(self.a, self.b, idle_timeout=idle_timeout)
        except Exception as exc:
            self.outcome = exc
        self.done.set()

    async def result(self) -> Any:
        """Wait for ``relay``, check that it has closed both sockets, and return its outcome."""
        await self.done.wait()
        assert (self.a.fileno(), self.b.fileno()) == (-1, -1)
        return self.outcome

    async def assert_broken_by(self, peer: Socket) -> None:
        """Check that ``relay`` has raised an error that names this peer, and not the other one."""
        error = await self.result()
        assert isinstance(error, trio.BrokenResourceError), error
        other = self.y if peer is self.x else self.x
        assert re.search(rf"with (.localhost. \()?{peer.getlocal()}\W", str(error))
        assert str(other.getlocal()) not in str(error)


async def small_pair(*, tls: bool) -> tuple[Socket, Socket]:
    """Return the two ends of a Unix connection."""
    a, b = unix_pair()
    if tls:
        authority = Authority()
        await upgrade(a, authority.client_tls(), b, authority.server_tls())
    return a, b


@contextlib.asynccontextmanager
async def relaying(
    layers: Iterable[str],
    *,
    idle_timeout: float | None = None,
    small: bool = False,
) -> AsyncIterator[Relayed]:
    """Relay between two connections until the end of the block.

    Args:
      layers: the layer of each connection, ``"plain"`` or ``"tls"``.
      idle_timeout: as in ``relay``.
      small: whether to use Unix connections, whose buffers fill quickly.
    """
    connect = small_pair if small else socket_pair
    (x, a), (b, y) = [await connect(tls=layer == "tls") for layer in layers]
    relayed = Relayed(x, a, b, y)
    async with closing(x, a, b, y), trio.open_nursery() as nursery:
        nursery.start_soon(relayed.run, idle_timeout)
        yield relayed
        nursery.cancel_scope.cancel()


async def end(sock: Socket) -> None:
    """End our direction: with FIN, or with ``close_notify`` under TLS. Reading still works."""
    tls = sock._connection.tls
    if tls is None:
        await sock.send_eof()
    else:
        tls.engine.close_notify()
        await tls.send_ciphertext(b"")


async def send_and_end(sock: Socket, data: bytes) -> None:
    await sock.send(data)
    await end(sock)


async def read_to_end(sock: Socket) -> bytes:
    """Return all data until the peer ends its direction. Our direction may have ended before."""
    received = bytearray()
    try:
        async for chunk in sock:
            received += chunk
    except TLSError as exc:
        # After we have sent close_notify, Python's ssl module reports the peer's close_notify as an
        # error.
        if not str(exc).endswith("the peer ended TLS"):
            raise
    return bytes(received)


async def until_end_noticed(sock: Socket) -> None:
    """Wait until ``relay`` has read the end of this socket's stream."""
    connection = sock._connection
    while not (
        connection.transport._at_eof
        if connection.tls is None
        else connection.tls.engine.state is TLSState.PEER_CLOSED
    ):
        await trio.lowlevel.checkpoint()


async def flood(sock: Socket) -> None:
    """Send until the connection breaks."""
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while True:
            await sock.send(b"x" * 65536)


async def assert_reset(sock: Socket) -> None:
    with pytest.raises(trio.BrokenResourceError):
        await read_all(sock)
