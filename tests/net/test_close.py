"""Closing loses nothing that was sent, waits only where it must, and ends."""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

import trisock
from helpers.pairs import clog, closing, raw_pair, tcp_pair, tls_pair, unix_pair
from trisock import ClientTLS, ServerTLS, Socket
from trisock._net import linger as _linger
from trisock._net import syscalls as _syscalls

ANSWER = b"HTTP/1.1 200 OK\r\nConnection: Close\r\nContent-Length: 10000000\r\n\r\n"
BODY = bytes(range(250)) * 40_000  # 10 MB
UPLOAD = b"u" * 1_000_000


async def answer_without_reading(sock: Socket) -> None:
    """Pluto's own ``bind`` example, grown."""
    await sock.send(ANSWER, BODY)


def post(port: int) -> bytes:
    """Post 1 MB with a plain blocking client, which reads when it has sent everything."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.settimeout(30)
        sock.sendall(b"POST / HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n" + UPLOAD)
        return b"".join(iter(lambda: sock.recv(1 << 20), b""))


async def test_an_answer_to_a_request_that_was_never_read_arrives_whole_200_times() -> None:
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, answer_without_reading)
        for _ in range(200):
            assert await trio.to_thread.run_sync(post, server.port) == ANSWER + BODY
        server.stop()


@pytest.mark.needs("curl")
async def test_curl_gets_an_answer_to_a_post_that_was_never_read_200_times(tmp_path: Path) -> None:
    (tmp_path / "upload").write_bytes(UPLOAD)
    command = ["curl", "-sS", "--fail", "-H", "Expect:", "--data-binary", f"@{tmp_path}/upload"]
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, answer_without_reading)
        for _ in range(200):
            done = await trio.run_process(
                [*command, f"http://127.0.0.1:{server.port}/"], capture_stdout=True
            )
            assert done.stdout == BODY
        server.stop()


async def test_under_tls_too_an_unread_request_does_not_cost_the_answer(
    authority: object, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, answer_without_reading, tls=server_tls)
        for _ in range(5):
            async with await trisock.connect("127.0.0.1", server.port, tls=client_tls) as sock:
                async with trio.open_nursery() as uploading:
                    uploading.start_soon(sock.send, UPLOAD)
                    assert await sock.recv_exactly(len(ANSWER) + len(BODY)) == ANSWER + BODY
                    assert await sock.recv() == b""  # and close_notify
        server.stop()


async def test_a_client_that_closes_without_reading_its_tls_tickets_loses_nothing(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    for _ in range(20):
        client, server = await tls_pair(client_tls, server_tls)
        async with closing(client, server):
            await server.send(b"a banner that nobody reads")  # and with it the tickets
            await client.send(b"x" * 100_000)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.close)
                assert await server.recv_exactly(100_000) == b"x" * 100_000
                assert await server.recv() == b""
                await server.close()


@pytest.mark.parametrize("kind", ["tcp", "unix", "tls"])
async def test_closing_an_idle_connection_does_not_wait(
    kind: str, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    if kind == "tls":
        a, b = await tls_pair(client_tls, server_tls)
    else:
        a, b = await tcp_pair() if kind == "tcp" else unix_pair()
    async with closing(a, b):
        with trio.fail_after(_linger.LINGER_SECONDS / 2):
            await a.close()
        assert a.fileno() == -1
        assert await b.recv() == b""
        with trio.fail_after(_linger.LINGER_SECONDS / 2):
            await b.close()


async def test_a_peer_that_never_stops_sending_does_not_keep_the_close_from_ending(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_linger, "LINGER_BYTES", 1_000_000)
    a, b = await tcp_pair()
    async with closing(a, b):
        total = 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.close)
            with pytest.raises(trio.BrokenResourceError):
                while True:
                    await b.send(b"x" * 65536)
                    total += 65536
        assert total > 500_000


async def test_a_peer_that_goes_silent_does_not_keep_the_close_from_ending(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Time is Trio's here, and jumps when everybody waits: no second of it passes.
    a, b = await tcp_pair()
    async with closing(a, b):
        await b.send(b"unread")
        await trio.lowlevel.wait_readable(a.fileno())
        start = trio.current_time()
        await a.close()
        assert trio.current_time() - start == pytest.approx(_linger.LINGER_SECONDS)


async def test_what_is_due_is_sent_also_when_there_is_no_room_for_it_at_first(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = unix_pair()
    async with closing(a, b):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.starttls, server_tls)
            await a.starttls(client_tls)
        await clog(a)
        a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # now not a byte more goes in
        sent = 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.close)  # its close_notify has to wait
            await trio.testing.wait_all_tasks_blocked()
            while chunk := await b.recv():
                sent += len(chunk)
        assert sent
        assert await b.recv() == b""  # close_notify came


async def test_what_is_due_is_sent_also_to_a_peer_that_has_ended_its_side(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = unix_pair()
    async with closing(a, b):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.starttls, server_tls)
            await a.starttls(client_tls)
        await clog(a)
        a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # now not a byte more goes in
        await b.stream.send_eof()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.close)
            await trio.testing.wait_all_tasks_blocked()
            while await b.recv():
                pass
        assert await b.recv() == b""  # close_notify came


async def test_closing_again_changes_nothing_and_waits_for_the_first() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        await b.send(b"unread")
        await trio.lowlevel.wait_readable(a.fileno())
        done = []

        async def close() -> None:
            await a.close()
            assert a.fileno() == -1
            done.append(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(close)
            nursery.start_soon(close)
            await trio.testing.wait_all_tasks_blocked()
            assert done == []
            await b.close()
        await a.close()
        await a.aclose()
        assert done == [1, 1]


@pytest.mark.parametrize("who", ["first", "second"])
async def test_a_cancelled_close_closes_hard_and_raises_cancelled(who: str) -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        await b.send(b"unread")
        await trio.lowlevel.wait_readable(a.fileno())
        async with trio.open_nursery() as nursery:
            if who == "second":
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


async def test_a_close_that_was_cancelled_before_it_began_still_closes(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    for a, b in (await tcp_pair(), await tls_pair(client_tls, server_tls)):
        async with closing(a, b):
            for _ in range(2):
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await a.close()
                assert scope.cancelled_caught
                assert a.fileno() == -1


@pytest.mark.parametrize("kind", ["plain", "tls"])
@pytest.mark.parametrize("how", ["close", "abort"])
async def test_closing_wakes_the_tasks_that_wait_on_the_socket(
    kind: str, how: str, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = unix_pair()
    async with closing(a, b):
        if kind == "tls":
            async with trio.open_nursery() as nursery:
                nursery.start_soon(b.starttls, server_tls)
                await a.starttls(client_tls)
        woken = []

        async def expect_closed(name: str, call: object) -> None:
            with pytest.raises(trio.ClosedResourceError):
                await call()  # type: ignore[operator]
            woken.append(name)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_closed, "recv", a.recv)
            nursery.start_soon(expect_closed, "send", lambda: a.send(b"x" * 10_000_000))
            await trio.testing.wait_all_tasks_blocked()
            if how == "abort":
                a.abort()
            else:
                with trio.fail_after(_linger.LINGER_SECONDS / 2):
                    await a.close()  # does not queue behind the send that is stuck
        assert sorted(woken) == ["recv", "send"]
        if kind == "tls":
            # The message was cut off, so there is no close_notify to say that it was not.
            with pytest.raises(trisock.TLSError):
                while await b.recv():
                    pass


@pytest.mark.parametrize("kind", ["plain", "tls"])
async def test_who_waits_is_woken_when_a_close_begins_and_nothing_goes_out_while_it_lasts(
    kind: str, client_tls: ClientTLS, server_tls: ServerTLS, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_linger, "LINGER_SECONDS", 1000)
    a, b = await (tcp_pair() if kind == "plain" else tls_pair(client_tls, server_tls))
    async with closing(a, b), trio.open_nursery() as nursery:

        async def expect_closed(call: Callable[[], Awaitable[object]]) -> None:
            with pytest.raises(trio.ClosedResourceError):
                await call()

        async with trio.open_nursery() as waiting:
            waiting.start_soon(expect_closed, a.recv)
            waiting.start_soon(expect_closed, lambda: a.send(b"x" * 50_000_000))
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(a.close)  # it waits for the peer, who takes nothing
        for call in (a.recv, lambda: a.send(b"x"), lambda: a.send(b"x", b"y"), a.send_eof):
            assert a.fileno() >= 0
            with pytest.raises(trio.ClosedResourceError):
                await call()
        a.abort()


async def test_after_close_everything_but_telling_is_over() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        peer, local = a.getpeer(), a.getlocal()
        a.unrecv(b"one\ntwo\npushed back")
        lines = a.lines()
        assert await lines.__anext__() == b"one"
        await a.close()
        for call in (
            lines.__anext__,
            a.recv,
            a.peek,
            a.receive_some,
            lambda: a.recv_exactly(1),
            lambda: a.recv_until(b"\n"),
            a.lines().__anext__,
            a.send,
            lambda: a.send(b"x"),
            lambda: a.send_all(b""),
            a.wait_send_all_might_not_block,
            a.send_eof,
            lambda: a.starttls("localhost"),
            a.stoptls,
        ):
            with pytest.raises(trio.ClosedResourceError):
                await call()
        with open(__file__, "rb") as file, pytest.raises(trio.ClosedResourceError):
            await a.send_file(file)
        with pytest.raises(trio.ClosedResourceError):
            a.unrecv(b"x")
        with pytest.raises(trio.ClosedResourceError):
            a.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        with pytest.raises(trio.ClosedResourceError):
            a.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert not a.isopen()
        assert (a.getpeer(), a.getlocal()) == (peer, local)
        assert a.getside() == "client"
        assert a.info().peer == peer
        assert a.fileno() == -1
        assert repr(a).endswith("plain closed>")


async def test_abort_resets_the_connection() -> None:
    sock, raw = raw_pair()
    with raw:
        sock.abort()
        sock.abort()
        with pytest.raises(ConnectionResetError):
            raw.recv(1)


async def test_abort_ends_a_close_that_is_waiting() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        await b.send(b"unread")
        await trio.lowlevel.wait_readable(a.fileno())
        with trio.fail_after(_linger.LINGER_SECONDS / 2):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(a.close)
                await trio.testing.wait_all_tasks_blocked()
                a.abort()


async def test_the_stream_below_may_be_closed_by_somebody_else() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        await a.stream.aclose()
        assert not a.isopen()
        with pytest.raises(trio.ClosedResourceError):
            await a.recv()
        with pytest.raises(trio.ClosedResourceError):
            await a.send(b"x")
        await a.close()


async def test_a_descriptor_that_is_taken_away_below_us_is_a_closed_socket() -> None:
    for a, b in (await tcp_pair(), unix_pair()):  # a socket of our own, and one that was adopted
        async with closing(a, b):
            os.close(a.stream.socket.detach())
            with pytest.raises(trio.ClosedResourceError):
                await a.recv()
            with pytest.raises(trio.ClosedResourceError):
                await a.send(b"x")
            assert not a.isopen()


async def test_a_stream_closed_below_us_is_a_closed_socket_for_a_reader_that_has_waited() -> None:
    """Then a read waits without a try, because so many in a row have found nothing."""
    a, b = await tcp_pair()
    async with closing(a, b):
        for _ in range(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(a.recv)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
        a.stream.socket.close()
        for _ in range(20):  # and after some it tries again
            with pytest.raises(trio.ClosedResourceError):
                await a.recv()


async def test_a_read_that_wakes_for_nothing_waits_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """select(2): a descriptor may be reported as ready although a read would block."""
    real = trio.lowlevel.wait_readable
    woken = []

    async def spurious(descriptor: int) -> None:
        woken.append(descriptor)
        if len(woken) == 1:
            await trio.lowlevel.checkpoint()
        else:
            await real(descriptor)

    a, b = await tcp_pair()
    async with closing(a, b), trio.open_nursery() as nursery:
        monkeypatch.setattr(trio.lowlevel, "wait_readable", spurious)
        nursery.start_soon(a.recv)
        await trio.testing.wait_all_tasks_blocked()
        assert len(woken) == 2
        await b.send(b"x")


async def test_after_a_close_nothing_goes_out_below_either() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        a.abort()
        with pytest.raises(trio.ClosedResourceError):
            a._connection.transport.send_nowait(b"x")


async def test_many_tasks_may_close_at_once() -> None:
    sock, raw = raw_pair()
    with raw:
        raw.sendall(b"unread, so that the close has to wait for the end")
        await trio.lowlevel.wait_readable(sock.fileno())
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(sock.close)
            await trio.testing.wait_all_tasks_blocked()
            raw.close()
        assert sock.fileno() == -1
        await sock.close()


async def test_a_close_after_the_peers_reset_is_quiet() -> None:
    sock, raw = raw_pair()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    raw.close()
    await trio.lowlevel.wait_readable(sock.fileno())
    await sock.close()


async def test_a_socket_is_closed_by_its_context() -> None:
    a, b = await tcp_pair()
    async with a, b:
        await a.send(b"x")
        assert await b.recv() == b"x"
    assert a.fileno() == b.fileno() == -1


@pytest.mark.parametrize("said_something", [True, False])
async def test_the_alert_of_a_failed_read_is_sent_before_the_close(
    said_something: bool, authority: object, server_tls: ServerTLS
) -> None:
    """A record that was forged: the peer is told so (RFC 8446, section 6.2)."""
    sock, raw = raw_pair()
    context = ssl.create_default_context(cadata=authority.pem.decode())  # type: ignore[attr-defined]
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    peer = context.wrap_bio(incoming, outgoing, server_hostname="example.org")

    def handshake() -> None:
        while True:
            try:
                peer.do_handshake()
            except ssl.SSLWantReadError:
                raw.sendall(outgoing.read())
                incoming.write(raw.recv(65536))
            else:
                raw.sendall(outgoing.read())
                return

    with raw:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sock.starttls, server_tls)
            await trio.to_thread.run_sync(handshake)
        if said_something:
            await sock.send(b"hello")
            incoming.write(await trio.to_thread.run_sync(raw.recv, 65536))
            assert peer.read() == b"hello"
        raw.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
        with pytest.raises(trisock.TLSError, match="a record was forged or damaged"):
            await sock.recv()
        with pytest.raises(trisock.TLSError, match="a record was forged or damaged"):
            await sock.recv()
        await sock.close()
        incoming.write(await trio.to_thread.run_sync(raw.recv, 65536))
        with pytest.raises(ssl.SSLError, match="ALERT_BAD_RECORD_MAC"):
            peer.read()


async def test_the_drain_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_linger, "LINGER_BYTES", 1_000_000)
    monkeypatch.setattr(_linger, "LINGER_SECONDS", 1000)
    a, b = await tcp_pair()
    async with closing(a, b):
        total = 0
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(a.close)
                with pytest.raises(trio.BrokenResourceError):
                    while True:
                        await b.send(b"x" * 65536)
                        total += 65536
        assert total > 500_000


def test_the_bounds_of_the_drain() -> None:
    assert (_linger.LINGER_SECONDS, _linger.LINGER_BYTES) == (2, 64 << 20)


async def test_a_late_byte_does_not_destroy_what_is_not_acknowledged() -> None:
    sock, raw = raw_pair()
    async with closing(sock):
        with raw:
            sent = 0
            while not _syscalls.unacknowledged_bytes(sock.stream.socket):
                await sock.send(b"x" * 65536)  # until the peer's kernel takes no more
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


@pytest.mark.parametrize("adopted", [False, True])
async def test_a_send_after_send_eof_does_not_take_the_peers_reset_away(adopted: bool) -> None:
    """The kernel tells of a reset once. A download that was cut off must not look complete."""
    if adopted:
        sock, raw = raw_pair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            sock = await trisock.connect("127.0.0.1", listening.getsockname()[1])
            raw, _ = listening.accept()
    async with closing(sock):
        await sock.send_eof()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        raw.close()
        await trio.lowlevel.wait_readable(sock.fileno())
        with pytest.raises(trio.ClosedResourceError):
            await sock.send(b"a mistake")
        with pytest.raises(trio.BrokenResourceError):
            await sock.recv()


@pytest.mark.parametrize("buffers", [(), (b"",), (b"", b"")])
async def test_nothing_is_sent_after_send_eof_not_even_nothing(buffers: tuple[bytes, ...]) -> None:
    client, server = await tcp_pair()
    async with closing(client, server):
        await client.send_eof()
        with pytest.raises(trio.ClosedResourceError):
            await client.send(*buffers)


async def test_a_close_at_once_leaves_what_cannot_be_told_to_the_graceful_close(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: int) -> int:
        raise OSError(errno.EIO, "cannot be told")

    a, b = await tcp_pair()
    async with closing(a, b):
        with monkeypatch.context() as patch:
            patch.setattr("trisock._net.transport.unread_bytes", fail)
            assert not a._connection.close_at_once()
        assert a.isopen()
        await b.send(b"unread")
        while not await a.peek():
            await trio.lowlevel.checkpoint()
