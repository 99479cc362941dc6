"""starttls: its arguments, and the data before, during and after the upgrade."""

from __future__ import annotations

import contextlib
import ssl

import pytest
import trio
import trio.testing

import trisock
from helpers.blocked import cancel_when_blocked
from helpers.pairs import closing, raw_pair
from helpers.raw_tls import RawTLS, raw_client_context, upgrade
from helpers.reads import READS
from trisock import ClientTLS, ServerTLS, Socket, TLSError
from trisock.testing import Authority, socket_pair

# ---- encrypted conversations ----


@pytest.mark.parametrize("layer", ["plain"])
async def test_a_connection_can_start_and_stop_tls_repeatedly(
    a: Socket, b: Socket, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    for _ in range(2):
        await a.send(b"STARTTLS\r\n")
        assert await b.recv_until(b"\r\n") == b"STARTTLS\r\n"
        await b.send(b"220 go ahead\r\n")
        assert await a.recv_until(b"\r\n") == b"220 go ahead\r\n"
        infos = await upgrade(a, client_tls, b, server_tls)
        for sock, info in zip((a, b), infos, strict=True):
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
        await a.send(b"secret")
        assert await b.recv() == b"secret"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.stoptls)
            await a.stoptls()
        assert a.tls is b.tls is None
        await a.send(b"plain text")
        assert await b.recv() == b"plain text"


@pytest.mark.parametrize("layer", ["plain"])
async def test_either_end_can_be_the_tls_client(
    a: Socket, b: Socket, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    """In FTP's active mode, the TLS client accepts the connection (RFC 4217, section 7)."""
    await upgrade(b, client_tls, a, server_tls)
    assert (a.getside(), b.getside()) == ("client", "server")
    await a.send(b"x")
    assert await b.recv() == b"x"


async def test_recv_returns_one_record_at_a_time(a: Socket, b: Socket) -> None:
    await a.send(b"one")
    await a.send(b"two")
    await a.send(b"three", b"four")
    await trio.lowlevel.wait_readable(b.fileno())
    assert await b.peek() == b"one"
    assert await b.recv() == b"one"
    assert await b.recv(1) == b"t"
    assert await b.peek() == b"wo"
    b.unrecv(b"more")
    assert [await b.recv() for _ in range(3)] == [b"more", b"wo", b"threefour"]
    assert await b.peek() is None
    await a.close()
    for _ in range(2):
        assert await b.recv() == b""
        assert await b.peek() == b""
    assert not b.isopen()


async def test_send_eof_is_not_implemented_under_tls(a: Socket) -> None:
    with pytest.raises(NotImplementedError, match="half-closed"):
        await a.send_eof()


async def test_both_ends_can_read_and_send_at_the_same_time(a: Socket, b: Socket) -> None:
    message = bytes(range(256)) * 8_000

    async def both(sock: Socket) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sock.send, message)
            assert await sock.recv_exactly(len(message)) == message

    async with trio.open_nursery() as nursery:
        nursery.start_soon(both, a)
        nursery.start_soon(both, b)


# ---- bytes that were received before TLS ----


@pytest.mark.parametrize("how", ["unrecv", "peek", "proxy line", "in pieces"])
async def test_starttls_uses_a_client_hello_that_was_received_earlier(
    how: str, authority: Authority, server_tls: ServerTLS
) -> None:
    # PROXY protocol, version 1: the line and the ClientHello arrive in one segment.
    line = b"PROXY TCP4 192.0.2.1 192.0.2.2 5 443\r\n" if how == "proxy line" else b""
    sock, raw = raw_pair()
    async with closing(sock):
        peer = RawTLS(raw, raw_client_context(authority), server_hostname="example.org")
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

        def client() -> None:
            peer.run(peer.ssl.do_handshake)
            peer.run(lambda: peer.ssl.write(b"hello"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, client)
            await sock.starttls(server_tls)
            assert await sock.recv() == b"hello"
        raw.close()


@pytest.mark.parametrize("role", ["server", "client"])
@pytest.mark.parametrize("where", ["buffered", "in the kernel", "pushed back"])
async def test_plain_text_injected_after_starttls_fails_the_handshake(
    role: str, where: str, authority: Authority, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    """An attacker injects plain text after the STARTTLS command or after the reply.

    See CVE-2011-0411 and "NO STARTTLS" (2021).
    """
    sock, raw = raw_pair()
    injected = b"MAIL FROM:<attacker>\r\n" if role == "server" else b"250 all is well\r\n"
    command = b"STARTTLS\r\n" if role == "server" else b"220 go ahead\r\n"
    if role == "server":
        peer = RawTLS(raw, raw_client_context(authority), server_hostname="example.org")
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


@pytest.mark.parametrize("layer", ["plain"])
async def test_a_context_that_fails_leaves_the_connection_unchanged(a: Socket) -> None:
    class Bad(ssl.SSLContext):
        def wrap_bio(self, *_: object, **__: object) -> ssl.SSLObject:
            raise RuntimeError("a plug-in has failed")

    a.unrecv(b"early")
    with pytest.raises(RuntimeError, match="plug-in"):
        await a.starttls(Bad(ssl.PROTOCOL_TLS_SERVER))
    assert await a.recv() == b"early"
    async with await trisock.listen(0, host="127.0.0.1") as listener:
        with pytest.raises(RuntimeError, match="plug-in"):  # connect leaves nothing open
            await trisock.connect("127.0.0.1", listener.port, tls=Bad(ssl.PROTOCOL_TLS_SERVER))


@pytest.mark.parametrize("layer", ["plain"])
async def test_a_wrong_argument_leaves_the_connection_unchanged(
    a: Socket, b: Socket, authority: Authority, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    good = authority.certificate("example.org")
    a.unrecv(b"early")
    no_check = ssl.create_default_context()
    for tls, options, error, words in [
        (None, {}, TypeError, "tls must be a server name"),
        (b"example.org", {}, TypeError, "tls must be a server name"),
        (42, {}, TypeError, "tls must be a server name"),
        ("", {}, ValueError, "not a host name"),
        ("a b", {}, ValueError, "not a host name"),
        ([], {}, ValueError, "at least one certificate"),
        (["example.org"], {}, TypeError, "not a str"),
        ([{"chain": "x"}], {}, ValueError, "it lacks private_key"),
        ([{"chain": "x", "private_key": "y"}], {}, ValueError, "not PEM"),
        (ClientTLS(ca=authority.ca), {"server_hostname": 1}, TypeError, "must be a str"),
        (
            [good],
            {"server_hostname": "example.org"},
            ValueError,
            "a TLS server takes no server_hostname",
        ),
        (client_tls, {"server_hostname": ""}, ValueError, "not a host name"),
        (client_tls, {"handshake_timeout": "1"}, TypeError, "number of seconds"),
        (client_tls, {"handshake_timeout": True}, TypeError, "number of seconds"),
        (client_tls, {"handshake_timeout": -1}, ValueError, "0 or more"),
        (client_tls, {"handshake_timeout": float("nan")}, ValueError, "0 or more"),
    ]:
        with pytest.raises(error, match=words):
            await a.starttls(tls, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs the server's name"):
        await b.starttls(ClientTLS(ca=authority.ca))
    with pytest.raises(ValueError, match="server_hostname is needed"):
        await b.starttls(no_check)
    with pytest.raises(RuntimeError, match="not using TLS"):
        await a.stoptls()
    assert await a.recv() == b"early"
    await upgrade(a, client_tls, b, server_tls)
    with pytest.raises(RuntimeError, match="already using TLS"):
        await a.starttls(client_tls)
    await a.send(b"x")
    assert await b.recv() == b"x"


async def test_the_most_specific_name_is_verified(
    authority: Authority, server_tls: ServerTLS
) -> None:
    """The name in ``tls`` overrides the connected host. ``server_hostname`` overrides both."""
    context = raw_client_context(authority)
    for tls, name_given, verified in [
        (ClientTLS(ca=authority.ca), None, "127.0.0.1"),  # the host given to connect
        (authority.client_tls("example.org"), None, "example.org"),
        (authority.client_tls("example.net"), "localhost", "localhost"),
        (authority.client_tls("example.org."), None, "example.org"),
        (context, None, "127.0.0.1"),
        (context, "localhost", "localhost"),
    ]:
        a, b = await socket_pair()
        async with closing(a, b), trio.open_nursery() as nursery:
            nursery.start_soon(b.starttls, server_tls)
            info = await a.starttls(tls, server_hostname=name_given)
            assert info.server_hostname == verified


@pytest.mark.parametrize("layer", ["plain"])
async def test_an_international_name_is_verified_in_its_ascii_form(
    a: Socket, b: Socket, authority: Authority
) -> None:
    role = authority.client_tls("faß.de")
    infos = await upgrade(a, role, b, [authority.certificate("xn--fa-hia.de")])
    assert [info.server_hostname for info in infos] == ["xn--fa-hia.de", "xn--fa-hia.de"]


async def test_an_ssl_context_works_in_either_role(authority: Authority) -> None:
    client_context = raw_client_context(authority)
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.certificate("127.0.0.1").load_into(server_context)
    a, b = await socket_pair()
    async with closing(a, b):
        infos = await upgrade(a, client_context, b, server_context)
        assert [info.server_hostname for info in infos] == ["127.0.0.1", None]
    a, b = await socket_pair()
    async with closing(a, b), trio.open_nursery() as nursery:
        nursery.start_soon(a.starttls, server_context)  # the side that connected is the TLS server
        info = await b.starttls(client_context, server_hostname="127.0.0.1")
        assert info.server_hostname == "127.0.0.1"


@pytest.mark.filterwarnings("ignore:ssl.PROTOCOL_TLS is deprecated")
@pytest.mark.parametrize("layer", ["plain"])
async def test_a_context_for_both_roles_takes_the_sockets_role(
    a: Socket, b: Socket, authority: Authority
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS)
    authority.certificate("127.0.0.1").load_into(context)
    infos = await upgrade(a, context, b, context)
    assert infos[0].peer_certificate


@pytest.mark.parametrize("layer", ["plain"])
@pytest.mark.parametrize("name", ["whatever.example", None])
async def test_without_verification_any_certificate_is_accepted(
    name: str | None, a: Socket, b: Socket, authority: Authority
) -> None:
    role = ClientTLS(name, verify=False)
    info, _ = await upgrade(a, role, b, [authority.certificate("example.org")])
    assert info.peer_certificate


@pytest.mark.parametrize("layer", ["plain"])
async def test_starttls_after_a_partial_send_closes_the_socket(
    a: Socket, b: Socket, client_tls: ClientTLS
) -> None:
    """A program that handles the error must not be able to continue in plain text."""
    await cancel_when_blocked(a.send, bytes(50_000_000))
    await b.send(b"plain text")
    with pytest.raises(trio.BrokenResourceError, match="cut short"):
        await a.starttls(client_tls)
    assert a.fileno() == -1
    with pytest.raises(trio.ClosedResourceError):
        await a.recv()


# ---- conflicts ----


@pytest.mark.parametrize(("layer", "change"), [("plain", "starttls"), ("tls", "stoptls")])
async def test_every_call_is_refused_while_tls_begins_or_ends(
    a: Socket, b: Socket, change: str, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(*((a.starttls, client_tls) if change == "starttls" else (a.stoptls,)))
        await trio.testing.wait_all_tasks_blocked()
        for read in READS.values():
            with pytest.raises(trio.BusyResourceError):
                await read(a)
        for call in (
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
        await (b.starttls(server_tls) if change == "starttls" else b.stoptls())
    await a.send(b"still works")
    assert await b.recv() == b"still works"
