"""The stages of opening a connection. After a timeout, the error names the current stage."""

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
    """The stages, in order. The values are used in error messages."""

    LOOK_UP = "while looking up the name"
    CONNECT = "while connecting"
    GREETING = "while waiting for the server's greeting"
    STARTTLS = "while negotiating STARTTLS"
    HANDSHAKE = "during the TLS handshake"


class Opening:
    """The progress of one connection that is being opened.

    Attributes:
      stage: the current stage or, afterwards, the last stage.
    """

    def __init__(self) -> None:
        self.stage = Stage.CONNECT

    @contextlib.contextmanager
    def connecting(self) -> Iterator[None]:
        """Record, while the block runs, whether a name is looked up (see ``note_look_ups``)."""
        self.stage = Stage.CONNECT
        token = _connecting.set(self)
        try:
            yield
        finally:
            _connecting.reset(token)

    def negotiating(self, sock: Socket) -> Socket:
        """Return a socket for ``starttls.upgrade`` that records the stage of the negotiation."""
        self.stage = Stage.GREETING
        return cast("Socket", _NotingSocket(sock, self))


class _NotingSocket:
    """Wraps a Socket, and records the stage of the negotiation.

    As soon as the client sends something, it no longer waits for the greeting.
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


# The ``Opening`` for which the current task is in ``Opening.connecting``.
_connecting: ContextVar[Opening] = ContextVar("_connecting")


class _NotingResolver(trio.abc.HostnameResolver):
    """Looks up names as Trio does by default, and records the stage.

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
    """Record when names are looked up in this run of Trio. Call this at the start of the run."""
    trio.socket.set_custom_hostname_resolver(_NotingResolver())
