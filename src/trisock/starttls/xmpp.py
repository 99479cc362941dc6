"""STARTTLS of XMPP, for clients and between servers."""

from __future__ import annotations

from xml.parsers import expat

import idna

from .conversation import (
    Names,
    Negotiation,
    Offered,
    Part,
    Refusal,
    Send,
    Until,
    ended,
    not_offered,
    refused,
    unexpected,
)

_STREAM = "http://etherx.jabber.org/streams stream"
_FEATURES = "http://etherx.jabber.org/streams features"
_TLS = "urn:ietf:params:xml:ns:xmpp-tls "


def xmpp_client(names: Names) -> Negotiation:
    """Ask for TLS as a client (RFC 6120, section 5.4)."""
    return _negotiate(_domain("xmpp", names), "jabber:client")


def xmpp_server_client(names: Names) -> Negotiation:
    """Ask for TLS as a server that connects to another one (RFC 6120, section 5.4)."""
    return _negotiate(_domain("xmpp-server", names), "jabber:server")


def _negotiate(domain: str, namespace: str) -> Negotiation:
    header = (
        f"<?xml version='1.0'?><stream:stream to='{domain}' version='1.0' "
        f"xmlns='{namespace}' xmlns:stream='http://etherx.jabber.org/streams'>"
    )
    yield Send(header.encode())
    stream = _Stream()
    yield from stream.header()
    features = yield from stream.element()
    if features[0] != _FEATURES:
        raise unexpected(stream.received)
    if _TLS + "starttls" not in features[1:]:
        raise not_offered()
    yield Offered()
    yield Send(b"<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>")
    answer = yield from stream.element()
    if answer[0] != _TLS + "proceed":
        raise refused(stream.received, offered=True)
    return b""


def _domain(protocol: str, names: Names) -> str:
    """Return the server's name with U-labels instead of A-labels (RFC 7622, section 3.2).

    Raises ``ValueError`` if the name is unknown.
    """
    if names.server is None:
        raise ValueError(f"{protocol} needs the server's name: give it in tls")
    try:
        return idna.decode(names.server)
    except UnicodeError:  # an IPv6 address, or a name that IDNA does not know
        return names.server


class _Stream:
    """The server's XML stream.

    XMPP allows no DTD, comment or processing instruction (RFC 6120, section 11.1). Without a DTD,
    there are no entities to expand. The driver limits the size.

    ``received`` holds the bytes of the current element.
    """

    def __init__(self) -> None:
        self.received = b""
        # Start tags (the name and the attributes), and end tags (None). The handlers must not refer
        # to self, which would be a reference cycle.
        events: list[tuple[str, dict[str, str]] | None] = []
        parser = expat.ParserCreate("UTF-8", " ")
        parser.StartElementHandler = lambda name, attributes: events.append((name, attributes))
        parser.EndElementHandler = lambda name: events.append(None)
        parser.StartDoctypeDeclHandler = _forbidden
        parser.CommentHandler = _forbidden
        parser.ProcessingInstructionHandler = _forbidden
        # Newer versions of Expat wait for more data before they parse a tag with a ">" in an
        # attribute. Turn this off: the limits of the driver bound the work of parsing such a tag
        # again.
        getattr(parser, "SetReparseDeferralEnabled", bool)(False)
        self._events, self._parser = events, parser

    def header(self) -> Part[None]:
        """Receive the header of the stream (RFC 6120, section 4.7)."""
        event = yield from self._event()
        name, attributes = event or ("", {})
        if name != _STREAM:
            raise unexpected(self.received)
        if attributes.get("version", "0").partition(".")[0] in ("", "0"):
            raise not_offered(self.received)  # there are no features before version 1.0

    def element(self) -> Part[list[str]]:
        """Receive an element of the stream. Returns its name and the names of its children."""
        self.received = b""
        names: list[str] = []
        depth = 0
        while depth or not names:
            event = yield from self._event()
            if event is None and not depth:
                raise ended(self.received)
            if event is not None and depth < 2:
                names.append(event[0])
            depth += -1 if event is None else 1
        return names

    def _event(self) -> Part[tuple[str, dict[str, str]] | None]:
        while not self._events:
            data = yield Until(b">")
            self.received += data
            try:
                self._parser.Parse(data)
            except expat.ExpatError:
                raise Refusal("the server sent invalid XML", reply=self.received) from None
        return self._events.pop(0)


def _forbidden(*args: object) -> None:
    raise Refusal("the server sent XML that XMPP forbids")
