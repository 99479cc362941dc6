"""Translate the arguments of Pluto's ``starttls`` into a ClientTLS or ServerTLS."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import trisock

from .blocking import describe

TLS = (
    str
    | Sequence[trisock.Certificate | Mapping[str, str | bytes]]
    | trisock.ClientTLS
    | trisock.ServerTLS
)
TLSOptions = Mapping[str, Any]
TLSResult = bool | tuple[Literal[True], str | None] | None

_OPTIONS = ("alpn", "early_data", "require_ecdhe")


@dataclasses.dataclass(frozen=True)
class Upgrade:
    """What a call of ``starttls`` asks for.

    Attributes:
      tls: the ``tls`` argument of ``trisock.Socket.starttls``.
      early_data: what to send directly after the handshake.
      returns_protocol: whether ``starttls`` also returns the negotiated protocol.
    """

    tls: trisock.TLSArgument
    early_data: bytes = dataclasses.field(default=b"", repr=False)
    returns_protocol: bool = False


def parse_upgrade(tls: TLS, options: TLSOptions | None) -> Upgrade:
    """Check the arguments of ``starttls``. As in Lua, an option that is ``None`` is not set.

    Raises ``TypeError`` or ``ValueError`` if an argument is invalid.
    """
    if options is None:
        return Upgrade(tls)
    if not isinstance(options, Mapping):
        raise TypeError(f"options must be a dict, not {describe(options)}")
    if not all(isinstance(name, str) and name in _OPTIONS for name in options):
        raise ValueError(f"starttls has only the options {', '.join(_OPTIONS)}")
    given = {name: value for name, value in options.items() if value is not None}
    early_data = _to_bytes(given.get("early_data", b""))
    require_ecdhe = given.get("require_ecdhe", False)
    if not isinstance(require_ecdhe, bool):
        raise TypeError(f"require_ecdhe must be True or False, not {describe(require_ecdhe)}")
    settings = {}
    if "alpn" in given:
        settings["alpn_protocols"] = given["alpn"]
    if isinstance(tls, (str, trisock.ClientTLS)):
        client = trisock.ClientTLS(tls) if isinstance(tls, str) else tls
        if require_ecdhe:
            settings["require_ecdhe"] = True
        role: trisock.TLSArgument = dataclasses.replace(client, **settings)
    else:
        if "early_data" in given or "require_ecdhe" in given:
            raise ValueError("early_data and require_ecdhe are options of a client")
        role = _server(tls, settings)
    return Upgrade(role, early_data, "alpn" in given)


def _server(tls: Any, settings: dict[str, Any]) -> trisock.TLSArgument:
    if not settings:
        return cast("trisock.TLSArgument", tls)
    if isinstance(tls, trisock.Certificate | Mapping | Sequence):
        return trisock.ServerTLS(cast("Any", tls), **settings)
    # A copy of a ServerTLS would miss a later reload of the original.
    raise TypeError(f"with {describe(tls)}, set its ALPN protocols, and not the option alpn")


def _to_bytes(data: object) -> bytes:
    if isinstance(data, str):
        return data.encode()
    if isinstance(data, (bytes, bytearray, memoryview)):
        return bytes(data)
    raise TypeError(f"early_data must be a str or bytes, not {describe(data)}")
