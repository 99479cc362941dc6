"""The driver of every negotiation: the I/O, the limits, the deadline, and the close."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import trio

from .._arguments import quoted
from .._errors import (
    IncompleteReadError,
    LimitExceededError,
    ServerClosing,
    StartTLSError,
    blame_peer,
)
from .._text import format_seconds, message_without_peer, printable, set_message
from .conversation import (
    CheckQuiet,
    Exactly,
    Farewell,
    Line,
    Negotiation,
    Offered,
    Refusal,
    Request,
    Send,
    Until,
)

if TYPE_CHECKING:
    from .._net.socket import Socket
    from .._tls.info import TLSInfo
    from .._tls.roles import TLSArgument

# The limits for what a peer may send in plain text. Real greetings and capabilities take 2 KiB or
# less, but the banner of an FTP server may be longer. In addition, the socket's buffer may hold the
# result of one read.
MAX_LINE = 8192  # bytes of a line, including its line end
MAX_LINES = 512  # also counts tags (XMPP) and commands (Telnet)
MAX_GREETING = 16384  # bytes before we have sent anything
MAX_TOTAL = 65536  # bytes before TLS

# An error's text shows at most this many bytes of a reply.
_MAX_SHOWN = 200


def check_protocol(protocol: object, known: Iterable[str]) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless the protocol is known."""
    if not isinstance(protocol, str):
        raise TypeError(f"a protocol must be a str, not {quoted(protocol)}")
    if protocol not in known:
        raise ValueError(f"a protocol must be one of {', '.join(known)}, not {quoted(protocol)}")


def check_socket(sock: Socket) -> None:
    """Raise an error unless a negotiation can begin."""
    if sock.istls():
        raise RuntimeError(f"the connection with {sock.getpeer()} is already using TLS")
    sock.unrecv(b"")  # raises an error if the socket is closed or another task is reading


async def run(
    sock: Socket, protocol: str, negotiation: Negotiation, tls: TLSArgument, timeout: float
) -> tuple[bytes, TLSInfo]:
    """Negotiate, then start TLS, within ``timeout`` seconds. Returns the greeting and the TLSInfo.

    On any failure, the socket is closed. After a failure, nothing is sent in plain text, except the
    farewell of a server.
    """
    deadline = trio.current_time() + timeout
    try:
        greeting = await _negotiate(sock, protocol, negotiation, deadline, timeout)
        left = max(0.0, deadline - trio.current_time())
        return greeting, await sock.starttls(tls, handshake_timeout=left)
    except BaseException:
        sock.abort()  # changes nothing if the socket is closed already
        raise


async def _negotiate(
    sock: Socket, protocol: str, negotiation: Negotiation, deadline: float, timeout: float
) -> bytes:
    progress = _Progress()
    failure: StartTLSError | ServerClosing | None = None
    with trio.move_on_at(deadline - _seconds_for_farewell(sock, timeout)):
        try:
            return await _converse(sock, negotiation, progress)
        except Refusal as refusal:
            failure = _error(sock, protocol, refusal, progress)
        except (trio.BrokenResourceError, IncompleteReadError) as exc:
            ending = Refusal(_how_it_ended(exc, progress), kind="closed")
            failure = _error(sock, protocol, ending, progress)
            failure.__cause__ = exc
        except ServerClosing as exc:
            failure = exc
    if failure is None:
        why = f"{_what_is_missing(sock, progress)} within {format_seconds(timeout)}"
        why += _advice_for_silence(sock, progress)
        failure = _error(sock, protocol, Refusal(why, kind="timeout"), progress)
    with trio.move_on_at(deadline):
        if isinstance(failure, ServerClosing) or failure.kind == "timeout":
            await _say_farewell(sock, progress)
        await sock.aclose()  # gracefully, so that a server's farewell arrives
    try:
        raise failure
    finally:
        del failure  # breaks a reference cycle with this frame


async def _converse(sock: Socket, negotiation: Negotiation, progress: _Progress) -> bytes:
    """Run a negotiation to its end. Returns the greeting, or raises ``Refusal``."""
    try:
        request = next(negotiation)
        while True:
            request = negotiation.send(await _perform(sock, request, progress))
    except StopIteration as stop:
        greeting: bytes = stop.value
        return greeting


async def _perform(sock: Socket, request: Request, progress: _Progress) -> bytes:
    if isinstance(request, Send):
        progress.spoken = True
        await sock.send(request.data)
        return b""
    if isinstance(request, CheckQuiet):
        await _check_quiet(sock)
        return b""
    if isinstance(request, Farewell):
        progress.farewell = request.data
        return b""
    if isinstance(request, Offered):
        progress.offered = True
        return b""
    with sock.idle():  # a server that stops need not wait for a silent client
        if isinstance(request, Exactly):
            progress.check(request.size)
            data = await sock.recv_exactly(request.size)
        else:
            data = await _delimited(sock, request, progress)
    progress.received += len(data)
    return data.removesuffix(b"\n").removesuffix(b"\r") if isinstance(request, Line) else data


async def _delimited(sock: Socket, request: Line | Until, progress: _Progress) -> bytes:
    delimiter = request.delimiter if isinstance(request, Until) else b"\n"
    progress.count_line()
    progress.check(1)
    try:
        return await sock.recv_until(delimiter, max_bytes=min(MAX_LINE, progress.left()))
    except LimitExceededError as exc:
        if exc.limit < MAX_LINE:
            progress.check(exc.limit + 1)
        raise Refusal(f"the peer sent a line of more than {MAX_LINE} bytes") from None


async def _check_quiet(sock: Socket) -> None:
    """Raise ``Refusal`` if unencrypted bytes follow the peer's last message before TLS.

    Bytes that arrive after this check become part of the handshake, which then fails
    (CVE-2011-0411).
    """
    if await sock.peek():
        raise Refusal("unencrypted bytes followed the last message before TLS")


def _seconds_for_farewell(sock: Socket, timeout: float) -> float:
    """Return how many seconds of the time limit a server keeps for its farewell."""
    return min(1.0, timeout / 10) if sock.getside() == "server" else 0.0


async def _say_farewell(sock: Socket, progress: _Progress) -> None:
    if progress.farewell:
        # The socket refuses to send if the client has gone, or the time limit has cut a reply
        # short.
        with contextlib.suppress(trio.BrokenResourceError):
            await sock.send(progress.farewell)


class _Progress:
    """The progress of the conversation, and the limits of what the peer may send.

    Attributes:
      received: how many bytes of complete answers have arrived.
      lines: how many lines were requested.
      spoken: whether we have sent anything.
      offered: whether the server has offered TLS.
      farewell: what we send if a stop or the time limit ends the session, or ``b""``.
    """

    def __init__(self) -> None:
        self.received = 0
        self.lines = 0
        self.spoken = False
        self.offered = False
        self.farewell = b""

    def left(self) -> int:
        return (MAX_TOTAL if self.spoken else MAX_GREETING) - self.received

    def check(self, size: int) -> None:
        if size > self.left():
            what = "" if self.spoken else " as its greeting"
            limit = MAX_TOTAL if self.spoken else MAX_GREETING
            raise Refusal(f"the peer sent more than {limit} bytes{what}")

    def count_line(self) -> None:
        self.lines += 1
        if self.lines > MAX_LINES:
            raise Refusal(f"the peer sent more than {MAX_LINES} lines, tags or commands")


def _what_is_missing(sock: Socket, progress: _Progress) -> str:
    if sock.getside() == "server":
        return "the client did not ask for TLS"
    return "no complete answer arrived" if progress.received else "nothing arrived"


def _advice_for_silence(sock: Socket, progress: _Progress) -> str:
    """Return a hint: a server with TLS from the start waits for the client to begin."""
    if sock.getside() == "server" or progress.received:
        return ""
    return " (does the server expect TLS from the start on this port?)"


def _how_it_ended(exc: Exception, progress: _Progress) -> str:
    if isinstance(exc, IncompleteReadError):
        when = "" if progress.received else " before it said anything"
        return f"the peer closed the connection{when}"
    return message_without_peer(exc) or printable(str(exc))


def _error(sock: Socket, protocol: str, refusal: Refusal, progress: _Progress) -> StartTLSError:
    why = refusal.why
    if refusal.reply is not None:
        why += f": {_shown(refusal.reply)}"
    error = StartTLSError(
        "",
        protocol=protocol,
        kind=refusal.kind,
        offered=True if progress.offered else refusal.offered,
        reply=refusal.reply,
    )
    blame_peer(error, sock.socket)
    return set_message(
        error,
        f"STARTTLS ({protocol}) with {sock.getpeer()} failed: {why}",
        without_peer=f"STARTTLS ({protocol}) failed: {why}",
    )


def _shown(reply: bytes) -> str:
    """Show the beginning of a peer's reply on one line, with control characters escaped."""
    shown = printable(reply[:_MAX_SHOWN].decode("utf-8", "backslashreplace"))
    return f"'{shown}'" + ("..." if len(reply) > _MAX_SHOWN else "")
