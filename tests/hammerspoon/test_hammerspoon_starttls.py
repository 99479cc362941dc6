"""startTLS of hs.socket's objects: whom it believes, and in which order it is done."""

# ruff: noqa: N802 (tests are named after hs.socket's names)

from __future__ import annotations

import contextlib
import ssl
from typing import Any

import pytest
import trio
import trio.testing

import trisock
from helpers.authority import Authority
from helpers.hammerspoon_kit import LOCALHOST, Calls, clients_of, connected, until
from helpers.pairs import closing, read_all
from trisock import ClientTLS, ServerTLS
from trisock.hammerspoon import Sockets


async def starttls_server(sock: trisock.Socket, tls: ServerTLS) -> None:
    """Talk a protocol with STARTTLS; then send back what comes."""
    await sock.send(b"hello\n")
    assert await sock.recv_until(b"\n") == b"STARTTLS\n"
    await sock.send(b"go ahead\n")
    await sock.starttls(tls)
    async for line in sock.lines(keep_ends=True):
        await sock.send(b"in secret: " + line)


async def test_startTLS_is_done_in_order_with_reads_and_writes(
    hs: Sockets, trusted: None, server_tls: ServerTLS, calls: Calls
) -> None:
    async def handler(sock: trisock.Socket) -> None:
        await starttls_server(sock, server_tls)

    def callback(data: bytes, tag: int) -> None:
        calls(data, tag, client.info()["isSecure"])
        if tag == 1:
            assert client.write("STARTTLS\n").read("\n", 2) is client
            assert client.startTLS("example.org") is client
            client.write("one\n").write("two\n")
            client.read("\n", 3)
            client.read("\n", 4)

    client = hs.new(callback)
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        client.connect("localhost", server.port)
        client.read("\n", 1)
        assert await calls.next() == (b"hello\n", 1, False)
        assert await calls.next() == (b"go ahead\n", 2, False)
        assert await calls.next() == (b"in secret: one\n", 3, True)
        assert await calls.next() == (b"in secret: two\n", 4, True)
        client.disconnect()
        server.stop()


async def test_startTLS_write_startTLS_write_read_in_one_callback(
    hs: Sockets, trusted: None, server_tls: ServerTLS, calls: Calls
) -> None:
    async def handler(sock: trisock.Socket) -> None:
        await sock.send(b"hello\n")
        assert await sock.recv_until(b"\n") == b"STARTTLS\n"
        await sock.starttls(server_tls)
        await sock.send(b"in secret: " + await sock.recv_until(b"\n"))

    def callback(data: bytes, tag: int) -> None:
        calls(data, tag)
        if tag == 1:
            client.write("STARTTLS\n").startTLS().write("one\n").read("\n", 2)

    client = hs.new(callback)
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        client.connect("localhost", server.port)
        client.read("\n", 1)
        assert await calls.next() == (b"hello\n", 1)
        assert await calls.next() == (b"in secret: one\n", 2)
        server.stop()


async def tls_by_hand(peer: trisock.Socket, tls: ServerTLS) -> bytes:
    """Be a TLS server until the connection ends; return all the bytes that came over it."""
    came = bytearray()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = tls._context().wrap_bio(incoming, outgoing, server_side=True)
    with contextlib.suppress(trio.BrokenResourceError):
        async for chunk in peer:
            came += chunk
            incoming.write(chunk)
            with contextlib.suppress(ssl.SSLError):
                server.do_handshake()
            if outgoing.pending:
                await peer.send(outgoing.read())
    return bytes(came)


GOOD = [(), (True,), (False,), ("example.org",), (True, "example.org"), (False, "example.org")]


GOOD += [(None,), (None, "example.org")]


@pytest.mark.parametrize("arguments", GOOD)
async def test_startTLS_with_verify_and_peerName(
    hs: Sockets,
    trusted: None,
    server_tls: ServerTLS,
    calls: Calls,
    arguments: tuple[Any, ...],
) -> None:
    async with connected(hs, fn=calls) as (client, peer):
        assert client.startTLS(*arguments) is client
        client.write("secret\n")
        client.read("\n")
        await peer.starttls(server_tls)
        assert await peer.recv_until(b"\n") == b"secret\n"
        await peer.send(b"yes\n")
        assert await calls.next() == (b"yes\n", -1)


@pytest.mark.parametrize(
    "arguments",
    [
        (),  # which verifies the host given to connect
        (True,),
        ("wrong.example",),
        (True, "wrong.example"),
        (False, "wrong.example"),  # a name is verified all the same
        (ClientTLS("wrong.example"),),
        (ClientTLS(), "wrong.example"),
        (ClientTLS("example.org"), "wrong.example"),
    ],
)
async def test_startTLS_with_the_wrong_name_sends_nothing_in_the_clear(
    hs: Sockets,
    trusted: None,
    authority: Authority,
    calls: Calls,
    log: pytest.LogCaptureFixture,
    arguments: tuple[Any, ...],
) -> None:
    async with connected(hs, fn=calls) as (client, peer):
        client.write("in the clear\n").startTLS(*arguments)
        client.write("secret\n", calls)
        client.read("\n")
        assert await peer.recv_exactly(13) == b"in the clear\n"
        came = await tls_by_hand(peer, ServerTLS(authority.issue("example.org")))
        assert came.startswith(b"\x16\x03")  # a handshake's record
        assert b"secret" not in came
        await until(lambda: client.info()["isDisconnected"])
        assert "certificate" in log.text
        client.write("secret\n")  # is not connected
        assert await calls.none()


@pytest.mark.parametrize("arguments", [each for each in GOOD if each != (False,)])
async def test_startTLS_with_an_unknown_authority_disconnects(
    hs: Sockets, server_tls: ServerTLS, calls: Calls, arguments: tuple[Any, ...]
) -> None:
    async with connected(hs, fn=calls) as (client, peer):
        client.startTLS(*arguments).write("secret\n", calls)
        came = await tls_by_hand(peer, server_tls)
        assert came.startswith(b"\x16\x03")
        assert b"secret" not in came
        await until(lambda: client.info()["isDisconnected"])
        assert await calls.none()


async def test_startTLS_False_takes_a_certificate_of_anybody(
    hs: Sockets, other_authority: Authority, calls: Calls
) -> None:
    async with connected(hs, fn=calls) as (client, peer):
        client.startTLS(False).read("\n")
        await peer.starttls(ServerTLS(other_authority.issue("anybody.example")))
        await peer.send(b"yes\n")
        assert await calls.next() == (b"yes\n", -1)


async def test_startTLS_over_a_unix_connection_needs_a_name(
    hs: Sockets,
    trusted: None,
    path: str,
    server_tls: ServerTLS,
    calls: Calls,
    log: pytest.LogCaptureFixture,
) -> None:
    async with connected(hs, path, calls) as (client, peer):
        client.startTLS().write("secret")
        assert await read_all(peer) == b""
        assert "needs to know the server's name" in log.text
    async with connected(hs, path, calls) as (client, peer):
        client.startTLS("example.org").read("\n")
        await peer.starttls(server_tls)
        await peer.send(b"yes\n")
        assert await calls.next() == (b"yes\n", -1)


async def test_startTLS_of_a_listening_socket_is_for_its_clients(
    hs: Sockets, client_tls: ClientTLS, server_tls: ServerTLS, calls: Calls
) -> None:
    server = hs.server(0, calls)
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


async def test_startTLS_of_a_listening_socket_without_certificates_disconnects(
    hs: Sockets, log: pytest.LogCaptureFixture
) -> None:
    server = hs.server(0)
    async with clients_of(server) as [peer]:
        server.startTLS().write("secret")
        assert await read_all(peer) == b""
        assert "needs to know the server's name" in log.text


async def test_startTLS_twice_changes_nothing_and_is_logged(
    hs: Sockets, server_tls: ServerTLS, calls: Calls, log: pytest.LogCaptureFixture
) -> None:
    async with connected(hs, fn=calls) as (client, peer):
        client.startTLS(False).startTLS(False).write("secret\n").read("\n")
        await peer.starttls(server_tls)
        assert await peer.recv_until(b"\n") == b"secret\n"
        await peer.send(b"yes\n")
        assert await calls.next() == (b"yes\n", -1)
        assert "it is using TLS already" in log.text


async def test_startTLS_unconnected_returns_self_and_is_logged(
    hs: Sockets, log: pytest.LogCaptureFixture
) -> None:
    created = hs.new()
    assert created.startTLS() is created
    assert "cannot start TLS: it is not connected" in log.text


async def test_startTLS_before_it_is_connected(
    hs: Sockets, server_tls: ServerTLS, calls: Calls
) -> None:
    async with await trisock.listen(0, host=LOCALHOST) as listener:
        client = hs.new(calls).connect(LOCALHOST, listener.port)
        assert client is not None
        client.startTLS(False).read("\n")
        peer = await listener.accept()
        async with closing(peer):
            await peer.starttls(server_tls)
            await peer.send(b"yes\n")
            assert await calls.next() == (b"yes\n", -1)


async def test_startTLS_injected_plain_text_reaches_no_callback(
    hs: Sockets, trusted: None, server_tls: ServerTLS, calls: Calls
) -> None:
    def callback(data: bytes, tag: int) -> None:
        calls(data)
        client.startTLS("example.org").read("\n")

    async with connected(hs) as (client, peer):
        client.setCallback(callback).read("\n")
        await peer.send(b"go ahead\ninjected\n")
        with pytest.raises(trio.BrokenResourceError):
            await peer.starttls(server_tls)
        await until(lambda: client.info()["isDisconnected"])
        assert await calls.next() == (b"go ahead\n",)
        assert await calls.none()


async def test_startTLS_what_came_while_nothing_was_read_reaches_no_callback(
    hs: Sockets, trusted: None, server_tls: ServerTLS, calls: Calls
) -> None:
    async with connected(hs, fn=calls) as (client, peer):
        await peer.send(b"injected\n")
        await trio.testing.wait_all_tasks_blocked()  # it is in the buffer
        client.startTLS("example.org").read("\n")
        with pytest.raises(trio.BrokenResourceError):
            await peer.starttls(server_tls)
        await until(lambda: client.info()["isDisconnected"])
        assert await calls.none()


@pytest.mark.parametrize("more", ["", "\n"], ids=["nothing to read", "a read that cannot be done"])
async def test_startTLS_behind_the_end_disconnects_after_what_was_written(
    more: str, hs: Sockets, trusted: None, calls: Calls
) -> None:
    def callback(data: bytes, tag: int) -> None:
        calls(data)
        client.write("last words\n")
        if more:
            client.read(more)
        client.startTLS("example.org")

    async with connected(hs) as (client, peer):
        client.setCallback(callback).read("\n")
        await peer.send(b"go ahead\n")
        await peer.send_eof()
        assert (await read_all(peer)).startswith(b"last words\n")
        await until(lambda: client.info()["isDisconnected"])
        assert await calls.next() == (b"go ahead\n",)
        assert await calls.none()


@pytest.mark.parametrize(
    "arguments",
    [("",), (True, "not a name"), (True, 5), (False, b"x"), (0,), (5,), (b"example.org",), ([],)],
)
async def test_startTLS_with_bad_arguments_raises_and_disconnects(
    hs: Sockets, arguments: tuple[Any, ...]
) -> None:
    async with connected(hs) as (client, peer):
        client.write("in the clear\n")
        await peer.recv_until(b"\n")
        with pytest.raises((TypeError, ValueError)):
            client.startTLS(*arguments)
        client.write("secret")
        assert await read_all(peer) == b""


async def test_startTLS_of_a_server_with_a_peerName_disconnects(
    hs: Sockets, server_tls: ServerTLS, log: pytest.LogCaptureFixture
) -> None:
    async with connected(hs) as (client, peer):
        client.startTLS(server_tls, "example.org").write("secret")
        assert await read_all(peer) == b""
        assert "server_hostname is for the TLS client's role" in log.text
