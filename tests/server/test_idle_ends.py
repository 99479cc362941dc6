"""The end of reads in ``Socket.idle``: under TLS, on new connections, and the close afterwards."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

import trisock
from helpers.pairs import clog
from helpers.post_handshake import PostHandshakePeer
from helpers.raw_tls import raw_client_context
from helpers.server import bound
from test_idle_handlers import echo_lines, until_idle, used
from trisock import IdleTimeoutError, ServerClosing, Socket
from trisock._net import transport
from trisock._net.idle import FRESH_SECONDS
from trisock.testing import Authority, serving


async def wait_idle(sock: Socket) -> None:
    with sock.idle():
        await sock.recv_line()


def half_a_record(client: Socket) -> bytes:
    """Return all but the last byte of a TLS record with a request."""
    engine = client._connection.tls.engine  # type: ignore[union-attr]
    engine.write(b"request\n")
    return engine.data_to_send()[:-1]


# ---- under TLS: a read does more than wait for its descriptor ----


def unsent_responses(server: trisock.Server) -> int:
    """Return how many bytes of OpenSSL's responses are unsent."""
    (connection,) = server._connections
    return connection.tls.engine.unsent  # type: ignore[union-attr]


class CallAtNextStep(trio.abc.Instrument):
    """Calls a function just before the next step of a handler's task."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.function = function

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task.name.endswith("Server._serve"):
            trio.lowlevel.remove_instrument(self)
            self.function()


async def test_a_stop_that_comes_with_half_a_record_ends_the_read(authority: Authority) -> None:
    """The read is awake but has not run yet, so there is no wait for the stop to interrupt."""
    async with serving(echo_lines, tls=authority.server_tls()) as s, await s.connect() as client:
        await used(client)
        await until_idle(s.server)
        trio.lowlevel.add_instrument(CallAtNextStep(s.server.stop))
        await client.stream.send_all(half_a_record(client))
        assert await client.recv() == b""


async def test_half_a_record_does_not_extend_an_idle_timeout(
    authority: Authority, mock_clock: trio.testing.MockClock
) -> None:
    async def handler(sock: Socket) -> None:
        with pytest.raises(IdleTimeoutError) as caught, sock.idle(timeout=5):
            await sock.recv_line()
        assert caught.value.at_boundary

    async with serving(handler, tls=authority.server_tls()) as s, await s.connect() as client:
        await until_idle(s.server)
        mock_clock.jump(3)
        await client.stream.send_all(half_a_record(client))
        await trio.testing.wait_all_tasks_blocked(0.001)
        mock_clock.jump(2)
        assert await client.recv() == b""


@pytest.mark.parametrize("end", ["stop", "timeout"])
async def test_an_idle_read_ends_although_a_key_update_cannot_be_answered(
    end: str, authority: Authority, tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    ended = trio.Event()

    async def handler(sock: Socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        await clog(sock)
        with pytest.raises((ServerClosing, IdleTimeoutError)), sock.idle(timeout=50):
            await sock.recv()
        ended.set()
        sock.abort()

    path = str(tmp_path / "socket")
    listener = await trisock.listen_unix(path)
    async with bound(handler, listener, tls=authority.server_tls()) as server:
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(path)
            context = raw_client_context(authority)
            peer = PostHandshakePeer(raw, context, server_hostname="localhost")
            await trio.to_thread.run_sync(peer.run, peer.ssl.do_handshake)
            await until_idle(server)
            raw.sendall(b"".join(peer.key_update(request=True) for _ in range(9)))
            while not unsent_responses(server):
                await trio.lowlevel.checkpoint()
            await trio.testing.wait_all_tasks_blocked()
            assert not ended.is_set()
            mock_clock.jump(FRESH_SECONDS if end == "stop" else 50)
            if end == "stop":
                server.stop()
            await ended.wait()


# ---- whether a request has begun ----


async def test_reading_buffered_bytes_in_a_block_begins_a_request() -> None:
    async def handler(sock: Socket) -> None:
        await sock.recv_line()
        with sock.idle():
            first = await sock.recv_line()  # unread when the block began
            second = await sock.recv_line()
        await sock.send(first + second)

    async with serving(handler) as s, await s.connect() as client:
        await client.send(b"hello\none,\n")
        await until_idle(s.server)
        s.server.stop()
        await trio.testing.wait_all_tasks_blocked()
        await client.send(b"two\n")
        assert await client.recv() == b"one,two"


# ---- a new connection ----


async def recv(sock: Socket) -> None:
    await sock.recv()


async def peek(sock: Socket) -> None:
    await sock.peek(wait=True)
    await sock.recv()


async def peek_nowait(sock: Socket) -> None:
    await trio.lowlevel.wait_readable(sock.fileno())
    await sock.peek()
    await sock.recv(100)


@pytest.mark.parametrize("read", [recv, peek, peek_nowait])
async def test_a_connection_is_not_new_after_its_first_bytes(
    read: Callable[[Socket], Awaitable[None]], mock_clock: trio.testing.MockClock
) -> None:
    async def handler(sock: Socket) -> None:
        await read(sock)
        await wait_idle(sock)

    async with serving(handler) as s, await s.connect() as client:
        await client.send(b"x")
        await until_idle(s.server)
        s.server.stop()
        assert await client.recv() == b""  # at once: the clock stands still


async def test_a_connection_is_new_after_a_cancelled_read(
    mock_clock: trio.testing.MockClock,
) -> None:
    async def handler(sock: Socket) -> None:
        with trio.move_on_after(1):
            await sock.recv()
        await echo_lines(sock)

    async with serving(handler) as s, await s.connect() as client:
        while not s.server.connections:
            await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(1)
        await until_idle(s.server)
        s.server.stop()
        await trio.testing.wait_all_tasks_blocked()
        await client.send(b"request\n")
        assert await client.recv_line() == b"request"


async def test_a_new_connections_idle_timeout_holds_while_the_server_stops(
    mock_clock: trio.testing.MockClock,
) -> None:
    async def handler(sock: Socket) -> None:
        with pytest.raises(IdleTimeoutError), sock.idle(timeout=2):
            await sock.recv()

    async with serving(handler) as s, await s.connect() as client:
        await until_idle(s.server)
        s.server.stop()
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(2)
        assert await client.recv() == b""


async def test_a_stop_does_not_extend_the_idle_timeout_of_a_begun_request(
    mock_clock: trio.testing.MockClock,
) -> None:
    async def handler(sock: Socket) -> None:
        await sock.recv_line()
        with pytest.raises(IdleTimeoutError), sock.idle(timeout=5):
            await sock.recv_line()

    async with serving(handler) as s, await s.connect() as client:
        await client.send(b"request\nhalf a line")
        await until_idle(s.server)
        mock_clock.jump(3)
        s.server.stop()
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(2)
        assert await client.recv() == b""


async def test_a_shielded_handler_keeps_its_idle_timeout(
    mock_clock: trio.testing.MockClock,
) -> None:
    """The timeout applies even after the grace, when the handlers are cancelled."""

    async def handler(sock: Socket) -> None:
        with trio.CancelScope(shield=True), sock.idle(timeout=8):
            with pytest.raises(IdleTimeoutError):
                await sock.recv_line()

    async with serving(handler) as s, await s.connect() as client:
        await client.send(b"half a line")
        while not any(len(each.buffer) for each in s.server._connections):
            await trio.lowlevel.checkpoint()
        await until_idle(s.server)
        s.server.stop(grace=0)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(8)
        assert await client.recv() == b""


# ---- the close after an idle read has ended ----


async def timed_out(sock: Socket) -> None:
    await sock.recv_line()
    with sock.idle(timeout=1):
        await sock.recv_line()


@pytest.mark.parametrize("handler", [echo_lines, timed_out])
async def test_the_close_waits_until_the_peer_has_our_fin(
    handler: Callable[[Socket], Awaitable[None]],
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The client may be sending its next request: a reset must not overtake our FIN."""
    ports = []

    async def linger(sock: trio.socket.SocketType, *args: object, **options: bool) -> bool:
        ports.append(sock.getsockname()[1])
        return True

    monkeypatch.setattr(transport, "linger", linger)
    async with bound(handler, host="127.0.0.1") as server:
        async with await trisock.connect("127.0.0.1", server.port) as client:
            await client.send(b"hello\n")
            await until_idle(server)
            if handler is echo_lines:
                server.stop()
            while server.stats().active:
                await trio.sleep(1)
    assert server.port in ports


@pytest.mark.parametrize("sent", [b"", b"half a line"])
async def test_close_notify_follows_only_a_timeout_between_requests(
    sent: bytes, authority: Authority, autojump_clock: trio.testing.MockClock
) -> None:
    """After half a request, ``close_notify`` would claim that the handler has sent everything."""
    async with bound(timed_out, host="127.0.0.1", tls=authority.server_tls()) as server:
        tls = authority.client_tls()
        async with await trisock.connect("127.0.0.1", server.port, tls=tls) as client:
            await client.send(b"hello\n" + sent)
            if sent:
                with pytest.raises(trisock.TLSError, match="without close_notify"):
                    await client.recv()
            else:
                assert await client.recv() == b""
