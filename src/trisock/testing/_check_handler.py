"""check_handler: run hostile clients against a handler."""

from __future__ import annotations

import gc
import math
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, Literal, cast

import trio

from .. import (
    ClientTLS,
    Handler,
    IncompleteReadError,
    LimitExceededError,
    ServerTLS,
    Socket,
    TLSArgument,
    bind,
)
from .._guard import bare, text
from .._text import format_seconds
from . import _flooding_clients
from . import _hostile_clients as clients
from ._logged_errors import LoggedErrors
from ._resources import Resources
from ._session import Profile, Session
from ._watchdog import Watchdog
from ._watched_handler import WatchedHandler

# If the connection itself raises these, bind logs them in one line as errors of the peer.
_PEER_ERRORS = (IncompleteReadError, LimitExceededError, trio.BrokenResourceError)

Client = Callable[[Session], Awaitable[None]]

# A leak is what every connection leaves behind. What only the first connection leaves behind may be
# a cache.
_ROUNDS = 3

_POLL = 0.01  # seconds between two checks of what a connection has left behind

# The clients for every handler. They connect in plain text or under TLS.
_CLIENTS: dict[str, Client] = {
    "silent client": clients.silent,
    "half-close": clients.half_close,
    "reset at once": clients.reset_at_once,
    "reset after the greeting": clients.reset_after_greeting,
    "reset in the middle of a request": clients.reset_in_request,
    "reset after a request": clients.reset_after_request,
    "cancellation": clients.cancellation,
    "garbage": clients.garbage,
    "truncation": clients.truncation,
    "byte by byte": clients.byte_by_byte,
    "many connections": clients.many_connections,
    "endless request": _flooding_clients.endless_request,
}

# This client takes as long as all others together, so it runs once: under TLS, if there is TLS.
_SLOW_READER: dict[str, Client] = {"slow reader": _flooding_clients.slow_reader}

# The clients for a handler that starts TLS.
_TLS_CLIENTS: dict[str, Client] = {
    "reset in the handshake": clients.reset_in_handshake,
    "truncated handshake": clients.truncated_handshake,
}

# The clients for a handler that has a command to start TLS.
_STARTTLS_CLIENTS: dict[str, Client] = {
    "plain text after STARTTLS": clients.plain_text,
    "injection": clients.injection,
    "reset after STARTTLS": clients.reset_after_starttls,
    "STARTTLS twice": clients.starttls_twice,
}


async def check_handler(
    handler: Handler,
    *,
    greeting: bytes | None = None,
    request: bytes | None = None,
    starttls: bytes | None = None,
    tls: TLSArgument | Literal[True] | None = None,
    server_tls: TLSArgument | None = None,
    timeout: float = 10,
) -> None:
    r"""Run hostile clients against a handler. Raise ``AssertionError`` if the handler has a fault.

    Each client gets its own server: ``bind`` runs the handler on 127.0.0.1::

        async def test_handler() -> None:
            await check_handler(handle, greeting=b"220 ready\r\n", starttls=b"STARTTLS\r\n")

    By default, the clients send the line ``NOOP``, which fits line-based protocols. For other
    protocols, such as those with length-prefixed frames, pass a valid request. Otherwise, a handler
    of frames reads ``NOOP`` as a length of 1.3 GB, and never gets a whole frame::

        await check_handler(handle, request=b"\0\0\0\5get k")

    The clients:

    - Some clients send nothing and disconnect, reset the connection at various points, or only
      half-close it. One client is silent while the server cancels the handler. The handler must end
      each time. It must answer a request even if EOF follows at once.
    - One client sends the request without its line end or last byte. The answer must not be the
      answer to a whole request. Another sends the request byte by byte. The answer must be the
      same as when the request arrives in one piece.
    - One client sends lines of other protocols, control characters, text that is not UTF-8, random
      bytes, the request with a changed byte or with bad numbers, and the start of the request
      followed by random bytes. The random bytes are the same in each run. Up to 32 bytes and 8
      numbers of the request are changed, one at a time.
    - One client sends a line that does not end. If there is a ``request``, it also sends the start
      of the request followed by 0xFF bytes, which a handler of frames reads as a large length.
      Another client sends many requests, and reads no answers. The handler may stop reading, or
      close the connection. It must not hold more than 8 MiB of a request or 2 MiB of answers, and
      it must serve other clients meanwhile.
    - 20 clients connect at the same time.
    - With ``starttls``, one client sends a request right after the command, in the same segment.
      The handler must not answer this request under TLS (CVE-2011-0411). Others send plain text
      instead of a handshake, cut the handshake short, or send the command under TLS. The clients
      above then run twice, in plain text and under TLS. Only the client that reads no answers runs
      once, under TLS.

    After each client, three things must hold. The handler has ended. It has raised no exception
    that ``bind`` logs at ERROR. No task that it started is running, and no descriptor is left open.
    What only the first connection leaves behind may be a cache. So a leak is reported only if each
    of three connections leaves something behind.

    The first fault ends the check, so there may be more. Two things are not checked: whether the
    handler ends if a client stays silent, and whether it forgets what a client sent before TLS.

    Args:
      handler: an async function that takes a ``Socket``.
      greeting: what the handler sends first in plain text, or the start of it. ``None``: the
        clients do not wait for a greeting.
      request: a whole request that the handler answers, at least 2 bytes. Choose a request that
        changes nothing, because it is sent many times. If it needs a login, put the login before
        it, in the same bytes. ``None``: the line ``NOOP``, with the line end of ``starttls``
        (``\r\n`` if there is no such command).
      starttls: the command that starts TLS, with its line end. If TLS can start only after other
        commands, put these before it, in the same bytes. ``None``: there is no such command.
      tls: the client's TLS role. Unless there is a ``server_tls``, the handler itself must call
        ``starttls``: after the command or, if there is no command, at once. With ``starttls`` or
        ``server_tls``, ``None`` means a client that accepts any certificate. ``True`` means a
        client that verifies the server, as in ``connect``.
      server_tls: the server's role, for a handler that runs under ``bind(tls=...)``. Each
        connection then starts with TLS before the handler is called. It cannot be combined with
        ``starttls``.
      timeout: a limit in seconds for three things: how long the handler may take to end after a
        client, how long it may run without a checkpoint, and how long to wait before a leak is
        reported. A handler without a fault does not need this time.

    Raises:
      AssertionError: the handler has a fault. The message names the client and says what happened.
        An exception that the handler raised is the cause.
      TypeError, ValueError: an argument is invalid.

    The check takes about a second, and works with ``autojump_clock``. If it is cancelled,
    everything is closed.

    A handler that reaches no checkpoint is ended by an exception (CPython only). A handler that
    ignores its cancellation is abandoned. Three kinds of handlers cannot be ended, and
    ``check_handler`` waits for them: a handler that waits under a shield for anything but its own
    socket, a handler whose child task ignores its cancellation, and a handler in a blocking call.
    """
    profile = _profile(handler, greeting, request, starttls, tls, server_tls, timeout)
    watchdog = Watchdog(timeout)
    with bare(), watchdog.running():
        check = _Check(_served(handler, profile.server_tls), profile, watchdog)
        if profile.tls is None or starttls is not None:
            await check.run_all(_CLIENTS, secure=False)
        if profile.tls is None:
            await check.run_all(_SLOW_READER, secure=False)
            return
        if starttls is not None:
            await check.run_all(_STARTTLS_CLIENTS, secure=True)
        await check.run_all(_TLS_CLIENTS, secure=True)
        await check.run_all({**_CLIENTS, **_SLOW_READER}, secure=True, suffix=" under TLS")


def _profile(
    handler: Handler,
    greeting: bytes | None,
    request: bytes | None,
    starttls: bytes | None,
    tls: TLSArgument | Literal[True] | None,
    server_tls: TLSArgument | None,
    timeout: float,
) -> Profile:
    """Return what is known about the handler. Raise an error if an argument is invalid."""
    if not callable(handler):
        raise TypeError(f"a handler must be an async function, not {type(handler).__name__}")
    for name, value in (("greeting", greeting), ("request", request), ("starttls", starttls)):
        if value is not None and not isinstance(value, bytes):
            raise TypeError(f"{name} must be bytes or None, not {type(value).__name__}")
    if starttls == b"":
        raise ValueError("starttls must not be empty")
    if request is not None and len(request) < 2:
        raise ValueError(f"request must have at least 2 bytes, not {len(request)}")
    if server_tls is not None and starttls is not None:
        raise ValueError("server_tls and starttls exclude each other: TLS can start only once")
    if (
        tls is not None
        and tls is not True
        and not isinstance(tls, (str, ClientTLS, ssl.SSLContext))
    ):
        raise TypeError(f"tls must be the role of a TLS client, not {type(tls).__name__}")
    if server_tls is not None and not isinstance(server_tls, (ServerTLS, ssl.SSLContext)):
        try:
            server_tls = ServerTLS(cast("Any", server_tls))
        except TypeError:
            found = type(server_tls).__name__
            raise TypeError(f"server_tls must be the role of a TLS server, not {found}") from None
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout must be a number of seconds, not {type(timeout).__name__}")
    if not 0 < timeout < math.inf:
        raise ValueError(f"timeout must be positive and finite, not {timeout}")
    if tls is True:
        tls = ClientTLS()
    elif tls is None and (starttls is not None or server_tls is not None):
        tls = ClientTLS(verify=False)
    if request is None:
        has_bare_newlines = starttls and not starttls.endswith(b"\r\n")
        request = b"NOOP\n" if has_bare_newlines else b"NOOP\r\n"
    return Profile(greeting or b"", request, starttls or b"", tls, server_tls, timeout)


def _served(handler: Handler, tls: TLSArgument | None) -> Handler:
    """Return a handler that starts TLS first, as ``bind`` does with ``tls``."""
    if tls is None:
        return handler

    async def start_tls_and_handle(sock: Socket) -> None:
        await sock.starttls(tls)
        await handler(sock)

    return start_tls_and_handle


class _Check:
    """The check of one handler."""

    def __init__(self, handler: Handler, profile: Profile, watchdog: Watchdog) -> None:
        self._handler = handler
        self._profile = profile
        self._watchdog = watchdog

    async def run_all(self, some: dict[str, Client], *, secure: bool, suffix: str = "") -> None:
        """Run clients one after the other."""
        for name, client in some.items():
            await self._run(f"{name}{suffix}", client, secure=secure)

    async def _run(self, name: str, client: Client, *, secure: bool) -> None:
        """Run one client, and raise ``AssertionError`` if the handler has a fault."""
        left = ""
        for number in range(_ROUNDS):
            before = Resources(self._watchdog)
            try:
                await self._run_once(client, secure=secure)
            except AssertionError as exc:
                raise AssertionError(f"{name}: {exc}") from exc.__cause__
            left = await self._left(before, self._profile.timeout if number == 0 else 0)
            if not left:
                return
        raise AssertionError(f"{name}: each connection leaves {left}")

    async def _left(self, before: Resources, seconds: float) -> str:
        """Wait up to ``seconds`` until nothing is left behind. Return what is left, as text."""
        if before.left():
            with self._watchdog.limit(seconds):
                while before.left():
                    gc.collect()  # an exception in a reference cycle may hold a socket
                    await trio.sleep(_POLL)
        return before.left()

    async def _run_once(self, client: Client, *, secure: bool) -> None:
        """Run a server for one client."""
        watched = WatchedHandler(self._handler, self._watchdog)
        logged = LoggedErrors()
        fault: AssertionError | None = None
        with logged.installed():
            async with trio.open_nursery() as nursery:
                with logged.of_tasks_started_here():
                    server = await bind(nursery, 0, watched, host="127.0.0.1")
                session = Session(server, watched, self._watchdog, self._profile, secure=secure)
                try:
                    await self._attend(client, session)
                except AssertionError as exc:
                    fault = exc
                finally:
                    session.abort()
                    await self._stop(session)
        self._judge(watched, logged.found(server), fault)

    async def _attend(self, client: Client, session: Session) -> None:
        """Run the client, and wait until the handler has ended."""
        await self._in_time(client, session)
        await self._in_time(Session.all_ended, session)

    async def _in_time(self, function: Client, session: Session) -> None:
        seconds = self._profile.timeout
        with self._watchdog.limit(seconds) as scope:
            await function(session)
        if scope.cancelled_caught:
            raise AssertionError(f"{session.waiting} (waited {format_seconds(seconds)})")

    async def _stop(self, session: Session) -> None:
        """Cancel the handlers that still run. Abandon those that do not end."""
        session.server.stop(grace=0)
        with self._watchdog.limit(self._profile.timeout) as scope:
            await session.server.wait_closed()
        if scope.cancelled_caught:
            session.watched.abandon()

    def _judge(
        self, watched: WatchedHandler, errors: list[BaseException], fault: AssertionError | None
    ) -> None:
        """Raise the fault that is closest to the cause."""
        if watched.is_stuck:
            ran = format_seconds(self._profile.timeout)
            raise AssertionError(f"the handler ran for {ran} without a checkpoint")
        if errors and not watched.is_abandoned:
            name = type(errors[0]).__name__
            message = f"the handler raised {name}: {text(errors[0])}"
            if isinstance(errors[0], _PEER_ERRORS):
                message += " (not raised by this connection, so bind logs it as a handler's error)"
            raise AssertionError(message) from errors[0]
        if fault is not None:
            raise fault
