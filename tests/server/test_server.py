"""bind and Server: the server outlives its handlers, and ends when it is told to."""

from __future__ import annotations

import contextlib
import errno
import inspect
import io
import logging
import math
import socket
import ssl
import sys

import pytest
import trio
import trio.testing

import trisock
from helpers.authority import Authority
from helpers.failures import few_descriptors, reset_in_the_backlog
from helpers.pairs import all_served, closing
from trisock import ClientTLS, ServerTLS, Socket
from trisock._net.connection import Connection

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup, ExceptionGroup


async def echo(sock: Socket) -> None:
    async for chunk in sock:
        await sock.send(chunk)


async def connect(server: trisock.Server, **options: object) -> Socket:
    return await trisock.connect("127.0.0.1", server.port, **options)  # type: ignore[arg-type]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG)
    return caplog


# ---- the way it goes ----


async def test_a_handler_runs_for_each_connection() -> None:
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, echo)
        assert server.addresses == (("0.0.0.0", server.port), ("::", server.port))
        hosts = ("127.0.0.1", "::1", "127.0.0.1")
        clients = [await trisock.connect(host, server.port) for host in hosts]
        for number, client in enumerate(clients):
            await client.send(b"%d" % number)
        for number, client in enumerate(clients):
            assert await client.recv() == b"%d" % number
        assert {sock.getpeer() for sock in server.connections} == {
            client.getlocal() for client in clients
        }
        assert all(sock.getside() == "server" for sock in server.connections)
        assert server.stats() == trisock.ServerStats(accepted=3, active=3)
        assert "open, 3 connections>" in repr(server)
        for client in clients:
            await client.close()
        server.stop()
        await server.wait_closed()
        assert server.stats() == trisock.ServerStats(accepted=3)
        assert server.connections == ()
        assert server.port
        assert "closed, 0 connections>" in repr(server)


async def test_plutos_own_example() -> None:
    async def handler(s: Socket) -> None:
        content = b"Hello, world!"
        await s.send(
            b"HTTP/1.1 200 OK\r\nConnection: Close\r\nContent-Length: %d\r\n\r\n" % len(content),
            content,
        )

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        async with await connect(server) as client:
            await client.send(b"GET / HTTP/1.1\r\n\r\n")
            answer = b"".join([chunk async for chunk in client])
        assert answer.endswith(b"\r\n\r\nHello, world!")
        server.stop()


async def test_it_takes_over_a_listener() -> None:
    listener = await trisock.listen(0, "127.0.0.1")
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, listener, echo)
        assert server.port == listener.port
        (await connect(server)).abort()
        server.stop()
    with pytest.raises(trio.ClosedResourceError):
        listener.hasconnection()


async def test_arguments_are_checked_and_nothing_listens_then(
    authority: Authority, client_tls: ClientTLS
) -> None:
    context = ClientTLS("x", verify=False)._context()
    async with await trisock.listen(0, "127.0.0.1") as listener, trio.open_nursery() as nursery:
        for arguments, options, error, words in [
            ((listener, None), {}, TypeError, "a handler is an async function"),
            (("80", echo), {}, TypeError, "a port is an int"),
            ((0, echo), {"max_connections": 0}, ValueError, "1 or more"),
            ((0, echo), {"max_connections": True}, TypeError, "int or None"),
            ((0, echo), {"max_connections": 1.5}, TypeError, "int or None"),
            ((0, echo), {"handshake_timeout": "x"}, TypeError, "handshake_timeout"),
            ((0, echo), {"tls": "example.org"}, TypeError, "needs certificates, not a str"),
            ((0, echo), {"tls": client_tls}, TypeError, "needs certificates, not a ClientTLS"),
            ((0, echo), {"tls": context}, ValueError, "context of a TLS server"),
            ((0, echo), {"tls": []}, ValueError, "at least one certificate"),
            ((listener, echo), {"host": "x"}, ValueError, "are for a port"),
            ((listener, echo), {"backlog": 5}, ValueError, "are for a port"),
            ((listener, echo), {"reuse_port": True}, ValueError, "are for a port"),
            ((listener.port, echo), {"host": "127.0.0.1"}, OSError, "cannot listen"),
        ]:
            with pytest.raises(error, match=words):
                await trisock.bind(nursery, *arguments, **options)  # type: ignore[arg-type]


async def test_a_nursery_that_is_closed_leaves_nothing_listening() -> None:
    async with trio.open_nursery() as nursery:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        await trisock.bind(nursery, 0, echo)


# ---- handlers that fail ----


async def test_what_a_handler_raises_is_logged_with_the_peer_and_the_server_lives(
    log: pytest.LogCaptureFixture,
) -> None:
    async def handler(sock: Socket) -> None:
        if await sock.recv() == b"fail":
            await sock.send(b"an answer before the fault")
            raise ValueError("the fault")
        await sock.send(b"fine")

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        async with await connect(server) as client:
            await client.send(b"fail")
            assert await client.recv() == b"an answer before the fault"
            assert await client.recv() == b""
            where = str(client.getlocal())
        async with await connect(server) as client:
            await client.send(b"work")
            assert await client.recv() == b"fine"
        server.stop()
        await server.wait_closed()
        assert server.stats() == trisock.ServerStats(accepted=2, handler_errors=1)
    (record,) = [each for each in log.records if each.levelno >= logging.ERROR]
    assert record.name == "trisock.server"
    assert where in record.getMessage()
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ValueError)


async def test_a_group_of_exceptions_is_logged_as_one(log: pytest.LogCaptureFixture) -> None:
    async def handler(sock: Socket) -> None:
        async def fail(error: Exception) -> None:
            raise error

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail, ValueError("one"))
            nursery.start_soon(fail, KeyError("two"))

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        async with await connect(server) as client:
            assert await client.recv() == b""
        server.stop()
        await server.wait_closed()
        assert server.stats().handler_errors == 1
    (record,) = [each for each in log.records if each.levelno >= logging.ERROR]
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ExceptionGroup)


async def test_a_handler_that_fails_while_it_is_cancelled_is_logged_and_the_cancel_goes_on(
    log: pytest.LogCaptureFixture,
) -> None:
    """It raises a group of both kinds, which ``except Exception`` does not see."""

    async def handler(sock: Socket) -> None:
        async def fail_in_the_end() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("while being cancelled")

        async with trio.open_nursery() as inner:
            inner.start_soon(fail_in_the_end)
            inner.start_soon(trio.sleep_forever)

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        client = await connect(server)
        while not server.connections:
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    client.abort()
    assert nursery.cancel_scope.cancelled_caught
    assert server.stats().handler_errors == 1
    (record,) = [each for each in log.records if each.levelno >= logging.ERROR]
    assert "ValueError" in str(record.exc_info)
    assert "Cancelled" not in str(record.exc_info)


@pytest.mark.parametrize("wrapped", [False, True])
async def test_what_is_no_exception_of_a_handler_ends_the_server(wrapped: bool) -> None:
    class Stop(BaseException):
        pass

    async def handler(sock: Socket) -> None:
        if wrapped:
            raise BaseExceptionGroup("both", [ValueError("logged"), Stop()])
        raise Stop

    with pytest.RaisesGroup(Stop, flatten_subgroups=True):
        async with trio.open_nursery() as nursery:
            server = await trisock.bind(nursery, 0, handler)
            client = await connect(server)
            await trio.sleep_forever()
    client.abort()
    assert server.closing.is_set()
    await server.wait_closed()
    assert server.stats().handler_errors == (1 if wrapped else 0)


@pytest.mark.parametrize("grouped", [False, True])
async def test_a_peer_that_vanished_is_not_worth_a_traceback(
    grouped: bool, log: pytest.LogCaptureFixture
) -> None:
    async def handler(sock: Socket) -> None:
        if grouped:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sock.recv)
        else:
            await sock.recv()

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        client = await connect(server)
        while not server.connections:
            await trio.lowlevel.checkpoint()
        client.abort()
        while server.connections:
            await trio.lowlevel.checkpoint()
        server.stop()
        await server.wait_closed()
        assert server.stats() == trisock.ServerStats(accepted=1, peer_errors=1)
    assert not [each for each in log.records if each.levelno > logging.INFO]
    assert any("closed the connection with" in each.getMessage() for each in log.records)


async def test_somebody_elses_broken_connection_is_worth_one(
    log: pytest.LogCaptureFixture,
) -> None:
    async def handler(sock: Socket) -> None:
        raise trio.BrokenResourceError("the database has gone away")

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        async with await connect(server) as client:
            await client.recv()
        server.stop()
        await server.wait_closed()
        assert server.stats().handler_errors == 1
    assert [each for each in log.records if each.levelno == logging.ERROR]


async def test_a_socket_that_the_handler_itself_has_closed_is_its_mistake(
    log: pytest.LogCaptureFixture,
) -> None:
    async def handler(sock: Socket) -> None:
        await sock.close()
        await sock.recv()

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        async with await connect(server) as client:
            await client.recv()
        await all_served(server, 1)
        assert server.stats().handler_errors == 1
        server.stop()
    assert [each for each in log.records if each.levelno == logging.ERROR]


async def test_a_handler_may_close_its_socket_itself() -> None:
    async def handler(sock: Socket) -> None:
        await sock.close()

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        async with await connect(server) as client:
            assert await client.recv() == b""
        server.stop()


# ---- stopping ----


async def test_stop_lets_handlers_finish() -> None:
    async def handler(sock: Socket) -> None:
        await sock.send(b"working")
        await server.closing.wait()
        await sock.send(b"done")

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        client = await connect(server)
        assert await client.recv() == b"working"
        server.stop()
        assert server.closing.is_set()
        assert "closing, 1 connections>" in repr(server)
        with pytest.raises(ConnectionRefusedError):
            await connect(server)
        assert await client.recv() == b"done"
        assert await client.recv() == b""
        await client.close()
        await server.wait_closed()


async def test_stop_cancels_handlers_after_their_grace(
    autojump_clock: trio.testing.MockClock,
) -> None:
    autojump_clock.autojump_threshold = 0.05  # not while bytes are on their way
    cancelled = []

    async def handler(sock: Socket) -> None:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            cancelled.append(trio.current_time())
            raise

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        clients = [await connect(server) for _ in range(2)]
        while len(server.connections) < 2:
            await trio.lowlevel.checkpoint()
        start = trio.current_time()
        server.stop(grace=20)
        server.stop(grace=5)
        server.stop(grace=30)  # can only shorten it
        await server.wait_closed()
        assert cancelled == [pytest.approx(start + 5)] * 2
        for client in clients:
            assert await client.recv() == b""
            client.abort()


async def test_stop_may_come_from_a_handler_and_before_the_server_has_begun() -> None:
    async def handler(sock: Socket) -> None:
        server.stop(grace=0)
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        client = await connect(server)
        assert await client.recv() == b""
        client.abort()
        await server.wait_closed()
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        server.stop()
    await server.wait_closed()
    with pytest.raises(ValueError, match="grace must be 0 or more, not -1"):
        server.stop(grace=-1)


async def test_arguments_that_cannot_be_used_change_nothing() -> None:
    async with await trisock.listen(0, "127.0.0.1") as listener:
        with pytest.raises(TypeError, match=r"needs a trio.Nursery, not 5"):
            await trisock.bind(5, listener, trio.sleep)  # type: ignore[arg-type]
        async with trio.open_nursery() as nursery:
            server = await trisock.bind(nursery, listener, Socket.recv)
            with pytest.raises(ValueError, match="grace is too long"):
                server.stop(10**400)
            with pytest.raises(TypeError, match="grace is a number of seconds or None"):
                server.stop("1")  # type: ignore[arg-type]
            assert not server.closing.is_set()
            async with await trisock.connect("127.0.0.1", server.port):
                server.stop()


async def test_stop_keeps_from_handlers_what_was_accepted_at_the_same_moment() -> None:
    handled = []

    async def handler(sock: Socket) -> None:
        handled.append(sock.getpeer())
        server.stop()

    listener = await trisock.listen(0, "127.0.0.1")
    clients = [await trisock.connect("127.0.0.1", listener.port) for _ in range(3)]
    async with closing(*clients), trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, listener, handler)  # all of them are waiting
        await server.wait_closed()
        assert len(handled) == 1
        assert server.stats() == trisock.ServerStats(accepted=3, refused=2)


async def test_stop_drops_handshakes_in_progress(
    server_tls: ServerTLS, log: pytest.LogCaptureFixture
) -> None:
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, echo, tls=server_tls)
        client = await connect(server)  # says nothing
        while server.stats().active < 1:
            await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
        assert server.connections == ()
        server.stop()
        await server.wait_closed()
        assert server.stats() == trisock.ServerStats(accepted=1, refused=1)
        with contextlib.suppress(trio.BrokenResourceError):
            assert await client.recv() == b""
        client.abort()


async def test_cancelling_the_nursery_cancels_handlers_without_grace() -> None:
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, echo)
        client = await connect(server)
        while not server.connections:
            await trio.lowlevel.checkpoint()
        (sock,) = server.connections
        nursery.cancel_scope.cancel()
    assert server.closing.is_set()
    await server.wait_closed()
    assert not sock.isopen()
    assert server.stats().active == 0
    client.abort()


async def test_starting_and_stopping_among_connections_that_come_in_never_fails() -> None:
    for turn in range(50):
        async with trio.open_nursery() as nursery:
            server = await trisock.bind(nursery, 0, echo, host="127.0.0.1", max_connections=2)

            async def knock(server: trisock.Server = server) -> None:
                with contextlib.suppress(OSError, trio.BrokenResourceError):
                    sock = await connect(server)
                    try:
                        await sock.send(b"x")
                        await sock.recv()
                    finally:
                        sock.abort()

            for _ in range(5):
                nursery.start_soon(knock)
            for _ in range(turn % 10):
                await trio.lowlevel.checkpoint()
            server.stop(grace=1)
            await server.wait_closed()
        assert server.stats().active == 0


async def test_a_listener_that_somebody_else_closes_ends_the_server() -> None:
    """As trio.serve_listeners does: nobody would hear the silence."""
    listener = await trisock.listen(0, "127.0.0.1")
    with pytest.RaisesGroup(trio.ClosedResourceError, flatten_subgroups=True):
        async with trio.open_nursery() as nursery:
            await trisock.bind(nursery, listener, echo, max_connections=1)
            await trio.testing.wait_all_tasks_blocked()
            await listener.close()


# ---- TLS ----


async def test_tls_from_the_start_and_failed_handshakes_are_counted(
    authority: Authority,
    client_tls: ClientTLS,
    server_tls: ServerTLS,
    log: pytest.LogCaptureFixture,
) -> None:
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, echo, tls=server_tls)
        async with await connect(server, tls=client_tls) as client:
            await client.send(b"hello")
            assert await client.recv() == b"hello"
            (sock,) = server.connections
            assert sock.istls()
        with pytest.raises(trisock.TLSError):
            await connect(server, tls=ClientTLS("example.net", ca=authority.pem))
        async with await connect(server) as client:
            await client.send(b"GET / HTTP/1.1\r\n\r\n")
            assert (await client.recv())[:1] in (b"", b"\x15")  # an alert, if OpenSSL makes one
        await all_served(server, 3)
        server.stop()
        await server.wait_closed()
        assert server.stats() == trisock.ServerStats(accepted=3, failed_handshakes=2)
        assert not server._handshakes
    messages = [each.getMessage() for each in log.records]
    assert any("does not speak TLS" in each for each in messages)
    assert not [each for each in log.records if each.levelno > logging.INFO]


async def test_a_silent_client_loses_its_handshake(
    server_tls: ServerTLS, autojump_clock: trio.testing.MockClock
) -> None:
    autojump_clock.autojump_threshold = 0.05  # not while bytes are on their way
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, echo, tls=server_tls, handshake_timeout=3)
        client = await connect(server)
        assert await client.recv() == b""
        assert trio.current_time() > 2
        client.abort()
        server.stop()
        await server.wait_closed()
        assert server.stats().failed_handshakes == 1


async def test_set_tls_is_for_new_connections(authority: Authority, client_tls: ClientTLS) -> None:
    old, new = authority.issue("example.org"), authority.issue("example.org", "new.example")
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, echo, tls=[old])
        async with await connect(server, tls=client_tls) as client:
            await client.send(b"hello")
            assert await client.recv() == b"hello"
            for wrong, error in [(None, TypeError), ("x", TypeError), ([], ValueError)]:
                with pytest.raises(error):
                    server.set_tls(wrong)  # type: ignore[arg-type]
            server.set_tls([new])
            await client.send(b"still here")
            assert await client.recv() == b"still here"
            async with await connect(server, tls=client_tls) as other:
                assert client.tls is not None
                assert other.tls is not None
                assert client.tls.peer_certificate != other.tls.peer_certificate
        server.stop()


# ---- how many ----


async def test_max_connections_keeps_the_excess_in_the_backlog() -> None:
    async def handler(sock: Socket) -> None:
        await sock.send(b"in")
        await sock.recv()

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler, max_connections=2)
        clients = [await connect(server) for _ in range(3)]
        for client in clients[:2]:
            assert await client.recv() == b"in"
        await trio.testing.wait_all_tasks_blocked()
        assert server.stats().accepted == 2
        assert await clients[2].peek() is None
        await clients[0].close()
        assert await clients[2].recv() == b"in"
        for client in clients[1:]:
            await client.close()
        # No slot was lost.
        for _ in range(5):
            pair = [await connect(server), await connect(server)]
            for client in pair:
                assert await client.recv() == b"in"
                client.abort()
        server.stop()


async def test_what_a_full_server_leaves_waiting_another_one_can_take() -> None:
    """As processes do that share a listening socket."""
    listening = socket.create_server(("127.0.0.1", 0))
    async with trisock.Listener([listening.dup()]) as other, trio.open_nursery() as nursery:
        listener = trisock.Listener([listening])
        server = await trisock.bind(nursery, listener, chat, max_connections=1)
        first = await connect(server)
        assert await first.recv() == b"hi\n"
        second = await connect(server)
        await trio.testing.wait_all_tasks_blocked()
        assert other.hasconnection()
        async with closing(first, second, await other.accept()):
            server.stop()


async def test_a_close_keeps_its_slot_when_as_many_are_closing_beside_it() -> None:
    async def handler(sock: Socket) -> None:
        await trio.lowlevel.wait_readable(sock.fileno())
        await sock.send(b"bye")

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler, max_connections=1)
        first = await connect(server)
        await first.send(b"unread, so that the close has to linger")
        assert await first.recv() == b"bye"
        second, third = await connect(server), await connect(server)
        await second.send(b"unread, too")
        assert await second.recv() == b"bye"
        await third.send(b"unread, too")
        await trio.testing.wait_all_tasks_blocked()
        assert server.stats().accepted == 2
        await first.close()
        assert await third.recv() == b"bye"
        second.abort()
        third.abort()
        server.stop()


async def test_a_slot_covers_the_handshake(client_tls: ClientTLS, server_tls: ServerTLS) -> None:
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, chat, tls=server_tls, max_connections=1)
        silent, second = await connect(server), await connect(server)
        while not server.stats().active:
            await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
        assert server.stats().accepted == 1
        silent.abort()
        await second.starttls(client_tls)
        assert await second.recv() == b"hi\n"
        second.abort()
        server.stop()


@pytest.mark.parametrize("limit", [None, 100])
async def test_running_out_of_descriptors_never_kills_the_server(
    limit: int | None, log: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, echo, host="127.0.0.1", max_connections=limit)
        clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(10)]
        with few_descriptors(5):
            while not any("EMFILE" in each.getMessage() for each in log.records):
                await trio.sleep(0.01)
            assert server.stats().accepted == 5
        while server.stats().accepted < 10:
            await trio.sleep(0.01)
        for client in clients:
            with trio.socket.from_stdlib_socket(client) as talking:
                await talking.send(b"hello")
                assert await talking.recv(5) == b"hello"
        server.stop()
    assert {each.name for each in log.records if each.levelno > logging.INFO} == {"trisock.server"}


async def test_a_full_backlog_does_not_keep_other_tasks_from_running() -> None:
    accepted = []

    async def handler(_: Socket) -> None:
        accepted.append(server.stats().accepted)

    async with trio.open_nursery() as nursery:
        listener = await trisock.listen(0, "127.0.0.1")
        clients = [socket.create_connection(("127.0.0.1", listener.port)) for _ in range(200)]
        server = await trisock.bind(nursery, listener, handler)
        await all_served(server, 200)
        for client in clients:
            client.close()
        server.stop()
    assert min(accepted) <= 64 < max(accepted) == 200


async def test_connections_that_die_before_accept_kill_nobody() -> None:
    async with trio.open_nursery() as nursery:
        listener = await trisock.listen(0, "127.0.0.1")
        for _ in range(3):
            reset_in_the_backlog(listener.port)
        server = await trisock.bind(nursery, listener, echo, max_connections=1)
        async with await connect(server) as client:
            await client.send(b"hello")
            assert await client.recv() == b"hello"
        assert server.stats().dropped == 3
        server.stop()


async def test_an_unexpected_error_of_accept_ends_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listener = await trisock.listen(0, "127.0.0.1")

    def fail(_: socket.socket) -> None:
        raise OSError(errno.EIO, "unheard of")

    monkeypatch.setattr(listener._listening, "accept_from", fail)
    with pytest.RaisesGroup(pytest.RaisesExc(OSError, match="unheard of"), flatten_subgroups=True):
        async with trio.open_nursery() as nursery:
            await trisock.bind(nursery, listener, echo)


# ---- broadcast ----


async def chat(sock: Socket) -> None:
    await sock.send(b"hi\n")
    await sock.recv()


async def test_broadcast_reaches_all_open_connections() -> None:
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, chat)
        assert await server.broadcast(b"nobody") == 0
        clients = [await connect(server) for _ in range(5)]
        for client in clients:
            assert await client.recv() == b"hi\n"
        assert await server.broadcast(bytearray(b"news")) == 5
        for client in clients:
            assert await client.recv() == b"news"
        clients[0].abort()
        await clients[1].close()
        while len(server.connections) > 3:
            await trio.lowlevel.checkpoint()
        assert await server.broadcast(memoryview(b"more")) == 3
        with pytest.raises(TypeError, match="bytes are needed"):
            await server.broadcast("text")  # type: ignore[arg-type]
        for client in clients:
            client.abort()
        server.stop()


async def test_broadcast_reaches_clients_that_have_ended_their_side() -> None:
    """As ``printf 'SUBSCRIBE\\n' | nc -N`` does: it only listens from then on."""

    async def handler(sock: Socket) -> None:
        await sock.recv_until(b"\n")
        assert await sock.recv() == b""
        await server.closing.wait()

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        async with await connect(server) as client:
            await client.send(b"SUBSCRIBE\n")
            await client.send_eof()
            while not server.connections or server.connections[0].isopen():
                await trio.lowlevel.checkpoint()
            assert await server.broadcast(b"news") == 1
            assert await client.recv() == b"news"
            server.stop()


async def test_who_comes_or_goes_during_a_broadcast_does_not_change_it() -> None:
    big = b"b" * 5_000_000
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, chat)
        staying, leaving = await connect(server), await connect(server)
        assert await staying.recv() == await leaving.recv() == b"hi\n"
        delivered = []

        async def broadcast() -> None:
            delivered.append(await server.broadcast(big))

        async with trio.open_nursery() as broadcasting:
            broadcasting.start_soon(broadcast)
            await trio.testing.wait_all_tasks_blocked()
            leaving.abort()
            late = await connect(server)
            assert await late.recv() == b"hi\n"
            assert await staying.recv_exactly(len(big)) == big
        assert delivered == [1]
        assert await server.broadcast(b"news") == 2
        assert await staying.recv() == await late.recv() == b"news"
        staying.abort()
        late.abort()
        server.stop()


@pytest.mark.parametrize("how", ["reset by the client", "closed by the handler"])
async def test_a_connection_that_is_over_costs_a_broadcast_nothing(how: str) -> None:
    async def handler(sock: Socket) -> None:
        if how == "closed by the handler" and await sock.recv() == b"QUIT":
            await sock.close()
        await server.closing.wait()

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        async with await connect(server) as leaving, await connect(server) as staying:
            await staying.send(b"STAY")
            if how == "closed by the handler":
                await leaving.send(b"QUIT")
                assert await leaving.recv() == b""
            else:
                leaving.abort()
            while len(server.connections) < 2 or all(each.isopen() for each in server.connections):
                await trio.lowlevel.checkpoint()
            assert await server.broadcast(b"news") == 1
            assert await staying.recv() == b"news"
            server.stop()


async def test_a_client_that_leaves_in_the_middle_of_a_line_is_not_worth_a_traceback(
    log: pytest.LogCaptureFixture,
) -> None:
    async def handler(sock: Socket) -> None:
        async for _ in sock.lines():
            raise AssertionError

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        async with await connect(server) as client:
            await client.send(b"QUI")
        await all_served(server, 1)
        assert server.stats() == trisock.ServerStats(accepted=1, peer_errors=1)
        server.stop()
    assert not [each for each in log.records if each.levelno > logging.INFO]


async def test_a_broadcast_never_goes_into_the_middle_of_what_a_handler_sends() -> None:
    big = b"h" * 5_000_000

    async def handler(sock: Socket) -> None:
        await sock.send(big)
        await sock.send(b"after")
        await sock.recv()

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        client = await connect(server)
        while not server.connections:
            await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()  # the handler is in the middle of it
        async with trio.open_nursery() as broadcasting:
            broadcasting.start_soon(server.broadcast, b"NEWS")
            broadcasting.start_soon(server.broadcast, b"MORE")
            await trio.testing.wait_all_tasks_blocked()
            assert await client.recv_exactly(len(big)) == big
            rest = await client.recv_exactly(13)
        # The handler's own next send waits for those that were there before it, and is not refused.
        assert rest in (b"NEWSMOREafter", b"MORENEWSafter")
        await client.close()
        server.stop()


async def test_a_handler_waits_for_a_broadcast_and_a_second_sender_still_collides() -> None:
    results = []

    async def handler(sock: Socket) -> None:
        await sock.recv()

        async def second() -> None:
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await sock.send(b"x")
            with trio.CancelScope() as scope:
                scope.cancel()
                with pytest.raises(trio.BusyResourceError):
                    await sock.send(b"x")
            results.append("busy")

        async with trio.open_nursery() as inner:
            inner.start_soon(second)
            await sock.send(b"mine")
        await sock.recv()

    big = b"b" * 5_000_000
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        client = await connect(server)
        while not server.connections:
            await trio.lowlevel.checkpoint()
        nursery.start_soon(server.broadcast, big)
        await trio.testing.wait_all_tasks_blocked()
        await client.send(b"go")
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert await client.recv_exactly(len(big) + 4) == big + b"mine"
        assert results == ["busy"]
        await client.close()
        server.stop()


async def test_a_handler_that_is_cancelled_while_it_waits_for_its_turn_leaves_the_turn() -> None:
    async def handler(sock: Socket) -> None:
        await sock.recv()
        with trio.move_on_after(0):
            await sock.send(b"never")
        await sock.send(b"later")
        await sock.recv()

    big = b"b" * 5_000_000
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        client = await connect(server)
        while not server.connections:
            await trio.lowlevel.checkpoint()
        nursery.start_soon(server.broadcast, big)
        await trio.testing.wait_all_tasks_blocked()
        await client.send(b"go")
        assert await client.recv_exactly(len(big) + 5) == big + b"later"
        await client.close()
        server.stop()


async def test_a_slow_client_is_aborted_and_hurts_no_other(
    autojump_clock: trio.testing.MockClock, log: pytest.LogCaptureFixture
) -> None:
    autojump_clock.autojump_threshold = 0.05  # not while bytes are on their way
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, chat)
        slow, fast = await connect(server), await connect(server)
        assert await slow.recv() == await fast.recv() == b"hi\n"
        big = b"b" * 50_000_000
        got = []

        async def read() -> None:
            got.append(await fast.recv_exactly(len(big)))

        nursery.start_soon(read)
        assert await server.broadcast(big, timeout=5) == 1
        assert got == [big]
        with pytest.raises(trio.BrokenResourceError):
            while await slow.recv():
                pass
        assert server.stats().aborted == 1
        fast.abort()
        slow.abort()
        server.stop()
        await server.wait_closed()
        assert server.stats().handler_errors == 0  # its handler was woken by our own abort
    assert not [each for each in log.records if each.levelno > logging.INFO]


async def test_connections_in_a_handshake_or_upgrade_are_left_out(
    authority: Authority, server_tls: ServerTLS, client_tls: ClientTLS
) -> None:
    async def handler(sock: Socket) -> None:
        await sock.starttls(server_tls)
        await sock.recv()

    for bind_tls in (None, server_tls):
        async with trio.open_nursery() as nursery:
            server = await trisock.bind(
                nursery, 0, handler if bind_tls is None else chat, tls=bind_tls
            )
            client = await connect(server)
            while server.stats().active < 1:
                await trio.lowlevel.checkpoint()
            await trio.testing.wait_all_tasks_blocked()
            assert await server.broadcast(b"CLEAR") == 0
            await client.starttls(client_tls)
            if bind_tls is not None:
                assert await client.recv() == b"hi\n"
            while not (server.connections and server.connections[0].istls()):
                await trio.lowlevel.checkpoint()
            assert await server.broadcast(b"SECRET") == 1
            assert await client.recv() == b"SECRET"
            await client.close()
            server.stop()


@pytest.mark.parametrize("how", ["timeout", "cancelled", "aborted"])
async def test_a_starttls_that_a_broadcast_keeps_waiting_closes_as_any_other(
    how: str, server_tls: ServerTLS, autojump_clock: trio.testing.MockClock
) -> None:
    autojump_clock.autojump_threshold = 0.05  # not while bytes are on their way
    done = []

    async def handler(sock: Socket) -> None:
        await sock.recv()
        if how == "timeout":
            with pytest.raises(trisock.TLSError, match="a broadcast was in its way"):
                await sock.starttls(server_tls, handshake_timeout=5)
        elif how == "aborted":
            async with trio.open_nursery() as inner:

                async def abort() -> None:
                    await trio.sleep(5)
                    sock.abort()

                inner.start_soon(abort)
                with pytest.raises(trio.ClosedResourceError):
                    await sock.starttls(server_tls)
        else:
            with trio.move_on_after(5) as scope:
                await sock.starttls(server_tls)
            assert scope.cancelled_caught
        assert not sock.isopen()
        done.append(how)

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        client = await connect(server)
        while not server.connections:
            await trio.lowlevel.checkpoint()
        async with closing(client), trio.open_nursery() as inner:
            inner.start_soon(lambda: server.broadcast(b"b" * 50_000_000, timeout=100))
            await trio.testing.wait_all_tasks_blocked()
            await client.send(b"STARTTLS")
            while server.stats().active:
                await trio.sleep(1)  # by a clock that jumps
        assert done == [how]
        server.stop()


async def test_a_send_file_that_a_broadcast_keeps_waiting_can_be_cancelled(
    autojump_clock: trio.testing.MockClock,
) -> None:
    autojump_clock.autojump_threshold = 0.05  # not while bytes are on their way
    big = b"b" * 5_000_000

    async def handler(sock: Socket) -> None:
        await sock.recv()
        with trio.move_on_after(5) as scope:
            await sock.send_file(io.BytesIO(b"never"))
        assert scope.cancelled_caught
        async with trio.open_nursery() as inner:
            inner.start_soon(sock.recv)  # the go-ahead of the client
            await sock.send(b"mine")  # it is nobody's turn but the broadcast's

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        client = await connect(server)
        while not server.connections:
            await trio.lowlevel.checkpoint()
        async with closing(client), trio.open_nursery() as inner:
            inner.start_soon(server.broadcast, big)
            await trio.testing.wait_all_tasks_blocked()
            await client.send(b"file, please")
            await trio.sleep(6)
            await client.send(b"go on")
            assert await client.recv_exactly(len(big) + 4) == big + b"mine"
        server.stop()


async def test_what_is_broadcast_is_what_it_was_at_the_call() -> None:
    big = b"h" * 5_000_000

    async def handler(sock: Socket) -> None:
        await sock.send(big)
        await sock.recv()

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        client = await connect(server)
        while not server.connections:
            await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
        news = bytearray(b"old")
        nursery.start_soon(server.broadcast, news)
        await trio.testing.wait_all_tasks_blocked()
        news[:] = b"new"
        assert await client.recv_exactly(len(big) + 3) == big + b"old"
        await client.close()
        server.stop()


async def test_starttls_waits_for_a_broadcast_that_was_there_before(
    server_tls: ServerTLS, client_tls: ClientTLS
) -> None:
    async def handler(sock: Socket) -> None:
        assert await sock.recv() == b"STARTTLS"
        await sock.starttls(server_tls)
        await sock.send(b"secret")

    big = b"b" * 5_000_000
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        client = await connect(server)
        while not server.connections:
            await trio.lowlevel.checkpoint()
        nursery.start_soon(server.broadcast, big)
        await trio.testing.wait_all_tasks_blocked()
        await client.send(b"STARTTLS")
        assert await client.recv_exactly(len(big)) == big
        await client.starttls(client_tls)
        assert await client.recv() == b"secret"
        await client.close()
        server.stop()


async def test_a_broadcast_that_comes_too_late_for_the_clear_is_left_out(
    server_tls: ServerTLS, client_tls: ClientTLS
) -> None:
    """It was waiting behind the handler's go-ahead; what the handler does next is starttls."""
    big = b"go ahead " * 500_000

    async def handler(sock: Socket) -> None:
        await sock.send(big)
        await sock.starttls(server_tls)
        await sock.recv()

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        client = await connect(server)
        while not server.connections:
            await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
        delivered = []

        async def broadcast() -> None:
            delivered.append(await server.broadcast(b"NEWS"))

        nursery.start_soon(broadcast)
        await trio.testing.wait_all_tasks_blocked()
        assert await client.recv_exactly(len(big)) == big
        # Either it went out before starttls began, whole, or not at all.
        news = await client.peek()
        if news is not None:
            assert await client.recv_exactly(4) == b"NEWS"
        await client.starttls(client_tls)
        assert delivered == [0 if news is None else 1]
        await client.close()
        server.stop()


async def test_a_peer_that_vanishes_from_several_tasks_is_not_worth_a_traceback_either(
    log: pytest.LogCaptureFixture,
) -> None:
    async def handler(sock: Socket) -> None:
        async def write() -> None:
            while True:
                await sock.send(b"x" * 100_000)

        async with trio.open_nursery() as inner:
            inner.start_soon(sock.recv)
            inner.start_soon(write)

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        for _ in range(10):
            client = await connect(server)
            await client.recv()
            client.abort()
        await all_served(server, 10)
        server.stop()
        await server.wait_closed()
        assert server.stats() == trisock.ServerStats(accepted=10, peer_errors=10)


async def test_send_eof_to_a_peer_that_vanished_is_that_connections_own_failure() -> None:
    async def handler(sock: Socket) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            while True:
                await sock.send(b"x" * 100_000)
        await sock.send_eof()

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        client = await connect(server)
        await client.recv()
        client.abort()
        await all_served(server, 1)
        server.stop()
        await server.wait_closed()
        assert server.stats() == trisock.ServerStats(accepted=1, peer_errors=1)


async def test_certificates_are_read_when_bind_is_called(
    authority: Authority, client_tls: ClientTLS
) -> None:
    certificates = [authority.issue("example.org")]
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, echo, tls=certificates)
        certificates.clear()
        async with await connect(server, tls=client_tls) as client:
            assert client.istls()
        server.stop()


async def test_a_context_that_goes_bad_costs_its_connections_and_not_the_server(
    authority: Authority, log: pytest.LogCaptureFixture
) -> None:
    class Bad(ssl.SSLContext):
        def wrap_bio(self, *_: object, **__: object) -> ssl.SSLObject:
            raise RuntimeError("a plug-in has failed")

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, echo, tls=Bad(ssl.PROTOCOL_TLS_SERVER))
        async with await connect(server) as client:
            assert await client.recv() == b""
        server.stop()
        await server.wait_closed()
        assert server.stats().failed_handshakes == 1
    assert "a plug-in has failed" in log.text


async def test_a_cancelled_broadcast_without_a_timeout_ends(
    autojump_clock: trio.testing.MockClock,
) -> None:
    autojump_clock.autojump_threshold = 0.05  # not while bytes are on their way
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, chat)
        client = await connect(server)
        assert await client.recv() == b"hi\n"
        with trio.move_on_after(1) as scope:
            await server.broadcast(b"b" * 50_000_000, timeout=math.inf)
        assert scope.cancelled_caught
        async with closing(client):
            server.stop(grace=0)


async def test_broadcast_is_to_all_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    autojump_clock.autojump_threshold = 0.05  # not while bytes are on their way

    async def handler(sock: Socket) -> None:
        await sock.send(b"hi\n")
        await sock.recv()

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        slow = [await trisock.connect("127.0.0.1", server.port) for _ in range(3)]
        for each in slow:
            assert await each.recv() == b"hi\n"
        start = trio.current_time()
        assert await server.broadcast(b"b" * 50_000_000, timeout=5) == 0
        assert trio.current_time() - start == pytest.approx(5, abs=1)
        for each in slow:
            each.abort()
        server.stop()


async def test_a_broadcast_that_waited_behind_a_go_ahead_is_left_out(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    delivered = []

    async def handler(sock: Socket) -> None:
        async with trio.open_nursery() as inner:

            async def broadcast() -> None:
                delivered.append(await server.broadcast(b"NEWS"))

            async with sock._connection.sending:
                inner.start_soon(broadcast)
                await trio.testing.wait_all_tasks_blocked()
            await sock.starttls(server_tls)  # without a pass through the scheduler
        await sock.recv()

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        async with await trisock.connect("127.0.0.1", server.port) as client:
            await client.starttls(client_tls)
        server.stop()
    assert delivered == [0]


def test_what_is_bounded_by_default() -> None:
    def default(function: object, name: str) -> object:
        return inspect.signature(function).parameters[name].default  # type: ignore[arg-type]

    assert default(Socket.starttls, "handshake_timeout") == 60
    assert default(trisock.bind, "handshake_timeout") == 60
    assert default(trisock.Server.broadcast, "timeout") == 10
    assert default(Socket.recv_until, "max_bytes") == 65536
    assert default(Socket.lines, "max_bytes") == 65536


def test_nothing_else_has_a_timeout_of_its_own() -> None:
    """For all the rest there are cancel scopes."""
    calls = {
        f"{owner.__name__}.{name}": call
        for owner in (trisock, Socket, trisock.Listener, trisock.Server)
        for name, call in vars(owner).items()
        if inspect.isfunction(call) and not name.startswith("_")
    }
    assert len(calls) > 30
    assert {
        name
        for name, call in calls.items()
        if any("timeout" in each for each in inspect.signature(call).parameters)
    } == {"Socket.starttls", "trisock.bind", "Server.broadcast"}


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS])
async def test_an_accept_that_fails_gives_its_slot_back(
    number: int, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    listener = await trisock.listen(0, "127.0.0.1")
    listening = listener._listening
    real, failures = listening.accept_from, [number] * 3

    def accept(sock: socket.socket) -> Connection | None:
        if failures:
            raise OSError(failures.pop(), "no")
        return real(sock)

    monkeypatch.setattr(listening, "accept_from", accept)
    autojump_clock.autojump_threshold = 0.05  # not while bytes are on their way

    async def hello(sock: Socket) -> None:
        await sock.send(b"hi")

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, listener, hello, max_connections=1)
        async with await connect(server) as client:
            assert await client.recv() == b"hi"
        assert not failures
        server.stop()


async def test_every_async_call_of_a_server_is_a_cancel_point() -> None:
    async with await trisock.listen(0, "127.0.0.1") as listener, trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, echo)
        server.stop()
        await server.wait_closed()
        for call in (
            lambda: trisock.bind(nursery, 0, echo),
            lambda: trisock.bind(nursery, listener, echo),
            lambda: server.broadcast(b"nobody"),
            server.wait_closed,
        ):
            with trio.CancelScope() as scope:
                scope.cancel()
                await call()
            assert scope.cancelled_caught


async def test_stop_closes_the_port_at_once() -> None:
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, lambda s: trio.sleep(0), host="127.0.0.1")
        await trio.testing.wait_all_tasks_blocked()
        server.stop()
        with socket.socket() as sock:
            assert sock.connect_ex(("127.0.0.1", server.port)) == errno.ECONNREFUSED
