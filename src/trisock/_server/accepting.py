"""Acceptor: the accept loops of a server."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable

import trio

from .. import _guard
from .._net.connection import Connection
from .._net.syscalls import readable_poller
from .draining import drain
from .listening import ListeningSockets
from .slots import Slots

# After accepting this many connections from one listening socket, let other tasks run.
_ACCEPTS_PER_PASS = 64

# The errors of accept(2) when a resource has run out, with advice for the user, and the seconds to
# wait before the next attempt. The errors and the seconds are those of Trio's serve_listeners.
_RESOURCES = {
    errno.EMFILE: "raise the process's limit of open files (ulimit -n), or lower max_connections",
    errno.ENFILE: "raise the system's limit of open files (fs.file-max)",
    errno.ENOMEM: "the system is short of memory",
    errno.ENOBUFS: "the system is short of memory",
}
_RETRY_SECONDS = 0.1

# Clients can cause these errors. So log one line when the errors begin, and then one line per
# minute.
_REPORT_SECONDS = 60

_logger = logging.getLogger("trisock.server")


class Acceptor:
    """Accepts a server's connections, from all of its listening sockets.

    Args:
      listening: the listening sockets.
      slots: the limit on concurrent connections, or ``None``.
      closing: an event that is set before the server closes ``listening``.
      start: called with each connection. The server then owns the connection and its slot.
      background: runs the task that reports errors of accept(2).

    Invariant: ``_exhaustion`` is the errno of accept(2) while a task reports this error, and
    ``_exhausted_accepts`` counts the errors since the last report.
    """

    def __init__(
        self,
        listening: ListeningSockets,
        slots: Slots | None,
        closing: trio.Event,
        start: Callable[[Connection], None],
        background: trio.Nursery,
    ) -> None:
        self._listening = listening
        self._slots = slots
        self._closing = closing
        self._start = start
        self._background = background
        self._exhaustion: int | None = None
        self._exhausted_accepts = 0

    async def run(self) -> None:
        """Accept until this is cancelled."""
        async with trio.open_nursery() as nursery:
            for sock in self._listening.sockets:
                nursery.start_soon(self._accept_from, sock)

    async def drain(self) -> None:
        """Accept the clients in the backlog, and let no new clients in.

        If another process may hold the listening sockets, the backlog is left to that process.
        """
        if self._listening.has_ahead():
            await self._accept_one(self._listening.sockets[0])
        if self._listening.is_shared():
            return
        async with trio.open_nursery() as nursery:
            for sock in self._listening.sockets:
                nursery.start_soon(self._drain, sock)

    async def _drain(self, listening: socket.socket) -> None:
        async def accept_one() -> bool:
            while True:
                try:
                    return await self._accept_one(listening)
                except OSError as exc:
                    await self._wait_for_resources(exc)

        with contextlib.suppress(trio.ClosedResourceError):  # stop(grace=0) closed the sockets
            self._listening.check_open()
            await drain(listening, accept_one)
            # Close this socket before the other sockets are drained: without the filter, new
            # clients are blocked only for a moment.
            self._listening.close_one(listening)

    async def _accept_from(self, listening: socket.socket) -> None:
        """Accept from one listening socket.

        Unlike ``trio.serve_listeners``, this accepts many pending connections in one pass, which
        makes a short connection a third cheaper (row connections). If no connection is pending,
        poll(2) detects this at a fifth of the cost of a failed accept(2) (row connections1).
        """
        if self._closing.is_set():  # Server.stop was called before this task ran
            return
        self._listening.check_open()
        is_pending = readable_poller(listening.fileno())
        while True:
            try:
                for _ in range(_ACCEPTS_PER_PASS):
                    if not await self._accept_one(listening) or not is_pending(0):
                        break
                await trio.lowlevel.wait_readable(listening)
            except trio.ClosedResourceError:
                if self._closing.is_set():  # Server.stop was called
                    return
                raise
            except OSError as exc:
                await self._wait_for_resources(exc)

    async def _accept_one(self, listening: socket.socket) -> bool:
        """Accept one connection. Return False if none is pending.

        This acquires a slot before accepting, so that excess connections wait in the backlog.
        """
        if self._slots is not None:
            try:
                self._slots.acquire_nowait()
            except trio.WouldBlock:
                await self._slots.acquire()
        connection = None
        try:
            connection = self._listening.accept_from(listening)
        finally:
            if connection is None and self._slots is not None:
                self._slots.release()
        if connection is None:
            return False
        self._start(connection)
        return True

    async def _wait_for_resources(self, exc: OSError) -> None:
        """Wait before the next accept if a resource has run out. Raise any other error."""
        if exc.errno not in _RESOURCES:
            raise exc
        self._exhausted_accepts += 1
        if self._exhaustion is None:
            self._exhaustion = exc.errno
            self._background.start_soon(self._report_exhaustion, exc.errno)
        await trio.sleep(_RETRY_SECONDS)

    async def _report_exhaustion(self, number: int) -> None:
        """Log that accept failed: one line immediately, then one per minute with a count."""
        name, advice = f"{errno.errorcode[number]} ({os.strerror(number)})", _RESOURCES[number]
        message = "%s: accept failed with %s, so clients wait; %s"
        self._log(message, name, advice)
        self._exhausted_accepts = 0
        await trio.sleep(_REPORT_SECONDS)
        while self._exhausted_accepts:
            message = "%s: accept failed with %s %s times in the last %s seconds; %s"
            count, self._exhausted_accepts = self._exhausted_accepts, 0
            self._log(message, name, count, _REPORT_SECONDS, advice)
            await trio.sleep(_REPORT_SECONDS)
        self._exhaustion = None

    def _log(self, message: str, *args: object) -> None:
        _guard.log(_logger, logging.ERROR, message, str(self._listening), *args)
