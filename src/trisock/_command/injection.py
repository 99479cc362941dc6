"""The injection test: does a server execute a plain-text command that came with STARTTLS?"""

from __future__ import annotations

import contextlib
from typing import Any, cast

from .. import Buffer, ClientTLS, Socket, starttls
from .injected_commands import INJECTED_COMMANDS, InjectedCommand
from .opening import NETWORK_ERRORS

# Stop reading after this many bytes of answers.
_MAX_ANSWERS = 65536


class _InjectingSocket:
    """A Socket that adds a command to the segment that asks for TLS.

    ``starttls.upgrade`` uses it for the negotiation. All methods but ``send`` are the Socket's own.
    """

    def __init__(self, sock: Socket, injected: InjectedCommand) -> None:
        self._sock = sock
        self._injected = injected

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    async def send(self, *buffers: Buffer) -> None:
        data = b"".join(buffers)
        if self._injected.starttls in data and not self._sock.istls():
            data += self._injected.command
        await self._sock.send(data)


async def is_injectable(sock: Socket, protocol: str, tls: ClientTLS) -> bool:
    """Return whether the server answers a plain-text command inside TLS.

    If the negotiation or the handshake fails, return False: the server has noticed the command.

    Args:
      sock: a new connection, in plain text. This call closes it.
      protocol: one of ``INJECTED_COMMANDS``.
      tls: the role, which should accept any certificate, because the test sends nothing secret.

    The call has no time limit of its own. A cancelled call closes the socket as well.
    """
    injected = INJECTED_COMMANDS[protocol]
    try:
        with contextlib.suppress(*NETWORK_ERRORS):
            injecting = cast("Socket", _InjectingSocket(sock, injected))
            await starttls.upgrade(injecting, protocol, tls, timeout=None)
            return injected.is_answered(await _answers(sock, injected))
        return False
    finally:
        sock.abort()


async def _answers(sock: Socket, injected: InjectedCommand) -> bytes:
    """End the session, and return what the server sends until it ends the connection."""
    data = b""
    with contextlib.suppress(*NETWORK_ERRORS):
        await sock.send(injected.quit)
        while len(data) < _MAX_ANSWERS and not injected.is_answered(data):
            chunk = await sock.recv()
            if not chunk:
                break
            data += chunk
    return data
