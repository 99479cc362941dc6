"""hs.socket's startTLS: its verification, and its order among queued reads and writes."""

# ruff: noqa: N802 (tests are named after hs.socket's names)

from __future__ import annotations

import contextlib
import ssl
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import trisock
from helpers.hammerspoon import LOCALHOST, Calls, Log, clients_of, unix_client, until
from helpers.pairs import closing, read_all
from trisock import ClientTLS, ServerTLS
from trisock.hammerspoon import Socket, Sockets
from trisock.testing import Authority

pytestmark = pytest.mark.usefixtures("trusted")


@pytest.mark.parametrize("go_ahead", [True, False], ids=["go ahead", "without go ahead"])
async def test_startTLS_runs_in_order_with_reads_and_writes(
    hs: Sockets, server_tls: ServerTLS, calls: Calls, go_ahead: bool
) -> None:
    """A single callback queues all operations, including startTLS."""

    async def handler(sock: trisock.Socket) -> None:
        await sock.send(b"hello\n")
        assert await sock.recv_until(b"\n") == b"STARTTLS\n"
        if go_ahead:
            await sock.send(b"go ahead\n")
        await sock.starttls(server_tls)
        async for line in sock.lines(keep_ends=True):
            await sock.send(b"encrypted: " + line)

    def callback(data: bytes, tag: int) -> None:
        calls(data, tag, client.info()["isSecure"])
        if tag == 1:
            client.write("STARTTLS\n")
            if go_ahead:
                client.read("\n", 2)
            assert client.startTLS() is client
            client.write("one\n").write("two\n")
            client.read("\n", 3)
            client.read("\n", 4)

    client = hs.new(callback)
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        client.connect("localhost", server.port)
        client.read("\n", 1)
        assert await calls.next() == (b"hello\n", 1, False)
        if go_ahead:
            assert await calls.next() == (b"go ahead\n", 2, False)
        assert await calls.next() == (b"encrypted: one\n", 3, True)
        assert await calls.next() == (b"encrypted: two\n", 4, True)
        client.disconnect()
        server.stop()


async def received_by_tls_server(peer: trisock.Socket, tls: ServerTLS) -> bytes:
    """Act as a TLS server until the connection ends. Return all received bytes, still encrypted."""
    received = bytearray()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = tls._context().wrap_bio(incoming, outgoing, server_side=True)
    with contextlib.suppress(trio.BrokenResourceError):
        async for chunk in peer:
            received += chunk
            incoming.write(chunk)
            with contextlib.suppress(ssl.SSLError):
                server.do_handshake()
            if outgoing.pending:
                await peer.send(outgoing.read())
    return bytes(received)


async def check_tls(client: Socket, peer: trisock.Socket, tls: ServerTLS, calls: Calls) -> None:
    """Do the peer's part of the handshake, and check that both sides can then send."""
    client.write("secret\n").read("\n")  # type: ignore[union-attr]
    await peer.starttls(tls)
    assert await peer.recv_until(b"\n") == b"secret\n"
    await peer.send(b"yes\n")
    assert await calls.next() == (b"yes\n", -1)


GOOD = [
    *((), (True,), (False,), (None,)),
    *(("example.org",), (True, "example.org"), (False, "example.org"), (None, "example.org")),
]


@pytest.mark.parametrize("arguments", GOOD)
async def test_startTLS_accepts_verify_and_peerName(
    client: Socket,
    peer: trisock.Socket,
    server_tls: ServerTLS,
    calls: Calls,
    arguments: tuple[Any, ...],
) -> None:
    assert client.startTLS(*arguments) is client
    await check_tls(client, peer, server_tls, calls)


@pytest.mark.parametrize(
    "arguments",
    [
        (),  # verifies the host that was passed to connect()
        (True,),
        ("mismatch.example",),
        (True, "mismatch.example"),
        (False, "mismatch.example"),  # an explicit name is verified even if verify is False
        (ClientTLS("mismatch.example"),),
        (ClientTLS(), "mismatch.example"),
    ],
)
async def test_startTLS_sends_no_plain_text_after_a_hostname_mismatch(
    client: Socket,
    peer: trisock.Socket,
    authority: Authority,
    calls: Calls,
    log: Log,
    arguments: tuple[Any, ...],
) -> None:
    client.write("plain text\n").startTLS(*arguments)
    client.write("secret\n", calls)
    client.read("\n")
    assert await peer.recv_exactly(11) == b"plain text\n"
    received = await received_by_tls_server(peer, authority.server_tls("example.org"))
    assert received.startswith(b"\x16\x03")  # a TLS handshake record
    assert b"secret" not in received
    await until(lambda: client.info()["isDisconnected"])
    assert "certificate" in log.text
    client.write("secret\n")  # ignored, since the client is not connected
    assert await calls.none()


@pytest.mark.parametrize("arguments", [each for each in GOOD if each != (False,)])
async def test_startTLS_with_an_unknown_authority_disconnects(
    client: Socket,
    peer: trisock.Socket,
    other_authority: Authority,
    calls: Calls,
    arguments: tuple[Any, ...],
) -> None:
    client.startTLS(*arguments).write("secret\n", calls)
    unknown = other_authority.certificate("localhost", "example.org", "127.0.0.1")
    received = await received_by_tls_server(peer, ServerTLS(unknown))
    assert received.startswith(b"\x16\x03")
    assert b"secret" not in received
    await until(lambda: client.info()["isDisconnected"])
    assert await calls.none()


async def test_startTLS_False_accepts_any_certificate(
    client: Socket, peer: trisock.Socket, other_authority: Authority, calls: Calls
) -> None:
    client.startTLS(False)
    await check_tls(client, peer, other_authority.server_tls("any.example"), calls)


@unix_client
async def test_startTLS_over_a_unix_path_without_a_name_disconnects(
    client: Socket, peer: trisock.Socket, log: Log
) -> None:
    client.startTLS().write("secret")
    assert await read_all(peer) == b""
    assert "needs the server's name" in log.text


@unix_client
async def test_startTLS_over_a_unix_path_accepts_a_name(
    client: Socket, peer: trisock.Socket, server_tls: ServerTLS, calls: Calls
) -> None:
    client.startTLS("example.org")
    await check_tls(client, peer, server_tls, calls)


async def test_a_servers_startTLS_upgrades_all_its_clients(
    server: Socket, client_tls: ClientTLS, server_tls: ServerTLS, calls: Calls
) -> None:
    async with clients_of(server, 2) as peers:
        server.write("go ahead\n")
        assert server.startTLS(server_tls) is server
        server.write("hello\n")
        server.read("\n")
        for peer in peers:
            assert await peer.recv_until(b"\n") == b"go ahead\n"
            await peer.starttls(client_tls)
            assert await peer.recv_until(b"\n") == b"hello\n"
            await peer.send(b"secret\n")
            assert await calls.next() == (b"secret\n", -1)


async def test_a_servers_startTLS_without_certificates_disconnects(
    server: Socket, log: Log
) -> None:
    async with clients_of(server) as [peer]:
        server.startTLS().write("secret")
        assert await read_all(peer) == b""
        assert "needs the server's name" in log.text


async def test_a_second_startTLS_is_ignored_and_logged(
    client: Socket, peer: trisock.Socket, server_tls: ServerTLS, calls: Calls, log: Log
) -> None:
    client.startTLS(False).startTLS(False)
    await check_tls(client, peer, server_tls, calls)
    assert "it is already using TLS" in log.text


async def test_startTLS_on_an_unconnected_object_returns_self_and_logs(
    hs: Sockets, log: Log
) -> None:
    created = hs.new()
    assert created.startTLS() is created
    assert "cannot start TLS: it is not connected" in log.text


async def test_startTLS_can_be_queued_while_connecting(
    hs: Sockets, server_tls: ServerTLS, calls: Calls
) -> None:
    async with await trisock.listen(0, host=LOCALHOST) as listener:
        client = hs.new(calls)
        client.connect(LOCALHOST, listener.port)
        client.startTLS(False)
        peer = await listener.accept()
        async with closing(peer):
            await check_tls(client, peer, server_tls, calls)


@pytest.mark.parametrize("reading", [True, False], ids=["after a line", "before any read"])
async def test_plain_text_injected_before_startTLS_reaches_no_callback(
    client: Socket, peer: trisock.Socket, server_tls: ServerTLS, calls: Calls, reading: bool
) -> None:
    def callback(data: bytes, tag: int) -> None:
        calls(data)
        client.startTLS("example.org").read("\n")

    if reading:
        client.setCallback(callback).read("\n")
        await peer.send(b"go ahead\ninjected\n")
    else:
        await peer.send(b"injected\n")
        await wait_all_tasks_blocked()  # until the client has buffered the line
        client.startTLS("example.org").read("\n")
    with pytest.raises(trio.BrokenResourceError):
        await peer.starttls(server_tls)
    await until(lambda: client.info()["isDisconnected"])
    if reading:
        assert await calls.next() == (b"go ahead\n",)
    assert await calls.none()


@pytest.mark.parametrize("unfinished_read", [False, True])
async def test_startTLS_after_eof_disconnects_after_all_pending_writes(
    client: Socket, peer: trisock.Socket, calls: Calls, unfinished_read: bool
) -> None:
    def callback(data: bytes, tag: int) -> None:
        calls(data)
        client.write("last words\n")
        if unfinished_read:
            client.read("\n")
        client.startTLS("example.org")

    client.setCallback(callback).read("\n")
    await peer.send(b"go ahead\n")
    await peer.send_eof()
    assert (await read_all(peer)).startswith(b"last words\n")
    await until(lambda: client.info()["isDisconnected"])
    assert await calls.next() == (b"go ahead\n",)
    assert await calls.none()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        *(((each,), "verify must be a bool, a name") for each in (0, 5, b"example.org", [])),
        *((each, "is not a host name") for each in [("",), (True, "not a name")]),
        *((each, "a host must be a str") for each in [(True, 5), (False, b"x")]),
        (("localhost", "other.example"), "two were given"),
    ],
)
async def test_startTLS_with_invalid_arguments_raises_and_disconnects(
    client: Socket, peer: trisock.Socket, arguments: tuple[Any, ...], words: str
) -> None:
    client.write("plain text\n")
    await peer.recv_until(b"\n")
    with pytest.raises((TypeError, ValueError), match=words):
        client.startTLS(*arguments)
    client.write("secret")
    assert await read_all(peer) == b""


async def test_disconnect_drops_a_queued_startTLS(client: Socket, peer: trisock.Socket) -> None:
    client.write("plain text\n")
    await peer.recv_until(b"\n")
    client.read("\n").startTLS("example.org").write("secret")  # type: ignore[union-attr]
    client.disconnect()
    assert await read_all(peer) == b""
    assert not client.connected()


async def test_startTLS_accepts_no_second_name(
    client: Socket, peer: trisock.Socket, server_tls: ServerTLS
) -> None:
    with pytest.raises(TypeError, match="takes no name for a server's role"):
        client.startTLS(server_tls, "example.org")
    assert await read_all(peer) == b""


async def test_startTLS_does_not_replace_a_pinned_name(
    client: Socket, peer: trisock.Socket
) -> None:
    with pytest.raises(TypeError, match="needs one name, but two were given"):
        client.startTLS(trisock.ClientTLS("pinned.example", verify=False), "other.example")
    assert await read_all(peer) == b""
