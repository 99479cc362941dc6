"""LoggedErrors: what a server logs at ERROR, kept so that a test can raise it.

Only the log has all errors that we need: the errors of the server itself, and those errors of
handlers that were not caused by a peer.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Iterator

from .. import Server

# Further errors are only counted: their tracebacks would keep the data of many connections alive.
_MAX_KEPT = 100

_logger = logging.getLogger("trisock.server")

_current: contextvars.ContextVar[LoggedErrors | None] = contextvars.ContextVar(
    "trisock.testing", default=None
)


class LoggedErrors(logging.Handler):
    """A log handler that keeps the errors of one server.

    All servers share a logger. A server's tasks inherit the context in which ``bind`` was called,
    so a context variable tells whether the current task belongs to our server.
    """

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.errors: list[BaseException] = []
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the error of a record, if a task of our server logged it."""
        if _current.get() is not self:
            return
        self.count += 1
        if self.count <= _MAX_KEPT:
            error = record.exc_info[1] if record.exc_info else None
            self.errors.append(error or RuntimeError(record.getMessage()))

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Keep errors that are logged inside the block."""
        _logger.addHandler(self)
        try:
            yield
        finally:
            _logger.removeHandler(self)

    @contextlib.contextmanager
    def of_tasks_started_here(self) -> Iterator[None]:
        """Keep the errors of the server that is started inside this block."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def found(self, server: Server) -> list[BaseException]:
        """Return the kept errors. A further error says how many were not kept, or not logged."""
        found = list(self.errors)
        if self.count > _MAX_KEPT:
            found.append(RuntimeError(f"{self.count - _MAX_KEPT} more errors"))
        unlogged = server.stats().handler_errors - self.count
        if unlogged > 0:
            found.append(
                RuntimeError(
                    f"{unlogged} handlers failed, but logging is turned off for trisock.server, so "
                    "their errors are unknown"
                )
            )
        return found
