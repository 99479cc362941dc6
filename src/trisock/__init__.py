"""A socket library for Trio: one Socket that can turn to TLS in mid-conversation."""

from ._address import Address
from ._connect import connect, connect_unix
from ._errors import IncompleteReadError, LimitExceededError, TLSError
from ._listener import Listener, listen, listen_nowait, listen_unix, listen_unix_nowait
from ._server import Server, ServerStats, bind
from ._socket import ConnectionInfo, Lines, Socket
from ._tls import Certificate, ClientTLS, ServerTLS, TLSInfo

__all__ = [
    "Address",
    "Certificate",
    "ClientTLS",
    "ConnectionInfo",
    "IncompleteReadError",
    "LimitExceededError",
    "Lines",
    "Listener",
    "Server",
    "ServerStats",
    "ServerTLS",
    "Socket",
    "TLSError",
    "TLSInfo",
    "bind",
    "connect",
    "connect_unix",
    "listen",
    "listen_nowait",
    "listen_unix",
    "listen_unix_nowait",
]
