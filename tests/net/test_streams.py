"""A Socket is a Trio stream: it passes Trio's checks, and follows Trio's rules for checkpoints."""

from __future__ import annotations

import functools
import ssl
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from helpers.pairs import clog, unix_pair
from helpers.reads import READS
from trisock import LimitExceededError, ServerTLS, Socket
from trisock._net import linger as _linger
from trisock._net.receive_buffer import ITEMS_AT_A_TIME
from trisock._net.receiving import READS_PER_CHECKPOINT
from trisock.testing import Authority, socket_pair

Pair = Callable[[], Awaitable[tuple[Socket, Socket]]]


@pytest.fixture
def short_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the wait of a close: Trio's checks often close one end while its peer still sends."""
    monkeypatch.setattr(_linger, "LINGER_SECONDS", 0.1)


async def open_pair(family: str) -> tuple[Socket, Socket]:
    return await socket_pair() if family == "tcp" else unix_pair()


def clogged(family: str, open_pair: Pair) -> Pair | None:
    """Return a function that opens two connected Sockets whose sends block, or ``None`` for TCP.

    Only the buffers of a Unix connection can be filled exactly.
    """

    async def clogged_pair() -> tuple[Socket, Socket]:
        a, b = await open_pair()
        await clog(a)
        await clog(b)
        return a, b

    return clogged_pair if family == "unix" else None


@pytest.mark.usefixtures("short_linger")
@pytest.mark.parametrize("family", ["tcp", "unix"])
async def test_a_socket_passes_trios_check_of_half_closeable_streams(family: str) -> None:
    async def plain_pair() -> tuple[Socket, Socket]:
        return await open_pair(family)

    await trio.testing.check_half_closeable_stream(plain_pair, clogged(family, plain_pair))


@pytest.mark.usefixtures("short_linger")
@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
@pytest.mark.parametrize("family", ["tcp", "unix"])
async def test_a_tls_socket_passes_trios_two_way_stream_check(
    authority: Authority, server_tls: ServerTLS, version: str, family: str
) -> None:
    context = ssl.create_default_context(cadata=authority.ca.decode())
    context.maximum_version = ssl.TLSVersion[version]

    async def tls_pair() -> tuple[Socket, Socket]:
        client, server = await open_pair(family)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.starttls, server_tls)
            info = await client.starttls(context, server_hostname="example.org")
        assert info.version == version.replace("_", ".")
        return client, server

    await trio.testing.check_two_way_stream(tls_pair, clogged(family, tls_pair))


async def test_the_socket_attribute_is_the_socket_of_the_stream(a: Socket, b: Socket) -> None:
    """With this attribute, a Socket can replace a SocketStream in libraries for Trio."""
    assert a.socket is a.stream.socket
    assert a.socket.getpeername() == tuple(b.getlocal())
    with pytest.raises(AttributeError):
        a.socket = b.socket  # type: ignore[misc]
    assert not hasattr(a, "do_handshake")  # only TLS streams have this method


@pytest.mark.parametrize("layer", ["plain", "tls"])
async def test_every_async_method_is_a_cancel_point(layer: str, a: Socket, b: Socket) -> None:
    reads = [functools.partial(read, a) for read in READS.values()]
    with open(__file__, "rb") as file:
        sends = (
            lambda: a.send(b""),
            lambda: a.send(b"x"),
            lambda: a.send_all(b"x"),
            lambda: a.send_frame(b"x"),
            lambda: a.send_file(file),
            lambda: a.wait_send_all_might_not_block(),
            *((lambda: a.send_eof(),) if layer == "plain" else ()),
        )

        async def assert_cancelled(*calls: Callable[[], Awaitable[object]]) -> None:
            for call in calls:
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await call()
                assert scope.cancelled_caught

        await b.send(b"three\n")
        await trio.lowlevel.wait_readable(a.fileno())
        await assert_cancelled(*reads)  # the kernel has unread data
        a.unrecv(b"one\ntwo\n")
        await assert_cancelled(*reads, *sends)
    # Nothing was read, sent or broken.
    assert await a.recv() == b"one\ntwo\n"
    assert await a.recv() == b"three\n"
    await a.send(b"still here")
    assert await b.recv() == b"still here"


@pytest.mark.parametrize("layer", ["plain", "tls"])
async def test_every_use_of_the_transport_is_a_schedule_point(a: Socket, b: Socket) -> None:
    for send in (lambda: b.send(b"x"), lambda: b.send(b"x", b"y"), lambda: b.send()):
        b.unrecv(b"read before the send")  # so the send is a schedule point
        await b.recv()
        with trio.testing.assert_checkpoints():
            await send()
    with trio.testing.assert_checkpoints():
        await a.recv(3)
    while a.info().buffered:
        await a.recv()
    with trio.testing.assert_checkpoints():
        await a.peek()
    a.unrecv(b"z")
    with trio.testing.assert_checkpoints():  # trio.abc requires a checkpoint on every call
        assert await a.receive_some() == b"z"
    with trio.testing.assert_checkpoints():
        await b.send_all(b"")
    with open(__file__, "rb") as file, trio.testing.assert_checkpoints():
        await b.send_file(file, count=1)
    await a.recv()  # a close with unread bytes would wait
    for sock in (a, b, b):
        with trio.testing.assert_checkpoints():
            await sock.close()


async def test_reading_from_a_full_buffer_lets_other_tasks_run(
    a: Socket, other_runs: Callable[[], int]
) -> None:
    # docs/design.md states these bounds.
    assert (READS_PER_CHECKPOINT, ITEMS_AT_A_TIME) == (64, 2048)
    a.unrecv(b"\0\n" * 6400)
    reads: list[Callable[[], Awaitable[object]]] = [
        lambda: a.recv(1),
        lambda: a.recv_exactly(1),
        lambda: a.recv_until(b"\n"),
        lambda: a.recv_line(),
        lambda: a.skip_until(b"\n"),
        lambda: a.recv_frame(1),
        lambda: a.peek(),
        lambda: a.peek(wait=True),
        lambda: refused(a.recv_frame(2, max_bytes=9)),
    ]
    for read in reads:
        before = other_runs()
        for _ in range(640):
            await read()
        assert other_runs() - before >= 9
    await a.recv_exactly(a.info().buffered)
    for size in (1, 2, 64):
        for item, items in [
            (b"x" * (size - 1) + b"\n", a.lines()),
            (bytes([size - 1]) + b"x" * (size - 1), a.frames(1)),
            (b"x" * (size - 1) + b"\n", a.lines().batches()),
        ]:
            a.unrecv(item * 10 * ITEMS_AT_A_TIME)
            before = other_runs()
            left = 10 * ITEMS_AT_A_TIME
            while left:
                got = await anext(items)
                left -= len(got) if isinstance(got, list) else 1
            assert other_runs() - before >= 9


async def refused(read: Awaitable[object]) -> None:
    with pytest.raises(LimitExceededError):
        await read


@pytest.mark.parametrize("layer", ["plain", "tls"])
async def test_a_socket_over_a_closed_stream_raises_closed_resource_error(a: Socket) -> None:
    await a.stream.aclose()
    for call in (a.peek, a.recv, lambda: a.send(b"x")):
        with pytest.raises(trio.ClosedResourceError):
            await call()
