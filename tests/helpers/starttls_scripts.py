"""Scripted servers of each STARTTLS protocol, which behave well, or badly in one way.

``openssl s_client`` and our client send different commands, so a script expects patterns.
"""

from __future__ import annotations

import re

from helpers.starttls_databases import MYSQL_GREETING, SUCCESS, ldap_message, mysql_packet
from helpers.starttls_servers import DO_START_TLS, TLS_FOLLOWS
from trisock.testing import Script

# A server sends bytes, and expects patterns. Each step has a name.
Steps = dict[str, bytes | re.Pattern[bytes]]


def _heard(pattern: bytes) -> re.Pattern[bytes]:
    return re.compile(pattern, re.DOTALL)


def _mail(verb: bytes) -> Steps:
    return {
        "greeting": b"220 localhost ready\r\n",
        "hello": _heard(verb + rb" [^\r\n]+\r\n"),
        "offer": b"250-localhost\r\n250 STARTTLS\r\n",
        "request": _heard(rb"STARTTLS\r\n"),
        "answer": b"220 go ahead\r\n",
    }


def _xmpp(namespace: bytes) -> Steps:
    return {
        "hello": _heard(rb"(<\?xml [^>]*>)?\s*<stream:stream [^>]*>"),
        "offer": _STREAM % namespace + b"<stream:features>"
        b"<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/></stream:features>",
        "request": _heard(rb"<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>"),
        "answer": b"<proceed xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>",
    }


_STREAM = (
    b"<?xml version='1.0'?><stream:stream from='localhost' id='1' version='1.0' "
    b"xmlns='jabber:%b' xmlns:stream='http://etherx.jabber.org/streams'>"
)


def good_server(protocol: str, *, s_client: bool) -> Steps:
    """Return the steps of a server that permits TLS, for ``s_client`` or for our client."""
    steps = dict(_GOOD[protocol])
    if protocol == "imap":
        for step, tag in _OUR_TAGS.items():
            reply = steps[step]
            assert isinstance(reply, bytes)
            steps[step] = reply.replace(b"TAG", b"." if s_client else tag)
    if protocol == "nntp" and not s_client:  # our client asks for TLS at once
        del steps["hello"], steps["offer"]
    return steps


# The tags of our IMAP client's commands. s_client's tag is a dot.
_OUR_TAGS = {"offer": b"a1", "answer": b"a2"}

_GOOD: dict[str, Steps] = {
    "smtp": _mail(b"EHLO"),
    "lmtp": _mail(b"LHLO"),
    "imap": {
        "greeting": b"* OK ready\r\n",
        "hello": _heard(rb"\S+ CAPABILITY\r\n"),
        "offer": b"* CAPABILITY IMAP4rev1 STARTTLS\r\nTAG OK done\r\n",
        "request": _heard(rb"\S+ STARTTLS\r\n"),
        "answer": b"TAG OK go ahead\r\n",
    },
    "pop3": {
        "greeting": b"+OK ready\r\n",
        "request": _heard(rb"STLS\r\n"),
        "answer": b"+OK go ahead\r\n",
    },
    "sieve": {
        "greeting": b'"IMPLEMENTATION" "test"\r\n"STARTTLS"\r\nOK "ready"\r\n',
        "request": _heard(rb"STARTTLS\r\n"),
        "answer": b'OK "go ahead"\r\n',
    },
    "ftp": {
        "greeting": b"220 ready\r\n",
        "request": _heard(rb"AUTH TLS\r\n"),
        "answer": b"234 go ahead\r\n",
    },
    "nntp": {
        "greeting": b"200 ready\r\n",
        "hello": _heard(rb"CAPABILITIES\r\n"),
        "offer": b"101 capabilities\r\nVERSION 2\r\nSTARTTLS\r\n.\r\n",
        "request": _heard(rb"STARTTLS\r\n"),
        "answer": b"382 go ahead\r\n",
    },
    "ldap": {
        "request": _heard(rb"0\x1d.{29}"),
        "answer": ldap_message(b"\1", 0x78, *SUCCESS),
    },
    "postgres": {"request": _heard(rb"\x00\x00\x00\x08\x04\xd2\x16\x2f"), "answer": b"S"},
    "mysql": {"greeting": MYSQL_GREETING, "request": _heard(rb"\x20\x00\x00\x01.{32}")},
    "xmpp": _xmpp(b"client"),
    "xmpp-server": _xmpp(b"server"),
    "irc": {"request": _heard(rb"STARTTLS\r\n"), "answer": b":localhost 670 * :go ahead\r\n"},
    "telnet": {
        "greeting": DO_START_TLS,
        "request": _heard(rb"\xff\xfb\x2e\xff\xfa\x2e\x01\xff\xf0"),
        "answer": TLS_FOLLOWS,
    },
}

PROTOCOLS = tuple(_GOOD)

# Each bad behaviour: the step that it replaces, and what the server sends instead.
_BAD: dict[str, dict[str, tuple[str, bytes]]] = {
    "smtp": {
        "unwelcome": ("greeting", b"554 no\r\n"),
        "not offered": ("offer", b"250-localhost\r\n250 SIZE\r\n"),
        "offered in other words": ("offer", b"250-STARTTLS\r\n250 XSTARTTLSX\r\n"),
        "refused": ("answer", b"454 not now\r\n"),
    },
    "imap": {
        "unwelcome": ("greeting", b"* BYE no\r\n"),
        "authenticated": ("greeting", b"* PREAUTH welcome\r\n"),
        "not offered": ("offer", b"* CAPABILITY IMAP4rev1\r\nTAG OK done\r\n"),
        "offered in other words": ("offer", b"* CAPABILITY XSTARTTLSX\r\nTAG OK done\r\n"),
        "refused": ("answer", b"TAG BAD no\r\n"),
    },
    "pop3": {
        "unwelcome": ("greeting", b"-ERR no\r\n"),
        "refused": ("answer", b"-ERR no\r\n"),
    },
    "sieve": {
        "unwelcome": ("greeting", b'"STARTTLS"\r\nBYE "no"\r\n'),
        "not offered": ("greeting", b'"IMPLEMENTATION" "test"\r\nOK "ready"\r\n'),
        "offered in other words": ("greeting", b'"IMPLEMENTATION" "STARTTLS"\r\nOK\r\n'),
        "refused": ("answer", b'NO "not now"\r\n'),
    },
    "ftp": {
        "unwelcome": ("greeting", b"421 no\r\n"),
        "refused": ("answer", b"534 no\r\n"),
    },
    "nntp": {
        "unwelcome": ("greeting", b"502 no\r\n"),
        "refused": ("answer", b"580 no\r\n"),
    },
    "ldap": {
        "not offered": ("answer", bytes.fromhex("300c 020101 7807 0a0102 0400 0400")),
        "refused": ("answer", bytes.fromhex("300c 020101 7807 0a0134 0400 0400")),
        "other message": ("answer", bytes.fromhex("300c 020102 7807 0a0100 0400 0400")),
    },
    "postgres": {
        "not offered": ("answer", b"N"),
        "refused": ("answer", b"E\0\0\0\x0bSFATAL\0\0"),
    },
    "mysql": {
        "unwelcome": ("greeting", mysql_packet(0, b"\xff\x69\x04no")),
        "not offered": ("greeting", MYSQL_GREETING.replace(b"\x00\x8a\x21", b"\x00\x82\x21")),
        "garbage": ("greeting", b"garbage\r\n"),
        "early close": ("greeting", b""),
        "injected": ("greeting", MYSQL_GREETING + mysql_packet(2, b"\0\0\0\2\0\0\0")),
    },
    "xmpp": {
        "not offered": (
            "offer",
            _STREAM % b"client" + b"<stream:features/></stream:stream>",
        ),
        "refused": ("answer", b"<failure xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>"),
        "comment": ("answer", b"<!-- <proceed -->"),
    },
    "irc": {
        "not offered": ("answer", b":localhost 421 * STARTTLS :Unknown command\r\n"),
        "refused": ("answer", b":localhost 691 * :no\r\n"),
    },
    "telnet": {
        "unwelcome": ("greeting", b"\xff\xfe\x2e"),
        "refused": ("answer", b"\xff\xfe\x2e"),
    },
}
_BAD["lmtp"], _BAD["xmpp-server"] = _BAD["smtp"], _BAD["xmpp"]

# In these protocols, s_client mistakes each chunk for a whole reply: if a reply arrives in pieces,
# s_client fails or waits forever.
_CHUNKS = ("sieve", "nntp", "ldap", "mysql", "xmpp", "xmpp-server", "telnet")

# Behaviours where the client must begin TLS.
GOOD_BEHAVIOURS = ("good", "byte by byte")


def behaviours(protocol: str) -> list[str]:
    """Return the names of all behaviours of a protocol's server."""
    good = list(GOOD_BEHAVIOURS)
    if protocol in _CHUNKS:
        good.remove("byte by byte")
    return list(dict.fromkeys([*good, *_BAD[protocol], "garbage", "early close", "injected"]))


def script(protocol: str, behaviour: str, *, s_client: bool) -> Script:
    """Return what the server does until TLS starts, or what a bad server does instead."""
    steps = good_server(protocol, s_client=s_client)
    if behaviour not in GOOD_BEHAVIOURS:
        _spoil(steps, *_bad_step(protocol, behaviour, steps), s_client=s_client)
    result = Script(byte_by_byte=behaviour == "byte by byte")
    for step in steps.values():
        if isinstance(step, bytes):
            result.send(step)
        else:
            result.expect(step)
    return result


def _bad_step(protocol: str, behaviour: str, steps: Steps) -> tuple[str, bytes]:
    """Return the step to replace, and what the server sends instead."""
    if behaviour in _BAD[protocol]:
        return _BAD[protocol][behaviour]
    if behaviour == "injected":
        answer = steps["answer"]
        assert isinstance(answer, bytes)
        return "answer", answer + b"injected\r\n"
    return "answer", {"garbage": b"garbage\r\n", "early close": b""}[behaviour]


def _spoil(steps: Steps, bad: str, said: bytes, *, s_client: bool) -> None:
    """Replace a step. If the new step sends nothing or ends an XMPP stream, it is the last step."""
    steps[bad] = said.replace(b"TAG", b"." if s_client else _OUR_TAGS.get(bad, b""))
    if not said or b"</stream:stream>" in said:
        names = list(steps)
        for name in names[names.index(bad) + bool(said) :]:
            del steps[name]
