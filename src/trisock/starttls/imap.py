"""STARTTLS of IMAP."""

from __future__ import annotations

import re

from .conversation import (
    CRLF,
    MAX_COMMANDS,
    CheckQuiet,
    Farewell,
    Line,
    Names,
    Negotiation,
    Offered,
    Part,
    Refusal,
    Send,
    client_quit,
    ended,
    line_with_literals,
    not_offered,
    refused,
    too_many_commands,
    unexpected,
    unwelcome,
)

_CAPABILITIES = b"IMAP4rev1 STARTTLS LOGINDISABLED"

# A tag has any ASTRING-CHARs except "+" (RFC 9051, section 9).
_TAG = re.compile(rb"""[^\x00-\x20\x7f-\xff(){%*"\\+]{1,64}""")


def imap_client(names: Names) -> Negotiation:
    """Ask for TLS by CAPABILITY and STARTTLS (RFC 9051, section 6.2.1)."""
    greeting = yield from line_with_literals()
    kind = greeting.upper().split(b" ")[:2]
    if kind == [b"*", b"PREAUTH"]:
        # STARTTLS is impossible once the client is authenticated (RFC 9051, section 7.1.4).
        why = "the server has authenticated us already"
        raise Refusal(why, kind="not offered", offered=False, reply=greeting)
    if kind != [b"*", b"OK"]:
        raise unwelcome(greeting)
    yield Send(b"a1 CAPABILITY" + CRLF)
    final, untagged = yield from _responses(b"a1")
    if not _is_ok(final):
        raise not_offered(final)
    words = (line.upper().split(b" ") for line in untagged)
    if not any(each[:2] == [b"*", b"CAPABILITY"] and b"STARTTLS" in each for each in words):
        raise not_offered()
    yield Offered()
    yield Send(b"a2 STARTTLS" + CRLF)
    # Untagged responses are legal here, but ignored, because they are not protected.
    final, _ = yield from _responses(b"a2")
    if not _is_ok(final):
        raise refused(final, offered=True)
    return greeting


def imap_server(names: Names) -> Negotiation:
    """Offer TLS, and refuse a login without it (RFC 9051, sections 6.2.1, 6.2.3 and 7.1.5)."""
    yield Farewell(b"* BYE the server ends the session\r\n")
    yield Send(b"* OK [CAPABILITY " + _CAPABILITIES + b"] ready\r\n")
    for _ in range(MAX_COMMANDS):
        line = yield Line()
        tag, _, command = line.rstrip(b" ").partition(b" ")
        command = command.upper()
        if not _TAG.fullmatch(tag):
            yield Send(b"* BAD invalid tag\r\n")
        elif command == b"STARTTLS":
            yield CheckQuiet()
            yield Send(tag + b" OK begin TLS\r\n")
            return b""
        elif command == b"LOGOUT":
            yield Send(b"* BYE logging out\r\n" + tag + b" OK done\r\n")
            raise client_quit()
        elif command == b"CAPABILITY":
            untagged = b"* CAPABILITY " + _CAPABILITIES + CRLF
            yield Send(untagged + tag + b" OK done\r\n")
        elif command == b"NOOP":
            yield Send(tag + b" OK done\r\n")
        elif command.endswith(b"+}"):  # a literal follows at once: do not read it as a command
            yield Send(b"* BYE no literals without TLS\r\n")
            raise Refusal("the client sent a literal without TLS", kind="refused")
        else:
            yield Send(tag + b" NO [PRIVACYREQUIRED] STARTTLS first\r\n")
    yield Send(b"* BYE STARTTLS first\r\n")
    raise too_many_commands()


def _responses(tag: bytes) -> Part[tuple[bytes, list[bytes]]]:
    """Return the tagged response and the untagged responses before it (RFC 9051, section 7)."""
    untagged: list[bytes] = []
    while True:
        response = yield from line_with_literals()
        if response.startswith(tag + b" "):
            return response, untagged
        if not response.startswith(b"* "):
            raise unexpected(response)
        if response[:5].upper() == b"* BYE":
            raise ended(response)
        untagged.append(response)


def _is_ok(tagged: bytes) -> bool:
    return tagged.upper().split(b" ")[1] == b"OK"
