"""relay: what each peer sees, whatever the other peer does."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

import trisock
from helpers.pairs import closing, read_all, until_full
from helpers.relaying import (
    PLAIN_OR_TLS,
    Relayed,
    assert_reset,
    end,
    flood,
    read_to_end,
    relaying,
    send_and_end,
    small_pair,
    until_end_noticed,
)
from trisock import Socket, TLSError
from trisock._net import linger
from trisock._net import relay as _relay
from trisock._net.connection import Connection
from trisock.testing import socket_pair

LARGE = bytes(range(256)) * 20_000  # more than the kernel accepts in one call

ALL_LAYERS = list(itertools.product(PLAIN_OR_TLS, repeat=2))
EACH_LAYER = pytest.mark.parametrize("layers", ALL_LAYERS, ids="-".join)
EACH_PEER = pytest.mark.parametrize("first", ["x", "y"])


def peers(relayed: Relayed, first: str) -> tuple[Socket, Socket]:
    """Return both peers, beginning with the peer named ``first``."""
    pair = relayed.x, relayed.y
    return pair if first == "x" else pair[::-1]


# ---- data ----


@EACH_LAYER
@pytest.mark.parametrize("size", [0, 1, len(LARGE)])
async def test_relay_copies_everything_and_returns_both_counts(
    size: int, layers: tuple[str, str]
) -> None:
    received = {}

    async def receive(name: str, sock: Socket) -> None:
        received[name] = await read_to_end(sock)

    async with relaying(layers) as relayed, trio.open_nursery() as nursery:
        nursery.start_soon(send_and_end, relayed.x, LARGE[:size])
        nursery.start_soon(send_and_end, relayed.y, b"answer")
        nursery.start_soon(receive, "x", relayed.x)
        nursery.start_soon(receive, "y", relayed.y)
        assert await relayed.result() == (size, 6)
    assert received["x"] == b"answer"
    assert received["y"] == LARGE[:size]


@EACH_LAYER
async def test_relay_forwards_data_in_the_receive_buffer_first(layers: tuple[str, str]) -> None:
    (x, a), (b, y) = [await socket_pair(tls=layer == "tls") for layer in layers]
    async with closing(x, a, b, y), trio.open_nursery() as nursery:
        await x.send(b"second, ")
        await x.send(b"third, ")
        await y.send(b"an answer")
        assert await a.peek(wait=True)
        assert await b.peek(wait=True)
        a.unrecv(b"first, ")
        nursery.start_soon(trisock.relay, a, b)
        await x.send(b"last")
        wanted = b"first, second, third, last"
        assert await y.recv_exactly(len(wanted)) == wanted
        assert await x.recv_exactly(9) == b"an answer"
        nursery.cancel_scope.cancel()


@EACH_LAYER
async def test_relay_passes_small_messages_on_at_once(layers: tuple[str, str]) -> None:
    async with relaying(layers) as relayed:
        for _ in range(50):
            await relayed.x.send(b"ping")
            assert await relayed.y.recv() == b"ping"
            await relayed.y.send(b"pong")
            assert await relayed.x.recv() == b"pong"


# ---- EOF ----


@pytest.mark.parametrize("layer", PLAIN_OR_TLS)
async def test_the_other_direction_continues_after_eof(layer: str) -> None:
    async with relaying((layer, "plain")) as relayed:
        await send_and_end(relayed.x, b"request")
        assert await read_to_end(relayed.y) == b"request"
        await relayed.y.send(b"answer, ")
        assert await relayed.x.recv() == b"answer, "
        await send_and_end(relayed.y, b"the rest")
        assert await read_to_end(relayed.x) == b"the rest"
        assert await relayed.result() == (7, 16)


@pytest.mark.parametrize("layer", PLAIN_OR_TLS)
async def test_close_notify_is_sent_when_both_directions_have_ended(layer: str) -> None:
    async with relaying((layer, "tls")) as relayed:
        await send_and_end(relayed.x, b"request")
        assert await relayed.y.recv() == b"request"
        await until_end_noticed(relayed.a)
        await trio.testing.wait_all_tasks_blocked()
        assert await relayed.y.peek() is None
        await send_and_end(relayed.y, b"answer")
        assert await read_to_end(relayed.x) == b"answer"
        assert await read_to_end(relayed.y) == b""
        assert await relayed.result() == (7, 6)


# ---- broken connections ----


async def abort(sock: Socket) -> None:
    sock.abort()


async def send_and_close(sock: Socket, data: bytes) -> None:
    await sock.send(data)
    await sock.close()


async def truncate(sock: Socket) -> None:
    sock.stream.socket.shutdown(socket.SHUT_WR)


async def send_garbage(sock: Socket) -> None:
    sock.stream.socket._sock.send(b"\x17\x03\x03\x00\x20" + b"x" * 32)  # type: ignore[attr-defined]


BREAKS: dict[Callable[[Socket], Awaitable[None]], list[str]] = {
    abort: PLAIN_OR_TLS,
    truncate: ["tls"],
    send_garbage: ["tls"],
}


@pytest.mark.parametrize(
    ("breaks", "first", "layers"),
    [
        (breaks, first, layers)
        for breaks, first, layers in itertools.product(BREAKS, "xy", ALL_LAYERS)
        if layers["xy".index(first)] in BREAKS[breaks]
    ],
)
async def test_a_broken_connection_aborts_the_other_connection(
    breaks: Callable[[Socket], Awaitable[None]],
    first: str,
    layers: tuple[str, str],
) -> None:
    async with relaying(layers) as relayed:
        peer, other = peers(relayed, first)
        await peer.send(b"data")
        assert await other.recv() == b"data"
        await breaks(peer)
        await relayed.assert_broken_by(peer)
        assert isinstance(relayed.outcome, TLSError) == (breaks is not abort)
        await assert_reset(other)


@EACH_PEER
@EACH_LAYER
async def test_a_reset_after_the_other_peers_eof_is_an_error(
    layers: tuple[str, str], first: str
) -> None:
    async with relaying(layers) as relayed:
        peer, other = peers(relayed, first)
        await end(other)
        await until_end_noticed(relayed.b if first == "x" else relayed.a)
        await abort(peer)
        await relayed.assert_broken_by(peer)
        await assert_reset(other)


@EACH_PEER
@EACH_LAYER
async def test_data_sent_before_a_close_arrives_before_the_reset(
    layers: tuple[str, str], first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data that the other peer then sends cannot reach the closed peer, so relay fails."""
    acknowledged = []

    async def wait_until_acknowledged(sink: trio.socket.SocketType) -> None:
        acknowledged.append(sink.fileno())
        await linger.wait_until_acknowledged(sink)

    monkeypatch.setattr(_relay, "wait_until_acknowledged", wait_until_acknowledged)
    monkeypatch.setattr(linger, "LINGER_SECONDS", 0.1)  # the close need not wait for the reset
    async with relaying(layers) as relayed, trio.open_nursery() as nursery:
        peer, other = peers(relayed, first)
        sink = (relayed.b if first == "x" else relayed.a).fileno()
        nursery.start_soon(send_and_close, peer, LARGE)
        assert await other.recv_exactly(len(LARGE)) == LARGE
        with contextlib.suppress(trio.BrokenResourceError):
            while True:
                # The first byte causes a reset, and sending the second byte fails because of it.
                await other.send(b"x")
                await trio.testing.wait_all_tasks_blocked(0.005)
        await relayed.assert_broken_by(peer)
        assert acknowledged == [sink]


async def test_a_failed_send_does_not_end_the_other_direction() -> None:
    async with relaying(("plain", "plain"), small=True) as relayed:
        await relayed.x.send(LARGE[:300_000])  # more than relay can send before y reads
        await relayed.x.close()
        await relayed.y.send(b"x")
        await trio.testing.wait_all_tasks_blocked()  # a Unix socket delivers at once
        assert await relayed.y.recv_exactly(300_000) == LARGE[:300_000]
        assert isinstance(await relayed.result(), trio.BrokenResourceError)


@EACH_PEER
async def test_relay_reports_the_error_of_the_read_not_the_send(first: str) -> None:
    """The send fails first, because the peer has closed (without ``close_notify``)."""
    layers = ("tls", "plain") if first == "x" else ("plain", "tls")
    async with relaying(layers, small=True) as relayed:
        peer, other = peers(relayed, first)
        await peer.send(LARGE[:300_000])  # more than relay can send before the other peer reads
        peer._connection.close_immediately()
        await other.send(b"x")
        await trio.testing.wait_all_tasks_blocked()
        assert await other.recv_exactly(300_000) == LARGE[:300_000]
        with pytest.raises(TLSError, match="without close_notify"):
            raise await relayed.result()


async def test_relay_closes_both_sockets_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    both_begun = trio.Event()
    close = Connection.close

    async def close_together(self: Connection) -> None:
        begun.append(self)
        if len(begun) == 2:
            both_begun.set()
        await both_begun.wait()
        await close(self)

    async with relaying(("plain", "plain"), small=True) as relayed:
        monkeypatch.setattr(Connection, "close", close_together)
        await end(relayed.x)
        await end(relayed.y)
        assert await relayed.result() == (0, 0)
    monkeypatch.undo()


async def test_a_tls_sink_that_was_already_broken_makes_relay_fail() -> None:
    """The sink's last ``send_file`` failed before the relay began."""
    (x, a), (b, y) = await small_pair(tls=False), await small_pair(tls=True)
    async with closing(x, a, b, y):
        tls = b._connection.tls
        assert tls is not None
        tls.cut_short()
        await end(x)
        await end(y)
        with pytest.raises(trio.BrokenResourceError, match="cut short"):
            await trisock.relay(a, b)


async def test_waiting_for_acknowledgement_ends_when_the_peer_reads(a: Socket, b: Socket) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_and_end, a, LARGE)
        await trio.testing.wait_all_tasks_blocked(0.05)
        with trio.move_on_after(0.1) as scope:
            await linger.wait_until_acknowledged(a.stream.socket)
        assert scope.cancelled_caught
        await read_all(b)
        with trio.fail_after(1.5):
            await linger.wait_until_acknowledged(a.stream.socket)


async def test_waiting_for_acknowledgement_ends_when_the_socket_is_closed(
    a: Socket, b: Socket
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood, a)
        await until_full(a)
        nursery.start_soon(linger.wait_until_acknowledged, a.stream.socket)
        await trio.lowlevel.checkpoint()
        a.abort()


@EACH_PEER
@EACH_LAYER
async def test_a_reset_is_noticed_while_the_other_peer_does_not_read(
    layers: tuple[str, str], first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_relay, "_BLOCKED_INTERVAL", 0.1)
    async with relaying(layers) as relayed, trio.open_nursery() as nursery:
        peer, other = peers(relayed, first)
        nursery.start_soon(flood, peer)
        await until_full(relayed.b if first == "x" else relayed.a)
        await until_full(peer)
        peer.abort()
        with trio.fail_after(20):  # well before the 60-second limit of a half-closed connection
            await relayed.assert_broken_by(peer)
        await assert_reset(other)


# ---- misuse ----


async def test_wrong_arguments_change_nothing() -> None:
    a, b = await socket_pair()
    async with closing(a, b):
        for arguments, error in (
            ((a, b.stream), TypeError),
            ((None, b), TypeError),
            ((a, a), ValueError),
        ):
            with pytest.raises(error):
                await trisock.relay(*arguments)  # type: ignore[arg-type]
        for timeout, error in (
            (-1, ValueError),
            (0, ValueError),
            ("1", TypeError),
            (True, TypeError),
        ):
            with pytest.raises(error, match=f"idle_timeout must be .*, not {timeout!r}$"):
                await trisock.relay(a, b, idle_timeout=timeout)  # type: ignore[arg-type]
        await a.send(b"x")
        assert await b.recv() == b"x"


@pytest.mark.parametrize("which", ["a", "b"])
@pytest.mark.parametrize("layers", [("plain", "plain"), ("tls", "tls")])
async def test_relay_refuses_a_socket_whose_send_was_cut_short(
    which: str, layers: tuple[str, str]
) -> None:
    (x, a), (b, y) = [await socket_pair(tls=layer == "tls") for layer in layers]
    broken = a if which == "a" else b
    async with closing(x, a, b, y):
        with trio.move_on_after(0.01):
            await broken.send(bytes(20_000_000))  # more than the kernel's buffers hold
        assert not broken.info().cansend
        with pytest.raises(trio.BrokenResourceError, match="cut short"):
            await trisock.relay(a, b)
        await assert_reset(y if which == "a" else x)


async def test_relay_refuses_a_socket_after_send_eof() -> None:
    (x, a), (b, y) = await socket_pair(), await socket_pair()
    async with closing(x, a, b, y):
        await b.send_eof()
        with pytest.raises(trio.ClosedResourceError, match="send_eof"):
            await trisock.relay(a, b)
        await assert_reset(x)
