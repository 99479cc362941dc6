"""Admission: decides by a client's address whether a server refuses the client."""

from __future__ import annotations

import inspect
import ipaddress
import logging
import math
from collections import Counter
from collections.abc import Callable

import trio

from .. import _guard
from .._address import Address, is_unix_address
from .._arguments import positive_int, quoted
from .._net.connection import Connection

# Clients can cause refusals. So log at most one line per minute for each reason.
_REPORT_SECONDS = 60

_logger = logging.getLogger("trisock.server")


class Admission:
    """Decides whether a client may connect, by the limit of its host and the program's function.

    Args:
      max_per_host: the maximum number of connections of one host, or ``None``.
      admit: the program's function, or ``None``.

    Raises TypeError or ValueError if an argument is invalid.

    Invariant: ``_hosts`` has the host of each connection that was admitted and not released.
    ``_numbers`` has the number of these connections for each host. So the number of open
    connections limits the memory.
    """

    def __init__(self, max_per_host: int | None, admit: Callable[[Address], bool] | None) -> None:
        if isinstance(max_per_host, bool):
            raise TypeError("max_connections_per_host must be an int or None, not a bool")
        if max_per_host is not None:
            max_per_host = positive_int("max_connections_per_host", max_per_host)
        if admit is not None and (not callable(admit) or inspect.iscoroutinefunction(admit)):
            raise TypeError(f"admit must be a plain function, not {quoted(admit)}")
        self._max_per_host = max_per_host
        self._admit = admit
        self._hosts: dict[Connection, str] = {}
        self._numbers: Counter[str] = Counter()
        crowded = f"its host has {max_per_host} connections already (max_connections_per_host)"
        self._crowded = _Report(f"refused the connection with %s: {crowded}", logging.INFO)
        self._failed = _Report("refused the connection with %s: admit failed", logging.ERROR)

    def admit(self, connection: Connection) -> bool:
        """Return whether the client may connect. If so, the caller must call ``release`` later.

        If the program's function raises an ``Exception``, the exception is logged, and this returns
        False.
        """
        address = connection.peer
        host = None
        if self._max_per_host is not None and not is_unix_address(address):
            host = _host(address)
            if self._numbers[host] >= self._max_per_host:
                self._crowded.log(address)
                return False
        if self._admit is not None and not self._ask(self._admit, address):
            return False
        if host is not None:
            self._hosts[connection] = host
            self._numbers[host] += 1
        return True

    def release(self, connection: Connection) -> None:
        """Stop counting a connection for its host. Ignores connections that were not counted."""
        host = self._hosts.pop(connection, None)
        if host is not None:
            self._numbers[host] -= 1
            if not self._numbers[host]:
                del self._numbers[host]

    def _ask(self, admit: Callable[[Address], bool], address: Address) -> bool:
        try:
            answer = admit(address)
            # An async function returns a coroutine, which is true and would admit everyone.
            if type(answer) is not bool:
                raise TypeError(f"admit must return a bool, not {quoted(answer)}")
        except BaseException as exc:
            errors, rest = _guard.split_errors(_guard.stray_cancelled(exc) or exc)
            try:
                if errors is not None:
                    self._failed.log(address, errors)
                if rest is not None:
                    _guard.raise_again(rest)
                return False
            finally:
                del errors, rest  # their tracebacks refer to this frame
        return answer


class _Report:
    """Logs an event at most once per minute, with the number of events not logged in between."""

    def __init__(self, message: str, level: int) -> None:
        self._message = message
        self._level = level
        self._next = -math.inf
        self._unreported = 0

    def log(self, peer: Address, exc_info: BaseException | None = None) -> None:
        now = trio.current_time()
        if now < self._next:
            self._unreported += 1
            return
        message, args = self._message, [str(peer)]
        if self._unreported:
            message += " (and %s more clients since the last report)"
            args.append(str(self._unreported))
        self._next, self._unreported = now + _REPORT_SECONDS, 0
        extra: dict[str, object] = {"peer": peer}
        _guard.log(_logger, self._level, message, *args, exc_info=exc_info, extra=extra)


def _host(address: Address) -> str:
    """Return what counts as one host: an IPv4 address, or an IPv6 network (/64).

    A provider gives each customer at least a /64. But on a link, all link-local addresses have the
    same /64, so each of them counts as a host of its own.
    """
    host = address.host
    if ":" not in host:
        return host
    ip = ipaddress.IPv6Address(host.partition("%")[0])
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return host if ip.is_link_local else ip.packed[:8].hex()
