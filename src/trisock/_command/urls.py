"""The URLs that the command accepts (no I/O)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .. import starttls
from .._address import to_ascii_host, to_tls_name
from .._text import printable

_HTTP = ("h2", "http/1.1")


@dataclass(frozen=True)
class Scheme:
    """What a scheme means.

    Attributes:
      port: the default port, or ``None`` if the URL must have a port.
      tls: whether the connection is encrypted: from the start, or after STARTTLS.
      protocol: the protocol that starts TLS by STARTTLS, or ``None``.
      alpn: the protocols to offer by ALPN, by the names that IANA has registered.
    """

    port: int | None
    tls: bool = True
    protocol: str | None = None
    alpn: tuple[str, ...] = ()


#: The schemes with a host. The schemes from ``starttls.PROTOCOLS`` begin in plain text.
SCHEMES: dict[str, Scheme] = {
    **{name: Scheme(ports[0], protocol=name) for name, ports in starttls.PROTOCOLS.items()},
    "submission": Scheme(587, protocol="smtp"),
    "postgresql": Scheme(5432, protocol="postgres"),
    "https": Scheme(443, alpn=_HTTP),
    "imaps": Scheme(993, alpn=("imap",)),
    "pop3s": Scheme(995, alpn=("pop3",)),
    "smtps": Scheme(465),
    "submissions": Scheme(465),
    "ftps": Scheme(990, alpn=("ftp",)),
    "nntps": Scheme(563, alpn=("nntp",)),
    "ldaps": Scheme(636),
    "ircs": Scheme(6697, alpn=("irc",)),
    "telnets": Scheme(992),
    "xmpps": Scheme(5223, alpn=("xmpp-client",)),  # XEP-0368
    "xmpps-server": Scheme(5270, alpn=("xmpp-server",)),
    "tls": Scheme(None),
    "tcp": Scheme(None, tls=False),
}


@dataclass(frozen=True)
class Target:
    """Where to connect, and how.

    Attributes:
      url: the URL as it was given, with unprintable characters escaped.
      scheme: what its scheme means.
      host: a name or an IP address; ``""`` for a Unix socket.
      port: the port; 0 for a Unix socket.
      path: the path of a Unix socket, or ``None``.
    """

    url: str
    scheme: Scheme
    host: str = ""
    port: int = 0
    path: str | None = None


def parse(url: str) -> Target:
    """Parse a URL. Raises ``ValueError`` with a text that says what to write instead."""
    shown = printable(url)
    if url[:5].lower() == "unix:":
        if not url[5:] or "\0" in url:
            raise ValueError(f"'{shown}': a path must follow 'unix:', as in unix:/run/server.sock")
        return Target(shown, Scheme(None, tls=False), path=url[5:])
    name, separator, rest = url.partition("://")
    if not separator:
        raise ValueError(
            f"'{_without_user(shown)}' has no scheme: write tls://HOST:PORT for TLS from the "
            "start, or the protocol, as in imap://HOST"
        )
    scheme = SCHEMES.get(name.lower())
    if scheme is None:
        raise ValueError(
            f"'{_without_user(shown)}': {_unknown_scheme(_without_user(printable(name)))}"
        )
    if "@" in rest:
        raise ValueError(f"'{_without_user(shown)}' names a user: give the host alone")
    rest = rest.removesuffix("/")
    if re.search(r"[/?#]", rest):
        raise ValueError(f"'{shown}' has a path: nothing may follow the host and the port")
    host, port = _split(rest, shown)
    if port is None:
        port = scheme.port
    if port is None:
        raise ValueError(f"'{shown}' has no port, as in {name.lower()}://HOST:PORT")
    try:
        check_host(host, tls=scheme.tls)
    except ValueError as exc:
        raise ValueError(f"'{shown}': {exc}") from None
    return Target(shown, scheme, host, port)


def check_host(host: str, *, tls: bool) -> None:
    """Raise ``ValueError`` unless the host is valid. The message quotes what was typed.

    (The library's own message does not quote a host that may be a key.)
    """
    try:
        (to_tls_name if tls else to_ascii_host)(host)
    except ValueError as exc:
        _, words, rest = str(exc).partition(" is not a host name")
        raise ValueError(f"'{printable(host)}'{words}{rest}") from None


def implicit_scheme(target: Target) -> str:
    """Return the scheme that uses TLS from the start, for a URL whose scheme uses STARTTLS."""
    name, _, _ = target.url.lower().partition(":")
    return f"{name}s" if f"{name}s" in SCHEMES else "tls"


def _split(rest: str, shown: str) -> tuple[str, int | None]:
    """Split ``host:port`` (RFC 3986, section 3.2). The port may be missing."""
    found = re.fullmatch(r"\[([^\[\]]*)\](?::(.*))?|([^:\[\]]*)(?::([^:]*))?", rest, re.DOTALL)
    if found is None:
        raise ValueError(
            f"'{shown}' has no valid host and port: write an IPv6 address in brackets, as in "
            "imap://[2001:db8::1]:143"
        )
    bracketed, bracketed_port, plain, plain_port = found.groups()
    if bracketed is not None:
        if ":" not in bracketed:
            raise ValueError(f"'{shown}': brackets are for IPv6 addresses")
        host, port = bracketed.replace("%25", "%", 1), bracketed_port  # RFC 6874, section 2
    else:
        host, port = plain, plain_port
    if not host:
        raise ValueError(f"'{shown}' has no host")
    return host, None if port is None else _to_port(port, shown)


def _to_port(text: str, shown: str) -> int:
    if re.fullmatch("[0-9]{1,5}", text) and 1 <= int(text) <= 65535:
        return int(text)
    raise ValueError(f"'{shown}': a port is a number from 1 to 65535")


def _without_user(url: str) -> str:
    # The part before the "@" may contain a password.
    return url.rpartition("@")[2]


def _unknown_scheme(name: str) -> str:
    if name.lower() == "http":
        return "http has no TLS: write https://HOST, or tcp://HOST:80 for plain text"
    return f"the scheme '{name}' is not one of {', '.join(sorted(SCHEMES))}, unix"
