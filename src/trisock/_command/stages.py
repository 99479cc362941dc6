"""The stages of opening a connection. The text of a timeout names the current one."""

from __future__ import annotations

import contextlib
import enum
import functools
import socket
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, cast

import trio

from .. import Buffer, Socket, TLSArgument, TLSInfo


class Stage(enum.Enum):
    """The stages, in order. The values are words for a text."""

    LOOK_UP = "while looking up the name"
    CONNECT = "while connecting"
    GREETING = "while waiting for the server's greeting"
    STARTTLS = "while negotiating STARTTLS"
    HANDSHAKE = "during the TLS handshake"


class Opening:
    """The progress of one connection that is being opened.

    Attributes:
      stage: the current stage. After the end, it is the last one.
    """

    def __init__(self) -> None:
        self.stage = Stage.CONNECT

    @contextlib.contextmanager
    def connecting(self) -> Iterator[None]:
        """Note whether ``connect`` looks up a name (see ``note_look_ups``)."""
        self.stage = Stage.CONNECT
        token = _connecting.set(self)
        try:
            yield
        finally:
            _connecting.reset(token)

    def negotiating(self, sock: Socket) -> Socket:
        """Return a socket for ``starttls.upgrade`` that notes how far the negotiation has come."""
        self.stage = Stage.GREETING
        return cast("Socket", _NotingSocket(sock, self))


class _NotingSocket:
    """A Socket that notes what the negotiation does. The methods are those of the socket.

    A client that has sent something no longer waits for the greeting.
    """

    def __init__(self, sock: Socket, opening: Opening) -> None:
        self._sock = sock
        self._opening = opening

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    async def send(self, *buffers: Buffer) -> None:
        self._opening.stage = Stage.STARTTLS
        await self._sock.send(*buffers)

    async def starttls(self, tls: TLSArgument, **options: Any) -> TLSInfo:
        self._opening.stage = Stage.HANDSHAKE
        return await self._sock.starttls(tls, **options)


# The opening whose task is in ``Opening.connecting``.
_connecting: ContextVar[Opening] = ContextVar("_connecting")


class _NotingResolver(trio.abc.HostnameResolver):
    """Looks up names as Trio does without a resolver, and notes it.

    Trio calls a resolver only for names, and not for addresses.
    """

    async def getaddrinfo(
        self,
        host: bytes | None,
        port: bytes | str | int | None,
        family: int = 0,
        type: int = 0,
        proto: int = 0,
        flags: int = 0,
    ) -> Any:
        opening = _connecting.get()
        opening.stage = Stage.LOOK_UP
        look_up = functools.partial(socket.getaddrinfo, host, port, family, type, proto, flags)
        found = await trio.to_thread.run_sync(look_up, abandon_on_cancel=True)
        opening.stage = Stage.CONNECT
        return found

    async def getnameinfo(self, sockaddr: Any, flags: int) -> tuple[str, str]:
        raise NotImplementedError  # pragma: no cover (nobody asks for the name of an address)


def note_look_ups() -> None:
    """Note the look-ups of names in this run of Trio. Call it at the beginning of the run."""
    trio.socket.set_custom_hostname_resolver(_NotingResolver())
