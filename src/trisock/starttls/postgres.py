"""The SSLRequest of PostgreSQL."""

from __future__ import annotations

from .conversation import (
    MAX_COMMANDS,
    CheckQuiet,
    Exactly,
    Names,
    Negotiation,
    Refusal,
    Send,
    not_offered,
    too_many_commands,
    unexpected,
)

# A message without a type: its length (8), then a code in place of the protocol's version.
_SSL_REQUEST = bytes.fromhex("00000008 04d2162f")
_GSSENC_REQUEST = bytes.fromhex("00000008 04d21630")
_CANCEL_REQUEST = bytes.fromhex("04d2162e")  # the code only: the length depends on the key

# An ErrorResponse: its type, its length, and its fields.
_ERROR_FIELDS = (
    b"SFATAL\0VFATAL\0C28000\0Mthis server requires TLS\0Hconnect with sslmode=verify-full\0\0"
)
_TLS_REQUIRED = b"E" + (4 + len(_ERROR_FIELDS)).to_bytes(4, "big") + _ERROR_FIELDS


def postgres_client(names: Names) -> Negotiation:
    """Ask for TLS by SSLRequest (PostgreSQL's documentation, "SSL Session Encryption").

    The greeting is empty, because the server does not speak first.
    """
    yield Send(_SSL_REQUEST)
    reply = yield Exactly(1)
    if reply == b"N":
        raise not_offered(reply)
    if reply == b"E":
        # Nobody has authenticated the text of this ErrorResponse (CVE-2024-10977): do not read it.
        raise Refusal("the server answered with an error", kind="refused", reply=reply)
    if reply != b"S":
        raise unexpected(reply)
    return b""


def postgres_server(names: Names) -> Negotiation:
    """Accept an SSLRequest, and refuse a session without one.

    A GSSENCRequest is declined, and the client may then send an SSLRequest. The source is the
    same as for ``postgres_client``.
    """
    for _ in range(MAX_COMMANDS):
        message = yield Exactly(8)
        if message == _SSL_REQUEST:
            yield CheckQuiet()
            yield Send(b"S")
            return b""
        if message == _GSSENC_REQUEST:
            yield Send(b"N")
            continue
        if message[:1] == b"\x16":
            raise Refusal("the client began TLS without a request")
        if message[4:] == _CANCEL_REQUEST:
            raise Refusal("the client sent a CancelRequest without TLS", kind="refused")
        if message[4:6] == b"\0\3":  # a StartupMessage of version 3
            yield Send(_TLS_REQUIRED)
            raise Refusal("the client began a session without TLS", kind="refused")
        raise Refusal("the client does not speak PostgreSQL's protocol")
    raise too_many_commands()
