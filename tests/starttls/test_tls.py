"""Turning to TLS in mid-conversation: both sides, what goes wrong, and what an attacker tries."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import socket
import ssl
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import trio
import trio.testing

import trisock
from helpers.authority import Authority, certificate
from helpers.pairs import closing, raw_pair, tcp_pair, tls_pair, unix_pair
from helpers.raw_tls import RawTLS, upgrade
from trisock import Certificate, ClientTLS, ServerTLS, Socket, TLSError
from trisock._errors import describe_ssl_error
from trisock._net import syscalls as _syscalls
from trisock._net.ciphertext import pieces

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


async def test_isopen_under_tls(client_tls: ClientTLS, server_tls: ServerTLS) -> None:
    client, server = await tls_pair(client_tls, server_tls)
    async with closing(client, server):
        assert server.isopen()
        await client.send(b"x")
        await client.send(b"y")
        await trio.lowlevel.wait_readable(server.fileno())
        assert await server.recv() == b"x"
        assert server.isopen()  # a record was read from the kernel and not decrypted yet
        assert await server.recv() == b"y"
        assert server.isopen()
        client.abort()
        await trio.lowlevel.wait_readable(server.fileno())
        assert not server.isopen()


async def test_a_reset_under_tls_is_a_broken_connection_and_no_fault_of_tls(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    client, server = await tls_pair(client_tls, server_tls)
    async with closing(client, server):
        client.abort()
        with pytest.raises(trio.BrokenResourceError, match="reset by peer") as caught:
            await server.recv()
        assert type(caught.value) is trio.BrokenResourceError


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
    async with await trisock.listen(0, "127.0.0.1") as listener:
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


# ---- handshakes that fail ----


@contextlib.contextmanager
def in_thread(function: Callable[[], object]) -> Iterator[None]:
    thread = threading.Thread(target=function)
    thread.start()
    try:
        yield
    finally:
        thread.join()


async def failing_handshake(
    client_tls: object, server_tls: object
) -> tuple[Socket, TLSError, Socket, TLSError | None]:
    """Run a handshake that the client or both find wrong; return both ends and their errors."""
    client, server = await tcp_pair()
    errors: dict[str, TLSError] = {}

    async def run(name: str, sock: Socket, tls: object) -> None:
        try:
            await sock.starttls(tls)  # type: ignore[arg-type]
            await sock.recv()
        except TLSError as exc:
            errors[name] = exc

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, "server", server, server_tls)
        await run("client", client, client_tls)
    return client, errors["client"], server, errors.get("server")


def expired(authority: Authority) -> Certificate:
    past = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=1)
    return certificate(authority.ca.issue_cert("example.org", not_after=past))


async def test_a_certificate_that_is_not_right_is_refused_in_words_and_the_server_is_told(
    authority: Authority, other_authority: Authority
) -> None:
    good = authority.issue("example.org")
    self_signed = other_authority.ca
    for client_tls, server_certificate, words, code, alert in [
        (
            ClientTLS("example.net", ca=authority.pem),
            good,
            "Hostname mismatch",
            62,
            "bad certificate",
        ),
        (
            ClientTLS("127.0.0.1", ca=authority.pem),
            good,
            "IP address mismatch",
            64,
            "bad certificate",
        ),
        (ClientTLS("example.org", ca=other_authority.pem), good, "local issuer", 20, "unknown ca"),
        (ClientTLS("example.org"), good, "certificate", None, "unknown ca"),
        (
            ClientTLS("example.org", ca=authority.pem),
            expired(authority),
            "certificate has expired",
            10,
            "certificate expired",
        ),
        (
            ClientTLS("localhost", ca=authority.pem),
            Certificate(self_signed.cert_pem.bytes(), self_signed.private_key_pem.bytes()),
            "self-signed certificate|self signed certificate",
            None,
            "unknown ca",
        ),
    ]:
        client, error, server, server_error = await failing_handshake(
            client_tls, [server_certificate]
        )
        assert error.reason == "CERTIFICATE_VERIFY_FAILED"
        with pytest.raises(TLSError, match=words):
            raise error
        assert client_tls.server_hostname in str(error)  # type: ignore[operator]
        assert str(client.getpeer()) in str(error)
        if code is not None:
            assert error.verify_code == code
        # The client's alert came through, though it closed the connection right after it.
        assert server_error is not None
        assert f"alert '{alert}'" in str(server_error)
        for sock in (client, server):
            assert not sock.isopen()
            assert not sock.istls()
            await sock.close()


async def test_no_common_version(authority: Authority, server_tls: ServerTLS) -> None:
    old = ssl.create_default_context(cadata=authority.pem.decode())
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    new = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    new.minimum_version = ssl.TLSVersion.TLSv1_3
    authority.issue("example.org").load_into(new)
    client, server = await tcp_pair()
    async with closing(client, server), trio.open_nursery() as nursery:

        async def server_side() -> None:
            with pytest.raises(TLSError, match="no TLS version that is accepted here"):
                await server.starttls(new)

        nursery.start_soon(server_side)
        with pytest.raises(TLSError, match="with the alert 'protocol version'"):
            await client.starttls(old, server_hostname="example.org")


async def test_tls_before_1_2_is_not_spoken(authority: Authority, server_tls: ServerTLS) -> None:
    for context in (server_tls._context(), ClientTLS("example.org", ca=authority.pem)._context()):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize(
    "greeting",
    [
        b"220 mail.example.org ESMTP\r\n",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\0" * 100,
        b"\x16" * 50,
        b"\x15\x03\x03\x00\x02\x01\x00",  # close_notify, in the clear
    ],
)
@pytest.mark.parametrize("role", ["server", "client"])
async def test_a_peer_that_does_not_speak_tls(
    greeting: bytes, role: str, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    sock, raw = raw_pair()
    async with closing(sock):
        with raw:
            raw.sendall(greeting)
            words = r"TLS handshake with .* failed: the peer (does not speak TLS \(|ended it)"
            with pytest.raises(TLSError, match=words):
                with in_thread(lambda: raw.shutdown(socket.SHUT_WR)):
                    await sock.starttls(client_tls if role == "client" else server_tls)
            assert sock.fileno() == -1
            with pytest.raises(trio.ClosedResourceError):
                await sock.send(b"a password")
            said = b"".join(iter(lambda: raw.recv(65536), b""))
            # Alerts and handshake records, and nothing else: no application data, no clear text.
            while said:
                assert said[0] in (0x15, 0x16)
                assert said[1] == 3
                said = said[5 + int.from_bytes(said[3:5], "big") :]


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("role", ["server", "client"])
async def test_a_peer_that_is_gone_in_the_handshake(
    how: str, role: str, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    sock, raw = raw_pair()
    async with closing(sock):
        if how == "reset":
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        raw.close()
        await trio.lowlevel.wait_readable(sock.fileno())
        words = "closed the connection|connection is broken"
        with pytest.raises(TLSError, match=words) as caught:
            await sock.starttls(client_tls if role == "client" else server_tls)
        assert caught.value.reason is None
        assert caught.value.verify_code is None


RESET = struct.pack("ii", 1, 0)


async def test_a_peer_that_is_gone_when_the_handshake_ends(server_tls: ServerTLS) -> None:
    """The client has verified everything, and nobody is there to hear that it has."""
    sock, raw = raw_pair()
    peer = RawTLS(raw, server_tls._context(), server_side=True)
    async with closing(sock), trio.open_nursery() as nursery:

        async def client() -> None:
            with pytest.raises(TLSError, match="closed the connection"):
                await sock.starttls(ClientTLS("example.org", verify=False))

        nursery.start_soon(client)
        await trio.testing.wait_all_tasks_blocked()
        # All of this before the client's task runs again:
        with raw, contextlib.suppress(ssl.SSLWantReadError):
            peer.incoming.write(raw.recv(65536))
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            try:
                peer.ssl.do_handshake()
            finally:
                raw.sendall(peer.outgoing.read())


async def test_starttls_waits_for_room_to_send(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = unix_pair()
    async with closing(a, b):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(a.fileno(), b"x")
        before = a._connection.transport.writable_now()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.starttls, client_tls)
            await trio.testing.wait_all_tasks_blocked()
            while set(chunk := await b.recv()) == {ord("x")}:
                pass
            b.unrecv(chunk.lstrip(b"x"))
            await b.starttls(server_tls)
        assert not before


def test_errors_without_a_reason_are_still_described() -> None:
    unknown = ssl.SSLError(1, "something odd")
    unknown.reason = ""
    assert "something odd" in describe_ssl_error(unknown)
    nameless = ssl.SSLError(1, "[SSL] ASN1 lib (_ssl.c:1006)")
    nameless.reason = ""
    assert describe_ssl_error(nameless) == "asn1 lib"
    known = ssl.SSLError(1, "x")
    known.reason = "SOMETHING_ODD"
    assert describe_ssl_error(known) == "something odd"


@pytest.mark.parametrize("role", ["server", "client"])
async def test_a_silent_peer_is_given_up(
    role: str,
    autojump_clock: trio.testing.MockClock,
    client_tls: ClientTLS,
    server_tls: ServerTLS,
) -> None:
    a, b = unix_pair()
    async with closing(a, b):
        start = trio.current_time()
        with pytest.raises(TLSError, match="not finished within 7 seconds"):
            await a.starttls(client_tls if role == "client" else server_tls, handshake_timeout=7)
        assert 7 <= trio.current_time() - start <= 10
        assert a.fileno() == -1


async def test_without_a_timeout_the_handshake_may_take_for_ever(
    client_tls: ClientTLS, autojump_clock: trio.testing.MockClock
) -> None:
    a, b = unix_pair()
    async with closing(a, b):
        with trio.move_on_after(50) as scope:
            await a.starttls(client_tls, handshake_timeout=None)
        assert scope.cancelled_caught
        assert a.fileno() == -1  # cancelled: closed as well
        await a.close()


async def test_closing_during_a_handshake_ends_it(client_tls: ClientTLS) -> None:
    a, b = unix_pair()
    async with closing(a, b), trio.open_nursery() as nursery:

        async def expect_closed() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await a.starttls(client_tls)

        nursery.start_soon(expect_closed)
        await trio.testing.wait_all_tasks_blocked()
        await a.close()


async def test_alpn(authority: Authority, server_tls: ServerTLS) -> None:
    certificates = [authority.issue("example.org")]
    server = ServerTLS(certificates, alpn_protocols=["h2", "http/1.1"])
    strict = ServerTLS(certificates, alpn_protocols=["h2"], require_alpn=True)

    def client(*protocols: str) -> ClientTLS:
        return ClientTLS("example.org", ca=authority.pem, alpn_protocols=protocols)

    for client_tls, server_role, chosen in [
        (client("http/1.1", "h2"), server, "h2"),  # the server's preference
        (client("imap"), server, None),
        (client(), server, None),
        (client("h2"), strict, "h2"),
        (client("h2"), server_tls, None),
    ]:
        a, b = await tcp_pair()
        async with closing(a, b):
            infos = await upgrade(a, client_tls, b, server_role)
            assert [info.alpn_protocol for info in infos] == [chosen, chosen]
    for client_tls in (client("imap"), client()):
        a, b = await tcp_pair()
        async with closing(a, b):
            with pytest.RaisesGroup(
                pytest.RaisesExc(TLSError, match="shares no ALPN protocol"), flatten_subgroups=True
            ):
                await upgrade(a, client_tls, b, strict)
            assert not b.isopen()


# ---- arguments ----


async def test_an_argument_that_cannot_be_used_leaves_the_connection_as_it_was(
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
async def test_a_context_that_could_be_either_takes_the_role_of_its_side(
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
async def test_while_a_connection_turns_to_tls_or_back_nobody_else_may_use_it(
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


# ---- client certificates ----


@pytest.mark.parametrize("sni", ["example.org", "second.example"])
@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
async def test_client_certificates_are_asked_for_whichever_certificate_sni_chose(
    sni: str, version: str, authority: Authority, other_authority: Authority
) -> None:
    server_tls = ServerTLS(
        [authority.issue("example.org"), authority.issue("second.example")],
        client_ca=authority.pem,
        require_client_certificate=True,
        alpn_protocols=["x"],
    )
    optional = ServerTLS(
        [authority.issue("example.org"), authority.issue("second.example")], client_ca=authority.pem
    )
    good = authority.issue("client@example.org")
    for shown, server_role, works in [
        (good, server_tls, True),
        (None, server_tls, False),
        (other_authority.issue("client@example.org"), server_tls, False),
        (good, optional, True),
        (None, optional, True),
        (other_authority.issue("client@example.org"), optional, False),
    ]:
        context = ssl.create_default_context(cadata=authority.pem.decode())
        context.maximum_version = ssl.TLSVersion[version]
        context.set_alpn_protocols(["x"])
        if shown is not None:
            shown.load_into(context)
        a, b = await tcp_pair()
        async with closing(a, b), trio.open_nursery() as nursery:
            server_error: list[TLSError] = []

            async def server_side(
                b: Socket = b, role: ServerTLS = server_role, errors: list[TLSError] = server_error
            ) -> None:
                try:
                    await b.starttls(role)
                    await b.send(b"welcome")
                except TLSError as exc:
                    errors.append(exc)

            nursery.start_soon(server_side)
            if works:
                info = await a.starttls(context, server_hostname=sni)
                assert await a.recv() == b"welcome"
                assert info.server_hostname == b.tls.server_hostname == sni  # type: ignore[union-attr]
                assert bool(b.tls.peer_certificate) == (shown is not None)  # type: ignore[union-attr]
                assert info.alpn_protocol == ("x" if server_role is server_tls else None)
                continue
            # In TLS 1.3 the client has finished when the server refuses it.
            with pytest.raises(TLSError, match="refused, with the alert"):
                await a.starttls(context, server_hostname=sni)
                await a.recv()
            assert a.tls is None or version == "TLSv1_3"
        if not works:
            assert server_error
            words = "showed no certificate" if shown is None else "certificate was refused"
            assert words in str(server_error[0])


async def test_a_client_that_only_sends_learns_why_it_was_refused(authority: Authority) -> None:
    """TLS 1.3: the alert comes after the client's handshake, and a reset after that."""
    server_tls = ServerTLS(
        authority.issue("example.org"), client_ca=authority.pem, require_client_certificate=True
    )
    a, b = await tcp_pair()
    async with closing(a, b):

        async def server_side() -> None:
            with pytest.raises(TLSError, match="showed no certificate"):
                await b.starttls(server_tls)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(server_side)
            await a.starttls(ClientTLS("example.org", ca=authority.pem))
            await trio.lowlevel.wait_readable(a.fileno())
        b.abort()
        with pytest.raises(TLSError, match="alert 'certificate required'") as caught:
            while True:
                await a.send(b"x" * 1000)
        assert caught.value.reason == "TLSV13_ALERT_CERTIFICATE_REQUIRED"
        with pytest.raises(TLSError, match="alert 'certificate required'"):
            await a.send(b"x")
        with pytest.raises(TLSError, match="alert 'certificate required'"):
            await a.recv()


async def test_client_tls_shows_its_certificate(authority: Authority) -> None:
    server_tls = ServerTLS(
        authority.issue("example.org"), client_ca=authority.pem, require_client_certificate=True
    )
    client_tls = ClientTLS(
        "example.org", ca=authority.pem, certificate=authority.issue("client@example.org")
    )
    a, b = await tcp_pair()
    async with closing(a, b):
        _, info = await upgrade(a, client_tls, b, server_tls)
        assert info.peer_certificate


# ---- the end of an encrypted stream ----


@pytest.mark.parametrize("ignored_by_context", [False, True])
async def test_an_end_without_close_notify_is_an_error(
    ignored_by_context: bool, authority: Authority, server_tls: ServerTLS
) -> None:
    context = ssl.create_default_context(cadata=authority.pem.decode())
    if ignored_by_context:
        context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 1 << 7)
    a, b = await tcp_pair()
    async with closing(a, b):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.starttls, server_tls)
            await a.starttls(context, server_hostname="example.org")
        await b.send(b"pay 100")
        await b.stream.send_eof()  # somebody in the middle cuts off the rest
        assert await a.recv() == b"pay 100"
        assert await a.peek() is None  # no end that could be trusted
        for _ in range(2):
            with pytest.raises(TLSError, match="without close_notify: data may be missing"):
                await a.recv()
        assert not a.isopen()


async def test_an_https_compatible_connection_neither_sends_nor_misses_close_notify(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: b.starttls(server_tls, https_compatible=True))
            await a.starttls(client_tls, https_compatible=True)
        await b.send(b"all of it")
        await b.close()
        assert await a.recv() == b"all of it"
        await trio.lowlevel.wait_readable(a.fileno())
        assert await a.peek() == b""
        assert await a.recv() == b""
    a, b = await tcp_pair()
    async with closing(a, b):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: b.starttls(server_tls, https_compatible=True))
            await a.starttls(client_tls)
        await b.close()
        with pytest.raises(TLSError, match="without close_notify"):
            await a.recv()


async def test_close_notify_is_sent_though_there_is_unread_data(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    """SSL_shutdown fails then, and the session tickets have not been sent yet, either."""
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        for _ in range(3):
            await a.send(b"never read")
        await trio.lowlevel.wait_readable(b.fileno())
        assert await b.peek() == b"never read"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.close)
            assert await a.recv() == b""
            nursery.start_soon(a.close)


async def test_after_a_cancelled_tls_send_the_connection_is_over(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.send, b"x" * 50_000_000)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        with pytest.raises(trio.BrokenResourceError, match="cut off"):
            await a.send(b"y")
        with pytest.raises(trio.BrokenResourceError, match="cut off"):
            await a.recv()
        assert not a.isopen()
        assert await a.peek() is None


async def test_a_tls_send_that_was_cancelled_before_its_first_byte_changes_nothing(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = unix_pair()
    async with closing(a, b):
        await upgrade(a, client_tls, b, server_tls)
        sent = 0
        while a._connection.transport.writable_now():
            await a.send(b"x" * 1000)
            sent += 1000
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.send, b"never sent")
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert await b.recv_exactly(sent) == b"x" * sent
        await a.send(b"but this")
        assert await b.recv() == b"but this"
        await b.send(b"and back")
        assert await a.recv() == b"and back"


async def test_a_tls_send_that_fails_while_another_task_reads_leaves_the_news_to_that_task(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        await b.send(b"421 too busy")
        b.abort()
        with a._connection.reading, pytest.raises(trio.BrokenResourceError):
            while True:
                await a.send(b"more")
        assert a.info().buffered == 0
        assert await a.recv() == b"421 too busy"


async def test_what_a_failed_tls_send_looks_at_is_bounded(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        last_words = b"x" * 200_000
        b.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 500_000)
        a.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 500_000)
        await b.send(last_words)
        await b.stream.send_eof()
        b.abort()
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await a.send(b"more")
        assert a.info().buffered <= 2 * 65536
        assert a.isopen()


async def test_a_file_that_cannot_be_read_at_all_changes_nothing() -> None:
    class Broken:
        def read(self, size: int) -> bytes:
            raise OSError("the disk is broken")

    a, b = await tcp_pair()
    async with closing(a, b):
        with pytest.raises(OSError, match="the disk is broken"):
            await a.send_file(Broken())  # type: ignore[arg-type]
        await a.send(b"no harm done")
        assert await b.recv() == b"no harm done"


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
@pytest.mark.parametrize("passes", range(6))
async def test_a_tls_send_with_room_is_never_cut_off_by_being_cancelled(
    passes: int, version: str, authority: Authority, server_tls: ServerTLS
) -> None:
    """Whenever it comes: all of it was sent or nothing was."""
    context = ssl.create_default_context(cadata=authority.pem.decode())
    context.maximum_version = ssl.TLSVersion[version]
    context.check_hostname = False
    a, b = await tls_pair(context, server_tls)
    async with closing(a, b):
        sent = False
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                nonlocal sent
                await a.send(b"first ")
                sent = True

            nursery.start_soon(send)
            for _ in range(passes):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        await a.send(b"second")
        expected = b"first second" if sent else b"second"
        assert await b.recv_exactly(len(expected)) == expected


async def test_a_file_that_could_not_be_read_to_its_end_is_not_vouched_for(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    class Broken:
        parts = [b"the first half"]

        def read(self, size: int) -> bytes:
            if self.parts:
                return self.parts.pop()
            raise OSError("the disk is broken")

    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        with pytest.raises(OSError, match="the disk is broken"):
            await a.send_file(Broken())  # type: ignore[arg-type]
        with pytest.raises(trio.BrokenResourceError, match="cut off"):
            await a.send(b"x")
        await b.send(b"still heard")
        assert await a.recv() == b"still heard"
        assert await b.recv() == b"the first half"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.close)
            with pytest.raises(TLSError, match="without close_notify"):
                await b.recv()
            await b.close()
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        Broken.parts.append(b"the first half")
        with pytest.raises(OSError, match="the disk is broken"):
            await a.send_file(Broken())  # type: ignore[arg-type]
        with pytest.raises(TLSError, match="cut off before"):
            await a.stoptls()
        assert not a.isopen()


async def test_after_a_send_that_was_cut_off_there_is_no_starttls(client_tls: ClientTLS) -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.send, b"x" * 50_000_000)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        with pytest.raises(trio.BrokenResourceError, match="cut off"):
            await a.starttls(client_tls)


async def test_a_tls_send_that_failed_hides_nothing_that_the_peer_said_before(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        await b.send(b"421 too busy")
        b.abort()
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await a.send(b"more")
        with pytest.raises(trio.BrokenResourceError):
            await a.send(b"more")
        assert await a.recv() == b"421 too busy"
        with pytest.raises(trio.BrokenResourceError):
            await a.recv()


# ---- stoptls ----


async def test_stoptls_refuses_while_decrypted_bytes_are_waiting(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        await b.send(b"one")
        await b.send(b"two")
        await trio.lowlevel.wait_readable(a.fileno())
        assert await a.recv() == b"one"
        with pytest.raises(RuntimeError, match="read them first"):
            await a.stoptls()
        assert a.istls()
        a.unrecv(b"pushed back")
        with pytest.raises(RuntimeError, match="read them first"):
            await a.stoptls()
        assert await a.recv() == b"pushed back"
        assert await a.recv() == b"two"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.stoptls)
            await a.stoptls()


@contextlib.asynccontextmanager
async def early_bird(
    authority: Authority, server_tls: ServerTLS
) -> AsyncIterator[tuple[Socket, socket.socket]]:
    """Give a server to which the end of the handshake and data came in one segment."""
    sock, raw = raw_pair()
    context = ssl.create_default_context(cadata=authority.pem.decode())
    peer = RawTLS(raw, context, server_hostname="example.org")

    def shake_hands_and_talk() -> None:
        while True:
            try:
                peer.ssl.do_handshake()
                break
            except ssl.SSLWantReadError:
                peer.flush()
                peer.incoming.write(raw.recv(65536))
        peer.ssl.write(b"early bird")
        peer.flush()

    with raw:
        async with closing(sock):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, shake_hands_and_talk)
                await sock.starttls(server_tls)
            yield sock, raw


async def test_a_read_that_is_cancelled_as_it_decrypts_what_came_with_the_handshake_loses_nothing(
    authority: Authority, server_tls: ServerTLS, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with early_bird(authority, server_tls) as (sock, _):
        assert sock._connection.tls is not None
        real = sock._connection.tls._decrypt

        def decrypt_and_cancel() -> bytes | None:
            scope.cancel()
            return real()

        monkeypatch.setattr(sock._connection.tls, "_decrypt", decrypt_and_cancel)
        with trio.CancelScope() as scope:
            assert await sock.recv() == b"early bird"
        assert not scope.cancelled_caught


async def test_stoptls_refuses_while_bytes_that_came_with_the_handshake_are_waiting(
    authority: Authority, server_tls: ServerTLS
) -> None:
    async with early_bird(authority, server_tls) as (sock, raw):
        raw.shutdown(socket.SHUT_WR)
        await trio.lowlevel.wait_readable(sock.fileno())
        assert sock.isopen()  # the kernel is at its end, TLS is not
        with pytest.raises(RuntimeError, match="decrypted bytes are waiting"):
            await sock.stoptls()
        assert sock.isopen()
        assert await sock.recv() == b"early bird"


async def test_stoptls_fails_on_encrypted_data_in_flight(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        await b.send(b"in flight")
        with pytest.raises(TLSError, match="still sending encrypted data"):
            await a.stoptls()
        assert a.fileno() == -1


async def test_clear_bytes_right_behind_close_notify_are_read_as_clear(
    authority: Authority, server_tls: ServerTLS
) -> None:
    sock, raw = raw_pair()
    context = ssl.create_default_context(cadata=authority.pem.decode())
    peer = RawTLS(raw, context, server_hostname="example.org")

    def talk() -> None:
        peer.run(peer.ssl.do_handshake)
        with contextlib.suppress(ssl.SSLWantReadError):
            peer.ssl.unwrap()
        raw.sendall(peer.outgoing.read() + b"clear again")

    async with closing(sock):
        with raw:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, talk)
                await sock.starttls(server_tls)
            assert await sock.recv() == b""  # the end of the encrypted stream
            await sock.stoptls()
            assert not sock.istls()
            assert await sock.recv() == b"clear again"


async def test_stoptls_with_a_peer_that_leaves_right_after_its_close_notify(
    authority: Authority, server_tls: ServerTLS
) -> None:
    sock, raw = raw_pair()
    context = ssl.create_default_context(cadata=authority.pem.decode())
    peer = RawTLS(raw, context, server_hostname="example.org")
    async with closing(sock):
        with raw:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, peer.run, peer.ssl.do_handshake)
                await sock.starttls(server_tls)
            with contextlib.suppress(ssl.SSLWantReadError):
                peer.ssl.unwrap()
            peer.flush()
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        await trio.lowlevel.wait_readable(sock.fileno())
        with pytest.raises(TLSError, match="the peer closed the connection"):
            await sock.stoptls()


@pytest.mark.parametrize("how", ["end", "reset", "garbage"])
async def test_stoptls_with_a_peer_that_does_not_do_the_same(
    how: str, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        if how == "end":
            await b.stream.send_eof()
        elif how == "reset":
            b.abort()
            await trio.lowlevel.wait_readable(a.fileno())
        else:
            await b.stream.send_all(b"clear text where TLS belongs")
        with pytest.raises(TLSError, match="failed"):
            await a.stoptls()
        assert not a.isopen()
        with pytest.raises(trio.ClosedResourceError):
            await a.recv()


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
async def test_stoptls_takes_an_alert_for_no_end_and_nobody_else_meets_it(
    version: str, authority: Authority, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    """OpenSSL takes it for one, and leaves its error to the next connection that it works for."""
    sock, raw = raw_pair()
    context = ssl.create_default_context(cadata=authority.pem.decode())
    context.maximum_version = ssl.TLSVersion[version]
    peer = RawTLS(raw, context, server_hostname="example.org")
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(sock, a, b):
        with raw:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, peer.run, peer.ssl.do_handshake)
                await sock.starttls(server_tls)
            peer.incoming.write(b"\x17\x03\x03\x00\x20" + bytes(32))  # a forged record
            with pytest.raises(ssl.SSLError, match=r"(?i)bad record mac"):
                peer.ssl.read()
            peer.flush()
            await trio.lowlevel.wait_readable(sock.fileno())
            with pytest.raises(TLSError, match="the peer refused, with the alert 'bad record mac'"):
                await sock.stoptls()
        assert await a.peek() is None
        await b.send(b"x")
        assert await a.recv() == b"x"


async def test_a_cancelled_stoptls_closes(client_tls: ClientTLS, server_tls: ServerTLS) -> None:
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.stoptls)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await a.recv()
            with pytest.raises(trio.BusyResourceError):
                await a.send(b"x")
            nursery.cancel_scope.cancel()
        assert a.fileno() == -1


# ---- what was agreed on ----


async def test_channel_bindings(authority: Authority, server_tls: ServerTLS) -> None:
    context = ssl.create_default_context(cadata=authority.pem.decode())
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context.maximum_version = version
        a, b = await tcp_pair()
        async with closing(a, b):
            client, server = await upgrade(a, context, b, server_tls)
            assert client.peer_certificate is not None
            digest = hashlib.sha256(client.peer_certificate).digest()
            assert client.channel_binding("tls-server-end-point") == digest
            with pytest.raises(ValueError, match="is not known here"):
                server.channel_binding("tls-server-end-point")
            with pytest.raises(ValueError, match="no channel binding of the type 'x'"):
                client.channel_binding("x")
            if version == ssl.TLSVersion.TLSv1_2:
                assert client.channel_binding() == server.channel_binding("tls-unique")
            else:
                with pytest.raises(ValueError, match=r"not defined for TLSv1\.3"):
                    client.channel_binding()


async def test_a_resumed_session_is_told(authority: Authority, server_tls: ServerTLS) -> None:
    context = ssl.create_default_context(cadata=authority.pem.decode())
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    session = None
    for resumed in (False, True):
        sock, raw = raw_pair()
        with raw:
            peer = RawTLS(raw, context, server_hostname="example.org", session=session)
            async with closing(sock), trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, peer.run, peer.ssl.do_handshake)
                info = await sock.starttls(server_tls)
                assert info.session_reused == resumed
            session = peer.ssl.session


async def test_isopen_under_tls_while_a_record_is_left_and_the_peer_is_gone(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    client, server = await tls_pair(client_tls, server_tls)
    async with closing(client, server):
        await client.send(b"x")
        await client.send(b"y")
        await client.stream.send_eof()
        while (
            _syscalls.unread_bytes(server.fileno()) < 2 * 23
        ):  # two records, and the end is behind
            await trio.lowlevel.checkpoint()
        assert await server.recv() == b"x"
        assert server.isopen()  # y is in OpenSSL's BIO, the kernel is at its end
        assert await server.recv() == b"y"
        assert not server.isopen()


async def test_isopen_is_false_after_close_notify_without_fin(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    client, server = await tls_pair(client_tls, server_tls)
    async with closing(client, server), trio.open_nursery() as nursery:
        nursery.start_soon(client.stoptls)  # close_notify, and no FIN
        assert await server.recv() == b""
        assert not server.isopen()
        nursery.cancel_scope.cancel()


def test_no_renegotiation(server_tls: ServerTLS) -> None:
    assert server_tls._context().options & ssl.OP_NO_RENEGOTIATION


def test_what_is_encrypted_at_a_time_is_bounded_and_small_buffers_share_a_record() -> None:
    views = [memoryview(b"a" * 10)] * 1000 + [memoryview(b"b" * 1_000_000)] + [memoryview(b"c")] * 5
    found = list(pieces(views))
    assert b"".join(found) == b"".join(views)
    assert max(map(len, found)) <= 65536
    assert len(found) <= 20
