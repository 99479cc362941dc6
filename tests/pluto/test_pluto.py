"""Pluto's socket library: each name of its page, inside Trio and outside it.

A test that says what holds on both sides is written once, as a coroutine function marked with
``both_sides``. Inside, it is run by Trio; outside, it must come to its end without ever waiting
for Trio. ``got`` awaits a result where there is something to await.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import inspect
import logging
import math
import os
import pathlib
import resource
import select
import signal
import socket as stdlib
import ssl
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import trio
import trio.testing
import trustme

import trisock
from helpers.authority import Authority
from helpers.deadline import DEADLINE
from helpers.pairs import clog, unix_pair
from trisock import ClientTLS, ServerTLS
from trisock.pluto import async_socket, listener, scheduler, socket
from trisock.pluto.blocking import background
from trisock.pluto.trio_thread import TrioThread

# ---- both sides ----


@pytest.fixture(autouse=True)
def bounded(no_leaked_descriptor: None) -> Iterator[None]:
    """Bound each test, also one that blocks, and end its background thread."""

    end = time.monotonic() + DEADLINE

    def look_at_the_time(*_: object) -> None:
        if time.monotonic() > end:
            raise TimeoutError("this test takes too long")

    before = signal.signal(signal.SIGALRM, look_at_the_time)
    # Often, since CPython does not notice a signal that comes in the moment before it waits for a
    # lock until the wait ends: the next signal ends it.
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        gc.collect()
        background.stop()


def finish(coroutine: Any) -> Any:
    """Run a coroutine outside Trio: nothing in it may wait for Trio."""
    try:
        coroutine.send(None)
    except StopIteration as exc:
        return exc.value
    raise AssertionError("it waits for Trio")


def both_sides(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def on(side: str, **kwargs: object) -> None:
        async def bounded_test() -> None:
            with trio.fail_after(DEADLINE):
                await test(**kwargs)

        if side == "inside":
            trio.run(bounded_test)
        else:
            finish(test(**kwargs))

    signature = inspect.signature(test)
    parameters = [
        *signature.parameters.values(),
        inspect.Parameter("side", inspect.Parameter.KEYWORD_ONLY),
    ]
    on.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return pytest.mark.parametrize("side", ["inside", "outside"])(on)


async def got(result: Any) -> Any:
    return await result if inspect.isawaitable(result) else result


class Thread:
    """A thread whose result, or exception, is wanted."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._outcome: Any = None
        self._function = function
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._outcome = self._function(), None
        except BaseException as exc:
            self._outcome = None, exc

    def result(self) -> Any:
        self._thread.join()
        value, exc = self._outcome
        self._outcome = None
        if exc is not None:
            raise exc
        return value


def inside() -> bool:
    return trio.lowlevel.in_trio_run()


async def together(
    first: Callable[[], Awaitable[Any]], second: Callable[[], Awaitable[Any]]
) -> tuple[Any, Any]:
    """Run two functions at once, in tasks or in threads; return their results."""
    if not inside():
        thread = Thread(lambda: finish(second()))
        return await first(), thread.result()
    results: dict[int, Any] = {}

    async def run(index: int, function: Callable[[], Awaitable[Any]]) -> None:
        results[index] = await function()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, 1, second)
        await run(0, first)
    return results[0], results[1]


async def pair() -> tuple[Any, Any]:
    """Return the two ends (client, server) of a connection."""
    listening = socket.listen(0)
    assert listening is not None
    client = await got(socket.connect("127.0.0.1", listening.port))
    server = await got(listening.accept())
    await got(listening.close())
    return client, server


async def raw_peer() -> tuple[Any, stdlib.socket]:
    """Return a client and the plain, blocking socket at its other end."""
    with stdlib.create_server(("127.0.0.1", 0)) as listening:
        client = await got(socket.connect("127.0.0.1", listening.getsockname()[1]))
        raw, _ = listening.accept()
    raw.setsockopt(stdlib.IPPROTO_TCP, stdlib.TCP_NODELAY, 1)
    raw.settimeout(DEADLINE)
    return client, raw


async def arrived(sock: Any) -> None:
    """Wait until there is something to read."""
    if inside():
        await trio.lowlevel.wait_readable(sock._sock.fileno())
    else:
        select.select([sock._sock.fileno()], [], [], DEADLINE)


async def starttls_on_both(
    client: Any, server: Any, for_client: object, for_server: object
) -> tuple[object, object]:
    return await together(
        lambda: got(client.starttls(for_client)), lambda: got(server.starttls(for_server))
    )


def mapping(leaf: trustme.LeafCert) -> dict[str, str | bytes]:
    """Return what Pluto's page calls a certificate."""
    return {
        "chain": b"".join(each.bytes() for each in leaf.cert_chain_pems).decode(),
        "private_key": leaf.private_key_pem.bytes(),
    }


@pytest.fixture(scope="session")
def certs(authority: Authority) -> list[dict[str, str | bytes]]:
    return [mapping(authority.ca.issue_cert("localhost", "127.0.0.1"))]


@pytest.fixture
def trusted(tmp_path: pathlib.Path, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the tests' authority in the system's trust store, as far as this process sees it."""
    path = tmp_path / "trusted.pem"
    path.write_bytes(authority.pem)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))


def closed_port() -> int:
    with stdlib.create_server(("127.0.0.1", 0)) as nobody:
        return int(nobody.getsockname()[1])


@pytest.fixture
def reasons(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return the reasons of failures that were logged so far."""
    caplog.set_level(logging.INFO, "trisock.pluto")

    def logged() -> list[str]:
        records = [each for each in caplog.records if each.name == "trisock.pluto"]
        assert all(each.levelno == logging.INFO for each in records)
        return [each.getMessage() for each in records]

    return logged


# ---- socket.connect ----


@both_sides
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_connect_returns_a_socket(host: str) -> None:
    with stdlib.create_server(("127.0.0.1", 0)) as listening:
        s = await got(socket.connect(host, listening.getsockname()[1]))
        assert isinstance(s, socket)
        assert isinstance(s, async_socket) is inside()
        await got(s.close())


@both_sides
async def test_connect_takes_an_ipv6_address() -> None:
    listening = socket.listen(0)
    s = await got(socket.connect("::1", listening.port))
    if s is None:
        pytest.skip("no IPv6 here")
    assert s.getpeer() == ("::1", listening.port)


@both_sides
async def test_connect_returns_none_when_refused(reasons: Callable[[], list[str]]) -> None:
    port = closed_port()
    assert await got(socket.connect("127.0.0.1", port)) is None
    assert f"cannot connect to 127.0.0.1:{port}: Connection refused" in reasons()[0]


@both_sides
async def test_connect_returns_none_for_a_name_that_does_not_resolve(
    monkeypatch: pytest.MonkeyPatch, reasons: Callable[[], list[str]]
) -> None:
    async def unknown(*_: object, **__: object) -> None:
        raise stdlib.gaierror(stdlib.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(trio.socket, "getaddrinfo", unknown)
    assert await got(socket.connect("no-such-host.invalid", 80)) is None
    assert "no-such-host.invalid:80" in reasons()[0]


@both_sides
@pytest.mark.parametrize(("host", "port"), [("a..b", 80), ("x" * 64, 80), ("localhost", 65536)])
async def test_connect_returns_none_for_what_cannot_be_a_host_or_a_port(
    host: str, port: int, reasons: Callable[[], list[str]]
) -> None:
    assert await got(socket.connect(host, port)) is None
    assert len(reasons()) == 1


@both_sides
async def test_connect_raises_type_error_for_a_mistake_in_the_program() -> None:
    with pytest.raises(TypeError):
        await got(socket.connect("localhost", "80"))


# ---- socket.listen ----


@both_sides
async def test_listen_returns_a_listener_at_once() -> None:
    listening = socket.listen(0)
    assert isinstance(listening, listener)
    assert 0 < listening.port < 65536
    assert str(listening.port) in repr(listening)
    stdlib.create_connection(("127.0.0.1", listening.port)).close()


@both_sides
async def test_listen_returns_none_where_the_port_is_taken(
    reasons: Callable[[], list[str]],
) -> None:
    listening = socket.listen(0)
    assert listening is not None
    assert socket.listen(listening.port) is None
    assert f"cannot listen on *:{listening.port}: Address already in use" in reasons()[0]


@both_sides
async def test_listen_returns_none_for_what_cannot_be_a_port() -> None:
    assert socket.listen(65536) is None


# ---- socket.bind, scheduler ----


async def echo(s: async_socket) -> None:
    while data := await s.recv():
        await s.send(data)


def client_of(port: int, *sent: bytes) -> bytes:
    """Send, and return all that comes until the end."""
    with stdlib.create_connection(("127.0.0.1", port), timeout=DEADLINE) as raw:
        for each in sent:
            raw.sendall(each)
        raw.shutdown(stdlib.SHUT_WR)
        return b"".join(iter(lambda: raw.recv(65536), b""))


async def in_thread(function: Callable[[], Any]) -> Any:
    return await trio.to_thread.run_sync(function)


@both_sides
async def test_bind_serves_each_client_in_a_task_of_its_own_when_the_scheduler_runs() -> None:
    sched = scheduler()
    entered = []

    async def handler(s: async_socket) -> None:
        entered.append(s)
        while len(entered) % 2:  # the first goes on when the second is there
            await trio.lowlevel.checkpoint()
        await s.send("together")

    bound = socket.bind(sched, 0, handler)
    assert isinstance(bound, listener)

    async def clients() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(talk)
        await bound.close()

    async def talk() -> None:
        assert await in_thread(lambda: client_of(bound.port)) == b"together"

    sched.add(clients)
    await got(sched.run())
    assert len(entered) == 2


@both_sides
async def test_bind_listens_at_once() -> None:
    sched = scheduler()
    bound = socket.bind(sched, 0, echo)
    with stdlib.create_connection(("127.0.0.1", bound.port), timeout=DEADLINE) as raw:
        raw.sendall(b"early")

        async def talk() -> None:
            assert await in_thread(lambda: raw.recv(100)) == b"early"
            raw.close()
            await bound.close()

        sched.add(talk)
        await got(sched.run())


@both_sides
async def test_bind_raises_oserror_where_the_port_is_taken() -> None:
    sched = scheduler()
    bound = socket.bind(sched, 0, echo)
    with pytest.raises(OSError, match=rf"cannot listen on \*:{bound.port}") as caught:
        socket.bind(sched, bound.port, echo)
    assert caught.value.errno == errno.EADDRINUSE
    await got(bound.close())


@both_sides
async def test_the_listener_of_bind_ends_the_server_when_the_last_handler_is_done() -> None:
    sched = scheduler()
    order = []

    async def handler(s: async_socket) -> None:
        await bound.close()
        with pytest.raises(OSError, match="connect"):
            await trio.open_tcp_stream("127.0.0.1", bound.port)
        order.append("handler")
        await s.send("goodbye")

    bound = socket.bind(sched, 0, handler)

    async def talk() -> None:
        assert await in_thread(lambda: client_of(bound.port)) == b"goodbye"

    sched.add(talk)
    await got(sched.run())
    assert order == ["handler"]
    await got(bound.close())  # changes nothing
    assert not bound.hasconnection()


@both_sides
async def test_the_listener_of_bind_closed_before_run_serves_nobody() -> None:
    sched = scheduler()
    bound = socket.bind(sched, 0, echo)
    await got(bound.close())
    with pytest.raises(ConnectionRefusedError):
        stdlib.create_connection(("127.0.0.1", bound.port))
    await got(sched.run())


@both_sides
async def test_the_listener_of_bind_closed_while_the_server_begins_serves_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sched = scheduler()
    bound = socket.bind(sched, 0, echo)
    begin = trisock.bind

    async def close_and_begin(*args: Any) -> trisock.Server:
        await bound.close()
        return await begin(*args)

    monkeypatch.setattr(trisock, "bind", close_and_begin)
    await got(sched.run())
    with pytest.raises(ConnectionRefusedError):
        stdlib.create_connection(("127.0.0.1", bound.port))


def test_a_scheduler_that_fails_at_once_leaves_no_port_open() -> None:
    sched = scheduler()
    bound = socket.bind(sched, 0, echo)

    async def cancelled_at_once() -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await sched.run()

    trio.run(cancelled_at_once)
    with pytest.raises(ConnectionRefusedError):
        stdlib.create_connection(("127.0.0.1", bound.port))
    bound.close()


@both_sides
async def test_bind_takes_plain_functions_that_return_an_awaitable() -> None:
    sched = scheduler()
    listening = socket.bind(sched, 0, lambda s: s.send("hello"))

    async def talk() -> None:
        assert await in_thread(lambda: client_of(listening.port)) == b"hello"
        await listening.close()

    sched.add(talk)
    await got(sched.run())


@both_sides
async def test_what_a_handler_raises_is_logged_and_harms_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sched = scheduler()

    async def handler(s: async_socket) -> None:
        if await s.recv() == b"fail":
            raise ValueError("a mistake")
        await s.send("fine")

    bound = socket.bind(sched, 0, handler)

    async def talk() -> None:
        assert await in_thread(lambda: client_of(bound.port, b"fail")) == b""
        assert await in_thread(lambda: client_of(bound.port, b"go on")) == b"fine"
        await bound.close()

    sched.add(talk)
    await got(sched.run())
    (record,) = [each for each in caplog.records if each.name == "trisock.server"]
    assert record.levelno == logging.ERROR
    assert isinstance(record.exc_info[1], ValueError)


@both_sides
async def test_bind_can_be_called_by_a_handler_while_the_scheduler_runs() -> None:
    sched = scheduler()
    second = []

    async def handler(s: async_socket) -> None:
        second.append(socket.bind(sched, 0, echo))
        await s.send(str(second[0].port))

    first = socket.bind(sched, 0, handler)

    async def talk() -> None:
        port = int(await in_thread(lambda: client_of(first.port)))
        assert await in_thread(lambda: client_of(port, b"hello")) == b"hello"
        await first.close()
        await second[0].close()

    sched.add(talk)
    await got(sched.run())


@both_sides
async def test_scheduler_runs_what_was_added_before_and_while_it_runs() -> None:
    sched = scheduler()
    order = []

    async def first() -> None:
        order.append("first")
        sched.add(second)

    async def second() -> None:
        order.append("second")

    sched.add(first)
    assert order == []
    await got(sched.run())
    assert order == ["first", "second"]
    await got(sched.run())  # there is nothing left
    assert order == ["first", "second"]
    sched.add(second)
    await got(sched.run())
    assert order == ["first", "second", "second"]


@both_sides
async def test_scheduler_lets_out_what_an_added_function_raises() -> None:
    sched = scheduler()

    async def fail() -> None:
        raise ValueError("a mistake")

    sched.add(fail)
    with pytest.RaisesGroup(pytest.RaisesExc(ValueError, match="a mistake")):
        await got(sched.run())
    await got(sched.run())  # and can be run again


@both_sides
async def test_scheduler_refuses_to_run_twice_at_once() -> None:
    sched = scheduler()
    complaints = []

    async def again() -> None:
        with pytest.raises(RuntimeError, match="running already") as caught:
            await sched.run()
        complaints.append(caught.value)

    sched.add(again)
    await got(sched.run())
    assert len(complaints) == 1


def test_a_handler_may_drop_its_socket_and_the_server_goes_on() -> None:
    """To close the descriptor of a connection under its server would crash that."""
    sched = scheduler()
    dropped = []

    def handler(s: async_socket) -> Awaitable[object]:
        stays = s._sock

        async def rest() -> None:
            gc.collect()
            assert stays.fileno() >= 0
            dropped.append(stays)
            await stays.send(b"still here")
            await trio.lowlevel.wait_readable(stays.fileno())

        return rest()

    bound = socket.bind(sched, 0, handler)

    async def talk() -> None:
        for _ in range(3):
            assert await in_thread(lambda: client_of(bound.port)) == b"still here"
        await bound.close()

    sched.add(talk)
    sched.run()
    assert len(dropped) == 3


# ---- send ----


@both_sides
@pytest.mark.parametrize("data", ["gr\u00fc\u00df dich", "gr\u00fc\u00df dich".encode()])
async def test_send_sends_str_as_utf8_and_bytes(data: str | bytes) -> None:
    client, raw = await raw_peer()
    with raw:
        assert await got(client.send(data)) is True
        assert raw.recv(100) == "gr\u00fc\u00df dich".encode()


@both_sides
async def test_send_returns_false_when_the_connection_is_over(
    reasons: Callable[[], list[str]],
) -> None:
    client, raw = await raw_peer()
    with raw:
        await got(client.close())
        assert await got(client.send("x")) is False
    assert "already closed" in reasons()[0]
    assert str(client.getpeer()) in reasons()[0]


@both_sides
async def test_send_raises_type_error_for_what_is_no_data() -> None:
    client, raw = await raw_peer()
    with raw, pytest.raises(TypeError):
        await got(client.send(1))


@both_sides
async def test_calls_can_be_written_with_the_socket_instance_first() -> None:
    client, server = await pair()
    assert await got(socket.send(client, "hello")) is True
    assert await got(socket.recv(server)) == b"hello"
    socket.unrecv(server, "again")
    assert await got(socket.peek(server)) == b"again"
    assert socket.getside(server) == "server"
    assert socket.getpeer(client) == client.getpeer()
    assert socket.isopen(client)
    assert not socket.istls(client)
    await got(socket.close(client))
    assert not socket.isopen(client)
    listening = socket.listen(0)
    assert not listener.hasconnection(listening)
    await got(listener.close(listening))
    assert await got(listener.accept(listening)) is None


# ---- recv ----


@both_sides
async def test_recv_returns_the_oldest_chunk() -> None:
    client, raw = await raw_peer()
    with raw:
        raw.sendall(b"one")
        assert await got(client.recv()) == b"one"
        raw.sendall(b"two")
        assert await got(client.recv()) == b"two"


@both_sides
async def test_recv_returns_one_record_under_tls(
    certs: list[dict[str, str | bytes]], trusted: None
) -> None:
    client, server = await pair()
    assert await starttls_on_both(client, server, "localhost", certs) == (True, True)
    await got(client.send("one"))
    await got(client.send("two"))
    assert [await got(server.recv()) for _ in range(2)] == [b"one", b"two"]


@both_sides
async def test_recv_waits_for_a_chunk() -> None:
    client, server = await pair()
    thread_or_task = await together(lambda: got(server.recv()), lambda: got(client.send("late")))
    assert thread_or_task == (b"late", True)


@both_sides
async def test_recv_returns_none_when_the_peer_has_closed() -> None:
    client, raw = await raw_peer()
    raw.sendall(b"last")
    raw.close()
    assert await got(client.recv()) == b"last"
    assert [await got(client.recv()) for _ in range(2)] == [None, None]


@both_sides
async def test_recv_returns_none_when_closed_here() -> None:
    client, raw = await raw_peer()
    with raw:
        await got(client.close())
        assert await got(client.recv()) is None


@both_sides
async def test_recv_returns_none_when_the_connection_broke(
    reasons: Callable[[], list[str]],
) -> None:
    client, raw = await raw_peer()
    raw.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    raw.close()
    assert await got(client.recv()) is None
    assert "reset by peer" in reasons()[0]


# ---- peek ----


@both_sides
async def test_peek_returns_what_recv_would_without_consuming_it() -> None:
    client, raw = await raw_peer()
    with raw:
        raw.sendall(b"hello")
        await arrived(client)
        assert [await got(client.peek()) for _ in range(2)] == [b"hello"] * 2
        assert await got(client.recv()) == b"hello"


@both_sides
async def test_peek_returns_none_when_there_is_no_message() -> None:
    client, raw = await raw_peer()
    assert await got(client.peek()) is None
    raw.close()
    await arrived(client)
    assert await got(client.peek()) is None
    await got(client.close())
    assert await got(client.peek()) is None


# ---- unrecv ----


@both_sides
async def test_unrecv_makes_it_oldest() -> None:
    client, server = await pair()
    await got(server.send("later"))
    client.unrecv("World")
    client.unrecv(b"Hello")
    assert [await got(client.recv()) for _ in range(3)] == [b"Hello", b"World", b"later"]


@both_sides
async def test_unrecv_after_close_does_nothing() -> None:
    client, _ = await pair()
    await got(client.close())
    client.unrecv("x")
    assert await got(client.recv()) is None


def client_hello(authority: Authority) -> tuple[ssl.SSLObject, ssl.MemoryBIO, ssl.MemoryBIO]:
    context = ssl.create_default_context(cadata=authority.pem.decode())
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    peer = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        peer.do_handshake()
    return peer, incoming, outgoing


@both_sides
@pytest.mark.parametrize("how", ["unrecv", "peek"])
async def test_unrecv_gives_a_client_hello_back_to_starttls(
    how: str, authority: Authority, certs: list[dict[str, str | bytes]]
) -> None:
    client, raw = await raw_peer()  # that connected it may be TLS's server all the same
    peer, incoming, outgoing = client_hello(authority)
    raw.sendall(outgoing.read())
    await arrived(client)
    if how == "unrecv":
        client.unrecv(await got(client.recv()))
    else:
        assert (await got(client.peek())).startswith(b"\x16\x03")

    def shake_hands() -> None:
        while True:
            try:
                peer.do_handshake()
            except ssl.SSLWantReadError:
                incoming.write(raw.recv(65536))
            else:
                raw.sendall(outgoing.read())
                return

    with raw:
        thread = Thread(shake_hands)
        assert await got(client.starttls(certs)) is True
        thread.result()


@both_sides
async def test_unrecv_of_clear_text_makes_starttls_fail(
    certs: list[dict[str, str | bytes]], trusted: None
) -> None:
    client, server = await pair()
    client.unrecv("slipped in")
    assert await starttls_on_both(client, server, "localhost", certs) == (False, False)
    assert not client.isopen()


# ---- starttls ----


@both_sides
async def test_starttls_returns_true_on_success_for_client_and_server(
    certs: list[dict[str, str | bytes]], trusted: None
) -> None:
    client, server = await pair()
    assert await starttls_on_both(client, server, "localhost", certs) == (True, True)
    await got(client.send("secret"))
    assert await got(server.recv()) == b"secret"


@both_sides
@pytest.mark.parametrize("name", ["elsewhere.example", "127.0.0.2"])
async def test_starttls_returns_false_and_closes_when_the_name_is_not_on_the_certificate(
    name: str,
    certs: list[dict[str, str | bytes]],
    trusted: None,
    reasons: Callable[[], list[str]],
) -> None:
    client, server = await pair()
    assert await starttls_on_both(client, server, name, certs) == (False, False)
    assert any("handshake" in each for each in reasons())
    for sock in (client, server):
        assert not sock.isopen()
        assert not sock.istls()
        assert await got(sock.send("x")) is False
        assert await got(sock.starttls(certs)) is False


@both_sides
async def test_starttls_returns_false_for_a_certificate_that_nobody_trusts(
    certs: list[dict[str, str | bytes]],
) -> None:
    client, server = await pair()
    assert await starttls_on_both(client, server, "localhost", certs) == (False, False)


@both_sides
async def test_starttls_returns_none_when_it_is_using_tls_already(
    certs: list[dict[str, str | bytes]], trusted: None
) -> None:
    client, server = await pair()
    await starttls_on_both(client, server, "localhost", certs)
    assert await got(client.starttls("localhost")) is None
    assert await got(server.starttls(certs)) is None
    await got(client.send("goes on"))
    assert await got(server.recv()) == b"goes on"


@both_sides
async def test_starttls_takes_several_certificates(authority: Authority, trusted: None) -> None:
    several = [mapping(authority.ca.issue_cert(name)) for name in ("one.example", "two.example")]
    for name in ("one.example", "two.example"):
        client, server = await pair()
        assert await starttls_on_both(client, server, name, several) == (True, True)


@both_sides
async def test_starttls_takes_rsa_keys_and_others(authority: Authority, trusted: None) -> None:
    for kind in trustme.KeyType:
        given = [mapping(authority.ca.issue_cert("localhost", key_type=kind))]
        client, server = await pair()
        assert await starttls_on_both(client, server, "localhost", given) == (True, True)


@both_sides
async def test_starttls_takes_what_a_trisock_socket_does(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    client, server = await pair()
    assert await starttls_on_both(client, server, client_tls, server_tls) == (True, True)


@both_sides
@pytest.mark.parametrize("mistake", [[{"chain": "x", "private_key": "y"}], [{"chain": "x"}], [], 1])
async def test_starttls_raises_for_a_certificate_that_is_none(mistake: Any) -> None:
    client, raw = await raw_peer()
    with raw:
        with pytest.raises((TypeError, ValueError)):
            await got(client.starttls(mistake))
        assert client.isopen()
        assert await got(client.send("untouched")) is True
        assert raw.recv(100) == b"untouched"


async def test_starttls_closes_a_socket_whose_last_send_was_cut_off(
    certs: list[dict[str, str | bytes]],
) -> None:
    one, other = unix_pair()
    s = async_socket(one, trio.lowlevel.current_trio_token())
    await clog(one)
    one.unrecv(b"still to be read")
    os.read(other.fileno(), 200_000)  # room for a part of what follows
    async with trio.open_nursery() as nursery:
        nursery.start_soon(s.send, bytes(10_000_000))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert s.isopen()
    assert await s.starttls(certs) is False
    assert not s.isopen()
    other.abort()


# ---- close, getpeer, getside, istls, isopen ----


@both_sides
async def test_close_loses_nothing_that_was_sent() -> None:
    client, raw = await raw_peer()
    with raw:
        message = bytes(range(256)) * 4000
        thread = Thread(lambda: b"".join(iter(lambda: raw.recv(65536), b"")))
        await got(client.send(message))
        assert await got(client.close()) is None
        assert thread.result() == message
        await got(client.close())  # changes nothing


@both_sides
async def test_getpeer_returns_address_and_port() -> None:
    client, raw = await raw_peer()
    with raw:
        ip, port = client.getpeer()
        assert (ip, port) == raw.getsockname()
        await got(client.close())
        assert client.getpeer() == (ip, port)


@both_sides
async def test_getside_returns_client_or_server() -> None:
    client, server = await pair()
    assert (client.getside(), server.getside()) == ("client", "server")


@both_sides
async def test_istls_tells_whether_it_is_encrypted(
    certs: list[dict[str, str | bytes]], trusted: None
) -> None:
    client, server = await pair()
    assert client.istls() is server.istls() is False
    await starttls_on_both(client, server, "localhost", certs)
    assert client.istls() is server.istls() is True


@both_sides
async def test_isopen_is_false_when_closed_here() -> None:
    client, _ = await pair()
    assert client.isopen() is True
    await got(client.close())
    assert client.isopen() is False


@both_sides
async def test_isopen_is_false_when_the_peer_has_closed_and_all_is_read() -> None:
    client, raw = await raw_peer()
    raw.sendall(b"last")
    raw.close()
    await arrived(client)
    assert client.isopen()
    assert await got(client.recv()) == b"last"
    await arrived(client)
    assert not client.isopen()


@both_sides
async def test_repr_tells_what_it_is() -> None:
    client, _ = await pair()
    name = "async_socket" if inside() else "socket"
    assert repr(client).startswith(f"<trisock.pluto.{name} <trisock.Socket client")


# ---- listener: accept, hasconnection, close ----


@both_sides
async def test_accept_returns_at_once_if_there_is_a_client() -> None:
    listening = socket.listen(0)
    with stdlib.create_connection(("127.0.0.1", listening.port)) as raw:
        s = await got(listening.accept())
        assert s.getside() == "server"
        assert s.getpeer() == raw.getsockname()


@both_sides
async def test_accept_waits_for_a_client() -> None:
    listening = socket.listen(0)
    server, client = await together(
        lambda: got(listening.accept()),
        lambda: got(socket.connect("127.0.0.1", listening.port)),
    )
    await got(client.send("hello"))
    assert await got(server.recv()) == b"hello"


@both_sides
async def test_accept_returns_none_when_the_listener_is_closed() -> None:
    listening = socket.listen(0)
    await got(listening.close())
    assert await got(listening.accept()) is None


@both_sides
async def test_accept_that_waits_returns_none_when_the_listener_is_closed() -> None:
    listening = socket.listen(0)

    async def close() -> None:
        with contextlib.suppress(trio.BusyResourceError):  # until the other is in accept
            while listening._listening._accepting.in_use is False:
                await got(wait_a_pass())
        await got(listening.close())

    assert await together(lambda: got(listening.accept()), close) == (None, None)


def wait_a_pass() -> Awaitable[None] | None:
    """Let others run: a checkpoint inside, a call of nothing outside."""
    return trio.lowlevel.checkpoint() if inside() else background.call(trio.lowlevel.checkpoint)


@both_sides
async def test_accept_raises_oserror_when_there_are_no_descriptors_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listening = socket.listen(0)

    def full(_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(listening._listening._listening, "accept_from", full)
    with pytest.raises(OSError, match="Too many open files"):
        await got(listening.accept())


@both_sides
async def test_hasconnection_tells_whether_there_is_a_client() -> None:
    listening = socket.listen(0)
    assert listening.hasconnection() is False
    with stdlib.create_connection(("127.0.0.1", listening.port)):
        while not listening.hasconnection():
            await got(wait_a_pass())
        assert listening.hasconnection() is True
        assert await got(listening.accept()) is not None
        assert listening.hasconnection() is False


@both_sides
async def test_hasconnection_guarantees_that_the_next_accept_does_not_wait() -> None:
    listening = socket.listen(0)
    raw = stdlib.create_connection(("127.0.0.1", listening.port))
    while not listening.hasconnection():
        await got(wait_a_pass())
    raw.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    raw.close()  # also if the client is gone by then
    s = await got(listening.accept())
    assert await got(s.recv()) is None


@both_sides
async def test_hasconnection_is_false_once_it_is_closed() -> None:
    listening = socket.listen(0)
    with stdlib.create_connection(("127.0.0.1", listening.port)):
        while not listening.hasconnection():
            await got(wait_a_pass())
        await got(listening.close())
        assert listening.hasconnection() is False


# ---- the page's programs, on this machine ----


def serve_once(answer: bytes = b"HTTP/1.1 200 OK\r\n\r\n") -> tuple[int, Thread]:
    """Return a port, and the thread that answers there one request and returns it."""
    listening = stdlib.create_server(("127.0.0.1", 0))

    def serve() -> bytes:
        with listening, listening.accept()[0] as raw:
            request = raw.recv(65536)
            raw.sendall(answer)
            return request

    return int(listening.getsockname()[1]), Thread(serve)


def test_page_recv_example() -> None:
    port, peer = serve_once()
    s = socket.connect("localhost", port)
    s.send("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert s.recv() == b"HTTP/1.1 200 OK\r\n\r\n"
    assert peer.result() == b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


def test_page_unrecv_example(capsys: pytest.CaptureFixture[str]) -> None:
    with stdlib.create_server(("127.0.0.1", 0)) as listening:
        sock = socket.connect("localhost", listening.getsockname()[1])
        sock.unrecv("World")
        sock.unrecv("Hello")
        print(sock.recv().decode())
        print(sock.recv().decode())
    assert capsys.readouterr().out == "Hello\nWorld\n"


def test_page_bind_and_starttls_examples(
    certs: list[dict[str, str | bytes]], trusted: None
) -> None:
    """The TLS server and the TLS client of the page, one in each of the two worlds."""
    sched = scheduler()

    async def handler(s: async_socket) -> None:
        if await s.starttls(certs):
            content = "Hello, world!"
            await s.send(
                f"HTTP/1.1 200 OK\r\nConnection: Close\r\nContent-Length: {len(content)}\r\n\r\n"
                + content
            )

    server = socket.bind(sched, 0, handler)

    def client() -> bytes:
        s = socket.connect("localhost", server.port)
        assert s.starttls("localhost"), "Failed to establish secure connection."
        s.send("GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        received = b""
        while data := s.recv():
            received += data
        return received

    async def talk() -> None:
        received.append(await in_thread(client))
        await server.close()

    received: list[bytes] = []
    sched.add(talk)
    sched.run()
    assert received[0].endswith(b"\r\nContent-Length: 13\r\n\r\nHello, world!")


@pytest.mark.parametrize("tls", [False, True])
def test_page_getpeer_getside_istls_isopen_examples(
    tls: bool, certs: list[dict[str, str | bytes]], trusted: None
) -> None:
    listening = socket.listen(0)
    peer = Thread(lambda: listening.accept().starttls(certs) if tls else listening.accept())
    sock = socket.connect("127.0.0.1", listening.port)
    ip, port = sock.getpeer()
    assert ip == "127.0.0.1"
    assert port == listening.port
    assert sock.getside() == "client"
    assert not sock.istls()
    if tls:
        assert sock.starttls("127.0.0.1")
        assert sock.istls()
    else:
        assert sock.isopen()
        sock.close()
        assert not sock.isopen()
    peer.result()


def test_page_hasconnection_example() -> None:
    lst = socket.listen(0)
    with stdlib.create_connection(("127.0.0.1", lst.port)) as raw:
        while not lst.hasconnection():
            pass
        raw.sendall(b"GET /")
        assert lst.accept().recv() == b"GET /"


# ---- the wrong side ----


CALLS: list[Callable[[Any], Any]] = [
    lambda s: s.send("x"),
    lambda s: s.recv(),
    lambda s: s.peek(),
    lambda s: s.unrecv("x"),
    lambda s: s.starttls("localhost"),
    lambda s: s.close(),
    lambda s: s.isopen(),
]
LISTENER_CALLS: list[Callable[[Any], Any]] = [
    lambda each: each.accept(),
    lambda each: each.hasconnection(),
    lambda each: each.close(),
]


def refused(s: Any, listening: Any, why: str) -> None:
    for thing, calls in ((s, CALLS), (listening, LISTENER_CALLS)):
        for call in calls:
            with pytest.raises(RuntimeError, match=f"this {type(thing).__name__} was {why}"):
                call(thing)
    assert not s.istls()  # plain on any side
    assert s.getside() == "client"
    assert s.getpeer()


def test_what_was_made_outside_trio_cannot_be_used_inside() -> None:
    client, server = finish(pair())
    listening = socket.listen(0)

    async def use() -> None:
        refused(client, listening, "made outside Trio: it cannot be used inside Trio")

    trio.run(use)
    client.send("works on")
    assert server.recv() == b"works on"


def test_what_was_made_inside_trio_cannot_be_used_outside_or_in_another_run() -> None:
    made = []

    async def make() -> None:
        made.extend([*await pair(), socket.listen(0)])
        await in_thread(
            lambda: refused(made[0], made[2], "made inside Trio: it cannot be used outside Trio")
        )

    async def use() -> None:
        refused(made[0], made[2], "made inside Trio: it cannot be used in another run of Trio")

    trio.run(make)
    refused(made[0], made[2], "made inside Trio: it cannot be used outside Trio")
    trio.run(use)


# ---- dropped ----


def end_of(raw: stdlib.socket) -> bytes:
    return b"".join(iter(lambda: raw.recv(65536), b""))


@both_sides
async def test_a_socket_that_is_dropped_is_closed_without_a_word() -> None:
    client, raw = await raw_peer()
    with raw, warnings.catch_warnings():
        warnings.simplefilter("error")
        await got(client.send("hello"))
        del client
        gc.collect()
        assert end_of(raw) == b"hello"


@both_sides
async def test_a_socket_that_is_dropped_leaves_what_was_sent_to_arrive() -> None:
    client, raw = await raw_peer()
    with raw:
        message = bytes(range(256)) * 256
        await got(client.send(message))
        del client
        gc.collect()
        assert end_of(raw) == message


@both_sides
async def test_a_socket_that_is_dropped_under_tls_is_closed_without_a_word(
    certs: list[dict[str, str | bytes]], trusted: None
) -> None:
    client, server = await pair()
    await starttls_on_both(client, server, "localhost", certs)
    del client
    gc.collect()
    assert await got(server.recv()) is None


@both_sides
async def test_a_temporary_lives_until_its_call_is_done() -> None:
    port, peer = serve_once(b"answer")

    unowned: list[Any] = []
    s = await got(socket.connect("127.0.0.1", port))
    await got(s.send("request"))
    unowned.append(s)
    del s
    assert await got(unowned.pop().recv()) == b"answer"
    assert peer.result() == b"request"


async def test_a_temporary_of_connect_lives_until_its_recv_is_done() -> None:
    with stdlib.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]

        def greet() -> None:
            with listening.accept()[0] as raw:
                gc.collect()
                raw.sendall(b"welcome")

        peer = Thread(greet)
        assert await (await socket.connect("127.0.0.1", port)).recv() == b"welcome"
        peer.result()


@both_sides
async def test_a_listener_that_is_dropped_is_closed_without_a_word() -> None:
    listening = socket.listen(0)
    port = listening.port
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del listening
        gc.collect()
    with pytest.raises(ConnectionRefusedError):
        stdlib.create_connection(("127.0.0.1", port))


@both_sides
async def test_a_listener_that_is_dropped_closes_what_hasconnection_found() -> None:
    listening = socket.listen(0)
    with stdlib.create_connection(("127.0.0.1", listening.port), timeout=DEADLINE) as raw:
        while not listening.hasconnection():
            await got(wait_a_pass())
        del listening
        gc.collect()
        with contextlib.suppress(ConnectionResetError):
            assert raw.recv(1) == b""


@both_sides
async def test_a_listener_of_bind_that_is_dropped_unserved_is_closed() -> None:
    sched = scheduler()
    port = socket.bind(sched, 0, echo).port
    stdlib.create_connection(("127.0.0.1", port)).close()  # the scheduler has it
    del sched
    gc.collect()
    with pytest.raises(ConnectionRefusedError):
        stdlib.create_connection(("127.0.0.1", port))


@both_sides
async def test_a_socket_that_was_closed_and_is_dropped_closes_no_other() -> None:
    client, raw = await raw_peer()
    with raw:
        number = client._sock.fileno()
        await got(client.close())
        with open(os.devnull) as other:
            os.dup2(other.fileno(), number)
        try:
            del client
            gc.collect()
        finally:
            os.close(number)  # it is still there


# ---- Ctrl-C ----


class Interrupter(trio.abc.Instrument):
    """Sends a signal to the main thread as soon as the next call waits in the background."""

    def __init__(self, signum: signal.Signals) -> None:
        self._signum = signum
        self._begun = False

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        self._begun = True

    def before_io_wait(self, timeout: float) -> None:
        if self._begun and timeout > 0:
            self._begun = False
            ident = threading.main_thread().ident
            assert ident is not None
            signal.pthread_kill(ident, self._signum)


class AlarmError(Exception):
    pass


SIGNALS = {signal.SIGINT: KeyboardInterrupt, signal.SIGUSR1: AlarmError}


@pytest.fixture(params=SIGNALS, ids=lambda signum: signum.name)
def interrupted(request: pytest.FixtureRequest) -> Iterator[Callable[[Callable[[], Any]], None]]:
    """Return what makes a call and checks that a signal in the middle of it ends it."""

    def alarm(*_: object) -> None:
        raise AlarmError

    def check(call: Callable[[], Any]) -> None:
        async def arm() -> Interrupter:
            instrument = Interrupter(request.param)
            trio.lowlevel.add_instrument(instrument)
            return instrument

        instrument = background.call(arm)
        with pytest.raises(SIGNALS[request.param]):
            call()

        async def disarm() -> None:
            trio.lowlevel.remove_instrument(instrument)

        background.call(disarm)

    before = signal.signal(signal.SIGUSR1, alarm)
    yield check
    signal.signal(signal.SIGUSR1, before)


Interrupted = Callable[[Callable[[], Any]], None]


def test_ctrl_c_ends_recv_and_no_byte_is_lost(interrupted: Interrupted) -> None:
    client, raw = finish(raw_peer())
    with raw:
        for _ in range(3):
            interrupted(client.recv)
        raw.sendall(b"hello")
        assert client.recv() == b"hello"
        assert client.send("and on")
        assert raw.recv(100) == b"and on"


def test_ctrl_c_ends_accept_and_no_client_is_lost(interrupted: Interrupted) -> None:
    listening = socket.listen(0)
    interrupted(listening.accept)
    client = socket.connect("127.0.0.1", listening.port)
    server = listening.accept()
    client.send("hello")
    assert server.recv() == b"hello"


def test_ctrl_c_ends_connect(interrupted: Interrupted) -> None:
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(stdlib.create_server(("127.0.0.1", 0), backlog=0))
        address = full.getsockname()
        others = []
        for _ in range(3):  # more than fit: the kernel answers no other SYN
            other = stack.enter_context(stdlib.socket())
            other.setblocking(False)
            other.connect_ex(address)
            others.append(other)
        select.select([], others[:1], [], DEADLINE)
        interrupted(lambda: socket.connect(*address))
    with stdlib.create_server(("127.0.0.1", 0)) as listening:
        assert socket.connect(*listening.getsockname()) is not None


def test_ctrl_c_ends_starttls_and_closes_the_socket(interrupted: Interrupted) -> None:
    client, raw = finish(raw_peer())
    with raw:
        interrupted(lambda: client.starttls("localhost"))
        assert client.isopen() is False
        assert client.recv() is None
        assert client.starttls("localhost") is False


def test_ctrl_c_ends_send_and_nothing_follows_what_was_cut_off(interrupted: Interrupted) -> None:
    client, raw = finish(raw_peer())
    with raw:
        interrupted(lambda: client.send(bytes(50_000_000)))
        assert client.send("x") is False
        assert client.isopen()
        client.unrecv("still to be read")
        assert client.recv() == b"still to be read"
        assert client.starttls("localhost") is False
        assert client.isopen() is False


def test_ctrl_c_ends_a_script_that_reads() -> None:
    program = """
import os, signal, socket, sys, threading, trio
from trisock.pluto import socket as pluto
from trisock.pluto.blocking import background

class Tell(trio.abc.Instrument):
    begun = False
    def task_spawned(self, task):
        self.begun = True
    def before_io_wait(self, timeout):
        if self.begun and timeout > 0:
            self.begun = False
            print("waiting", flush=True)

async def tell():
    trio.lowlevel.add_instrument(Tell())

listening = pluto.listen(0)
peer = socket.create_connection(("127.0.0.1", listening.port))
s = listening.accept()
background.call(tell)
try:
    s.recv()
except KeyboardInterrupt:
    peer.sendall(b"hello")
    print(s.recv(), flush=True)
peer.close()
"""
    with subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"waiting\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE)
    assert b"hello" in out
    assert (process.returncode, err) == (0, b"")


@pytest.fixture
def own() -> Iterator[TrioThread]:
    """A background thread of the test's own."""
    made = TrioThread()
    yield made
    made.stop()


def raise_in_main(signum: signal.Signals = signal.SIGINT) -> None:
    ident = threading.main_thread().ident
    assert ident is not None
    signal.pthread_kill(ident, signum)


async def raise_in_main_and_be_given_up() -> None:
    raise_in_main()
    while trio.current_effective_deadline() > -math.inf:
        await trio.lowlevel.cancel_shielded_checkpoint()


def test_undo_takes_back_the_result_of_a_call_that_was_done_when_ctrl_c_came(
    own: TrioThread,
) -> None:
    undone: list[str] = []

    async def done() -> str:
        await raise_in_main_and_be_given_up()
        return "result"  # it has come to its end just then

    with pytest.raises(KeyboardInterrupt):
        own.call(done, undone.append)
    assert undone == ["result"]


@pytest.mark.parametrize("fails", [False, True])
def test_undo_is_for_results_only(own: TrioThread, fails: bool) -> None:
    undone: list[object] = []

    async def function() -> str:
        if fails:
            raise ValueError("a mistake")
        return "result"

    with contextlib.nullcontext() if not fails else pytest.raises(ValueError, match="mistake"):
        assert own.call(function, undone.append) == "result"

    async def waiting() -> None:
        raise_in_main()
        await trio.sleep_forever()

    with pytest.raises(KeyboardInterrupt):
        own.call(waiting, undone.append)
    assert undone == []


def test_an_undo_that_fails_harms_no_later_call(
    own: TrioThread, caplog: pytest.LogCaptureFixture
) -> None:
    async def done() -> str:
        await raise_in_main_and_be_given_up()
        return "result"

    def undo(result: str) -> None:
        raise ValueError("a mistake")

    with pytest.raises(KeyboardInterrupt):
        own.call(done, undo)

    async def later() -> str:
        return "fine"

    assert own.call(later) == "fine"
    assert "could not take back" in caplog.text
    caplog.clear()


def test_recv_pushes_back_what_ctrl_c_kept_from_the_caller() -> None:
    client, raw = finish(raw_peer())
    with raw:
        client.unrecv("second")
        client._unrecv(b"first")
        client._unrecv(None)
        assert [client.recv() for _ in range(2)] == [b"first", b"second"]
        client.close()
        client._unrecv(b"late")  # has no place to go back to
        assert client.recv() is None


def hold_back(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Have a call of the core end with a result and a Ctrl-C at the same time."""
    where = {"recv": trisock.Socket, "accept": trisock.Listener}[name]
    original = getattr(where, name)

    async def result_and_signal(self: Any) -> Any:
        result = await original(self)
        monkeypatch.setattr(where, name, original)
        await raise_in_main_and_be_given_up()
        return result

    monkeypatch.setattr(where, name, result_and_signal)


def test_recv_has_what_ctrl_c_kept_from_the_caller_again(monkeypatch: pytest.MonkeyPatch) -> None:
    client, raw = finish(raw_peer())
    with raw:
        raw.sendall(b"hello")
        hold_back(monkeypatch, "recv")
        with pytest.raises(KeyboardInterrupt):
            client.recv()
        assert client.recv() == b"hello"


def test_accept_has_the_client_that_ctrl_c_kept_from_the_caller_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listening = socket.listen(0)
    with stdlib.create_connection(("127.0.0.1", listening.port)) as raw:
        hold_back(monkeypatch, "accept")
        with pytest.raises(KeyboardInterrupt):
            listening.accept()
        assert listening.hasconnection()
        assert listening.accept().getpeer() == raw.getsockname()
        assert not listening.hasconnection()


def test_a_closed_listener_has_no_client_that_ctrl_c_left_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listening = socket.listen(0)
    with stdlib.create_connection(("127.0.0.1", listening.port), timeout=DEADLINE) as raw:
        hold_back(monkeypatch, "accept")
        with pytest.raises(KeyboardInterrupt):
            listening.accept()
        listening.close()
        assert not listening.hasconnection()
        assert listening.accept() is None
        assert raw.recv(1) == b""


# ---- threads ----


def test_several_threads_use_different_sockets_at_once() -> None:
    def exchange(number: int) -> None:
        client, server = finish(pair())
        for n in range(50):
            client.send(f"{number} {n}")
            assert server.recv() == f"{number} {n}".encode()

    for thread in [Thread(functools.partial(exchange, number)) for number in range(8)]:
        thread.result()


def test_one_thread_reads_while_another_writes_on_one_socket() -> None:
    client, raw = finish(raw_peer())
    with raw:
        reading = Thread(client.recv)
        while not client._sock._connection.reading.in_use:
            wait_a_pass()
        client.send("question")
        assert raw.recv(100) == b"question"
        raw.sendall(b"answer")
        assert reading.result() == b"answer"


def test_two_threads_that_read_from_one_socket_are_a_mistake() -> None:
    client, raw = finish(raw_peer())
    with raw:
        reading = Thread(client.recv)
        while not client._sock._connection.reading.in_use:
            wait_a_pass()
        for call in (client.recv, client.peek, lambda: client.unrecv("x")):
            with pytest.raises(trio.BusyResourceError, match="reading"):
                call()
        raw.sendall(b"hello")
        assert reading.result() == b"hello"


def test_a_socket_that_another_thread_closes_ends_a_recv() -> None:
    client, raw = finish(raw_peer())
    with raw:
        reading = Thread(client.recv)
        while not client._sock._connection.reading.in_use:
            wait_a_pass()
        client.close()
        assert reading.result() is None


# ---- the background thread ----


@contextlib.contextmanager
def no_descriptors_left() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for each in taken:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_thread_that_cannot_start_is_an_oserror_and_later_calls_work(own: TrioThread) -> None:
    with no_descriptors_left():
        for _ in range(2):
            with pytest.raises(OSError, match="Too many open files"):
                own.call(trio.lowlevel.checkpoint)
    own.stop()  # also one that has failed
    own.call(trio.lowlevel.checkpoint)
    with no_descriptors_left():
        own.call(trio.lowlevel.checkpoint)  # it is running
    own.stop()
    with no_descriptors_left(), pytest.raises(OSError, match="Too many open files"):
        own.call(trio.lowlevel.checkpoint)
    own.call(trio.lowlevel.checkpoint)  # in another one


def test_ctrl_c_while_a_thread_cannot_start_is_a_keyboard_interrupt(
    own: TrioThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trio.run
    interrupted = threading.Event()

    def fail(*_: Any) -> None:
        monkeypatch.setattr(trio, "run", run)
        raise_in_main()
        interrupted.wait(DEADLINE)
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(trio, "run", fail)
    with pytest.raises(KeyboardInterrupt):
        own.call(trio.lowlevel.checkpoint)
    failing = background_threads()
    interrupted.set()
    for each in failing:
        each.join()
    own.call(trio.lowlevel.checkpoint)


def test_a_thread_that_the_system_refuses_leaves_nothing_behind(
    own: TrioThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            own.call(trio.lowlevel.checkpoint)
    own.call(trio.lowlevel.checkpoint)


def script(program: str) -> str:
    """Run a program that must end with status 0 and nothing on stderr; return what it prints."""
    result = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", program],
        capture_output=True,
        timeout=DEADLINE,
    )
    assert (result.returncode, result.stderr.decode()) == (0, "")
    return result.stdout.decode()


def test_the_background_thread_starts_with_the_first_call_and_ends_with_the_process() -> None:
    printed = script(
        """
import threading
from trisock.pluto import scheduler, socket
def threads():
    print([each.name for each in threading.enumerate() if each.name == "trisock"])
threads()
listening = socket.listen(0)
threads()
listening.hasconnection()
threads()
"""
    )
    assert printed == "[]\n[]\n['trisock']\n"


def test_a_process_ends_without_a_word_with_sockets_open() -> None:
    script(
        """
import threading
from trisock.pluto import scheduler, socket
listening = socket.listen(0)
client = socket.connect("127.0.0.1", listening.port)
server = listening.accept()
waiting = socket.connect("127.0.0.1", listening.port)
assert listening.hasconnection()
bound = socket.bind(scheduler(), 0, print)
threading.Thread(target=server.recv, daemon=True).start()
while not server._sock._connection.reading.in_use:
    server.istls()
"""
    )


# ---- fork ----


def child(function: Callable[[], None]) -> None:
    """Run a function in a forked child, which must not warn, complain or hang."""
    number = os.fork()
    if not number:
        status = 1
        try:
            signal.alarm(DEADLINE)
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == 0


def background_threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "trisock"]


def converse(client: Any, server: Any) -> None:
    client.send("hello")
    assert server.recv() == b"hello"


def test_fork_before_the_first_call() -> None:
    listening = socket.listen(0)
    child(lambda: converse(*finish(pair())))
    child(lambda: converse(socket.connect("127.0.0.1", listening.port), listening.accept()))
    converse(*finish(pair()))


def test_fork_after_calls_lets_the_child_use_its_sockets_and_the_parent_go_on() -> None:
    client, server = finish(pair())
    converse(client, server)

    def in_child() -> None:
        assert not background_threads()
        converse(server, client)
        converse(*finish(pair()))
        child(lambda: converse(client, server))  # and forks itself
        converse(client, server)

    child(in_child)
    assert not background_threads()  # it was stopped
    converse(client, server)
    child(in_child)


def test_fork_after_a_name_was_resolved() -> None:
    def by_name() -> None:
        with stdlib.create_server(("127.0.0.1", 0)) as listening:
            assert socket.connect("localhost", listening.getsockname()[1]) is not None

    by_name()
    with warnings.catch_warnings():
        # Trio's thread for the resolver may be there still.
        warnings.simplefilter("ignore", DeprecationWarning)
        child(by_name)
    by_name()


def test_fork_while_another_thread_is_in_a_call() -> None:
    client, raw = finish(raw_peer())
    with raw:
        reading = Thread(client.recv)
        while not client._sock._connection.reading.in_use:
            wait_a_pass()

        def in_child() -> None:
            client.send("from the child")
            converse(*finish(pair()))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # there are threads, indeed
            child(in_child)
        assert raw.recv(100) == b"from the child"
        client.send("from the parent")
        assert raw.recv(100) == b"from the parent"
        raw.sendall(b"hello")
        assert reading.result() == b"hello"


def test_fork_inside_trio_leaves_the_run_alone() -> None:
    client, server = finish(pair())

    async def main() -> None:
        child(lambda: os.fstat(client._sock.fileno()) and None)
        await trio.lowlevel.checkpoint()

    trio.run(main)
    converse(client, server)


def test_fork_makes_no_warning_where_nothing_is_going_on() -> None:
    script(
        """
import os
from trisock.pluto import socket
listening = socket.listen(0)
client = socket.connect("127.0.0.1", listening.port)
server = listening.accept()
for _ in range(20):
    client.send("x")
    assert server.recv() == b"x"
    number = os.fork()
    if not number:
        client.send("y")
        assert server.recv() == b"y"
        break
    assert os.waitpid(number, 0)[1] == 0  # it has ended as programs do
"""
    )


def test_a_platform_without_fork_has_nothing_to_register(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "register_at_fork")
    made = TrioThread()
    made.call(trio.lowlevel.checkpoint)
    made.stop()
