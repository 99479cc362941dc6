"""bind and Server: how a server starts, how it stops, and how it uses TLS."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import inspect
import logging
import socket
import ssl

import pytest
import trio
import trio.testing

import trisock
from helpers.pairs import all_served, closing, read_all
from helpers.server import bound, connect, connected, echo, logged, opening
from trisock import ClientTLS, ServerTLS, Socket
from trisock.testing import Authority, serving

# ---- starting ----


async def test_a_handler_runs_for_each_connection() -> None:
    async with bound(echo) as server:
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
        with pytest.raises(dataclasses.FrozenInstanceError):
            server.stats().active = 0  # type: ignore[misc]
        for client in clients:
            await client.close()
    assert server.stats() == trisock.ServerStats(accepted=3)
    assert server.connections == ()
    assert server.port
    assert "closed, 0 connections>" in repr(server)


async def test_plutos_bind_example_works() -> None:
    async def handler(s: Socket) -> None:
        content = b"Hello, world!"
        await s.send(
            b"HTTP/1.1 200 OK\r\nConnection: Close\r\nContent-Length: %d\r\n\r\n" % len(content),
            content,
        )

    async with serving(handler) as s, await s.connect() as client:
        await client.send(b"GET / HTTP/1.1\r\n\r\n")
        assert (await read_all(client)).endswith(b"\r\n\r\nHello, world!")


async def test_bind_takes_over_a_listener() -> None:
    listener = await trisock.listen(0, host="127.0.0.1")
    async with bound(echo, listener) as server:
        assert server.port == listener.port
        (await connect(server)).abort()
    with pytest.raises(trio.ClosedResourceError):
        listener.hasconnection()


async def test_bind_with_bad_arguments_leaves_nothing_listening(
    authority: Authority, client_tls: ClientTLS
) -> None:
    context = ClientTLS("x", verify=False)._context()
    async with (
        await trisock.listen(0, host="127.0.0.1") as listener,
        trio.open_nursery() as nursery,
    ):
        for arguments, options, error, words in [
            ((listener, None), {}, TypeError, "a handler must be an async function"),
            (("80", echo), {}, TypeError, "a port must be an int"),
            ((0, echo), {"max_connections": 0}, ValueError, "1 or more"),
            ((0, echo), {"max_connections": True}, TypeError, "CapacityLimiter or None"),
            ((0, echo), {"max_connections": 1.5}, TypeError, "CapacityLimiter or None"),
            ((0, echo), {"handshake_timeout": "x"}, TypeError, "handshake_timeout"),
            ((0, echo), {"https_compatible": None}, TypeError, "https_compatible must be"),
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


async def test_bind_in_a_closed_nursery_leaves_nothing_listening() -> None:
    async with trio.open_nursery() as nursery:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        await trisock.bind(nursery, 0, echo)


def test_only_five_calls_have_a_timeout() -> None:
    """All other calls rely on cancel scopes."""
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
    } == {"Socket.starttls", "Socket.idle", "trisock.bind", "trisock.relay", "Server.broadcast"}


async def test_every_async_call_of_a_server_is_a_cancel_point() -> None:
    async with (
        await trisock.listen(0, host="127.0.0.1") as listener,
        trio.open_nursery() as nursery,
    ):
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


# ---- stopping ----


async def test_stop_lets_handlers_finish() -> None:
    async def handler(sock: Socket) -> None:
        await sock.send(b"working")
        await s.server.closing.wait()
        await sock.send(b"done")

    async with serving(handler) as s, await s.connect() as client:
        assert await client.recv() == b"working"
        s.server.stop()
        assert s.server.closing.is_set()
        assert "closing, 1 connections>" in repr(s.server)
        assert await client.recv() == b"done"
        assert await client.recv() == b""
        await s.server.wait_closed()
        with pytest.raises(ConnectionRefusedError):
            await s.connect()


async def test_stop_cancels_handlers_after_the_grace_period(
    jumping_clock: trio.testing.MockClock,
) -> None:
    cancelled = []

    async def handler(sock: Socket) -> None:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            cancelled.append(trio.current_time())
            raise

    async with bound(handler) as server:
        clients = [await connect(server) for _ in range(2)]
        async with closing(*clients):
            while len(server.connections) < 2:
                await trio.lowlevel.checkpoint()
            start = trio.current_time()
            server.stop(grace=20)
            server.stop(grace=5)
            server.stop(grace=30)  # a later stop can only shorten the grace period
            await server.wait_closed()
            assert cancelled == [pytest.approx(start + 5)] * 2
            for client in clients:
                assert await client.recv() == b""


async def test_stop_works_in_a_handler_and_before_the_server_starts() -> None:
    async def handler(sock: Socket) -> None:
        server.stop(grace=0)
        await trio.sleep_forever()

    async with bound(handler) as server:
        async with closing(client := await connect(server)):
            assert await client.recv() == b""
            await server.wait_closed()
    async with bound(handler) as server:
        server.stop()
    await server.wait_closed()
    with pytest.raises(ValueError, match="grace must be 0 or more, not -1"):
        server.stop(grace=-1)


async def test_a_refused_argument_changes_nothing() -> None:
    listener = await trisock.listen(0, host="127.0.0.1")
    with pytest.raises(TypeError, match=r"needs a trio.Nursery, not 5"):
        await trisock.bind(5, listener, trio.sleep)  # type: ignore[arg-type]
    async with serving(Socket.recv, port_or_listener=listener) as s:
        with pytest.raises(ValueError, match="grace is too long"):
            s.server.stop(10**400)
        with pytest.raises(TypeError, match="grace must be a number of seconds or None"):
            s.server.stop("1")  # type: ignore[arg-type]
        assert not s.server.closing.is_set()


async def test_stop_serves_connections_that_have_no_handler_yet() -> None:
    handled = []

    async def handler(sock: Socket) -> None:
        handled.append(sock.getpeer())
        s.server.stop()

    listener = await trisock.listen(0, host="127.0.0.1")
    clients = [await trisock.connect("127.0.0.1", listener.port) for _ in range(3)]
    async with closing(*clients), serving(handler, port_or_listener=listener) as s:
        await s.server.wait_closed()
    assert len(handled) == 3
    assert s.server.stats() == trisock.ServerStats(accepted=3)


async def test_the_end_of_the_grace_drops_handshakes_in_progress(server_tls: ServerTLS) -> None:
    async with serving(echo, tls=server_tls) as s:
        client = await s.connect(tls=None)  # the client sends nothing
        while s.server.stats().active < 1:
            await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
        assert s.server.connections == ()
        s.server.stop(grace=0)
        await s.server.wait_closed()
        assert s.server.stats() == trisock.ServerStats(accepted=1, refused=1)
        with contextlib.suppress(trio.BrokenResourceError):
            assert await client.recv() == b""


async def test_cancelling_the_nursery_cancels_handlers_without_grace() -> None:
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, echo)
        async with connected(server):
            (sock,) = server.connections
            assert len(nursery.child_tasks) == 1  # handlers have a nursery of their own
            nursery.cancel_scope.cancel()
    assert server.closing.is_set()
    assert not server.ready
    await server.wait_closed()
    assert not sock.isopen()
    assert server.stats().active == 0


async def test_starting_and_stopping_while_clients_connect_never_fails() -> None:
    for attempt in range(50):
        async with trio.open_nursery() as nursery:
            server = await trisock.bind(nursery, 0, echo, host="127.0.0.1", max_connections=2)

            async def connect_and_ask(server: trisock.Server = server) -> None:
                with contextlib.suppress(OSError, trio.BrokenResourceError):
                    async with closing(sock := await connect(server)):
                        await sock.send(b"x")
                        await sock.recv()

            for _ in range(5):
                nursery.start_soon(connect_and_ask)
            for _ in range(attempt % 10):
                await trio.lowlevel.checkpoint()
            server.stop(grace=1)
            await server.wait_closed()
        assert server.stats().active == 0


async def test_a_server_whose_listener_is_closed_ends_with_an_error() -> None:
    """If the server ended silently, nobody would notice. ``trio.serve_listeners`` raises, too."""
    listener = await trisock.listen(0, host="127.0.0.1")
    with pytest.RaisesGroup(trio.ClosedResourceError, flatten_subgroups=True):
        async with trio.open_nursery() as nursery:
            await trisock.bind(nursery, listener, echo, max_connections=1)
            await trio.testing.wait_all_tasks_blocked()
            await listener.close()


async def test_stop_without_grace_closes_the_port_immediately() -> None:
    async with serving(echo) as s:
        await trio.testing.wait_all_tasks_blocked()
        s.server.stop(grace=0)
        with socket.socket() as sock:
            assert sock.connect_ex(("127.0.0.1", s.server.port)) == errno.ECONNREFUSED


# ---- TLS ----


async def test_a_tls_server_counts_failed_handshakes(
    authority: Authority,
    client_tls: ClientTLS,
    server_tls: ServerTLS,
    log: pytest.LogCaptureFixture,
) -> None:
    async with serving(echo, tls=server_tls) as s:
        async with await s.connect() as client:
            await client.send(b"hello")
            assert await client.recv() == b"hello"
            (sock,) = s.server.connections
            assert sock.istls()
        with pytest.raises(trisock.TLSError):
            await s.connect(tls=authority.client_tls("example.net"))
        async with await s.connect(tls=None) as client:
            await client.send(b"GET / HTTP/1.1\r\n\r\n")
            assert (await client.recv())[:1] in (b"", b"\x15")  # an alert, if OpenSSL sends one
        await all_served(s.server, 3)
    assert s.server.stats() == trisock.ServerStats(accepted=3, failed_handshakes=2)
    assert not opening(s.server)
    assert any("does not speak TLS" in each.getMessage() for each in log.records)
    assert not logged(log, logging.WARNING)


async def test_set_tls_applies_to_new_connections(authority: Authority) -> None:
    old, new = (
        authority.certificate("example.org"),
        authority.certificate("example.org", "new.example"),
    )
    async with serving(echo, tls=[old]) as s:
        async with await s.connect() as client:
            await client.send(b"hello")
            assert await client.recv() == b"hello"
            for wrong, error in [(None, TypeError), ("x", TypeError), ([], ValueError)]:
                with pytest.raises(error):
                    s.server.set_tls(wrong)  # type: ignore[arg-type]
            s.server.set_tls([new])
            await client.send(b"still here")
            assert await client.recv() == b"still here"
            async with await s.connect() as other:
                assert client.tls is not None
                assert other.tls is not None
                assert client.tls.peer_certificate != other.tls.peer_certificate


async def test_set_tls_fails_on_a_server_without_tls(server_tls: ServerTLS) -> None:
    async with serving(echo) as s:
        with pytest.raises(RuntimeError, match="bound with tls"):
            s.server.set_tls(server_tls)
        async with await s.connect() as client:
            await client.send(b"still plain text")
            assert await client.recv() == b"still plain text"


async def test_bind_copies_the_list_of_certificates(authority: Authority) -> None:
    certificates = [authority.certificate("example.org")]
    async with serving(echo, tls=certificates) as s:
        certificates.clear()
        async with await s.connect() as client:
            assert client.istls()


@pytest.mark.parametrize("compatible", [False, True])
async def test_an_https_compatible_server_does_not_require_close_notify(
    compatible: bool, server_tls: ServerTLS, client_tls: ClientTLS
) -> None:
    async with bound(echo, tls=server_tls, https_compatible=compatible) as server:
        async with await connect(server, tls=client_tls, https_compatible=True) as client:
            await client.send(b"hello")
            assert await client.recv() == b"hello"
        await all_served(server, 1)
    assert server.stats().peer_errors == (not compatible)


async def test_an_https_compatible_server_sends_no_close_notify(
    server_tls: ServerTLS, client_tls: ClientTLS
) -> None:
    async def answer(sock: trisock.Socket) -> None:
        await sock.send(b"hello")

    async with bound(answer, tls=server_tls, https_compatible=True) as server:
        async with await connect(server, tls=client_tls) as client:
            assert await client.recv() == b"hello"
            with pytest.raises(trisock.TLSError, match="without close_notify"):
                await client.recv()


async def test_a_failing_ssl_context_ends_connections_but_not_the_server(
    authority: Authority, log: pytest.LogCaptureFixture
) -> None:
    class Failing(ssl.SSLContext):
        def wrap_bio(self, *_: object, **__: object) -> ssl.SSLObject:
            raise RuntimeError("a plug-in has failed")

    async with bound(echo, tls=Failing(ssl.PROTOCOL_TLS_SERVER)) as server:
        async with await connect(server) as client:
            assert await client.recv() == b""
    assert server.stats().failed_handshakes == 1
    assert "a plug-in has failed" in log.text
    (record,) = logged(log, logging.ERROR)
    assert record.peer == client.getlocal()  # type: ignore[attr-defined]
