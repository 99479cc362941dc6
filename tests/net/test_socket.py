"""Sockets adopt streams, read chunks, and allow one reader and one sender at a time."""

from __future__ import annotations

import socket

import pytest
import trio
import trio.testing

import trisock
from helpers.pairs import reset
from helpers.reads import READS
from trisock import ClientTLS, Socket

# ---- adopting a Trio stream ----


async def test_a_socket_adopts_a_trio_stream() -> None:
    a, b = trio.socket.socketpair()
    with b:
        stream = trio.SocketStream(a)
        sock = Socket(stream)
        assert sock.stream is stream
        assert sock.getside() == "client"
        assert sock.fileno() == a.fileno()
        await sock.send(b"x")
        assert await b.recv(1) == b"x"
        await sock.close()


async def test_only_a_trio_socket_stream_can_be_adopted() -> None:
    with pytest.raises(TypeError, match=r"needs a trio\.SocketStream"):
        Socket(object())  # type: ignore[arg-type]
    a, b = trio.socket.socketpair()
    with a, b, pytest.raises(ValueError, match="side must be"):
        Socket(trio.SocketStream(a), side="middle")  # type: ignore[arg-type]


async def test_adopting_an_unconnected_stream_raises_an_oserror() -> None:
    with trio.socket.socket() as unconnected, pytest.raises(OSError, match="not connected"):
        Socket(trio.SocketStream(unconnected))


async def test_info_describes_a_connection(a: Socket, b: Socket) -> None:
    assert a.getpeer() == b.getlocal() == ("127.0.0.1", b.getlocal().port)
    assert b.getpeer() == a.getlocal()
    assert (a.getside(), b.getside()) == ("client", "server")
    assert not a.istls()
    assert a.tls is None
    a.unrecv(b"abc")
    assert a.info() == trisock.ConnectionInfo(
        local=a.getlocal(),
        peer=a.getpeer(),
        side="client",
        isopen=True,
        cansend=True,
        istls=False,
        tls=None,
        buffered=3,
    )
    assert "client 127.0.0.1:" in repr(a)
    assert repr(a).endswith("plain open>")


async def test_socket_options_can_be_set_and_read(a: Socket) -> None:
    a.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    assert a.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert len(a.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)) == 8
    with pytest.raises(TypeError, match="a value, or None and a length"):
        a.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, None)  # type: ignore[call-overload]
    with pytest.raises(OSError, match=r"."):  # the system has no such option
        a.setsockopt(socket.SOL_SOCKET, 9999, None, 4)


# ---- recv, peek, unrecv ----


async def test_recv_returns_chunks_and_then_eof_on_every_call(a: Socket, b: Socket) -> None:
    await b.send(b"one")
    assert await a.recv() == b"one"
    await b.send(b"two")
    assert await a.recv(2) == b"tw"
    assert await a.recv(2) == b"o"
    await b.send_eof()
    for _ in range(3):
        assert await a.recv() == b""
        assert await a.peek() == b""


async def test_bytes_pushed_back_last_are_received_first(a: Socket, b: Socket) -> None:
    a.unrecv(b"World")
    hello = bytearray(b"Hello")
    a.unrecv(hello)
    hello[:] = b"it was copied"
    a.unrecv(b"")
    a.unrecv(memoryview(b"xx")[:0])
    assert await a.recv() == b"Hello"
    assert await a.recv() == b"World"


async def test_pushed_back_data_is_read_before_eof(a: Socket, b: Socket) -> None:
    await b.send_eof()
    assert await a.recv() == b""
    assert not a.isopen()
    a.unrecv(b"once more")
    assert a.isopen()
    assert await a.peek() == b"once more"
    assert await a.recv() == b"once more"
    assert await a.recv() == b""


async def test_peek_shows_the_next_chunk_without_waiting(a: Socket, b: Socket) -> None:
    assert await a.peek() is None
    await b.send(b"hello")
    await trio.lowlevel.wait_readable(a.fileno())
    assert await a.peek() == b"hello"  # read from the kernel; the next peek uses the buffer
    assert await a.peek() == b"hello"
    assert a.info().buffered == 5
    assert await a.recv(2) == b"he"
    assert await a.peek() == b"llo"
    assert await a.recv() == b"llo"
    assert await a.peek() is None


async def test_peek_hides_no_error_from_recv(sock: Socket, raw: socket.socket) -> None:
    reset(raw)
    await trio.lowlevel.wait_readable(sock.fileno())
    assert not sock.isopen()
    assert await sock.peek() is None
    assert not sock.isopen()
    for _ in range(2):  # the second recv must not return EOF
        with pytest.raises(trio.BrokenResourceError, match="reset by peer"):
            await sock.recv()


async def test_isopen_leaves_data_unread(sock: Socket, raw: socket.socket) -> None:
    with raw:
        assert sock.isopen()
        raw.sendall(b"bye")
    await trio.lowlevel.wait_readable(sock.fileno())
    assert sock.isopen()  # because data is unread
    assert await sock.recv() == b"bye"
    await trio.lowlevel.wait_readable(sock.fileno())
    assert not sock.isopen()
    assert await sock.recv() == b""


@pytest.mark.parametrize("bad", ["str", None, 1, [b"x"]])
async def test_data_that_is_not_bytes_raises_type_error(bad: object, a: Socket, b: Socket) -> None:
    with pytest.raises(TypeError, match="expected bytes, bytearray or memoryview"):
        a.unrecv(bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected bytes, bytearray or memoryview"):
        await a.send(b"not sent", bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected bytes, bytearray or memoryview"):
        await a.recv_until(bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected bytes, bytearray or memoryview"):
        a.lines(delimiter=bad)  # type: ignore[arg-type]
    assert await b.peek() is None


async def test_invalid_sizes_and_delimiters_are_refused(a: Socket, b: Socket) -> None:
    for call in (
        lambda: a.recv(0),
        lambda: a.receive_some(-1),
        lambda: a.recv_exactly(-1),
        lambda: a.recv_until(b"\n", max_bytes=0),
        lambda: a.recv_until(b""),
    ):
        with pytest.raises(ValueError, match=r"must be|at least"):
            await call()
    for call in (lambda: a.recv(1.5), lambda: a.recv_exactly("1")):  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            await call()


# ---- one reader, one sender ----


@pytest.mark.parametrize("layer", ["plain", "tls"])
@pytest.mark.parametrize("family", ["unix"])
async def test_a_second_reader_or_sender_fails_without_disturbing_the_first(
    client_tls: ClientTLS, a: Socket, b: Socket
) -> None:
    message = b"x" * 5_000_000
    got = []

    async def read() -> None:
        got.append(await a.recv_exactly(5))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        nursery.start_soon(a.send, message)
        await trio.testing.wait_all_tasks_blocked()
        for another_read in READS.values():
            with pytest.raises(trio.BusyResourceError, match="reading"):
                await another_read(a)
        with pytest.raises(trio.BusyResourceError, match="reading"):
            a.unrecv(b"x")
        with open(__file__, "rb") as file:
            for call in (
                lambda: a.send(b"y"),
                lambda: a.send_all(b""),
                a.wait_send_all_might_not_block,
                lambda: a.send_file(file),
                a.send_eof,
            ):
                with pytest.raises(trio.BusyResourceError, match="sending"):
                    await call()
        with pytest.raises(trio.BusyResourceError):
            await a.starttls(client_tls)
        with pytest.raises(trio.BusyResourceError):
            await a.stoptls()
        assert await b.recv_exactly(len(message)) == message
        await b.send(b"hello")
    assert got == [b"hello"]
