"""The TLS roles of the command's connections."""

from __future__ import annotations

from .. import ClientTLS


class Roles:
    """The TLS roles of all connections. Roles differ in ALPN, and in whether they verify.

    Args:
      ca: the authorities to trust instead of the system's, in PEM, or ``None``.
      name: the name to verify instead of each URL's host, or ``None``.

    Both arguments are valid: they were checked when the command line was parsed.
    """

    def __init__(self, ca: bytes | None, name: str | None) -> None:
        self.name = name
        self._ca = ca
        self._roles: dict[tuple[tuple[str, ...], bool], ClientTLS] = {}

    def role(self, alpn: tuple[str, ...], *, verify: bool = True) -> ClientTLS:
        """Return the role that offers these protocols by ALPN."""
        found = self._roles.get((alpn, verify))
        if found is None:
            ca = self._ca if verify else None
            found = ClientTLS(self.name, ca=ca, alpn_protocols=alpn, verify=verify)
            self._roles[alpn, verify] = found
        return found
