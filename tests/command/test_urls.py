"""The URLs that the command accepts."""

from __future__ import annotations

import pytest

from trisock import starttls
from trisock._command.urls import SCHEMES, parse


@pytest.mark.parametrize(
    ("url", "host", "port", "protocol", "tls"),
    [
        ("imap://mail.example.org", "mail.example.org", 143, "imap", True),
        ("IMAP://mail.example.org/", "mail.example.org", 143, "imap", True),
        ("imaps://mail.example.org", "mail.example.org", 993, None, True),
        ("smtp://mail.example.org:25", "mail.example.org", 25, "smtp", True),
        ("submission://mail.example.org", "mail.example.org", 587, "smtp", True),
        ("submissions://mail.example.org", "mail.example.org", 465, None, True),
        ("postgresql://db", "db", 5432, "postgres", True),
        ("https://[2001:db8::1]", "2001:db8::1", 443, None, True),
        ("tls://[2001:db8::1]:8443", "2001:db8::1", 8443, None, True),
        ("tls://[fe80::1%25eth0]:8443", "fe80::1%eth0", 8443, None, True),
        ("tls://[fe80::1%eth0]:8443", "fe80::1%eth0", 8443, None, True),
        ("tls://bücher.example:1", "bücher.example", 1, None, True),
        ("tcp://127.1:65535", "127.1", 65535, None, False),
    ],
)
def test_a_url_gives_host_port_protocol_and_tls(
    url: str, host: str, port: int, protocol: str | None, tls: bool
) -> None:
    target = parse(url)
    assert (target.host, target.port, target.path) == (host, port, None)
    assert (target.scheme.protocol, target.scheme.tls) == (protocol, tls)
    assert target.url == url


def test_every_protocol_with_starttls_is_a_scheme_with_its_first_port() -> None:
    for name, ports in starttls.PROTOCOLS.items():
        assert parse(f"{name}://host").port == ports[0]


def test_the_path_of_a_unix_socket_is_used_unchanged() -> None:
    target = parse("unix:/run/a?b@c#d")
    assert (target.path, target.scheme.tls) == ("/run/a?b@c#d", False)
    assert parse("UNIX:relative").path == "relative"


@pytest.mark.parametrize(
    ("url", "advice"),
    [
        ("mail.example.org", "write tls://HOST:PORT"),
        ("mail.example.org:993", "write tls://HOST:PORT"),
        ("", "write tls://HOST:PORT"),
        (
            "gopher://host",
            "'gopher://host': the scheme 'gopher' is not one of ftp, ftps, https, imap",
        ),
        ("http://host", "'http://host': http has no TLS: write https://HOST, or tcp://HOST:80"),
        ("imap://me:secret@host", "'host' names a user: give the host alone"),
        ("me:secret@host", "'host' has no scheme"),
        ("me:secret@x://host", "'x://host': the scheme 'x' is not one of"),
        ("https://host/path", "nothing may follow the host and the port"),
        ("https://host?query", "nothing may follow"),
        ("https://host#part", "nothing may follow"),
        ("https://host//", "nothing may follow"),
        ("imap://2001:db8::1", "write an IPv6 address in brackets"),
        ("imap://[::1", "write an IPv6 address in brackets"),
        ("imap://[::1]143", "write an IPv6 address in brackets"),
        ("imap://[127.0.0.1]", "brackets are for IPv6 addresses"),
        ("imap://", "has no host"),
        ("imap://:143", "has no host"),
        ("imap://host:", "a port is a number from 1 to 65535"),
        ("imap://host:0", "a port is a number from 1 to 65535"),
        ("imap://host:65536", "a port is a number from 1 to 65535"),
        ("imap://host:imap", "a port is a number from 1 to 65535"),
        ("imap://host:١٤٣", "a port is a number from 1 to 65535"),
        ("tls://host", "'tls://host' has no port, as in tls://HOST:PORT"),
        ("tcp://host", "has no port"),
        (
            "tls://*.example.org:1",
            "'*.example.org' is not a host name: wildcards are only for certificates",
        ),
        ("tls://127.1:443", "not a complete IPv4 address"),
        ("imap://host\x1b", "is not a host name"),
        ("imap://host\x1b[2J", r"imap://host\x1b[2J"),
        ("unix:", "a path must follow"),
        ("unix:a\0b", "a path must follow"),
    ],
)
def test_a_wrong_url_is_refused_with_advice(url: str, advice: str) -> None:
    with pytest.raises(ValueError, match=r".+") as caught:
        parse(url)
    assert advice in str(caught.value)
    assert "secret" not in str(caught.value)
    assert str(caught.value).isprintable()


def test_every_scheme_except_tcp_uses_tls() -> None:
    assert [name for name, scheme in SCHEMES.items() if not scheme.tls] == ["tcp"]
