"""Negotiations of trisock.starttls without I/O: what each side sends, and when it refuses."""

from __future__ import annotations

import pytest

import trisock
from helpers.starttls_conversations import (
    CANCEL_REQUEST,
    CLIENT_CONVERSATIONS,
    GSSENC_REQUEST,
    LDAP_SUCCESS,
    MYSQL_FLAGS,
    MYSQL_GREETING,
    SERVER_CONVERSATIONS,
    SSL_REQUEST,
    XMPP_FEATURES,
    XMPP_GREETING,
    XMPP_TLS,
    Replay,
    client,
    mysql_greeting,
    packet_of,
    said_by_peer,
    said_by_us,
    server,
)
from trisock.starttls.conversation import Names, Send
from trisock.starttls.xmpp import xmpp_client

HELLO = b"220 ready\r\n"
EHLO_OK = b"250-x\r\n250 STARTTLS\r\n"
CAPABLE = b"* CAPABILITY IMAP4rev1 STARTTLS\r\na1 OK done\r\n"
SIEVE = b'"STARTTLS"\r\nOK\r\n'


def test_the_client_table_has_every_protocol() -> None:
    assert set(CLIENT_CONVERSATIONS) == set(trisock.starttls.PROTOCOLS)
    assert set(SERVER_CONVERSATIONS) < set(trisock.starttls.PROTOCOLS)


@pytest.mark.parametrize("protocol", CLIENT_CONVERSATIONS)
def test_a_client_asks_for_tls_as_the_protocol_says(protocol: str) -> None:
    conversation = CLIENT_CONVERSATIONS[protocol]
    replay = Replay(client(protocol), said_by_peer(conversation))
    assert replay.refusal is None
    assert replay.sent == said_by_us(conversation)
    assert replay.unread == b""


@pytest.mark.parametrize("protocol", SERVER_CONVERSATIONS)
def test_a_server_offers_tls_as_the_protocol_says(protocol: str) -> None:
    conversation = SERVER_CONVERSATIONS[protocol]
    replay = Replay(server(protocol), said_by_peer(conversation))
    assert replay.refusal is None
    assert replay.sent == said_by_us(conversation)
    assert replay.unread == b""


@pytest.mark.parametrize(
    ("protocol", "greeting"),
    [
        ("smtp", b"220-mx.example.org\r\n220 ready"),
        ("imap", b"* OK [ALERT] {5}\r\nhe\r\no ready"),
        ("pop3", b"+OK ready <1.2@mx.example.org>"),
        ("sieve", b'"IMPLEMENTATION" "x"\r\n"SIEVE" {2}\r\nOK\r\n"StartTLS"\r\nOK "ready"'),
        ("ftp", b"220-welcome\r\n220\r\n 220 x\r\n220 ready"),
        ("nntp", b"201 ready"),
        ("mysql", MYSQL_GREETING),
        ("ldap", b""),
        ("postgres", b""),
        ("xmpp", b""),
        ("irc", b""),
        ("telnet", b""),
    ],
)
def test_the_greeting_is_returned(protocol: str, greeting: bytes) -> None:
    assert (
        Replay(client(protocol), said_by_peer(CLIENT_CONVERSATIONS[protocol])).greeting == greeting
    )


@pytest.mark.parametrize(
    ("protocol", "received", "offered", "reply"),
    [
        # SMTP and LMTP
        ("smtp", b"554-no\r\n554 go\r\n", None, b"554-no\r\n554 go"),
        ("smtp", b"hello\r\n", None, b"hello"),
        ("smtp", b"220_ready\r\n", None, b"220_ready"),
        ("smtp", b"220-a\r\n221 b\r\n", None, b"221 b"),
        ("smtp", HELLO + b"502 what?\r\n", False, b"502 what?"),
        ("smtp", HELLO + b"421 busy\r\n", None, b"421 busy"),
        ("lmtp", HELLO + b"501 [127.0.0.1]?\r\n", None, b"501 [127.0.0.1]?"),
        ("smtp", HELLO + b"250-STARTTLS\r\n250 XSTARTTLS\r\n", False, None),
        ("smtp", HELLO + EHLO_OK + b"454 not now\r\n", True, b"454 not now"),
        ("lmtp", HELLO + b"500\r\n", False, b"500"),
        # IMAP
        ("imap", b"* PREAUTH hello\r\n", False, b"* PREAUTH hello"),
        ("imap", b"* BYE {2}\r\nab\r\n", None, b"* BYE {2}\r\nab"),
        ("imap", b"* OK\r\na1 OK\r\n", False, None),
        ("imap", b"*\r\n", None, b"*"),
        ("imap", b"* OK x\r\n* BYE shutdown\r\n", None, b"* BYE shutdown"),
        ("imap", b"* OK x\r\n+ go on\r\n", None, b"+ go on"),
        ("imap", b"* OK x\r\na1 BAD what?\r\n", False, b"a1 BAD what?"),
        ("imap", b"* OK x\r\n* CAPABILITY XSTARTTLS\r\na1 OK x\r\n", False, None),
        ("imap", b"* OK x\r\n* STARTTLS\r\na1 OK x\r\n", False, None),
        ("imap", b"* OK x\r\n" + CAPABLE + b"a2 NO x\r\n", True, b"a2 NO x"),
        # other mail
        ("pop3", b"-ERR busy\r\n", None, b"-ERR busy"),
        ("pop3", b"+OK\r\n-ERR what?\r\n", None, b"-ERR what?"),
        ("pop3", b"+OK\r\n+OKAY\r\n", None, b"+OKAY"),
        ("sieve", b'BYE "busy"\r\n', None, b'BYE "busy"'),
        ("sieve", b'"SIEVE" "STARTTLS"\r\nOK\r\n', False, None),
        ("sieve", b'"STARTTLSX"\r\n{9}\r\nSTARTTLSX\r\nOK (X) "y"\r\n', False, None),
        ("sieve", SIEVE + b"NO {3}\r\n{9}\r\n", True, b"NO {3}\r\n{9}"),
        ("sieve", SIEVE + b"NO {4+}\r\nOK\r\n\r\n", True, b"NO {4+}\r\nOK\r\n"),
        # FTP and NNTP
        ("ftp", b"421 busy\r\n", None, b"421 busy"),
        ("ftp", b"busy\r\n", None, b"busy"),
        ("ftp", b"2200 ok\r\n", None, b"2200 ok"),
        ("ftp", HELLO + b"534-x\r\n534 no\r\n", None, b"534-x\r\n534 no"),
        ("nntp", b"400 busy\r\n", None, b"400 busy"),
        ("nntp", b"200 x\r\n580 no\r\n", None, b"580 no"),
        # LDAP
        ("ldap", b"\x31\x00", None, b"\x31\x00"),
        ("ldap", b"\x30\x80", None, b"\x30\x80"),
        ("ldap", b"\x30\x85", None, b"\x30\x85"),
        ("ldap", b"\x30\x00", None, b""),
        ("ldap", b"\x30\x03\x02\x01\x01", None, b"\x02\x01\x01"),
        ("ldap", b"\x30\x05\x02\x01\x01\x78\x00", None, b""),
        ("ldap", b"\x30\x05\x02\x01\x01\x78\x01", None, b"\x02\x01\x01\x78\x01"),
        (
            "ldap",
            LDAP_SUCCESS.replace(b"\x0a\x01", b"\x02\x01"),
            None,
            LDAP_SUCCESS[2:7] + b"\x02" + LDAP_SUCCESS[8:],
        ),
        (
            "ldap",
            LDAP_SUCCESS.replace(b"\x02\x01\x01", b"\x02\x01\x00"),
            None,
            b"\x02\x01\x00" + LDAP_SUCCESS[5:],
        ),
        (
            "ldap",
            LDAP_SUCCESS.replace(b"\x0a\x01\x00", b"\x0a\x01\x02"),
            False,
            LDAP_SUCCESS[2:9] + b"\x02" + LDAP_SUCCESS[10:],
        ),
        (
            "ldap",
            LDAP_SUCCESS.replace(b"\x0a\x01\x00", b"\x0a\x01\x34"),
            None,
            LDAP_SUCCESS[2:9] + b"\x34" + LDAP_SUCCESS[10:],
        ),
        # databases
        ("postgres", b"N", False, b"N"),
        ("postgres", b"E\0\0\0\5", None, b"E"),
        ("postgres", b"s", None, b"s"),
        ("mysql", packet_of(0, b"\xff\x15\x04Host blocked"), None, b"Host blocked"),
        ("mysql", packet_of(0, b""), None, b""),
        ("mysql", packet_of(0, b"\x09x\0" + bytes(30)), None, b"\x09x\0" + bytes(30)),
        ("mysql", packet_of(0, b"\x0a8.0"), None, b"\x0a8.0"),
        ("mysql", packet_of(0, b"\x0a8.0\0" + bytes(14)), None, b"\x0a8.0\0" + bytes(14)),
        ("mysql", mysql_greeting(MYSQL_FLAGS, 1), None, mysql_greeting(MYSQL_FLAGS, 1)[4:]),
        ("mysql", mysql_greeting(MYSQL_FLAGS & ~0x800), False, None),
        ("mysql", mysql_greeting(MYSQL_FLAGS & ~0x200), False, None),
        # XMPP
        ("xmpp", b"<a>", None, b"<a>"),
        ("xmpp", b"<stream/>", None, b"<stream/>"),
        ("xmpp", b"220 ready>", None, b"220 ready>"),
        (
            "xmpp",
            XMPP_GREETING.replace(b"version='1.0' ", b""),
            False,
            XMPP_GREETING.replace(b"version='1.0' ", b"")[21:],
        ),
        ("xmpp", XMPP_GREETING + b"</stream:stream>", None, b"</stream:stream>"),
        ("xmpp", XMPP_GREETING + b"<stream:error/>", None, b"<stream:error/>"),
        ("xmpp", XMPP_GREETING + b"<stream:features></a>", None, b"<stream:features></a>"),
        ("xmpp", XMPP_GREETING + b"<stream:features><starttls/></stream:features>", False, None),
        (
            "xmpp",
            XMPP_GREETING + XMPP_FEATURES + b"<failure " + XMPP_TLS,
            True,
            b"<failure " + XMPP_TLS,
        ),
        ("xmpp", XMPP_GREETING + b"<!--x-->", None, None),
        ("xmpp", XMPP_GREETING + b"<?x y?>", None, None),
        ("xmpp", b"<!DOCTYPE x [<!ENTITY a 'b'>]>", None, None),
        # others
        ("irc", b":x 691 * :no\r\n", None, b":x 691 * :no"),
        ("irc", b"\r\n:x\r\n:x 421 * STARTTLS :what?\r\n", False, b":x 421 * STARTTLS :what?"),
        ("irc", b"ERROR :bye\r\n", None, b"ERROR :bye"),
        ("telnet", b"\xff\xfe\x2e", None, b"\xff\xfe\x2e"),
        ("telnet", b"\xff\xfd\x2e\xff\xfe\x2e", None, b"\xff\xfe\x2e"),
    ],
)
def test_a_client_refuses_servers_that_do_not_start_tls(
    protocol: str, received: bytes, offered: bool | None, reply: bytes | None
) -> None:
    replay = Replay(client(protocol), received)
    assert replay.refusal is not None
    assert replay.refusal.offered is offered
    if reply is not None and protocol == "xmpp" and offered is False:
        assert (replay.refusal.reply or b"").endswith(reply)
    else:
        assert replay.refusal.reply == reply


@pytest.mark.parametrize(
    ("protocol", "received", "kind"),
    [
        ("smtp", b"554 no\r\n", "refused"),
        ("smtp", HELLO + b"502 what?\r\n", "not offered"),
        ("smtp", HELLO + b"421 busy\r\n", "refused"),
        ("smtp", HELLO + EHLO_OK + b"454 not now\r\n", "refused"),
        ("smtp", HELLO + b"EHLO\r\n", "violation"),
        ("imap", b"* PREAUTH hello\r\n", "not offered"),
        ("imap", b"* OK x\r\n* BYE shutdown\r\n", "closed"),
        ("ldap", LDAP_SUCCESS.replace(b"\x0a\x01\x00", b"\x0a\x01\x02"), "not offered"),
        ("postgres", b"E", "refused"),
        ("mysql", packet_of(0, b"\xff\x15\x04Host blocked"), "refused"),
        ("xmpp", XMPP_GREETING + b"</stream:stream>", "closed"),
        ("irc", b":x 421 * STARTTLS :what?\r\n", "not offered"),
        ("irc", b":x 691 * :no\r\n", "refused"),
        ("irc", b"ERROR :bye\r\n", "closed"),
    ],
)
def test_a_refusal_has_a_kind(protocol: str, received: bytes, kind: str) -> None:
    replay = Replay(client(protocol), received)
    assert replay.refusal is not None
    assert replay.refusal.kind == kind


@pytest.mark.parametrize("content", [b"{9}", b"x{1+}", b"{" * 50])
def test_a_literal_may_end_like_an_announcement(content: bytes) -> None:
    literal = b"{%d}\r\n%b\r\n" % (len(content), content)
    replay = Replay(client("imap"), b"* OK " + literal + CAPABLE + b"a2 OK\r\n")
    assert (replay.greeting, replay.unread) == (b"* OK " + literal[:-2], b"")
    replay = Replay(client("sieve"), b'"X" ' + literal + SIEVE + b"OK\r\n")
    assert (replay.refusal, replay.unread) == (None, b"")


def test_a_subnegotiation_of_telnet_may_hold_any_byte() -> None:
    odd = b"\xff\xfa\x18\xff\xff\xf0\xff\xfe\x2e\xff\xff\xff\xf0"
    received = odd + b"\xff\xfd\x2e" + odd + b"\xff\xfa\x2e\x01\xff\xf0"
    replay = Replay(client("telnet"), received)
    assert (replay.greeting, replay.unread) == (b"", b"")
    assert replay.sent == b"\xff\xfb\x2e\xff\xfa\x2e\x01\xff\xf0"


def test_an_ldap_length_may_have_the_long_form() -> None:
    response = b"\x30\x82\x00\x0d" + LDAP_SUCCESS[2:5] + b"\x78\x81\x07" + LDAP_SUCCESS[7:]
    replay = Replay(client("ldap"), response)
    assert (replay.greeting, replay.unread) == (b"", b"")


def test_telnet_data_may_contain_an_escaped_iac_before_se() -> None:
    """IAC IAC is the data byte 255, so the SE after it does not end the subnegotiation."""
    terminal_type = b"\xff\xfa\x18\xff\xff\xf0\xff\xfd\x2e\xff\xf0"
    replay = Replay(client("telnet"), terminal_type + b"\xff\xfe\x2e")
    assert replay.sent == b"\xff\xfb\x2e"
    assert replay.refusal is not None


def test_a_ping_with_a_bare_cr_is_not_answered() -> None:
    replay = Replay(client("irc"), b"PING a\rQUIT\r\n:x 670\r\n")
    assert replay.sent == b"STARTTLS\r\n"


@pytest.mark.parametrize(
    ("name", "domain"),
    [
        ("xn--bcher-kva.example", "bücher.example"),
        ("my_host.example", "my_host.example"),
        ("::1", "::1"),
        ("192.0.2.1", "192.0.2.1"),
    ],
)
def test_xmpp_names_the_domain_in_unicode(name: str, domain: str) -> None:
    request = next(xmpp_client(Names(b"localhost", name)))
    assert isinstance(request, Send)
    assert f" to='{domain}' ".encode() in request.data


def test_a_mysql_client_sends_only_flags_of_both_sides() -> None:
    replay = Replay(client("mysql"), mysql_greeting(0xA00))
    assert replay.sent[4:8] == (0xA00).to_bytes(4, "little")


def test_an_old_mysql_greeting_has_16_flags() -> None:
    content = b"\x0a5.0\0" + bytes(13) + (0xA00).to_bytes(2, "little")
    assert Replay(client("mysql"), packet_of(0, content)).refusal is None


TOO_MANY = 20
S = b"220 localhost ESMTP\r\n"


@pytest.mark.parametrize(
    ("protocol", "received", "sent"),
    [
        (
            "smtp",
            b"HELO\r\nHELO x\r\nEHLO \r\nSTARTTLS x\r\nNOOP\r\nLHLO x\r\nquit\r\n",
            b"501 Syntax error in the parameters\r\n250 localhost\r\n"
            + 2 * b"501 Syntax error in the parameters\r\n"
            + b"250 OK\r\n530 Must issue a STARTTLS command first\r\n221 Bye\r\n",
        ),
        (
            "smtp",
            TOO_MANY * b"\r\n",
            TOO_MANY * b"530 Must issue a STARTTLS command first\r\n"
            + b"421 localhost Too many commands\r\n",
        ),
        ("lmtp", b"EHLO x\r\nQUIT\r\n", b"530 Must issue a STARTTLS command first\r\n221 Bye\r\n"),
        (
            "imap",
            b"(\r\na\r\na NOOP\r\na logout\r\n",
            b"* BAD invalid tag\r\na NO [PRIVACYREQUIRED] STARTTLS first\r\na OK done\r\n"
            b"* BYE logging out\r\na OK done\r\n",
        ),
        ("imap", b"a LOGIN {3+}\r\nb STARTTLS\r\n", b"* BYE no literals without TLS\r\n"),
        (
            "imap",
            TOO_MANY * b"\r\n",
            TOO_MANY * b"* BAD invalid tag\r\n" + b"* BYE STARTTLS first\r\n",
        ),
        ("pop3", b"QUIT \r\n", b"+OK bye\r\n"),
        (
            "pop3",
            TOO_MANY * b"STLS x\r\n",
            TOO_MANY * b"-ERR STLS first\r\n" + b"-ERR too many commands\r\n",
        ),
        ("postgres", CANCEL_REQUEST, b""),
        ("postgres", b"\x16\x03\x01\x00\x05hello", b""),
        ("postgres", b"GET / HTTP/1.1", b""),
        ("postgres", TOO_MANY * GSSENC_REQUEST, TOO_MANY * b"N"),
    ],
)
def test_a_server_refuses_clients_that_do_not_start_tls(
    protocol: str, received: bytes, sent: bytes
) -> None:
    replay = Replay(server(protocol), received)
    assert replay.refusal is not None
    greeting = SERVER_CONVERSATIONS[protocol][0]
    assert replay.sent == (b"" if protocol == "postgres" else greeting.data) + sent
    assert replay.refusal.reply is None  # a client's line may hold a password


def test_a_postgres_session_without_tls_gets_an_error() -> None:
    replay = Replay(server("postgres"), GSSENC_REQUEST + b"\0\0\0\x29\0\3\0\0user\0")
    assert replay.refusal is not None
    assert replay.sent[:2] == b"NE"
    assert int.from_bytes(replay.sent[2:6], "big") == len(replay.sent) - 2
    assert b"\0C28000\0" in replay.sent
    assert SSL_REQUEST not in replay.sent
