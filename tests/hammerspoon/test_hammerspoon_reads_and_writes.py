"""Reads and writes of hs.socket's objects, and their behaviour at EOF."""

# ruff: noqa: N802 (tests are named after hs.socket's names)

from __future__ import annotations

import logging
import socket

import pytest
from trio.testing import wait_all_tasks_blocked

import trisock
from helpers.hammerspoon import (
    LOCALHOST,
    MORE_THAN_FITS,
    Calls,
    Log,
    clients_of,
    connected,
    errors_in,
    unix_server,
    until,
)
from helpers.pairs import closing, read_all
from trisock import ServerTLS
from trisock.hammerspoon import Socket, Sockets

# ---- read ----


async def test_read_accepts_a_byte_count(
    client: Socket, peer: trisock.Socket, calls: Calls
) -> None:
    assert client.read(5) is client
    await peer.send(b"hel")
    assert await calls.none()
    await peer.send(b"lo, world\n")
    assert await calls.next() == (b"hello", -1)
    assert client.read(0, 1) is client  # a read of 0 bytes is ignored, as in hs.socket
    assert await calls.none()
    assert client.receive("\n", 2) is client
    assert await calls.next() == (b", world\n", 2)


async def test_read_accepts_a_delimiter_and_includes_it(
    client: Socket, peer: trisock.Socket, calls: Calls
) -> None:
    client.read("\r\n").read(b"\0\xff").read("é").read(bytearray(b"--"))  # type: ignore[union-attr, arg-type]
    await peer.send(b"one\ntwo\r")
    assert await calls.none()
    await peer.send(b"\n\0\0\xffcaf\xc3\xa9--rest")
    for expected in (b"one\ntwo\r\n", b"\0\0\xff", "café".encode(), b"--"):
        assert await calls.next() == (expected, -1)
    assert await calls.none()


async def test_the_tag_of_a_read_is_passed_to_the_callback(
    client: Socket, peer: trisock.Socket, calls: Calls
) -> None:
    client.read("\n", 7)
    client.read("\n", tag=0)
    client.read("\n")
    client.read("\n", None)
    await peer.send(b"a\nb\nc\nd\n")
    for expected in [(b"a\n", 7), (b"b\n", 0), (b"c\n", -1), (b"d\n", -1)]:
        assert await calls.next() == expected


async def test_reads_complete_in_order(client: Socket, peer: trisock.Socket, calls: Calls) -> None:
    for tag in range(100):
        client.read("\n" if tag % 2 else 3, tag)
    await peer.send(b"abcd\n" * 50)
    for tag in range(100):
        assert await calls.next() == (b"d\n" if tag % 2 else b"abc", tag)


async def test_reads_and_writes_can_be_queued_while_connecting(hs: Sockets, calls: Calls) -> None:
    async with await trisock.listen(0, host=LOCALHOST) as listener:
        client = hs.new(calls)
        client.connect(LOCALHOST, listener.port, calls)
        assert client.read("\n", 1) is client
        assert client.read("\n", 2) is client
        client.write("hello\n", 3, calls)
        peer = await listener.accept()
        async with closing(peer):
            assert await calls.next() == ()
            assert await calls.next() == (3,)
            await peer.send(b"one\ntwo\n")
            assert await calls.next() == (b"one\n", 1)
            assert await calls.next() == (b"two\n", 2)


async def test_read_without_a_callback_returns_None_and_logs(hs: Sockets, log: Log) -> None:
    async with connected(hs) as (client, _peer):
        assert client.read("\n") is None
        assert "there is no callback" in log.text
        assert client.connected()


async def test_reads_and_writes_on_an_unconnected_object_are_logged(
    hs: Sockets, log: Log, calls: Calls
) -> None:
    client = hs.new(calls)
    assert client.read("\n") is None
    assert "cannot read: it is not connected" in log.text
    assert client.write("lost", calls) is client
    assert "cannot write: it is not connected" in log.text
    assert await calls.none()


async def test_read_on_a_server_reads_from_each_client(server: Socket, calls: Calls) -> None:
    async with clients_of(server, 3) as peers:
        assert server.read("\n", 5) is server
        for number, peer in enumerate(peers):
            await peer.send(b"%d\n" % number)
            assert await calls.next() == (b"%d\n" % number, 5)


async def test_read_on_a_server_does_not_apply_to_later_clients(
    server: Socket, calls: Calls
) -> None:
    assert server.read("\n", 1) is server
    async with clients_of(server) as [peer]:
        await peer.send(b"too late\n")
        assert await calls.none()
        server.read("\n", 2)
        assert await calls.next() == (b"too late\n", 2)


# ---- setCallback ----


async def test_setCallback_also_applies_to_queued_reads(
    client: Socket, peer: trisock.Socket, calls: Calls
) -> None:
    other = Calls()
    client.setCallback(other)
    client.read("\n", 1)
    client.read("\n", 2)
    assert client.setCallback(calls) is client
    await peer.send(b"a\n")
    assert await calls.next() == (b"a\n", 1)
    client.setCallback(other)
    await peer.send(b"b\n")
    assert await other.next() == (b"b\n", 2)


@pytest.mark.parametrize("arguments", [(), (None,)])
async def test_setCallback_without_a_function_clears_the_callback(
    client: Socket, peer: trisock.Socket, calls: Calls, arguments: tuple[None, ...]
) -> None:
    client.read("\n", 1)
    assert client.setCallback(*arguments) is client
    await peer.send(b"dropped\n")
    assert await calls.none()
    assert client.read("\n") is None
    client.setCallback(calls).read("\n", 2)
    await peer.send(b"line\n")
    assert await calls.next() == (b"line\n", 2)


# ---- write ----


async def test_write_returns_self_and_writes_in_order(client: Socket, peer: trisock.Socket) -> None:
    assert client.write("one ") is client
    assert client.send(b"two ") is client
    client.write("três ").write(bytearray(b"four ")).write(memoryview(b"five")).write("")  # type: ignore[arg-type]
    expected = "one two três four five".encode()
    assert await peer.recv_exactly(len(expected)) == expected


async def test_the_write_callback_receives_the_tag(
    client: Socket, peer: trisock.Socket, calls: Calls
) -> None:
    for arguments, tag in [((calls,), -1), ((7, calls), 7), ((0, calls), 0), ((None, calls), -1)]:
        assert client.write("x", *arguments) is client  # type: ignore[arg-type]
        assert await calls.next() == (tag,)
    client.write("x", 8)
    client.write("x", fn=calls)
    client.write("x", fn=calls, tag=9)
    assert await calls.next() == (-1,)
    assert await calls.next() == (9,)
    assert await peer.recv_exactly(7) == b"xxxxxxx"
    assert await calls.none()  # each callback is called only once


async def test_write_copies_mutable_data(client: Socket, peer: trisock.Socket) -> None:
    message = bytearray(b"before")
    client.write(message)  # type: ignore[arg-type]
    message[:] = b"after!"
    assert await peer.recv_exactly(6) == b"before"


async def test_write_of_an_invalid_type_raises_type_error(
    client: Socket, peer: trisock.Socket
) -> None:
    with pytest.raises(TypeError):
        client.write(5)  # type: ignore[arg-type]
    client.write("still there")
    assert await peer.recv() == b"still there"


async def test_write_on_a_server_goes_to_all_clients(server: Socket) -> None:
    async with clients_of(server, 3) as peers:
        assert server.write("all\n") is server
        for peer in peers:
            assert await peer.recv_exactly(4) == b"all\n"


@unix_server
async def test_a_servers_write_callback_runs_once_after_the_last_write(
    server: Socket, calls: Calls
) -> None:
    async with clients_of(server, 3) as peers:
        server.write(MORE_THAN_FITS, 5, calls)
        for peer in peers:
            assert await calls.none()
            await peer.recv_exactly(len(MORE_THAN_FITS))
        assert await calls.next() == (5,)
        assert await calls.none()


@unix_server
async def test_a_servers_write_callback_does_not_wait_for_lost_clients(
    server: Socket, calls: Calls
) -> None:
    async with clients_of(server, 2) as [quick, slow]:
        server.write(MORE_THAN_FITS, 5, calls)
        await quick.recv_exactly(len(MORE_THAN_FITS))
        assert await calls.none()
        slow.abort()
        assert await calls.next() == (5,)
        assert await calls.none()


async def test_a_servers_write_callback_ignores_disconnected_clients(
    server: Socket, calls: Calls
) -> None:
    async with clients_of(server, 2) as [leaves, stays]:
        await leaves.close()
        await until(lambda: server.connections() == 1)
        server.write("hello", 5, calls)
        assert await calls.next() == (5,)
        assert await stays.recv() == b"hello"


@unix_server
async def test_a_servers_write_callback_is_not_called_without_a_recipient(
    server: Socket, calls: Calls
) -> None:
    server.write("to nobody", calls)
    async with clients_of(server, 2) as peers:
        server.write(MORE_THAN_FITS, calls)
        await wait_all_tasks_blocked()
        for peer in peers:
            peer.abort()
        await until(lambda: not server.connected())
        assert await calls.none()


# ---- EOF ----


async def test_data_before_eof_can_still_be_read(
    client: Socket, peer: trisock.Socket, calls: Calls
) -> None:
    await peer.send(b"one\ntwo")
    await peer.close()
    await wait_all_tasks_blocked(0.01)
    assert client.connected()
    client.read("\n", 1)
    client.read(3, 2)
    assert await calls.next() == (b"one\n", 1)
    assert await calls.next() == (b"two", 2)
    await until(lambda: client.info()["isDisconnected"])


@pytest.mark.parametrize("delimiter", [10, "\n"])
async def test_eof_in_the_middle_of_a_read_disconnects(
    client: Socket, peer: trisock.Socket, calls: Calls, delimiter: int | str
) -> None:
    client.read(delimiter)
    await peer.send(b"too few")
    await peer.close()
    await until(lambda: client.info()["isDisconnected"])
    assert await calls.none()


async def test_eof_disconnects_even_without_a_read(
    client: Socket, peer: trisock.Socket, server: Socket
) -> None:
    await peer.close()
    await until(lambda: client.info()["isDisconnected"])
    async with clients_of(server) as [peer]:
        await peer.close()
        await until(lambda: not server.connected())


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("slow", [False, True])
async def test_a_half_closed_client_receives_the_response(
    server: Socket, again: bool, slow: bool
) -> None:
    def respond(data: bytes, tag: int) -> None:
        server.write(b"response to " + data)
        if again:
            server.read("\n")

    async def respond_slowly(data: bytes, tag: int) -> None:
        await wait_all_tasks_blocked(0.01)
        respond(data, tag)

    async with clients_of(server) as [peer]:
        server.setCallback(respond_slowly if slow else respond).read("\n")
        await peer.send(b"request\n")
        await peer.send_eof()
        assert await read_all(peer) == b"response to request\n"
        assert not server.connected()


async def test_a_client_that_half_closes_early_still_receives_the_response(
    server: Socket,
) -> None:
    server.setCallback(lambda data, tag: server.write(data))
    async with clients_of(server) as [peer]:
        await peer.send(b"one\ntwo\n")
        await peer.send_eof()
        await wait_all_tasks_blocked(0.01)
        server.read("\n")
        server.read("\n")
        assert await read_all(peer) == b"one\ntwo\n"


@unix_server
async def test_a_half_closed_client_receives_all_queued_writes(server: Socket) -> None:
    async with clients_of(server) as [peer]:
        server.write(MORE_THAN_FITS).write("the last")
        await peer.send_eof()
        await wait_all_tasks_blocked()
        assert await read_all(peer) == MORE_THAN_FITS + b"the last"


@pytest.mark.parametrize("clean", [True, False], ids=["close_notify", "truncated"])
async def test_eof_on_a_tls_connection_disconnects(
    client: Socket, peer: trisock.Socket, server_tls: ServerTLS, calls: Calls, log: Log, clean: bool
) -> None:
    client.startTLS(False).read("\n", 1)
    await peer.starttls(server_tls)
    await peer.send(b"line\nrest")
    if clean:
        await peer.close()
        assert await calls.next() == (b"line\n", 1)
        client.read(4, 2)
        assert await calls.next() == (b"rest", 2)
    else:
        assert await calls.next() == (b"line\n", 1)
        client.read("\n", 2)
        peer.stream.socket.shutdown(socket.SHUT_WR)  # without close_notify
    await until(lambda: client.info()["isDisconnected"])
    assert await calls.none()
    levels = {each.levelno for each in log.records}
    assert levels == ({logging.DEBUG} if clean else {logging.DEBUG, logging.WARNING})


async def test_a_reset_disconnects(
    client: Socket, peer: trisock.Socket, server: Socket, calls: Calls, log: Log
) -> None:
    client.read("\n")
    peer.abort()
    await until(lambda: client.info()["isDisconnected"])
    async with clients_of(server, 2) as peers:
        peers[0].abort()
        await until(lambda: server.connections() == 1)
        server.read("\n")
        await peers[1].send(b"line\n")
        assert await calls.next() == (b"line\n", -1)
    assert not errors_in(log)
