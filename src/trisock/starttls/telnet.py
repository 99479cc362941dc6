"""The option START_TLS of Telnet."""

from __future__ import annotations

from .conversation import Exactly, Names, Negotiation, Part, Send, Until, refused

_IAC, _DONT, _DO, _WONT, _WILL, _SB, _SE = (
    b"\xff",
    b"\xfe",
    b"\xfd",
    b"\xfc",
    b"\xfb",
    b"\xfa",
    b"\xf0",
)
_START_TLS = b"\x2e"
_FOLLOWS = b"\x01"


def telnet_client(names: Names) -> Negotiation:
    """Ask for TLS by the option START_TLS (draft-altman-telnet-starttls-02).

    The greeting is empty. Text from the server is read and dropped. Other options are refused
    before we announce TLS, and dropped afterwards.
    """
    command = yield from _command()
    # C-Kermit drops a ClientHello that arrives together with our FOLLOWS. It sends its own FOLLOWS
    # as soon as it has read our WILL. So if the server asks first, we send WILL and FOLLOWS in one
    # piece: once the server's FOLLOWS arrives, the server has read ours, and a ClientHello is safe.
    answer = _IAC + _WILL + _START_TLS
    if command not in (_DO + _START_TLS, _DONT + _START_TLS):
        yield Send(answer)
        answer = b""
    while command != _DO + _START_TLS:
        verb, option = command[:1], command[1:2]
        if option == _START_TLS and verb == _DONT:
            raise refused(_IAC + command)
        if verb == _DO:
            yield Send(_IAC + _WONT + option)
        elif verb == _WILL:
            yield Send(_IAC + _DONT + option)
        command = yield from _command()
    yield Send(answer + _IAC + _SB + _START_TLS + _FOLLOWS + _IAC + _SE)
    while (command := (yield from _command())) != _SB + _START_TLS + _FOLLOWS:
        if command == _DONT + _START_TLS:
            raise refused(_IAC + command)
    return b""


def _command() -> Part[bytes]:
    """Return the next command, without IAC: the verb, and its option or content (RFC 854).

    A subnegotiation is returned without the IAC SE at its end.
    """
    while True:
        yield Until(_IAC)
        verb = yield Exactly(1)
        if verb in (_DO, _DONT, _WILL, _WONT):
            return verb + (yield Exactly(1))
        if verb == _SB:
            return verb + (yield from _subnegotiation())


def _subnegotiation() -> Part[bytes]:
    """Return the content of a subnegotiation. In it, IAC IAC stands for a byte 255 (RFC 855)."""
    content = b""
    while True:
        content += yield Until(_IAC)
        end = yield Exactly(1)
        if end == _SE:
            return content[:-1]
        if end != _IAC:
            content += end
