"""STARTTLS of IRC."""

from __future__ import annotations

from .conversation import CRLF, Line, Names, Negotiation, Send, ended, not_offered, refused

_UNKNOWN_COMMAND = b"421"


def irc_client(names: Names) -> Negotiation:
    """Ask for TLS by STARTTLS (IRCv3, "tls", which advises against STARTTLS).

    The greeting is empty, because nothing that a server may send first is useful.
    """
    yield Send(b"STARTTLS" + CRLF)
    while True:
        line = yield Line()
        words = line.split(b" ")
        while words and words[0][:1] in (b"@", b":"):  # tags, and the name of the server
            words.pop(0)
        command = words[0].upper() if words else b""
        if command == b"670":
            return b""
        if command == b"PING" and b"\r" not in line:
            yield Send(b"PONG " + b" ".join(words[1:]) + CRLF)
        elif command == b"ERROR":
            raise ended(line)
        elif command == _UNKNOWN_COMMAND:
            raise not_offered(line)
        elif command[:1] in (b"4", b"6") and command.isdigit():
            raise refused(line)
