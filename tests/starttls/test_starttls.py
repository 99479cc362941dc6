"""Turning to TLS in mid-conversation, whatever has come before, and what starttls is given."""

from __future__ import annotations

import contextlib
import ssl

import pytest
import trio
import trio.testing

import trisock
from helpers.authority import Authority
from helpers.pairs import closing, raw_pair, tcp_pair, tls_pair
from helpers.raw_tls import RawTLS, upgrade
from trisock import ClientTLS, ServerTLS, Socket, TLSError

# ---- the conversation ----


async def test_a_conversation_turns_to_tls_and_back(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    client, server = await tcp_pair()
    async with closing(client, server):
        for _ in range(2):
            await client.send(b"STARTTLS\r\n")
            assert await server.recv_until(b"\r\n") == b"STARTTLS\r\n"
            await server.send(b"220 go ahead\r\n")
            assert await client.recv_until(b"\r\n") == b"220 go ahead\r\n"
            infos = await upgrade(client, client_tls, server, server_tls)
            for sock, info in zip((client, server), infos, strict=True):
                assert sock.istls()
                assert sock.tls is info
                assert sock.info().tls is info
                assert info.version == "TLSv1.3"
                assert info.cipher.startswith("TLS_")
                assert info.server_hostname == "example.org"
                assert info.alpn_protocol is None
                assert not info.session_reused
                assert "TLSv1.3 open" in repr(sock)
            assert infos[0].peer_certificate
            assert infos[1].peer_certificate is None
            await client.send(b"secret")
            assert await server.recv() == b"secret"
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.stoptls)
                await client.stoptls()
            assert client.tls is server.tls is None
            await client.send(b"clear")
            assert await server.recv() == b"clear"


async def test_either_end_may_take_either_role(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    """RFC 4217, section 7: in active mode the one that accepts is the TLS client."""
    client, server = await tcp_pair()
    async with closing(client, server):
        await upgrade(server, client_tls, client, server_tls)
        assert (client.getside(), server.getside()) == ("client", "server")
        await client.send(b"x")
        assert await server.recv() == b"x"


async def test_recv_gives_one_record_at_a_time(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    client, server = await tls_pair(client_tls, server_tls)
    async with closing(client, server):
        await client.send(b"one")
        await client.send(b"two")
        await client.send(b"three", b"four")
        await trio.lowlevel.wait_readable(server.fileno())
        assert await server.peek() == b"one"
        assert await server.recv() == b"one"
        assert await server.recv(1) == b"t"
        assert await server.peek() == b"wo"
        server.unrecv(b"more")
        assert [await server.recv() for _ in range(3)] == [b"more", b"wo", b"threefour"]
        assert await server.peek() is None
        await client.close()
        for _ in range(2):
            assert await server.recv() == b""
            assert await server.peek() == b""
        assert not server.isopen()


async def test_a_context_that_fails_leaves_the_connection_as_it_was() -> None:
    class Bad(ssl.SSLContext):
        def wrap_bio(self, *_: object, **__: object) -> ssl.SSLObject:
            raise RuntimeError("a plug-in has failed")

    a, b = await tcp_pair()
    async with closing(a, b):
        a.unrecv(b"early")
        with pytest.raises(RuntimeError, match="plug-in"):
            await a.starttls(Bad(ssl.PROTOCOL_TLS_SERVER))
        assert await a.recv() == b"early"
    async with await trisock.listen(0, host="127.0.0.1") as listener:
        with pytest.raises(RuntimeError, match="plug-in"):  # and leaves nothing open
            await trisock.connect("127.0.0.1", listener.port, tls=Bad(ssl.PROTOCOL_TLS_SERVER))


async def test_send_eof_does_not_exist_under_tls(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    client, server = await tls_pair(client_tls, server_tls)
    async with closing(client, server):
        with pytest.raises(NotImplementedError, match="half-closed"):
            await client.send_eof()


async def test_reading_and_sending_go_on_at_the_same_time(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    client, server = await tls_pair(client_tls, server_tls)
    message = bytes(range(256)) * 8_000
    async with closing(client, server):

        async def both(sock: Socket) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sock.send, message)
                assert await sock.recv_exactly(len(message)) == message

        async with trio.open_nursery() as nursery:
            nursery.start_soon(both, client)
            nursery.start_soon(both, server)


# ---- bytes that came before TLS ----


@pytest.mark.parametrize("how", ["unrecv", "peek", "proxy line", "in pieces"])
async def test_a_client_hello_that_was_received_already_belongs_to_tls(
    how: str, authority: Authority, server_tls: ServerTLS
) -> None:
    # PROXY protocol, version 1: the line and the ClientHello in one segment.
    line = b"PROXY TCP4 192.0.2.1 192.0.2.2 5 443\r\n" if how == "proxy line" else b""
    context = ssl.create_default_context(cadata=authority.pem.decode())
    sock, raw = raw_pair()
    async with closing(sock):
        peer = RawTLS(raw, context, server_hostname="example.org")
        with contextlib.suppress(ssl.SSLWantReadError):
            peer.ssl.do_handshake()
        hello = peer.outgoing.read()
        raw.sendall(line + hello)
        if how == "proxy line":
            assert await sock.recv_until(b"\r\n") == line
            assert sock.info().buffered == len(hello)
        elif how == "unrecv":
            sock.unrecv(await sock.recv_exactly(len(hello)))
        elif how == "in pieces":
            first, second = await sock.recv_exactly(1), await sock.recv_exactly(7)
            sock.unrecv(second)
            sock.unrecv(first)
        else:
            await trio.lowlevel.wait_readable(sock.fileno())
            assert (await sock.peek() or b"").startswith(b"\x16\x03")

        def talk() -> None:
            peer.run(peer.ssl.do_handshake)
            peer.run(lambda: peer.ssl.write(b"hello"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, talk)
            await sock.starttls(server_tls)
            assert await sock.recv() == b"hello"
        raw.close()


@pytest.mark.parametrize("role", ["server", "client"])
@pytest.mark.parametrize("where", ["buffered", "in the kernel", "pushed back"])
async def test_bytes_behind_starttls_never_reach_the_application(
    role: str, where: str, authority: Authority, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    """CVE-2011-0411, and "NO STARTTLS" (2021): clear text slipped in behind the command."""
    sock, raw = raw_pair()
    injected = b"MAIL FROM:<attacker>\r\n" if role == "server" else b"250 all is well\r\n"
    command = b"STARTTLS\r\n" if role == "server" else b"220 go ahead\r\n"
    context: ssl.SSLContext
    if role == "server":
        context = ssl.create_default_context(cadata=authority.pem.decode())
        peer = RawTLS(raw, context, server_hostname="example.org")
    else:
        peer = RawTLS(raw, server_tls._context(), server_side=True)

    def attack() -> None:
        with raw, contextlib.suppress(ssl.SSLError, EOFError, ConnectionError):
            if where == "in the kernel":
                raw.sendall(injected)
            peer.run(peer.ssl.do_handshake)

    async with closing(sock):
        raw.sendall(command + (injected if where == "buffered" else b""))
        assert await sock.recv_until(b"\r\n") == command
        if where == "pushed back":
            sock.unrecv(injected)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, attack)
            with pytest.raises(TLSError, match="does not speak TLS"):
                await sock.starttls(server_tls if role == "server" else client_tls)
        assert not sock.isopen()
        with pytest.raises(trio.ClosedResourceError):
            await sock.recv()


# ---- arguments ----


async def test_a_wrong_argument_leaves_the_connection_as_it_was(
    authority: Authority, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    good = authority.issue("example.org")
    a, b = await tcp_pair()
    async with closing(a, b):
        a.unrecv(b"early")
        no_check = ssl.create_default_context()
        for tls, options, error, words in [
            (None, {}, TypeError, "tls is a server name"),
            (b"example.org", {}, TypeError, "tls is a server name"),
            (42, {}, TypeError, "tls is a server name"),
            ("", {}, ValueError, "not a host name"),
            ("a b", {}, ValueError, "not a host name"),
            ([], {}, ValueError, "at least one certificate"),
            (["example.org"], {}, TypeError, "not a str"),
            ([{"chain": "x"}], {}, ValueError, "has the fields chain and private_key"),
            ([{"chain": "x", "private_key": "y"}], {}, ValueError, "not PEM"),
            (ClientTLS(ca=authority.pem), {"server_hostname": 1}, TypeError, "is a str"),
            ([good], {"server_hostname": "example.org"}, ValueError, "for the TLS client's role"),
            (client_tls, {"server_hostname": ""}, ValueError, "not a host name"),
            (client_tls, {"handshake_timeout": "1"}, TypeError, "number of seconds"),
            (client_tls, {"handshake_timeout": True}, TypeError, "number of seconds"),
            (client_tls, {"handshake_timeout": -1}, ValueError, "0 or more"),
            (client_tls, {"handshake_timeout": float("nan")}, ValueError, "0 or more"),
        ]:
            with pytest.raises(error, match=words):
                await a.starttls(tls, **options)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="needs to know the server's name"):
            await b.starttls(ClientTLS(ca=authority.pem))
        with pytest.raises(ValueError, match="server_hostname is needed"):
            await b.starttls(no_check)
        with pytest.raises(RuntimeError, match="not using TLS"):
            await a.stoptls()
        assert await a.recv() == b"early"
        await upgrade(a, client_tls, b, server_tls)
        with pytest.raises(RuntimeError, match="using TLS already"):
            await a.starttls(client_tls)
        await a.send(b"x")
        assert await b.recv() == b"x"


async def test_the_name_that_is_checked_is_the_nearest_one(
    authority: Authority, server_tls: ServerTLS
) -> None:
    context = ssl.create_default_context(cadata=authority.pem.decode())
    for tls, name_given, verified in [
        (ClientTLS(ca=authority.pem), None, "127.0.0.1"),  # what connect was given
        (ClientTLS("example.org", ca=authority.pem), None, "example.org"),
        (ClientTLS("example.net", ca=authority.pem), "localhost", "localhost"),
        (ClientTLS("example.org.", ca=authority.pem), None, "example.org"),
        (context, None, "127.0.0.1"),
        (context, "localhost", "localhost"),
    ]:
        a, b = await tcp_pair()
        async with closing(a, b), trio.open_nursery() as nursery:
            nursery.start_soon(b.starttls, server_tls)
            info = await a.starttls(tls, server_hostname=name_given)
            assert info.server_hostname == verified


async def test_an_international_name_is_verified_by_its_a_label(authority: Authority) -> None:
    certificate = authority.issue("xn--fa-hia.de")
    a, b = await tcp_pair()
    async with closing(a, b):
        infos = await upgrade(a, ClientTLS("faß.de", ca=authority.pem), b, [certificate])
        assert [info.server_hostname for info in infos] == ["xn--fa-hia.de", "xn--fa-hia.de"]


async def test_a_context_of_ones_own(authority: Authority, server_tls: ServerTLS) -> None:
    client_context = ssl.create_default_context(cadata=authority.pem.decode())
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue("127.0.0.1").load_into(server_context)
    a, b = await tcp_pair()
    async with closing(a, b):
        infos = await upgrade(a, client_context, b, server_context)
        assert [info.server_hostname for info in infos] == ["127.0.0.1", None]
    a, b = await tcp_pair()
    async with closing(a, b), trio.open_nursery() as nursery:
        nursery.start_soon(a.starttls, server_context)  # whichever side made the connection
        info = await b.starttls(client_context, server_hostname="127.0.0.1")
        assert info.server_hostname == "127.0.0.1"


@pytest.mark.filterwarnings("ignore:ssl.PROTOCOL_TLS is deprecated")
async def test_a_context_for_either_role_takes_that_of_its_side(
    authority: Authority,
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS)
    authority.issue("127.0.0.1").load_into(context)
    a, b = await tcp_pair()
    async with closing(a, b):
        infos = await upgrade(a, context, b, context)
        assert infos[0].peer_certificate


async def test_without_verification_anybody_is_taken(authority: Authority) -> None:
    for name in ("whatever.example", None):
        a, b = await tcp_pair()
        async with closing(a, b):
            info, _ = await upgrade(
                a, ClientTLS(name, verify=False), b, [authority.issue("example.org")]
            )
            assert info.peer_certificate


# ---- one at a time ----


@pytest.mark.parametrize("changing", ["starttls", "stoptls"])
async def test_nobody_uses_a_connection_that_turns_to_tls_or_back(
    changing: str, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = await (tcp_pair() if changing == "starttls" else tls_pair(client_tls, server_tls))
    async with closing(a, b):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                *((a.starttls, client_tls) if changing == "starttls" else (a.stoptls,))
            )
            await trio.testing.wait_all_tasks_blocked()
            for call in (
                a.recv,
                a.peek,
                a.receive_some,
                lambda: a.recv_exactly(1),
                lambda: a.recv_until(b"x"),
                a.lines().__anext__,
                lambda: a.send(b"x"),
                lambda: a.send(b"x", b"y"),
                lambda: a.send_all(b"x"),
                a.wait_send_all_might_not_block,
                a.send_eof,
                lambda: a.starttls(client_tls),
                a.stoptls,
            ):
                with pytest.raises(trio.BusyResourceError):
                    await call()
            with pytest.raises(trio.BusyResourceError):
                a.unrecv(b"x")
            await (b.starttls(server_tls) if changing == "starttls" else b.stoptls())
        await a.send(b"nothing has happened")
        assert await b.recv() == b"nothing has happened"
