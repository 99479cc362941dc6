"""trisock.starttls.accept: the server's side."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import ssl

import pytest
import trio
import trio.testing

import trisock
from helpers.pairs import closing, read_all, unix_pair
from helpers.server import bound, connect
from helpers.starttls_conversations import (
    GSSENC_REQUEST,
    SERVER_CONVERSATIONS,
    SSL_REQUEST,
    Heard,
)
from trisock import ClientTLS, ServerTLS, Socket, StartTLSError, TLSError
from trisock.starttls import accept
from trisock.testing import Script, serving


def client_script(protocol: str, *, byte_by_byte: bool = False) -> Script:
    steps = Script(byte_by_byte=byte_by_byte)
    for each in SERVER_CONVERSATIONS[protocol]:
        steps = steps.expect(each.data) if isinstance(each, Heard) else steps.send(each)
    return steps


async def fail(sock: Socket, protocol: str, tls: ServerTLS) -> StartTLSError:
    with pytest.raises(StartTLSError) as caught:
        await accept(sock, protocol, tls)
    assert sock.fileno() == -1
    assert caught.value.protocol == protocol
    assert caught.value.reply is None
    return caught.value


@pytest.mark.parametrize("byte_by_byte", [False, True])
@pytest.mark.parametrize("protocol", SERVER_CONVERSATIONS)
async def test_accept_starts_tls(
    protocol: str, byte_by_byte: bool, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = unix_pair()
    peer = client_script(protocol, byte_by_byte=byte_by_byte).starttls(client_tls).send(b"hello")
    async with closing(a, b), trio.open_nursery() as nursery:
        nursery.start_soon(peer, a)
        info = await accept(b, protocol, server_tls, hostname="localhost")
        assert info is b.tls
        assert await b.recv_exactly(5) == b"hello"


@pytest.mark.parametrize(
    ("hostname", "name"),
    [
        (None, socket.gethostname().encode()),
        ("mx_1.example.org", b"mx_1.example.org"),
        ("bücher.example", b"xn--bcher-kva.example"),
        ("[IPv6:2001:db8::1]", b"[IPv6:2001:db8::1]"),
        ("192.0.2.1", b"[192.0.2.1]"),
        ("fe80::1%lo", b"[IPv6:fe80::1]"),
    ],
)
async def test_a_server_names_itself(
    hostname: str | None, name: bytes, server_tls: ServerTLS
) -> None:
    a, b = unix_pair()
    async with closing(a, b), trio.open_nursery() as nursery:
        nursery.start_soon(
            Script().expect(b"220 " + name + b" LMTP\r\n").send(b"QUIT\r\n").expect(b"221 Bye\r\n"),
            a,
        )
        with pytest.raises(StartTLSError, match="the client quit without asking for TLS"):
            await accept(b, "lmtp", server_tls, hostname=hostname)


async def test_an_invalid_machine_name_is_replaced_with_localhost(
    monkeypatch: pytest.MonkeyPatch, server_tls: ServerTLS
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "my machine")
    a, b = unix_pair()
    async with closing(a, b):
        await a.send(b"QUIT\r\n")
        await fail(b, "smtp", server_tls)
        assert await read_all(a) == b"220 localhost ESMTP\r\n221 Bye\r\n"


async def test_a_wrong_argument_sends_nothing(client_tls: ClientTLS, server_tls: ServerTLS) -> None:
    a, b = unix_pair()
    async with closing(a, b):
        for protocol, tls, options, error, text in [
            (
                "ftp",
                server_tls,
                {},
                ValueError,
                "imap, pop3, postgres, not 'ftp'",
            ),
            ("smtp", client_tls, {}, TypeError, "TLS server's role, not a ClientTLS"),
            ("smtp", ClientTLS(), {}, TypeError, "TLS server's role, not a ClientTLS"),
            ("smtp", "mail.example.org", {}, TypeError, "TLS server's role, not a str"),
            ("smtp", ssl.create_default_context(), {}, TypeError, "role, not a SSLContext"),
            ("smtp", server_tls, {"hostname": "a b"}, ValueError, "not a host name"),
            ("smtp", server_tls, {"hostname": "a\r\n221 x"}, ValueError, "not a host name"),
            ("smtp", server_tls, {"hostname": "[::1]\r\n221 x"}, ValueError, "not a host name"),
            ("smtp", server_tls, {"hostname": b"a"}, TypeError, "hostname must be a str"),
            ("smtp", server_tls, {"timeout": "1"}, TypeError, "timeout must be a number"),
        ]:
            with pytest.raises(error, match=text):
                await accept(b, protocol, tls, **options)
        assert await a.peek() is None
        assert b.isopen()


@pytest.mark.parametrize(
    ("protocol", "said", "answer"),
    [
        ("smtp", b"EHLO x\r\nSTARTTLS\r\nMAIL FROM:<a@b>\r\n", b"250 STARTTLS\r\n"),
        ("lmtp", b"STARTTLS\r\nx", b" LMTP\r\n"),
        ("imap", b"a STARTTLS\r\nb LOGIN x y\r\n", b"] ready\r\n"),
        ("pop3", b"STLS\r\nUSER x\r\n", b"+OK ready\r\n"),
        ("postgres", SSL_REQUEST + b"\0", b""),
    ],
)
async def test_injected_bytes_end_the_connection_without_a_go_ahead(
    protocol: str, said: bytes, answer: bytes, server_tls: ServerTLS
) -> None:
    a, b = unix_pair()
    async with closing(a, b):
        await a.send(said)
        await a.send_eof()
        error = await fail(b, protocol, server_tls)
        received = await read_all(a)
    assert "unencrypted bytes followed the last message before TLS" in str(error)
    assert received.endswith(answer)
    assert bool(received) == bool(answer)


async def test_bytes_injected_later_fail_the_handshake(server_tls: ServerTLS) -> None:
    a, b = unix_pair()
    async with closing(a, b), trio.open_nursery() as nursery:
        peer = Script().expect(b"+OK ready\r\n").send(b"STLS\r\n").expect(b"+OK begin TLS\r\n")
        nursery.start_soon(peer.send(b"USER x\r\n"), a)
        with pytest.raises(TLSError, match="does not speak TLS"):
            await accept(b, "pop3", server_tls)
        assert b.fileno() == -1


async def test_an_error_never_quotes_the_client(server_tls: ServerTLS) -> None:
    a, b = unix_pair()
    async with closing(a, b):
        await a.send(b"PASS hunter2\r\n" * 20)
        error = await fail(b, "pop3", server_tls)
    assert "hunter2" not in str(error) + repr(error) + repr(vars(error))
    assert "20 commands" in str(error)


async def test_a_client_that_is_silent_is_closed_in_time(
    autojump_clock: trio.testing.MockClock, server_tls: ServerTLS
) -> None:
    a, b = unix_pair()
    async with closing(a, b):
        with pytest.raises(StartTLSError, match="the client did not ask for TLS within 5 seconds"):
            await accept(b, "pop3", server_tls, timeout=5)
        assert 4 < trio.current_time() <= 5


# What the client sends, how the server's answer ends, and how the server's farewell begins.
FAREWELLS = pytest.mark.parametrize(
    ("protocol", "said", "answered", "farewell"),
    [
        ("smtp", b"EHLO x\r\n", b"250 STARTTLS\r\n", b"421 localhost Service closing"),
        ("lmtp", b"LHLO x\r\n", b"250 STARTTLS\r\n", b"421 localhost Service closing"),
        ("imap", b"a NOOP\r\n", b"a OK done\r\n", b"* BYE the server ends the session"),
        ("pop3", b"CAPA\r\n", b".\r\n", b""),
        ("postgres", GSSENC_REQUEST, b"N", b""),
    ],
)


@FAREWELLS
async def test_a_client_gets_a_farewell_when_the_server_stops(
    protocol: str, said: bytes, answered: bytes, farewell: bytes, server_tls: ServerTLS
) -> None:
    async def handler(sock: Socket) -> None:
        await accept(sock, protocol, server_tls, hostname="localhost")

    async with bound(handler) as server:
        client = await connect(server)
        await client.send(said)
        await client.recv_until(answered)
        server.stop()
        rest = await read_all(client)
        await client.close()
    assert rest.startswith(farewell)
    assert rest.endswith(b"\r\n") == bool(farewell)
    assert server.stats().handler_errors == server.stats().peer_errors == 0


@FAREWELLS
async def test_a_client_gets_a_farewell_after_the_timeout(
    protocol: str,
    said: bytes,
    answered: bytes,
    farewell: bytes,
    server_tls: ServerTLS,
    autojump_clock: trio.testing.MockClock,
) -> None:
    a, b = unix_pair()
    async with closing(a, b):
        await a.send(said + b"half")
        with pytest.raises(StartTLSError) as caught:
            await accept(b, protocol, server_tls, hostname="localhost", timeout=60)
        assert caught.value.kind == "timeout"
        assert 59 <= trio.current_time() <= 60
        received = await read_all(a)
    _, _, rest = received.partition(answered)
    assert rest.startswith(farewell)
    assert rest.endswith(b"\r\n") == bool(farewell)


def fill(sock: Socket) -> None:
    """Send until the peer's receive buffer is full."""
    with socket.socket(fileno=os.dup(sock.fileno())) as raw, contextlib.suppress(BlockingIOError):
        while True:
            raw.send(b"x" * 1000)


async def test_a_client_that_does_not_read_gets_no_farewell_in_a_reply(
    server_tls: ServerTLS, autojump_clock: trio.testing.MockClock
) -> None:
    a, b = unix_pair()
    async with closing(a, b):
        fill(b)
        with pytest.raises(StartTLSError, match="within 20 seconds"):
            await accept(b, "smtp", server_tls, timeout=20)
        assert b"421" not in await read_all(a)


async def test_a_client_that_has_gone_gets_no_farewell(
    server_tls: ServerTLS, autojump_clock: trio.testing.MockClock
) -> None:
    a, b = unix_pair()
    async with closing(a, b), trio.open_nursery() as nursery:

        @nursery.start_soon
        async def leave() -> None:
            await a.recv_until(b"\n")
            a.socket.shutdown(socket.SHUT_RD)

        with pytest.raises(StartTLSError, match="within 5 seconds"):
            await accept(b, "smtp", server_tls, timeout=5)
        assert b.fileno() == -1


async def test_a_failure_is_logged_on_one_line(
    server_tls: ServerTLS, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(sock: Socket) -> None:
        await accept(sock, "pop3", server_tls)

    with caplog.at_level(logging.INFO):
        async with bound(handler) as server:
            client = await connect(server)
            await client.send(b"QUIT\r\n")
            assert (await read_all(client)).endswith(b"+OK bye\r\n")
            await client.close()
    assert server.stats().peer_errors == 1
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.exc_info is None
    assert record.getMessage().endswith(
        ": STARTTLS (pop3) failed: the client quit without asking for TLS"
    )


async def test_an_error_of_another_connection_is_the_handlers_fault(
    server_tls: ServerTLS, client_tls: ClientTLS
) -> None:
    async def handler(sock: Socket) -> None:
        await trisock.connect("127.0.0.1", other.server.port, starttls="pop3", tls=client_tls)

    async with serving(Script().send(b"-ERR\r\n")) as other, bound(handler) as server:
        client = await connect(server)
        await read_all(client)
        await client.close()
    assert server.stats().handler_errors == 1


async def test_a_stop_ends_the_wait_for_starttls(server_tls: ServerTLS) -> None:
    caught: list[BaseException] = []

    async def handler(sock: Socket) -> None:
        try:
            await accept(sock, "pop3", server_tls)
        except trisock.ServerClosing as exc:
            assert sock.fileno() == -1
            caught.append(exc)
            raise

    async with serving(handler) as s:
        client = await s.connect()
        await client.send(b"CAPA\r\n")
        assert await client.recv_until(b"\r\n.\r\n") == b"+OK ready\r\n+OK\r\nSTLS\r\n.\r\n"
        s.server.stop()
        assert await client.recv() == b""
        await client.close()
    assert len(caught) == 1
