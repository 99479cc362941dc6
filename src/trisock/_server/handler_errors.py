"""What a handler raised: log the errors, and raise the rest."""

from __future__ import annotations

import logging
from collections import Counter

import trio

from .. import _guard
from .._errors import IdleTimeoutError, IncompleteReadError, ServerClosing
from .._net.connection import Connection
from .._text import message_without_peer

_logger = logging.getLogger("trisock.server")


def is_server_closing(failure: BaseException) -> bool:
    """Return whether the failure is ``ServerClosing``, alone or in a group: a normal end."""
    return all(type(leaf) is ServerClosing for leaf in _guard.leaves(failure))


def is_complete(connection: Connection, failure: BaseException) -> bool:
    """Return whether the handler had sent everything it meant to send when it failed.

    This is so if the peer ended the connection, or fell silent, between two messages.
    """
    return (
        type(failure) in (IncompleteReadError, IdleTimeoutError)
        and connection.caused(failure)
        and getattr(failure, "at_boundary", False)
    )


def log_or_raise(connection: Connection, failure: BaseException, counts: Counter[str]) -> None:
    """Log each ``Exception``, and raise the rest."""
    failure = _guard.stray_cancelled(failure) or failure
    errors, rest = _guard.split_errors(failure)
    if errors is not None:
        log(connection, errors, counts)
    if rest is failure:
        raise failure
    if rest is not None:
        raise rest from None


def log(connection: Connection, errors: BaseException, counts: Counter[str]) -> None:
    """Log and count the ``Exception``, or the group, that a handler raised."""
    leaves = [leaf for leaf in _guard.leaves(errors) if type(leaf) is not ServerClosing]
    if all(connection.caused(leaf) for leaf in leaves):
        counts["peer_errors"] += 1
        if not _guard.is_logged(_logger, logging.INFO):
            return
        why = "; ".join(dict.fromkeys(_reason(leaf) for leaf in leaves))
        message = "closed the connection with %s: %s"
        _guard.log(_logger, logging.INFO, message, str(connection.peer), why)
    else:
        counts["handler_errors"] += 1
        message = "the handler of %s failed"
        _guard.log(_logger, logging.ERROR, message, str(connection.peer), exc_info=errors)


def log_handshake(connection: Connection, exc: Exception) -> None:
    """Log a failed handshake of ``bind(tls=)``."""
    if connection.caused(exc):
        _guard.log(_logger, logging.INFO, "%s", _guard.text(exc))
    else:
        message = "the TLS handshake with %s failed"
        _guard.log(_logger, logging.ERROR, message, str(connection.peer), exc_info=exc)


def _reason(exc: BaseException) -> str:
    # A ClosedResourceError gets here only after an abort, by a broadcast or by the handler.
    if type(exc) is trio.ClosedResourceError:
        return "it was aborted"
    return message_without_peer(exc) or _guard.text(exc)
