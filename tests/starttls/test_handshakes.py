"""Failed handshakes, client certificates and negotiated values."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import ssl

import pytest
import trio
import trio.testing

from helpers.certificates import CertificateAuthority
from helpers.client_hellos import records_of
from helpers.pairs import RESET, closing, raw_pair, unix_pair
from helpers.raw_tls import RawTLS, raw_client_context, upgrade, visit
from trisock import Certificate, ClientTLS, ServerTLS, Socket, TLSError, TLSInfo
from trisock._errors import describe_ssl_error
from trisock.testing import Authority, socket_pair


@pytest.fixture
def layer() -> str:
    """In this file, the two ends ``a`` and ``b`` have not called starttls yet."""
    return "plain"


# ---- failed handshakes ----


async def failing_handshake(
    client_tls: object, server_tls: object
) -> tuple[Socket, TLSError, Socket, TLSError | None]:
    """Run a handshake that fails at the client or at both ends.

    Return each end and its error. The server's error may be ``None``.
    """
    client, server = await socket_pair()
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


@pytest.mark.parametrize(
    ("why", "words", "code", "alert"),
    [
        ("another name", "Hostname mismatch", 62, "bad certificate"),
        ("another address", "IP address mismatch", 64, "bad certificate"),
        ("another authority", "local issuer", 20, "unknown ca"),
        ("not in the trust store", "certificate", None, "unknown ca"),
        ("expired", "certificate has expired", 10, "certificate expired"),
        ("self-signed", "self-signed certificate|self signed certificate", None, "unknown ca"),
    ],
)
async def test_a_bad_certificate_fails_the_handshake_at_both_ends(
    why: str,
    words: str,
    code: int | None,
    alert: str,
    authority: Authority,
    other_authority: Authority,
) -> None:
    good = authority.certificate("example.org")
    root = other_authority._ca
    client_tls, server_certificate = {
        "another name": (authority.client_tls("example.net"), good),
        "another address": (authority.client_tls("127.0.0.1"), good),
        "another authority": (other_authority.client_tls("example.org"), good),
        "not in the trust store": (ClientTLS("example.org"), good),
        "expired": (authority.client_tls("example.org"), authority.expired("example.org")),
        "self-signed": (
            authority.client_tls("localhost"),
            Certificate(root.cert_pem.bytes(), root.private_key_pem.bytes()),
        ),
    }[why]
    client, error, server, server_error = await failing_handshake(client_tls, [server_certificate])
    assert error.reason == "CERTIFICATE_VERIFY_FAILED"
    with pytest.raises(TLSError, match=words):
        raise error
    assert client_tls.server_hostname in str(error)  # type: ignore[operator]
    assert str(client.getpeer()) in str(error)
    if code is not None:
        assert error.verify_code == code
    # The server received the client's alert, although the client closed right after the alert.
    assert server_error is not None
    assert f"alert '{alert}'" in str(server_error)
    for sock in (client, server):
        assert not sock.isopen()
        assert not sock.istls()
        await sock.close()


@pytest.mark.parametrize("names", [(), ("127.0.0.1",)], ids=["no names", "an address only"])
async def test_a_common_name_is_no_host_name(names: tuple[str, ...]) -> None:
    authority = CertificateAuthority("root")
    certificate = authority.issue(*names, common_name="example.org")
    role = ClientTLS("example.org", ca=authority.pem)
    _, error, _, _ = await failing_handshake(role, certificate)
    assert error.verify_code == 62
    assert str(error).endswith("(the name must be in its subjectAltName)")


async def test_a_custom_ssl_context_may_accept_a_common_name(a: Socket, b: Socket) -> None:
    authority = CertificateAuthority("root")
    context = ssl.create_default_context(cadata=authority.pem.decode())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(b.starttls, authority.issue(common_name="example.org"))
        await a.starttls(context, server_hostname="example.org")
    assert context.hostname_checks_common_name


async def test_a_handshake_without_a_common_version_fails(
    a: Socket, b: Socket, authority: Authority
) -> None:
    new = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    new.minimum_version = ssl.TLSVersion.TLSv1_3
    authority.certificate("example.org").load_into(new)

    async def server_side() -> None:
        with pytest.raises(TLSError, match="no TLS version that we accept"):
            await b.starttls(new)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(server_side)
        with pytest.raises(TLSError, match="with the alert 'protocol version'"):
            await a.starttls(
                raw_client_context(authority, "TLSv1_2"), server_hostname="example.org"
            )


async def test_tls_before_1_2_is_disabled(authority: Authority, server_tls: ServerTLS) -> None:
    for context in (server_tls._context(), authority.client_tls("example.org")._context()):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize(
    "greeting",
    [
        b"220 mail.example.org ESMTP\r\n",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\0" * 100,
        b"\x16" * 50,
        b"\x15\x03\x03\x00\x02\x01\x00",  # an unencrypted close_notify
    ],
    ids=["SMTP", "HTTP", "NUL bytes", "0x16 bytes", "close_notify"],
)
@pytest.mark.parametrize("role", ["server", "client"])
async def test_a_handshake_fails_if_the_peer_does_not_speak_tls(
    greeting: bytes, role: str, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    sock, raw = raw_pair()
    async with closing(sock):
        with raw:
            raw.sendall(greeting)
            raw.shutdown(socket.SHUT_WR)
            words = r"TLS handshake with .* failed: the peer (does not speak TLS \(|ended TLS)"
            with pytest.raises(TLSError, match=words):
                await sock.starttls(client_tls if role == "client" else server_tls)
            assert sock.fileno() == -1
            with pytest.raises(trio.ClosedResourceError):
                await sock.send(b"a password")
            # The peer received only alerts and handshake records: no data and no plain text.
            for record in records_of(b"".join(iter(lambda: raw.recv(65536), b""))):
                assert record[0] in (0x15, 0x16)
                assert record[1] == 3


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("role", ["server", "client"])
async def test_a_handshake_fails_if_the_peer_closes(
    how: str, role: str, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    sock, raw = raw_pair()
    async with closing(sock):
        if how == "reset":
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        raw.close()
        await trio.lowlevel.wait_readable(sock.fileno())
        words = "closed the connection|connection is broken"
        with pytest.raises(TLSError, match=words) as caught:
            await sock.starttls(client_tls if role == "client" else server_tls)
        assert caught.value.reason is None
        assert caught.value.verify_code is None


async def test_a_reset_before_the_clients_last_flight_fails_the_handshake(
    server_tls: ServerTLS,
) -> None:
    """The client has accepted the server's messages, but its own Finished message is not sent."""
    sock, raw = raw_pair()
    peer = RawTLS(raw, server_tls._context(), server_side=True)
    async with closing(sock), trio.open_nursery() as nursery:

        async def client() -> None:
            with pytest.raises(TLSError, match="closed the connection"):
                await sock.starttls(ClientTLS("example.org", verify=False))

        nursery.start_soon(client)
        await trio.testing.wait_all_tasks_blocked()
        # The following lines run before the client's task runs again.
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


@pytest.mark.parametrize(
    ("text", "reason", "description"),
    [
        ("something odd", "", "something odd"),
        ("[SSL] ASN1 lib (_ssl.c:1006)", "", "^asn1 lib$"),
        ("x", "SOMETHING_ODD", "^something odd$"),
    ],
)
def test_an_ssl_error_without_a_known_reason_is_described(
    text: str, reason: str, description: str
) -> None:
    error = ssl.SSLError(1, text)
    error.reason = reason
    assert re.search(description, describe_ssl_error(error))


@pytest.mark.parametrize("role", ["server", "client"])
async def test_a_silent_peer_times_out_the_handshake(
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


async def test_a_handshake_without_a_timeout_waits_until_cancelled(
    client_tls: ClientTLS, autojump_clock: trio.testing.MockClock
) -> None:
    a, b = unix_pair()
    async with closing(a, b):
        with trio.move_on_after(50) as scope:
            await a.starttls(client_tls, handshake_timeout=None)
        assert scope.cancelled_caught
        assert a.fileno() == -1  # the cancellation closed the socket
        await a.close()


async def test_closing_the_socket_ends_a_handshake(client_tls: ClientTLS) -> None:
    a, b = unix_pair()
    async with closing(a, b), trio.open_nursery() as nursery:

        async def expect_closed() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await a.starttls(client_tls)

        nursery.start_soon(expect_closed)
        await trio.testing.wait_all_tasks_blocked()
        await a.close()


ALPN = {
    "the server prefers": (["http/1.1", "h2"], ["h2", "http/1.1"], False, "h2"),
    "none in common": (["imap"], ["h2", "http/1.1"], False, None),
    "no client protocols": ([], ["h2", "http/1.1"], False, None),
    "no server protocols": (["h2"], [], False, None),
    "required": (["h2"], ["h2"], True, "h2"),
}


@pytest.mark.parametrize(("client", "server", "required", "chosen"), ALPN.values(), ids=ALPN)
async def test_alpn_chooses_a_common_protocol(
    client: list[str],
    server: list[str],
    required: bool,
    chosen: str | None,
    a: Socket,
    b: Socket,
    authority: Authority,
) -> None:
    client_tls = authority.client_tls("example.org", alpn_protocols=client)
    certificate = authority.certificate("example.org")
    server_tls = ServerTLS(certificate, alpn_protocols=server, require_alpn=required)
    infos = await upgrade(a, client_tls, b, server_tls)
    assert [info.alpn_protocol for info in infos] == [chosen, chosen]


@pytest.mark.parametrize("protocols", [["imap"], []])
async def test_a_handshake_fails_without_a_required_alpn_protocol(
    protocols: list[str], a: Socket, b: Socket, authority: Authority
) -> None:
    client_tls = authority.client_tls("example.org", alpn_protocols=protocols)
    strict = authority.server_tls("example.org", alpn_protocols=["h2"], require_alpn=True)
    with pytest.RaisesGroup(
        pytest.RaisesExc(TLSError, match="shares no ALPN protocol"), flatten_subgroups=True
    ):
        await upgrade(a, client_tls, b, strict)
    assert not b.isopen()


# ---- client certificates ----


@pytest.mark.parametrize("sent", ["good", "bad", "none"])
@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("sni", ["example.org", "second.example"])
@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
async def test_client_certificates_are_requested_for_every_server_name(
    sent: str,
    required: bool,
    sni: str,
    version: str,
    authority: Authority,
    other_authority: Authority,
) -> None:
    server_tls = ServerTLS(
        [authority.certificate("example.org"), authority.certificate("second.example")],
        client_ca=authority.ca,
        require_client_certificate=required,
        alpn_protocols=["x"] if required else [],
    )
    context = raw_client_context(authority, version)
    context.set_alpn_protocols(["x"])
    if sent != "none":
        issuer = authority if sent == "good" else other_authority
        issuer.certificate("client@example.org").load_into(context)
    works = sent == "good" or (sent == "none" and not required)
    server_error: TLSError | None = None
    a, b = await socket_pair()

    async def server_side() -> None:
        nonlocal server_error
        try:
            await b.starttls(server_tls)
            await b.send(b"welcome")
        except TLSError as exc:
            server_error = exc

    async with closing(a, b):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server_side)
            if works:
                info = await a.starttls(context, server_hostname=sni)
                assert await a.recv() == b"welcome"
            else:
                # In TLS 1.3, the client's handshake succeeds before the server refuses the client.
                with pytest.raises(TLSError, match="refused, with the alert"):
                    await a.starttls(context, server_hostname=sni)
                    await a.recv()
                assert a.tls is None or version == "TLSv1_3"
        if works:
            assert b.tls is not None
            assert info.server_hostname == b.tls.server_hostname == sni
            assert bool(b.tls.peer_certificate) == (sent == "good")
            assert info.alpn_protocol == ("x" if required else None)
        else:
            words = "sent no certificate" if sent == "none" else "certificate was refused"
            assert words in str(server_error)
            advice = "(if you trust its issuer, pass the issuer to ServerTLS(client_ca=...))"
            assert (advice in str(server_error)) == (sent != "none")


@pytest.fixture
def strict_server_tls(authority: Authority) -> ServerTLS:
    return authority.server_tls(
        "example.org", client_ca=authority.ca, require_client_certificate=True
    )


async def test_a_client_that_only_sends_learns_why_it_was_refused(
    a: Socket, b: Socket, client_tls: ClientTLS, strict_server_tls: ServerTLS
) -> None:
    """In TLS 1.3, the alert arrives after the client's handshake. A reset follows the alert."""

    async def server_side() -> None:
        with pytest.raises(TLSError, match="sent no certificate"):
            await b.starttls(strict_server_tls)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(server_side)
        await a.starttls(client_tls)
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


async def test_client_tls_sends_its_certificate(
    a: Socket, b: Socket, authority: Authority, strict_server_tls: ServerTLS
) -> None:
    certificate = authority.certificate("client@example.org")
    client_tls = authority.client_tls("example.org", certificate=certificate)
    _, info = await upgrade(a, client_tls, b, strict_server_tls)
    assert info.peer_certificate


# ---- negotiated values ----


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
async def test_channel_bindings_depend_on_the_tls_version(
    version: str, a: Socket, b: Socket, authority: Authority, server_tls: ServerTLS
) -> None:
    client, server = await upgrade(a, raw_client_context(authority, version), b, server_tls)
    assert client.peer_certificate is not None
    digest = hashlib.sha256(client.peer_certificate).digest()
    assert client.channel_binding("tls-server-end-point") == digest
    with pytest.raises(ValueError, match="which this side does not know"):
        server.channel_binding("tls-server-end-point")
    with pytest.raises(ValueError, match="no channel binding of the type 'x'"):
        client.channel_binding("x")
    if version == "TLSv1_2":
        assert client.channel_binding() == server.channel_binding("tls-unique")
    else:
        with pytest.raises(ValueError, match=r"not defined for TLSv1\.3"):
            client.channel_binding()


async def test_session_reused_is_true_after_a_resumption(
    authority: Authority, server_tls: ServerTLS
) -> None:
    context = raw_client_context(authority, "TLSv1_2")
    session = None
    for resumed in (False, True):
        info, session = await visit(server_tls, context, "example.org", session)
        assert isinstance(info, TLSInfo)
        assert info.session_reused == resumed


def test_renegotiation_is_disabled(server_tls: ServerTLS) -> None:
    assert server_tls._context().options & ssl.OP_NO_RENEGOTIATION
