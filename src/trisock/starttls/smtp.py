"""STARTTLS of SMTP and LMTP."""

from __future__ import annotations

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
    not_offered,
    refused,
    too_many_commands,
    unexpected,
    unwelcome,
)

# The replies of a server that does not know EHLO or LHLO (RFC 5321, section 3.2).
_NO_EXTENSIONS = (b"500", b"502")


def smtp_client(names: Names) -> Negotiation:
    """Ask for TLS by EHLO and STARTTLS (RFC 3207, section 4)."""
    return _client(names, b"EHLO")


def lmtp_client(names: Names) -> Negotiation:
    """Ask for TLS by LHLO and STARTTLS (RFC 2033, section 4.1, and RFC 3207)."""
    return _client(names, b"LHLO")


def _client(names: Names, hello: bytes) -> Negotiation:
    code, greeting = yield from _reply()
    if code != b"220":
        raise unwelcome(CRLF.join(greeting))
    yield Send(hello + b" " + names.own + CRLF)
    code, lines = yield from _reply()
    if code in _NO_EXTENSIONS:
        raise not_offered(CRLF.join(lines))
    if code != b"250":
        why = f"the server refused {hello.decode()}"
        raise Refusal(why, kind="refused", reply=CRLF.join(lines))
    # The first line holds the server's name, and each other line a keyword (RFC 5321, 4.1.1.1).
    if not any(line[4:].strip().upper() == b"STARTTLS" for line in lines[1:]):
        raise not_offered()
    yield Offered()
    yield Send(b"STARTTLS" + CRLF)
    code, lines = yield from _reply()
    if code != b"220":
        raise refused(CRLF.join(lines), offered=True)
    return CRLF.join(greeting)


def smtp_server(names: Names) -> Negotiation:
    """Offer TLS, and refuse mail without it (RFC 3207, section 4)."""
    return _server(names, b"ESMTP", (b"EHLO", b"HELO"))


def lmtp_server(names: Names) -> Negotiation:
    """Offer TLS, and refuse mail without it (RFC 2033, section 4.1, and RFC 3207)."""
    return _server(names, b"LMTP", (b"LHLO",))


def _server(names: Names, service: bytes, hellos: tuple[bytes, ...]) -> Negotiation:
    # RFC 5321, section 3.8: a server that ends the session sends 421 first.
    yield Farewell(b"421 %b Service closing transmission channel\r\n" % names.own)
    yield Send(b"220 %b %b\r\n" % (names.own, service))
    for _ in range(MAX_COMMANDS):
        line = yield Line()
        verb, _, argument = line.rstrip(b" ").partition(b" ")
        verb = verb.upper()
        if verb == b"STARTTLS" and not argument:
            yield CheckQuiet()
            yield Send(b"220 Go ahead\r\n")
            return b""
        if verb == b"QUIT":
            yield Send(b"221 Bye\r\n")
            raise client_quit()
        if verb in hellos and argument:
            keywords = b"" if verb == b"HELO" else b"250 STARTTLS\r\n"
            separator = b"-" if keywords else b" "
            yield Send(b"250%b%b\r\n%b" % (separator, names.own, keywords))
        elif verb in (*hellos, b"STARTTLS"):
            yield Send(b"501 Syntax error in the parameters\r\n")
        elif verb in (b"NOOP", b"RSET"):
            yield Send(b"250 OK\r\n")
        else:
            yield Send(b"530 Must issue a STARTTLS command first\r\n")
    yield Send(b"421 %b Too many commands\r\n" % names.own)
    raise too_many_commands()


def _reply() -> Part[tuple[bytes, list[bytes]]]:
    """Return the code and the lines of a reply (RFC 5321, section 4.2.1)."""
    lines: list[bytes] = []
    while True:
        line = yield Line()
        code, separator = line[:3], line[3:4]
        if not code.isdigit() or separator not in (b" ", b"-", b""):
            raise unexpected(line)
        if lines and code != lines[0][:3]:
            raise unexpected(line)  # each line of a reply has the same code
        lines.append(line)
        if separator != b"-":
            return code, lines
