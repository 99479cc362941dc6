"""A close loses no data. It waits only if data could be lost, and for a bounded time."""

from __future__ import annotations

import errno
import functools
import os
import socket
import ssl
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from helpers.blocked import cancel_when_blocked
from helpers.pairs import clog, closing, reset
from helpers.raw_tls import RawTLS
from helpers.reads import READS
from trisock import ServerTLS, Socket, TLSError
from trisock._net import linger as _linger
from trisock._net import syscalls as _syscalls
from trisock.testing import Authority, serving, socket_pair

HEADER = b"HTTP/1.1 200 OK\r\nConnection: Close\r\nContent-Length: 10000000\r\n\r\n"
BODY = bytes(range(250)) * 40_000  # 10 MB
UPLOAD = b"u" * 1_000_000

BOTH_LAYERS = pytest.mark.parametrize("layer", ["plain", "tls"])
BOTH_FAMILIES = pytest.mark.parametrize("family", ["tcp", "unix"])


async def leave_unread(b: Socket, a: Socket) -> None:
    """Make ``a.close()`` wait for ``b``: ``b`` sends data, and ``a`` does not read the data."""
    await b.send(b"unread")
    await trio.lowlevel.wait_readable(a.fileno())


# ---- nothing is lost ----


async def respond_without_reading(sock: Socket) -> None:
    """Respond like the handler of Pluto's ``bind`` example, but with a larger response."""
    await sock.send(HEADER, BODY)


async def post_with_python(port: int) -> bytes:
    """Post 1 MB with a blocking client that sends everything before it reads."""

    def post() -> bytes:
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.settimeout(30)
            sock.sendall(b"POST / HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n" + UPLOAD)
            return b"".join(iter(lambda: sock.recv(1 << 20), b""))

    return await trio.to_thread.run_sync(post)


async def post_with_curl(port: int) -> bytes:
    options = ["-sS", "--fail", "--include", "-H", "Expect:", "--data-binary", "@-"]
    command = ["curl", *options, f"http://127.0.0.1:{port}/"]
    return (await trio.run_process(command, stdin=UPLOAD, capture_stdout=True)).stdout


@pytest.mark.parametrize(
    "post", [post_with_python, pytest.param(post_with_curl, marks=pytest.mark.needs("curl"))]
)
async def test_a_response_to_an_unread_request_arrives_whole(
    post: Callable[[int], Awaitable[bytes]], times: int
) -> None:
    async with serving(respond_without_reading) as s:
        for _ in range(20 * times):
            assert await post(s.server.port) == HEADER + BODY


async def test_a_tls_response_to_an_unread_request_arrives_whole(server_tls: ServerTLS) -> None:
    async with serving(respond_without_reading, tls=server_tls) as s:
        for _ in range(5):
            async with await s.connect() as sock:
                async with trio.open_nursery() as uploading:
                    uploading.start_soon(sock.send, UPLOAD)
                    assert await sock.recv_exactly(len(HEADER) + len(BODY)) == HEADER + BODY
                    assert await sock.recv() == b""  # close_notify has arrived


async def test_closing_with_unread_tls_tickets_loses_no_sent_data(times: int) -> None:
    for _ in range(5 * times):
        client, server = await socket_pair(tls=True)
        async with closing(client, server):
            await server.send(b"an unread banner")  # also sends the tickets
            await client.send(b"x" * 100_000)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.close)
                assert await server.recv_exactly(100_000) == b"x" * 100_000
                assert await server.recv() == b""
                await server.close()


async def test_data_in_flight_survives_a_byte_that_arrives_during_close(
    sock: Socket, raw: socket.socket
) -> None:
    sent = 0
    while not _syscalls.unacknowledged_bytes(sock.stream.socket):
        await sock.send(b"x" * 65536)  # until the peer's kernel accepts no more data
        sent += 65536
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sock.close)
        await trio.testing.wait_all_tasks_blocked()
        raw.sendall(b"late")
        got = 0
        while chunk := await trio.to_thread.run_sync(raw.recv, 1 << 20):
            got += len(chunk)
        raw.shutdown(socket.SHUT_WR)
    assert got == sent


@pytest.mark.parametrize(("family", "layer"), [("unix", "tls")])
@pytest.mark.parametrize("half_closed", [False, True])
async def test_close_notify_waits_for_room_in_the_send_buffer(
    half_closed: bool, a: Socket, b: Socket
) -> None:
    await clog(a)
    a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # no room for another byte
    if half_closed:
        await b.stream.send_eof()
    received = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.close)  # close_notify has to wait for room
        await trio.testing.wait_all_tasks_blocked()
        while chunk := await b.recv():
            received += len(chunk)
    assert received
    assert await b.recv() == b""  # close_notify


@pytest.mark.parametrize("after_data", [True, False])
async def test_the_alert_of_a_failed_read_precedes_the_close(
    after_data: bool, sock: Socket, raw: socket.socket, authority: Authority, server_tls: ServerTLS
) -> None:
    """The peer receives an alert about the forged record (RFC 8446, section 6.2)."""
    context = ssl.create_default_context(cadata=authority.ca.decode())
    peer = RawTLS(raw, context, server_hostname="example.org")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sock.starttls, server_tls)
        await trio.to_thread.run_sync(peer.run, peer.ssl.do_handshake)
    if after_data:
        await sock.send(b"hello")
        assert await trio.to_thread.run_sync(peer.run, peer.ssl.read) == b"hello"
    raw.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
    for _ in range(2):
        with pytest.raises(TLSError, match="forged or damaged"):
            await sock.recv()
    await sock.close()
    with pytest.raises(ssl.SSLError, match="ALERT_BAD_RECORD_MAC"):
        await trio.to_thread.run_sync(peer.run, peer.ssl.read)


# ---- how long a close takes ----


@pytest.mark.parametrize(("family", "layer"), [("tcp", "plain"), ("unix", "plain"), ("tcp", "tls")])
async def test_closing_an_idle_connection_does_not_wait(a: Socket, b: Socket) -> None:
    with trio.fail_after(_linger.LINGER_SECONDS / 2):
        await a.close()
    assert a.fileno() == -1
    assert await b.recv() == b""
    with trio.fail_after(_linger.LINGER_SECONDS / 2):
        await b.close()


async def test_a_close_discards_only_a_limited_number_of_bytes(
    a: Socket, b: Socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_linger, "LINGER_BYTES", 1_000_000)
    monkeypatch.setattr(_linger, "LINGER_SECONDS", 1000)
    total = 0
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.close)
            with pytest.raises(trio.BrokenResourceError):
                while True:
                    await b.send(b"x" * 65536)
                    total += 65536
    assert total > 500_000


async def test_a_silent_peer_cannot_delay_the_close_forever(
    a: Socket, b: Socket, autojump_clock: trio.testing.MockClock
) -> None:
    await leave_unread(b, a)
    start = trio.current_time()
    await a.close()
    assert trio.current_time() - start == pytest.approx(_linger.LINGER_SECONDS)


def test_a_waiting_close_has_the_documented_limits() -> None:
    assert (_linger.LINGER_SECONDS, _linger.LINGER_BYTES) == (2, 64 << 20)


async def test_a_failed_system_call_in_close_if_drained_changes_nothing(
    a: Socket, b: Socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> int:
        raise OSError(errno.EIO, "not known")

    with monkeypatch.context() as patch:
        patch.setattr("trisock._net.transport.unread_bytes", fail)
        assert not a._connection.close_if_drained()
    assert a.isopen()
    await b.send(b"unread")
    while not await a.peek():
        await trio.lowlevel.checkpoint()


async def test_after_the_peers_fin_a_close_does_not_wait_for_acknowledgements(
    sock: Socket, raw: socket.socket
) -> None:
    raw.shutdown(socket.SHUT_WR)
    assert await sock.recv() == b""
    sent = 0
    while not _syscalls.unacknowledged_bytes(sock.stream.socket):
        await sock.send(b"x" * 16384)
        sent += 16384
    assert sock._connection.close_if_drained()
    received = 0
    while data := await trio.to_thread.run_sync(raw.recv, 65536):
        received += len(data)
    assert received == sent


# ---- second, cancelled and aborted closes ----


async def test_a_second_close_waits_for_the_first(a: Socket, b: Socket) -> None:
    await leave_unread(b, a)
    done = []

    async def close() -> None:
        await a.close()
        assert a.fileno() == -1
        done.append(1)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(close)
        await trio.testing.wait_all_tasks_blocked()
        assert done == []
        await b.close()
    await a.close()
    await a.aclose()
    assert done == [1, 1, 1]


@pytest.mark.parametrize("which", ["first", "second"])
async def test_a_cancelled_close_closes_immediately_and_raises_cancelled(
    which: str, a: Socket, b: Socket
) -> None:
    await leave_unread(b, a)
    async with trio.open_nursery() as nursery:
        if which == "second":
            nursery.start_soon(a.close)
            await trio.testing.wait_all_tasks_blocked()
        with trio.CancelScope() as scope:

            async def cancel() -> None:
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()

            nursery.start_soon(cancel)
            await a.close()
        assert scope.cancelled_caught
        assert a.fileno() == -1
    with pytest.raises(trio.ClosedResourceError):
        await a.recv()


@BOTH_LAYERS
async def test_a_close_cancelled_before_it_starts_still_closes(a: Socket) -> None:
    for _ in range(2):
        with trio.CancelScope() as scope:
            scope.cancel()
            await a.close()
        assert scope.cancelled_caught
        assert a.fileno() == -1


async def test_abort_resets_the_connection(sock: Socket, raw: socket.socket) -> None:
    sock.abort()
    sock.abort()
    with pytest.raises(ConnectionResetError):
        raw.recv(1)


async def test_abort_ends_a_close_that_is_waiting(a: Socket, b: Socket) -> None:
    await leave_unread(b, a)
    with trio.fail_after(_linger.LINGER_SECONDS / 2):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.close)
            await trio.testing.wait_all_tasks_blocked()
            a.abort()


async def test_a_close_after_the_peers_reset_raises_nothing(
    sock: Socket, raw: socket.socket
) -> None:
    reset(raw)
    await trio.lowlevel.wait_readable(sock.fileno())
    await sock.close()


async def test_leaving_the_async_with_block_closes_the_socket(a: Socket, b: Socket) -> None:
    async with a, b:
        await a.send(b"x")
        assert await b.recv() == b"x"
    assert a.fileno() == b.fileno() == -1


# ---- other tasks ----


async def assert_closed(call: Callable[[], Awaitable[object]]) -> None:
    with pytest.raises(trio.ClosedResourceError):
        await call()


@pytest.mark.parametrize("family", ["unix"])
@BOTH_LAYERS
@pytest.mark.parametrize("how", ["close", "abort"])
async def test_closing_wakes_the_tasks_that_wait_on_the_socket(
    how: str, layer: str, a: Socket, b: Socket
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(assert_closed, a.recv)
        nursery.start_soon(assert_closed, lambda: a.send(b"x" * 10_000_000))
        await trio.testing.wait_all_tasks_blocked()
        if how == "abort":
            a.abort()
        else:
            with trio.fail_after(_linger.LINGER_SECONDS / 2):
                await a.close()  # must not wait for the other task's send
    if layer == "tls":
        # The message was cut short, so there is no close_notify.
        with pytest.raises(TLSError):
            while await b.recv():
                pass


@BOTH_LAYERS
async def test_a_waiting_close_wakes_other_tasks_and_refuses_calls(
    a: Socket, b: Socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_linger, "LINGER_SECONDS", 1000)
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as waiting:
            waiting.start_soon(assert_closed, a.recv)
            waiting.start_soon(assert_closed, lambda: a.send(b"x" * 50_000_000))
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(a.close)  # waits, because the peer reads nothing
        for call in (a.recv, lambda: a.send(b"x"), lambda: a.send(b"x", b"y"), a.send_eof):
            assert a.fileno() >= 0
            await assert_closed(call)
        a.abort()


@pytest.mark.parametrize("how", ["close", "abort"])
async def test_a_closed_socket_describes_itself_but_refuses_other_calls(
    how: str, a: Socket
) -> None:
    peer, local = a.getpeer(), a.getlocal()
    a.unrecv(b"one\ntwo\npushed back")
    lines = a.lines()
    assert await lines.__anext__() == b"one"
    if how == "close":
        await a.close()
    else:
        a.abort()
    for read in READS.values():
        await assert_closed(functools.partial(read, a))
    with open(__file__, "rb") as file:
        for call in (
            lines.__anext__,
            a.send,
            lambda: a.send(b"x"),
            lambda: a.send_all(b""),
            a.wait_send_all_might_not_block,
            a.send_eof,
            lambda: a.send_file(file),
            lambda: a.starttls("localhost"),
            a.stoptls,
        ):
            await assert_closed(call)
    for function in (
        lambda: a.unrecv(b"x"),
        lambda: a.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        lambda: a.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
        lambda: a._connection.transport.send_nowait(b"x"),
    ):
        with pytest.raises(trio.ClosedResourceError):
            function()
    assert not a.isopen()
    assert (a.getpeer(), a.getlocal()) == (peer, local)
    assert a.getside() == "client"
    assert a.info().peer == peer
    assert a.fileno() == -1
    assert repr(a).endswith("plain closed>")


# ---- closed below the Socket ----


@BOTH_FAMILIES
@pytest.mark.parametrize("how", ["stream", "socket", "descriptor"])
@pytest.mark.parametrize("isopen_first", [True, False])
async def test_a_socket_over_a_closed_stream_is_closed(
    isopen_first: bool, how: str, a: Socket
) -> None:
    if how == "stream":
        await a.stream.aclose()
    elif how == "socket":
        a.stream.socket.close()
    else:
        os.close(a.stream.socket.detach())
    if isopen_first:
        assert not a.isopen()
    for call in (a.recv, lambda: a.send(b"x"), lambda: a.send(b"one", b"two")):
        await assert_closed(call)
    assert not a.isopen()
    await a.close()


async def test_a_read_notices_a_closed_stream_although_it_waits_first(a: Socket) -> None:
    for _ in range(5):  # after four EAGAINs, a read waits before its system call
        await cancel_when_blocked(a.recv)
    a.stream.socket.close()
    for _ in range(20):  # after 15 such reads, a read makes its system call first
        await assert_closed(a.recv)


async def test_a_read_after_a_spurious_wake_up_waits_again(
    a: Socket, b: Socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """select(2): the kernel may report a descriptor as readable although a read would block."""
    real = trio.lowlevel.wait_readable
    woken = []

    async def spurious(descriptor: int) -> None:
        woken.append(descriptor)
        if len(woken) == 1:
            await trio.lowlevel.checkpoint()
        else:
            await real(descriptor)

    async with trio.open_nursery() as nursery:
        monkeypatch.setattr(trio.lowlevel, "wait_readable", spurious)
        nursery.start_soon(a.recv)
        await trio.testing.wait_all_tasks_blocked()
        assert len(woken) == 2
        await b.send(b"x")
