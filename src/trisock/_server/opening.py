"""Opening: the steps before a connection's handler, namely the PROXY header and the handshake."""

from __future__ import annotations

import logging
import math
from collections import Counter

import trio

from .. import _guard
from .._net.connection import Connection
from .._net.deadlines import Deadlines
from .._tls.roles import TLSRole
from .admission import Admission
from .handler_errors import about, log_handshake
from .proxies import ProxyHeaderError, TrustedProxies

_logger = logging.getLogger("trisock.server")


class Opening:
    """Opens the connections of a server, each within one time limit.

    Args:
      tls: the TLS role of each connection, or ``None``.
      proxies: the proxies that must send a PROXY header first, or ``None``.
      admission: decides which clients are refused, or ``None`` to refuse none.
      timeout: the maximum seconds for the PROXY header and the handshake together, or ``math.inf``.
      https_compatible: as in ``Socket.starttls``.

    Attributes:
      tls: the TLS role of new connections.
      admission: decides which clients are refused.
      counts: the server's counters.
      deadlines: the deadlines of the connections that are being opened.
    """

    def __init__(
        self,
        tls: TLSRole | None,
        proxies: TrustedProxies | None,
        admission: Admission | None,
        timeout: float,
        *,
        https_compatible: bool,
    ) -> None:
        self.tls = tls
        self._proxies = proxies
        self.admission = admission
        self._timeout = timeout
        self._https_compatible = https_compatible
        self.counts: Counter[str] = Counter()
        self.deadlines = Deadlines(Connection.time_out_handshake)

    def is_empty(self) -> bool:
        """Return whether a connection needs neither a PROXY header nor a handshake."""
        return self.tls is None and self._proxies is None

    def refuses_early(self, connection: Connection) -> bool:
        """Refuse a connection right after its accept, if its address is not admitted.

        Behind a proxy, the client's address is not known yet, so ``run`` checks it later.
        """
        return self._proxies is None and self._refuses(connection)

    def _refuses(self, connection: Connection) -> bool:
        """If the client is not admitted, reset its connection and return True."""
        if self.admission is None:
            return False
        admitted = False
        try:
            admitted = self.admission.admit(connection)
        finally:
            if not admitted:
                self.counts["refused"] += 1
                connection.abort()
        return not admitted

    def limit(self, timeout: float) -> None:
        """Set a time limit in seconds for all openings that have none."""
        if self._timeout == math.inf:
            self._timeout = timeout
        self.deadlines.limit(timeout)

    async def run(self, connection: Connection) -> bool:
        """Open a connection. Return whether its handler may run."""
        timeout = self._timeout
        self.deadlines.add(connection, timeout)
        try:
            if self._proxies is not None and not (
                await self._receive_header(connection) and not self._refuses(connection)
            ):
                return False
            # From here on, connection.peer is the client's address, even behind a proxy.
            return self.tls is None or await self._handshake(connection, self.tls)
        except trio.Cancelled:  # the grace has ended
            self.counts["refused"] += 1
            raise
        finally:
            self.deadlines.discard(connection, timeout)

    async def _receive_header(self, connection: Connection) -> bool:
        """Receive the PROXY header. If that fails, reset the connection."""
        assert self._proxies is not None
        try:
            await self._proxies.receive_header(connection)
        except ProxyHeaderError as exc:
            self.counts[exc.counter] += 1
            message = "refused the connection with %s: %s"
            _guard.log(
                _logger,
                logging.INFO,
                message,
                str(connection.peer),
                str(exc),
                extra=about(connection),
            )
            connection.abort()
            return False
        return True

    async def _handshake(self, connection: Connection, tls: TLSRole) -> bool:
        try:
            await connection.starttls(
                tls, https_compatible=self._https_compatible, timeout=math.inf, close=False
            )
        except Exception as exc:
            self.counts["failed_handshakes"] += 1
            log_handshake(connection, exc)
            return False
        return True
