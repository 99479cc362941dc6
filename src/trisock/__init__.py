"""A socket library for Trio: start in plain text, upgrade to TLS on the same connection."""

from ._address import Address
from ._connect import connect, connect_unix
from ._errors import IncompleteReadError, LimitExceededError, TLSError
from ._net.lines import Lines
from ._net.socket import ConnectionInfo, Socket
from ._server.listener import Listener, listen, listen_nowait, listen_unix, listen_unix_nowait
from ._server.server import Server, ServerStats, bind
from ._tls.certificate import Certificate
from ._tls.info import TLSInfo
from ._tls.roles import ClientTLS, ServerTLS

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
