"""STARTTLS for each protocol: everything that comes before the TLS handshake.

``upgrade`` is the client's side, and ``accept`` the server's::

    sock = await trisock.connect("mail.example.org", 143)
    greeting = await trisock.starttls.upgrade(sock, "imap")
    await sock.send(b"a CAPABILITY\\r\\n")  # ask again: do not trust what came before TLS

``connect(host, starttls="imap")`` connects and upgrades in one step.
"""

from .client import PROTOCOLS, upgrade
from .server import accept

__all__ = ["PROTOCOLS", "accept", "upgrade"]
