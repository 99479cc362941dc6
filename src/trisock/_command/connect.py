"""Connect a terminal to a server: send what is typed, and show what the server sends."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from .. import Socket
from .._text import format_seconds, printable
from .certificate import CertificateFacts
from .explain import explain, explain_timeout
from .opening import NETWORK_ERRORS, open_target
from .roles import Roles
from .stages import Opening, note_look_ups
from .terminal import TerminalText, read, write
from .urls import Target

# The limit in seconds for the name look-up, the connection, STARTTLS and the handshake together.
_OPENING_LIMIT = 60

# TLS has no half-close. So after the end of the input, we close a TLS connection when the peer has
# sent nothing for this long (seconds). ``relay`` uses the same limit.
_SILENCE = 60

# We do not offer HTTP/2: servers prefer it, but nobody can type it.
_BINARY_HTTP = "h2"


class ConversationFailedError(Exception):
    """The connection could not be made, or it broke. The text says why, and is safe to show."""


@dataclass(frozen=True)
class Ends:
    """The descriptors of the terminal.

    Attributes:
      input: the descriptor with the data to send; ``None`` if there is no input.
      output: the descriptor for the data that the peer sends; ``None`` to drop this data.
      notify: called with a text for the user.
    """

    input: int | None
    output: int | None
    notify: Callable[[str], None]


async def converse(
    target: Target, roles: Roles, ends: Ends, *, proxy_protocol: bool, keep_lf: bool
) -> None:
    """Connect, send the input, and show what the peer sends until it ends the connection.

    Input from a terminal gets CRLF line ends, unless ``keep_lf``. Other input is sent as it is. At
    the end of the input, a connection in plain text is half-closed. TLS has no half-close: a TLS
    connection is closed once the peer has been silent for 60 seconds.

    Raises: ``ConversationFailedError`` if the network or the peer fails, or if the peer is silent
    for too long, because its answer may then be incomplete. ``OSError`` if the input or the output
    fails. If cancelled, the connection is closed immediately.
    """
    alpn = tuple(each for each in target.scheme.alpn if each != _BINARY_HTTP)
    note_look_ups()
    opening = Opening()
    sock: Socket | None = None
    try:
        with trio.move_on_after(_OPENING_LIMIT):
            sock = await open_target(target, roles, alpn, opening, proxy_protocol=proxy_protocol)
    except NETWORK_ERRORS as exc:
        raise ConversationFailedError(_explain(exc, target, roles)) from exc
    if sock is None:
        raise ConversationFailedError(explain_timeout(opening.stage, _OPENING_LIMIT, target))
    try:
        ends.notify(_describe(sock))
        await _Conversation(sock, ends, keep_lf=keep_lf).run()
        await sock.close()
    except trio.BrokenResourceError as exc:
        raise ConversationFailedError(_explain(exc, target, roles)) from exc
    finally:
        sock.abort()


def _explain(error: Exception, target: Target, roles: Roles) -> str:
    now = datetime.datetime.now(datetime.timezone.utc)
    name = roles.name or target.host
    return explain(error, CertificateFacts(), name, target, now)


def _describe(sock: Socket) -> str:
    how = "in plain text"
    if sock.tls is not None:
        name = f" with {printable(sock.tls.server_hostname)}" if sock.tls.server_hostname else ""
        how = f"{sock.tls.version} {sock.tls.cipher}{name}"
    return f"connected to {sock.getpeer()}, {how}"


class _Conversation:
    """Both directions of a conversation.

    ``_failure`` is the error that ended a direction. ``run`` raises it bare, and not in a group.

    Invariant: the scope ``_waiting`` surrounds each read. The scope has a deadline once the input
    has ended (``_is_limited``). Slow output does not count as silence: no read runs meanwhile.
    """

    def __init__(self, sock: Socket, ends: Ends, *, keep_lf: bool) -> None:
        self._sock = sock
        self._ends = ends
        self._to_crlf = ends.input is not None and os.isatty(ends.input) and not keep_lf
        on_terminal = ends.output is not None and os.isatty(ends.output)
        self._text = TerminalText() if on_terminal else None
        self._is_limited = False
        self._waiting = trio.CancelScope()
        self._failure: Exception | None = None

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run_direction, self._send, nursery.cancel_scope)
            await self._run_direction(self._receive, nursery.cancel_scope)
            nursery.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure

    async def _run_direction(
        self, direction: Callable[[], Awaitable[None]], both: trio.CancelScope
    ) -> None:
        try:
            await direction()
        except Exception as exc:
            self._failure = exc
            both.cancel()

    async def _send(self) -> None:
        with contextlib.suppress(trio.BrokenResourceError):  # the read reports the reason
            if self._ends.input is not None:
                while data := await read(self._ends.input):
                    await self._sock.send(data.replace(b"\n", b"\r\n") if self._to_crlf else data)
            if self._sock.istls():
                self._is_limited = True
                self._waiting.deadline = trio.current_time() + _SILENCE
                self._ends.notify("end of the input; waiting for the peer to close")
            else:
                await self._sock.send_eof()

    async def _receive(self) -> None:
        while data := await self._next():
            await self._show(data)
        await self._show(b"", final=True)
        self._ends.notify("the peer has ended the connection")

    async def _next(self) -> bytes:
        """Return what ``recv`` returns. Close the connection if the peer is silent for too long."""
        deadline = trio.current_time() + _SILENCE if self._is_limited else math.inf
        with trio.CancelScope(deadline=deadline) as self._waiting:
            return await self._sock.recv()
        await self._sock.close()
        raise ConversationFailedError(
            f"the peer did not end the connection, and was silent for {format_seconds(_SILENCE)}: "
            "end the input with a command that makes the peer close, such as QUIT"
        )

    async def _show(self, data: bytes, *, final: bool = False) -> None:
        if self._text is not None:
            data = self._text.convert(data, final=final)
        if self._ends.output is not None:
            await write(self._ends.output, data)
