"""Handshakes that fail, client certificates, and what was agreed on."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator

import pytest
import trio
import trio.testing

from helpers.authority import Authority, certificate
from helpers.pairs import RESET, closing, raw_pair, tcp_pair, unix_pair
from helpers.raw_tls import RawTLS, upgrade
from trisock import Certificate, ClientTLS, ServerTLS, Socket, TLSError
from trisock._errors import describe_ssl_error

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


async def test_a_wrong_certificate_is_refused_in_words_and_the_server_told(
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


def test_no_renegotiation(server_tls: ServerTLS) -> None:
    assert server_tls._context().options & ssl.OP_NO_RENEGOTIATION
