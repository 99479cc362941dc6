"""The client side of the MySQL protocol, after an upgrade to TLS."""

from __future__ import annotations

import hashlib

from helpers.real_servers import PASSWORD
from helpers.starttls_databases import mysql_packet, receive_mysql
from trisock import Socket

# CLIENT_LONG_PASSWORD, CLIENT_PROTOCOL_41, CLIENT_SSL, CLIENT_SECURE_CONNECTION and
# CLIENT_PLUGIN_AUTH.
_CAPABILITIES = 0x0001 | 0x0200 | 0x0800 | 0x8000 | 0x80000

_AUTH_SWITCH, _OK = b"\xfe", b"\0"


async def mysql_login(sock: Socket) -> None:
    """Log in as ``alice``, who needs TLS, and ask which cipher the connection uses.

    We name another way to authenticate, so the server sends a new nonce under TLS.
    """
    response = _CAPABILITIES.to_bytes(4, "little") + (1 << 24).to_bytes(4, "little")
    response += b"\x21" + bytes(23) + b"alice\0" + b"\0" + b"mysql_clear_password\0"
    await sock.send(mysql_packet(2, response))
    number, packet = await receive_mysql(sock)
    kind, plugin, nonce = packet[:1], *packet[1:].split(b"\0", 1)
    assert (kind, plugin) == (_AUTH_SWITCH, b"mysql_native_password")
    await sock.send(mysql_packet(number + 1, _native_password(nonce.removesuffix(b"\0"))))
    _, packet = await receive_mysql(sock)
    assert packet[:1] == _OK, packet
    await sock.send(mysql_packet(0, b"\3SHOW STATUS LIKE 'Ssl_version'"))
    packets = [(await receive_mysql(sock))[1] for _ in range(5)]
    assert sock.tls is not None
    assert packets[4].endswith(sock.tls.version.encode())


def _native_password(nonce: bytes) -> bytes:
    """Prove that we know the password (``mysql_native_password``)."""
    once = hashlib.sha1(PASSWORD.encode()).digest()
    proof = hashlib.sha1(nonce + hashlib.sha1(once).digest()).digest()
    return bytes(a ^ b for a, b in zip(once, proof, strict=True))
