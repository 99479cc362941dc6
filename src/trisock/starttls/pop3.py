"""STARTTLS of POP3."""

from __future__ import annotations

from .conversation import (
    CRLF,
    MAX_COMMANDS,
    CheckQuiet,
    Line,
    Names,
    Negotiation,
    Send,
    client_quit,
    refused,
    too_many_commands,
    unwelcome,
)


def pop3_client(names: Names) -> Negotiation:
    """Ask for TLS by STLS (RFC 2595, section 4)."""
    greeting = yield Line()
    if not _is_ok(greeting):
        raise unwelcome(greeting)
    yield Send(b"STLS" + CRLF)
    reply = yield Line()
    if not _is_ok(reply):
        raise refused(reply)
    return greeting


def pop3_server(names: Names) -> Negotiation:
    """Offer TLS, and refuse a login without it (RFC 2595, section 4)."""
    yield Send(b"+OK ready\r\n")
    for _ in range(MAX_COMMANDS):
        command = (yield Line()).rstrip(b" ").upper()
        if command == b"STLS":
            yield CheckQuiet()
            yield Send(b"+OK begin TLS\r\n")
            return b""
        if command == b"QUIT":
            yield Send(b"+OK bye\r\n")
            raise client_quit()
        if command == b"CAPA":  # RFC 2449, section 5
            yield Send(b"+OK\r\nSTLS\r\n.\r\n")
        else:
            yield Send(b"-ERR STLS first\r\n")
    yield Send(b"-ERR too many commands\r\n")
    raise too_many_commands()


def _is_ok(line: bytes) -> bool:
    return line.upper().split(b" ")[0] == b"+OK"
