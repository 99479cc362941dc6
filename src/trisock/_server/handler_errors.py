"""Handle what a handler raised: log each ``Exception``, and raise all other exceptions."""

from __future__ import annotations

import logging
from collections import Counter

import trio

from .. import _guard
from .._address import Address
from .._errors import IdleTimeoutError, IncompleteReadError, ServerClosing
from .._net.connection import Connection
from .._text import message_without_peer

_logger = logging.getLogger("trisock.server")

LEFT_OPEN = "the handler left a cancel scope open, such as a timeout inside an async generator"


def is_normal_end(connection: Connection, failure: BaseException) -> bool:
    """Return whether a handler may end with this exception, alone or in a group.

    Normal ends are ``ServerClosing``, and the peer's EOF between two messages. Both must come from
    the handler's own connection.
    """
    return all(_is_normal(connection, leaf) for leaf in _guard.leaves(failure))


def is_complete(connection: Connection, failure: BaseException) -> bool:
    """Return whether the handler had sent everything it meant to send when it failed.

    This is so if the peer ended the connection, or fell silent, between two messages.
    """
    return all(
        type(leaf) in (IncompleteReadError, IdleTimeoutError)
        and connection.caused(leaf)
        and getattr(leaf, "at_boundary", False)
        for leaf in _guard.leaves(failure)
    )


def is_cancelled(failure: BaseException) -> bool:
    """Return whether the handler was cancelled."""
    return any(type(leaf) is trio.Cancelled for leaf in _guard.leaves(failure))


def log_or_raise(connection: Connection, failure: BaseException, counts: Counter[str]) -> None:
    """Log each ``Exception`` in ``failure``, and raise all other exceptions."""
    failure = _guard.stray_cancelled(failure) or failure
    errors, rest = _guard.split_errors(failure)
    if errors is not None:
        log(connection, errors, counts)
    if rest is not None:
        _guard.raise_again(rest)


def log(connection: Connection, errors: BaseException, counts: Counter[str]) -> None:
    """Log and count the ``Exception``, or the group, that a handler raised."""
    leaves = [leaf for leaf in _guard.leaves(errors) if not _is_normal(connection, leaf)]
    if not leaves:  # only normal ends, in a group with something that is raised
        return
    extra = about(connection)
    if all(connection.caused(leaf) for leaf in leaves):
        counts["peer_errors"] += 1
        if not _guard.is_logged(_logger, logging.INFO):
            return
        why = "; ".join(dict.fromkeys(_reason(leaf) for leaf in leaves))
        message = "closed the connection with %s: %s"
        _guard.log(_logger, logging.INFO, message, str(connection.peer), why, extra=extra)
    else:
        counts["handler_errors"] += 1
        message, peer = "the handler of %s failed", str(connection.peer)
        _guard.log(_logger, logging.ERROR, message, peer, exc_info=errors, extra=extra)


def log_handshake(connection: Connection, exc: Exception) -> None:
    """Log a failed handshake of ``bind(tls=)``."""
    extra = about(connection)
    if connection.caused(exc):
        _guard.log(_logger, logging.INFO, "%s", _guard.text(exc), extra=extra)
    else:
        message, peer = "the TLS handshake with %s failed", str(connection.peer)
        _guard.log(_logger, logging.ERROR, message, peer, exc_info=exc, extra=extra)


def log_end_of_grace(address: Address, cancelled: int) -> None:
    """Log that handlers of the server on this address were cancelled."""
    message = "the server on %s stopped; number of handlers that it cancelled: %s"
    _guard.log(_logger, logging.INFO, message, str(address), str(cancelled))


def about(connection: Connection) -> dict[str, object]:
    """Return the ``extra`` argument for a log record: it sets ``record.peer`` to an Address."""
    return {"peer": connection.peer}


def _is_normal(connection: Connection, leaf: BaseException) -> bool:
    if type(leaf) is IncompleteReadError:
        return leaf.at_boundary and connection.caused(leaf)
    return type(leaf) is ServerClosing and connection.caused(leaf)


def _reason(exc: BaseException) -> str:
    # A ClosedResourceError gets here only after an abort, by a broadcast or by the handler.
    if type(exc) is trio.ClosedResourceError:
        return "it was aborted"
    return message_without_peer(exc) or _guard.text(exc)
