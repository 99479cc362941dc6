"""What hs.socket's objects read and write, and what the end of the stream does to it."""

# ruff: noqa: N802 (tests are named after hs.socket's names)

from __future__ import annotations

import logging
import socket

import pytest
import trio
import trio.testing

import trisock
from helpers.hammerspoon_kit import (
    LOCALHOST,
    MORE_THAN_FITS,
    Calls,
    clients_of,
    complaints,
    connected,
    until,
)
from helpers.pairs import closing, read_all
from trisock import ServerTLS
from trisock.hammerspoon import Sockets

# ---- read ----


async def test_read_returns_self(hs: Sockets, calls: Calls) -> None:
    async with connected(hs, fn=calls) as (client, _peer):
        assert client.read(1) is client
        assert client.receive("\n", 1) is client


async def test_read_by_count(hs: Sockets, calls: Calls) -> None:
    async with connected(hs, fn=calls) as (client, peer):
        client.read(5)
        await peer.send(b"hel")
        assert await calls.none()
        await peer.send(b"lo, world")
        assert await calls.next() == (b"hello", -1)
        assert client.read(0) is client  # and nothing else, as in hs.socket
        assert await calls.none()


async def test_read_by_delimiter_up_to_and_including_it(hs: Sockets, calls: Calls) -> None:
    async with connected(hs, fn=calls) as (client, peer):
        client.read("\r\n").read(b"\0\xff").read("é").read(bytearray(b"--"))  # type: ignore[union-attr, arg-type]
        await peer.send(b"one\ntwo\r")
        assert await calls.none()
        await peer.send(b"\n\0\0\xffcaf\xc3\xa9--rest")
        assert await calls.next() == (b"one\ntwo\r\n", -1)
        assert await calls.next() == (b"\0\0\xff", -1)
        assert await calls.next() == ("café".encode(), -1)
        assert await calls.next() == (b"--", -1)
        assert await calls.none()


async def test_read_tag_is_passed_to_the_callback(hs: Sockets, calls: Calls) -> None:
    async with connected(hs, fn=calls) as (client, peer):
        client.read("\n", 7)
        client.read("\n", tag=0)
        client.read("\n")
        client.read("\n", None)
        await peer.send(b"a\nb\nc\nd\n")
        expected = [(b"a\n", 7), (b"b\n", 0), (b"c\n", -1), (b"d\n", -1)]
        assert [await calls.next() for _ in range(4)] == expected


async def test_read_calls_queue_in_order(hs: Sockets, calls: Calls) -> None:
    async with connected(hs, fn=calls) as (client, peer):
        for tag in range(100):
            client.read("\n" if tag % 2 else 3, tag)
        await peer.send(b"abcd\n" * 50)
        for tag in range(100):
            assert await calls.next() == (b"d\n" if tag % 2 else b"abc", tag)


async def test_read_before_it_is_connected(hs: Sockets, calls: Calls) -> None:
    async with await trisock.listen(0, host=LOCALHOST) as listener:
        client = hs.new(calls).connect(LOCALHOST, listener.port)
        assert client is not None
        assert client.read("\n", 1) is client
        assert client.read("\n", 2) is client
        peer = await listener.accept()
        async with closing(peer):
            await peer.send(b"one\ntwo\n")
            assert await calls.next() == (b"one\n", 1)
            assert await calls.next() == (b"two\n", 2)


async def test_read_without_a_callback_is_None_and_logged(
    hs: Sockets, log: pytest.LogCaptureFixture
) -> None:
    async with connected(hs) as (client, _peer):
        assert client.read("\n") is None
        assert "there is no callback" in log.text
        assert client.connected()


async def test_read_unconnected_is_None_and_logged(
    hs: Sockets, log: pytest.LogCaptureFixture, calls: Calls
) -> None:
    assert hs.new(calls).read("\n") is None
    assert "it is not connected" in log.text


async def test_read_of_what_cannot_be_read_raises_and_harms_nothing(
    hs: Sockets, calls: Calls
) -> None:
    async with connected(hs, fn=calls) as (client, peer):
        for wrong in ("", -1):
            with pytest.raises(ValueError, match="a number of bytes or a delimiter"):
                client.read(wrong)
        for wrong in (None, 1.5):
            with pytest.raises(TypeError, match="data is bytes or str"):
                client.read(wrong)  # type: ignore[arg-type]
        client.read("\n")
        await peer.send(b"a\n")
        assert await calls.next() == (b"a\n", -1)


async def test_arguments_of_the_wrong_kind_raise_at_once(hs: Sockets) -> None:
    for call in (
        lambda: hs.new(5),  # type: ignore[arg-type]
        lambda: hs.new().setCallback(5),  # type: ignore[arg-type]
        lambda: hs.new().setTimeout("5"),  # type: ignore[arg-type]
        lambda: hs.new().setTimeout(float("nan")),
        lambda: hs.new().connect(LOCALHOST, "80"),  # type: ignore[arg-type]
        lambda: hs.new().connect({"host": LOCALHOST, "port": 80}),  # type: ignore[arg-type]
        lambda: hs.new().connect(LOCALHOST, 80, 5),  # type: ignore[arg-type]
        lambda: hs.new().write("x", 1, 5),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match=r"a function|a number of seconds|no host and port"):
            call()


async def test_read_of_a_listening_socket_reads_from_each_client(hs: Sockets, calls: Calls) -> None:
    server = hs.server(0, calls)
    async with clients_of(server, 3) as peers:
        assert server.read("\n", 5) is server
        for number, peer in enumerate(peers):
            await peer.send(b"%d\n" % number)
            assert await calls.next() == (b"%d\n" % number, 5)


async def test_read_of_a_server_is_for_those_who_are_there(hs: Sockets, calls: Calls) -> None:
    server = hs.server(0, calls)
    assert server.read("\n", 1) is server  # from nobody
    async with clients_of(server) as [peer]:
        await peer.send(b"too late\n")
        assert await calls.none()
        server.read("\n", 2)
        assert await calls.next() == (b"too late\n", 2)


# ---- setCallback ----


async def test_setCallback_returns_self_and_holds_from_then_on(hs: Sockets, calls: Calls) -> None:
    other = Calls()
    async with connected(hs, fn=other) as (client, peer):
        client.read("\n", 1)
        client.read("\n", 2)
        assert client.setCallback(calls) is client
        await peer.send(b"a\n")
        assert await calls.next() == (b"a\n", 1)
        client.setCallback(other)
        await peer.send(b"b\n")
        assert await other.next() == (b"b\n", 2)


@pytest.mark.parametrize("arguments", [(), (None,)])
async def test_setCallback_with_None_or_no_argument_clears_it(
    hs: Sockets, calls: Calls, arguments: tuple[None, ...]
) -> None:
    async with connected(hs, fn=calls) as (client, peer):
        client.read("\n", 1)
        assert client.setCallback(*arguments) is client
        await peer.send(b"read by nobody\n")
        assert await calls.none()
        assert client.read("\n") is None
        client.setCallback(calls).read("\n", 2)
        await peer.send(b"line\n")
        assert await calls.next() == (b"line\n", 2)


# ---- write ----


async def test_write_returns_self_and_writes_in_order(hs: Sockets) -> None:
    async with connected(hs) as (client, peer):
        assert client.write("one ") is client
        assert client.send(b"two ") is client
        client.write("três ").write(bytearray(b"four ")).write(memoryview(b"five")).write("")  # type: ignore[arg-type]
        expected = "one two três four five".encode()
        assert await peer.recv_exactly(len(expected)) == expected


async def test_write_fn_receives_the_tag(hs: Sockets, calls: Calls) -> None:
    async with connected(hs) as (client, peer):
        for arguments, tag in [
            ((calls,), -1),
            ((7, calls), 7),
            ((0, calls), 0),
            ((None, calls), -1),
        ]:
            assert client.write("x", *arguments) is client  # type: ignore[arg-type]
            assert await calls.next() == (tag,)
        client.write("x", 8)
        client.write("x", fn=calls)
        client.write("x", fn=calls, tag=9)
        assert await calls.next() == (-1,)
        assert await calls.next() == (9,)
        assert await peer.recv_exactly(7) == b"xxxxxxx"
        assert await calls.none()  # single-use


async def test_write_copies_what_can_change(hs: Sockets) -> None:
    async with connected(hs) as (client, peer):
        message = bytearray(b"before")
        client.write(message)  # type: ignore[arg-type]
        message[:] = b"after!"
        assert await peer.recv_exactly(6) == b"before"


async def test_write_before_it_is_connected(hs: Sockets, calls: Calls) -> None:
    async with await trisock.listen(0, host=LOCALHOST) as listener:
        client = hs.new().connect(LOCALHOST, listener.port, calls)
        assert client is not None
        client.write("hello\n", 1, calls)
        async with closing(await listener.accept()) as _:
            assert await calls.next() == ()
            assert await calls.next() == (1,)


async def test_write_unconnected_returns_self_and_is_logged(
    hs: Sockets, log: pytest.LogCaptureFixture, calls: Calls
) -> None:
    client = hs.new()
    assert client.write("lost", calls) is client
    assert "cannot write: it is not connected" in log.text
    assert await calls.none()


async def test_write_of_what_is_no_data_raises(hs: Sockets) -> None:
    async with connected(hs) as (client, peer):
        with pytest.raises(TypeError):
            client.write(5)  # type: ignore[arg-type]
        client.write("still there")
        assert await peer.recv() == b"still there"


async def test_write_of_a_listening_socket_is_broadcast(hs: Sockets) -> None:
    server = hs.server(0)
    async with clients_of(server, 3) as peers:
        assert server.write("all\n") is server
        for peer in peers:
            assert await peer.recv_exactly(4) == b"all\n"


async def test_server_write_fn_is_called_once_when_all_have_it(
    hs: Sockets, path: str, calls: Calls
) -> None:
    server = hs.server(path)
    async with clients_of(server, 3) as [quick, slow, other]:
        server.write(MORE_THAN_FITS, 5, calls)
        await quick.recv_exactly(len(MORE_THAN_FITS))
        await other.recv_exactly(len(MORE_THAN_FITS))
        assert await calls.none()
        await slow.recv_exactly(len(MORE_THAN_FITS))
        assert await calls.next() == (5,)
        assert await calls.none()


async def test_server_write_fn_does_not_count_those_who_are_lost(
    hs: Sockets, path: str, calls: Calls
) -> None:
    server = hs.server(path)
    async with clients_of(server, 2) as [quick, slow]:
        server.write(MORE_THAN_FITS, 5, calls)
        await quick.recv_exactly(len(MORE_THAN_FITS))
        assert await calls.none()
        slow.abort()
        assert await calls.next() == (5,)
        assert await calls.none()


async def test_server_write_fn_does_not_wait_for_those_who_left(hs: Sockets, calls: Calls) -> None:
    server = hs.server(0)
    async with clients_of(server, 2) as [leaves, stays]:
        await leaves.close()
        await until(lambda: server.connections() == 1)
        server.write("hello", 5, calls)
        assert await calls.next() == (5,)
        assert await stays.recv() == b"hello"


async def test_server_write_fn_is_not_called_if_nobody_has_it(
    hs: Sockets, path: str, calls: Calls
) -> None:
    server = hs.server(path)
    server.write("to nobody", calls)
    async with clients_of(server, 2) as peers:
        server.write(MORE_THAN_FITS, calls)
        await trio.testing.wait_all_tasks_blocked()
        for peer in peers:
            peer.abort()
        await until(lambda: not server.connected())
        assert await calls.none()


# ---- the end of the stream ----


async def test_what_came_before_the_end_is_still_read(hs: Sockets, calls: Calls) -> None:
    async with connected(hs, fn=calls) as (client, peer):
        await peer.send(b"one\ntwo")
        await peer.close()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert client.connected()
        client.read("\n", 1)
        client.read(3, 2)
        assert await calls.next() == (b"one\n", 1)
        assert await calls.next() == (b"two", 2)
        await until(lambda: client.info()["isDisconnected"])


async def test_a_read_that_can_never_be_done_disconnects(hs: Sockets, calls: Calls) -> None:
    for wanted in (10, "\n"):
        async with connected(hs, fn=calls) as (client, peer):
            client.read(wanted)
            await peer.send(b"too few")
            await peer.close()
            await until(lambda: client.info()["isDisconnected"])
    assert await calls.none()


async def test_the_end_is_seen_while_nothing_is_read(hs: Sockets) -> None:
    async with connected(hs) as (client, peer):
        await peer.close()
        await until(lambda: client.info()["isDisconnected"])
    server = hs.server(0)
    async with clients_of(server) as [peer]:
        await peer.close()
        await until(lambda: not server.connected())


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("plain", [True, False])
async def test_a_client_that_shuts_down_its_side_gets_the_answer(
    hs: Sockets, again: bool, plain: bool
) -> None:
    def answer(data: bytes, tag: int) -> None:
        server.write(b"answer to " + data)
        if again:
            server.read("\n")

    async def slow(data: bytes, tag: int) -> None:
        await trio.testing.wait_all_tasks_blocked(0.01)
        answer(data, tag)

    server = hs.server(0, answer if plain else slow)
    async with clients_of(server) as [peer]:
        server.read("\n")
        await peer.send(b"question\n")
        await peer.send_eof()
        assert await read_all(peer) == b"answer to question\n"
        assert not server.connected()


async def test_a_client_that_shut_down_before_the_read_is_answered(
    hs: Sockets,
) -> None:
    server = hs.server(0)
    server.setCallback(lambda data, tag: server.write(data))
    async with clients_of(server) as [peer]:
        await peer.send(b"one\ntwo\n")
        await peer.send_eof()
        await trio.testing.wait_all_tasks_blocked(0.01)
        server.read("\n")
        server.read("\n")
        assert await read_all(peer) == b"one\ntwo\n"


async def test_a_client_that_shuts_down_gets_all_that_is_queued(hs: Sockets, path: str) -> None:
    server = hs.server(path)
    async with clients_of(server) as [peer]:
        server.write(MORE_THAN_FITS).write("the last")
        await peer.send_eof()
        await trio.testing.wait_all_tasks_blocked()
        assert await read_all(peer) == MORE_THAN_FITS + b"the last"


async def test_the_end_of_a_secure_stream_disconnects(
    hs: Sockets, server_tls: ServerTLS, calls: Calls, log: pytest.LogCaptureFixture
) -> None:
    async with connected(hs, fn=calls) as (client, peer):
        client.startTLS(False).read("\n", 1)
        await peer.starttls(server_tls)
        await peer.send(b"line\nrest")
        await peer.close()
        assert await calls.next() == (b"line\n", 1)
        client.read(4, 2)
        assert await calls.next() == (b"rest", 2)
        await until(lambda: client.info()["isDisconnected"])
    assert all(each.levelno == logging.DEBUG for each in log.records)


async def test_a_secure_end_without_close_notify_is_logged(
    hs: Sockets, server_tls: ServerTLS, calls: Calls, log: pytest.LogCaptureFixture
) -> None:
    async with connected(hs, fn=calls) as (client, peer):
        client.startTLS(False).read("\n")
        await peer.starttls(server_tls)
        await peer.send(b"cut of")
        await until(lambda: client.info()["isSecure"])
        peer.stream.socket.shutdown(socket.SHUT_WR)  # behind the back of TLS
        await until(lambda: client.info()["isDisconnected"])
    assert log.records[-2].levelno == logging.WARNING
    assert await calls.none()


async def test_a_reset_disconnects(
    hs: Sockets, calls: Calls, log: pytest.LogCaptureFixture
) -> None:
    async with connected(hs, fn=calls) as (client, peer):
        client.read("\n")
        peer.abort()
        await until(lambda: client.info()["isDisconnected"])
    server = hs.server(0, calls)
    async with clients_of(server, 2) as peers:
        peers[0].abort()
        await until(lambda: server.connections() == 1)
        server.read("\n")
        await peers[1].send(b"line\n")
        assert await calls.next() == (b"line\n", -1)
    assert not complaints(log)
