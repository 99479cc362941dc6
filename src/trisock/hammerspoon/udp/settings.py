"""The settings of an hs.socket.udp object, and how they choose a host's address. No I/O."""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from ..._address import format_host_port

# The limits of hs.socket.udp's setBufferSize, by IP version, and the buffer size of a new object.
MAX_BUFFER_SIZE = {4: 65535, 6: 4294967295}
_DEFAULT_BUFFER_SIZE = 9216

VERSIONS = (4, 6)


@dataclass
class Settings:
    """The settings of an object. They are kept when the object is closed.

    Attributes:
      timeout: seconds that a send may take. Negative means no limit.
      callback: the read callback.
      broadcast: whether the object may send to broadcast addresses.
      reuse_port: whether the object shares its port with other sockets.
      enabled: the IP versions that the object uses.
      preferred: the IP version to choose if a host has both; ``None`` keeps the lookup's order.
      buffer_size: the maximum size of a received datagram, in bytes, for each IP version.
    """

    timeout: float
    callback: Callable[..., object] | None
    broadcast: bool = False
    reuse_port: bool = False
    enabled: set[int] = field(default_factory=lambda: set(VERSIONS))
    preferred: int | None = None
    buffer_size: dict[int, int] = field(
        default_factory=lambda: dict.fromkeys(VERSIONS, _DEFAULT_BUFFER_SIZE)
    )

    def set_buffer_size(self, size: int, version: object) -> None:
        """Set the buffer size of one IP version or of both. An invalid size means the maximum."""
        for each in [version] if version in VERSIONS else VERSIONS:
            limit = MAX_BUFFER_SIZE[each]
            self.buffer_size[each] = size if 0 <= size <= limit else limit

    def host_to_bind(self) -> str | None:
        """Return the local host that stands for all addresses of the enabled IP versions.

        Raises ``ValueError`` if no IP version is enabled.
        """
        if not self.enabled:
            raise ValueError("cannot open a socket: IPv4 and IPv6 are both disabled")
        if len(self.enabled) == 1:
            return "0.0.0.0" if 4 in self.enabled else "::"  # noqa: S104
        return None


def version_of(host: str) -> int:
    """Return the IP version of an address."""
    return 6 if ":" in host else 4


def choose_host(
    hosts: Sequence[str],
    versions: Collection[int],
    preferred: int | None,
    target: tuple[str, int],
) -> str:
    """Choose which of a host's addresses to use.

    Args:
      hosts: the addresses, in the order of the lookup.
      versions: the IP versions that can be used.
      preferred: the preferred IP version, or ``None`` to keep the order.
      target: the host and the port, for the error.

    Raises ``OSError`` (``EAFNOSUPPORT``) if no address can be used.
    """
    usable = [host for host in hosts if version_of(host) in versions]
    if not usable:
        found = " and ".join(f"IPv{version}" for version in sorted({*map(version_of, hosts)}))
        where = format_host_port(*target)
        why = f"cannot reach {where}: it has only {found}, which this object does not use"
        raise OSError(errno.EAFNOSUPPORT, why)
    return next((host for host in usable if version_of(host) == preferred), usable[0])
