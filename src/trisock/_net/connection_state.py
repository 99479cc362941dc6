"""ConnectionState: whether a connection is plain text, changing, TLS, relayed, or ended."""

from __future__ import annotations

import enum


class ConnectionState(enum.Enum):
    """The state of a connection."""

    PLAIN = enum.auto()
    CHANGING = enum.auto()  # starttls or stoptls is in progress
    TLS = enum.auto()
    RELAYED = enum.auto()  # relay has the connection, and will close it
    CLOSING = enum.auto()
    CLOSED = enum.auto()
    ABORTED = enum.auto()  # closed by ``abort``


class UnreadError(RuntimeError):
    """A RuntimeError that supports weak references, which ``Transport.remember_failure`` needs."""
