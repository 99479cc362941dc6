"""A Socket is a Trio stream: Trio's own checks, and its rules for checkpoints."""

from __future__ import annotations

import ssl

import pytest
import trio
import trio.testing

from helpers.authority import Authority
from helpers.pairs import clog, closing, tcp_pair, tls_pair, unix_pair
from trisock import ClientTLS, ServerTLS, Socket
from trisock._net import linger as _linger


@pytest.fixture
def short_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trio's checks close one end while the other still sends, and wait for it, often."""
    monkeypatch.setattr(_linger, "LINGER_SECONDS", 0.1)


@pytest.mark.usefixtures("short_linger")
async def test_a_tcp_socket_passes_trios_check_of_half_closeable_streams() -> None:
    await trio.testing.check_half_closeable_stream(tcp_pair, None)


@pytest.mark.usefixtures("short_linger")
async def test_a_unix_socket_passes_trios_check_of_half_closeable_streams() -> None:
    async def pair() -> tuple[Socket, Socket]:
        return unix_pair()

    async def clogged_pair() -> tuple[Socket, Socket]:
        a, b = unix_pair()
        await clog(a)
        await clog(b)
        return a, b

    await trio.testing.check_half_closeable_stream(pair, clogged_pair)


@pytest.mark.usefixtures("short_linger")
@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_after_starttls_a_socket_passes_trios_check_of_two_way_streams(
    authority: Authority, server_tls: ServerTLS, version: str, kind: str
) -> None:
    context = ssl.create_default_context(cadata=authority.pem.decode())
    context.maximum_version = ssl.TLSVersion[version]

    async def pair() -> tuple[Socket, Socket]:
        client, server = await tcp_pair() if kind == "tcp" else unix_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.starttls, server_tls)
            info = await client.starttls(context, server_hostname="example.org")
        assert info.version == version.replace("_", ".")
        return client, server

    async def clogged_pair() -> tuple[Socket, Socket]:
        a, b = await pair()
        await clog(a)
        await clog(b)
        return a, b

    await trio.testing.check_two_way_stream(pair, clogged_pair if kind == "unix" else None)


@pytest.mark.parametrize("layer", ["plain", "tls"])
async def test_every_async_method_is_a_cancel_point(
    layer: str, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    if layer == "plain":
        a, b = await tcp_pair()
    else:
        a, b = await tls_pair(client_tls, server_tls)
    reads = (
        lambda: a.recv(),
        lambda: a.recv(1),
        lambda: a.peek(),
        lambda: a.recv_exactly(1),
        lambda: a.recv_exactly(0),
        lambda: a.recv_until(b"\n"),
        lambda: a.lines().__anext__(),
        lambda: a.receive_some(),
    )
    async with closing(a, b):
        await b.send(b"three\n")
        await trio.lowlevel.wait_readable(a.fileno())
        for call in reads:  # what has arrived in the kernel
            with trio.CancelScope() as scope:
                scope.cancel()
                await call()
            assert scope.cancelled_caught
        a.unrecv(b"one\ntwo\n")
        with open(__file__, "rb") as file:
            for call in (
                *reads,
                lambda: a.send(b""),
                lambda: a.send(b"x"),
                lambda: a.send_all(b"x"),
                lambda: a.send_file(file),
                lambda: a.wait_send_all_might_not_block(),
                *((lambda: a.send_eof(),) if layer == "plain" else ()),
            ):
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await call()
                assert scope.cancelled_caught
        # Nothing was consumed, nothing was sent, nothing was broken.
        assert await a.recv() == b"one\ntwo\n"
        assert await a.recv() == b"three\n"
        await a.send(b"still here")
        assert await b.recv() == b"still here"


@pytest.mark.parametrize("layer", ["plain", "tls"])
async def test_whatever_touches_the_transport_is_a_schedule_point(
    layer: str, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    if layer == "plain":
        a, b = await tcp_pair()
    else:
        a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        for send in (lambda: b.send(b"x"), lambda: b.send(b"x", b"y"), lambda: b.send()):
            with trio.testing.assert_checkpoints():
                await send()
        with trio.testing.assert_checkpoints():
            await a.recv(3)
        while a.info().buffered:
            await a.recv()
        with trio.testing.assert_checkpoints():
            await a.peek()
        a.unrecv(b"z")
        with trio.testing.assert_checkpoints():  # the interface of trio.abc: always
            assert await a.receive_some() == b"z"
        with trio.testing.assert_checkpoints():
            await b.send_all(b"")
        with open(__file__, "rb") as file, trio.testing.assert_checkpoints():
            await b.send_file(file, count=1)
        for sock in (a, b, b):
            with trio.testing.assert_checkpoints():
                await sock.close()


async def test_a_reader_of_a_full_buffer_lets_others_run_every_64_reads_or_2048_lines() -> None:
    from trisock._net.receive_buffer import LINES_AT_A_TIME
    from trisock._net.receiving import READS_PER_CHECKPOINT

    assert (READS_PER_CHECKPOINT, LINES_AT_A_TIME) == (
        64,
        2048,
    )  # the bounds that docs/design.md states
    a, b = await tcp_pair()
    async with closing(a, b):
        others = 0

        async def other() -> None:
            nonlocal others
            while True:
                await trio.lowlevel.checkpoint()
                others += 1

        a.unrecv(b"x\n" * 6400)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            await trio.lowlevel.checkpoint()
            others = 0
            for read in (
                lambda: a.recv(1),
                lambda: a.recv_exactly(1),
                lambda: a.recv_until(b"\n"),
                lambda: a.peek(),
            ):
                before = others
                for _ in range(640):
                    await read()
                assert others - before >= 9
            for size in (2, 64):
                a.unrecv((b"x" * (size - 1) + b"\n") * 10 * LINES_AT_A_TIME)
                before = others
                count = 0
                async for _ in a.lines():
                    count += 1
                    if count == 10 * LINES_AT_A_TIME:
                        break
                assert others - before >= 9
            nursery.cancel_scope.cancel()
