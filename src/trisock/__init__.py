"""A socket library for Trio: start in plain text, upgrade to TLS on the same connection."""

from . import starttls
from ._address import Address
from ._arguments import Buffer
from ._connect import connect, connect_unix
from ._errors import (
    IdleTimeoutError,
    IncompleteReadError,
    LimitExceededError,
    ServerClosing,
    StartTLSError,
    TLSError,
)
from ._net.iterators import Frames, LineBatches, Lines
from ._net.proxy_header import ProxyHeader
from ._net.proxy_tlvs import ProxySSL
from ._net.relay import relay
from ._net.socket import ConnectionInfo, Socket
from ._server.listener import Listener, listen, listen_nowait, listen_unix, listen_unix_nowait
from ._server.server import Handler, Server, bind
from ._server.service import Service, open_service, run
from ._server.stats import ServerStats
from ._tls.certificate import Certificate
from ._tls.info import TLSInfo
from ._tls.roles import ClientTLS, ServerTLS, TLSArgument
from ._udp.datagram import Datagram
from ._udp.endpoint import UDPInfo
from ._udp.opening import connect_udp, connect_udp_nowait, open_udp, open_udp_nowait
from ._udp.socket import UDPSocket

__version__ = "0.1.0"

__all__ = [
    "Address",
    "Buffer",
    "Certificate",
    "ClientTLS",
    "ConnectionInfo",
    "Datagram",
    "Frames",
    "Handler",
    "IdleTimeoutError",
    "IncompleteReadError",
    "LimitExceededError",
    "LineBatches",
    "Lines",
    "Listener",
    "ProxyHeader",
    "ProxySSL",
    "Server",
    "ServerClosing",
    "ServerStats",
    "ServerTLS",
    "Service",
    "Socket",
    "StartTLSError",
    "TLSArgument",
    "TLSError",
    "TLSInfo",
    "UDPInfo",
    "UDPSocket",
    "bind",
    "connect",
    "connect_udp",
    "connect_udp_nowait",
    "connect_unix",
    "listen",
    "listen_nowait",
    "listen_unix",
    "listen_unix_nowait",
    "open_service",
    "open_udp",
    "open_udp_nowait",
    "relay",
    "run",
    "starttls",
]
