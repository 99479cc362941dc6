"""The TLS roles of the command's connections."""

from __future__ import annotations

from pathlib import Path

from .. import ClientTLS


class Roles:
    """The TLS roles of all connections. They differ in the protocols that they offer by ALPN.

    Args:
      ca: the file of the authorities to trust instead of the system's, or ``None``.
      name: the name to verify instead of each URL's host, or ``None``.

    Raises ``OSError`` if the file cannot be read, and ``ValueError`` if an argument is invalid.
    """

    def __init__(self, ca: Path | None, name: str | None) -> None:
        self.name = name
        role = ClientTLS(name, ca=ca)
        self._ca = role.ca  # read once
        self._roles: dict[tuple[tuple[str, ...], bool], ClientTLS] = {((), True): role}

    def role(self, alpn: tuple[str, ...], *, verify: bool = True) -> ClientTLS:
        """Return the role that offers these protocols."""
        found = self._roles.get((alpn, verify))
        if found is None:
            ca = self._ca if verify else None
            found = ClientTLS(self.name, ca=ca, alpn_protocols=alpn, verify=verify)
            self._roles[alpn, verify] = found
        return found
