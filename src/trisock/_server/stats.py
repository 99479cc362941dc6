"""ServerStats: the counters of a Server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerStats:
    """A snapshot of a Server's counters.

    Attributes:
      accepted: connections accepted since the start.
      active: connections that are open now, whether in the handshake, in the handler or closing.
      dropped: connections that died before they could be accepted.
      refused: connections that were accepted but not given to the handler, because their address
        was not admitted (``max_connections_per_host``, ``admit``) or the server was stopping.
      untrusted_proxies: connections refused because the peer is not in ``bind(trusted_proxies=)``.
      bad_proxy_headers: connections refused because a trusted proxy sent no valid PROXY header.
      failed_handshakes: TLS handshakes that failed or timed out, both of ``bind(tls=)`` and of a
        handler's own ``starttls``.
      handler_errors: connections whose handler raised an ``Exception`` that the peer did not cause.
        Each exception is logged with its traceback.
      peer_errors: connections whose handler ended with an error that the peer can cause: the peer
        vanished, violated the TLS protocol, or sent a line that was too long.
      aborted: connections that ``broadcast`` aborted because they were too slow.
      cancelled: handlers that were cancelled, for example because the grace of ``stop`` had ended.
    """

    accepted: int = 0
    active: int = 0
    dropped: int = 0
    refused: int = 0
    untrusted_proxies: int = 0
    bad_proxy_headers: int = 0
    failed_handshakes: int = 0
    handler_errors: int = 0
    peer_errors: int = 0
    aborted: int = 0
    cancelled: int = 0
