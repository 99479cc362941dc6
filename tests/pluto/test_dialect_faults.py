"""Failures in trisock.hammerspoon and trisock.pluto: shutdown, cancellation and races."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import trio
import trio.testing

import trisock
from helpers.pairs import all_served
from helpers.pluto import (
    FORK_WARNS,
    background_threads,
    pair,
    raise_emfile,
    run_outside,
    run_program,
)
from trisock import Socket, hammerspoon, pluto
from trisock.pluto.blocking import background

pytestmark = pytest.mark.usefixtures("bounded")  # some tests make blocking calls

# ---- trisock.hammerspoon: shutdown ----


async def test_clients_are_closed_when_open_sockets_exits(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Socket] = []
    connect = trisock.connect

    async def remember(host: str, port: int) -> Socket:
        made.append(await connect(host, port))
        return made[0]

    monkeypatch.setattr(trisock, "connect", remember)
    connected = trio.Event()
    async with hammerspoon.open_sockets() as hs:
        port = hs.server(0).info()["localPort"]
        client = hs.new(print).connect("127.0.0.1", port, connected.set)
        assert client is not None
        await connected.wait()
    assert made[0].fileno() == -1
    assert client.info()["isDisconnected"]
    assert client.read(1) is None


async def test_an_error_from_a_cancelled_block_propagates() -> None:
    with pytest.raises(ValueError, match="from the block"):
        with trio.CancelScope() as scope:
            async with hammerspoon.open_sockets() as hs:
                hs.server(0)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
                raise ValueError("from the block")


async def test_a_cancelled_block_raises_only_cancelled() -> None:
    with trio.CancelScope() as scope:
        async with hammerspoon.open_sockets() as hs:
            hs.server(0)
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught


# ---- trisock.hammerspoon: reusing an object ----


class BeforeTask(trio.abc.Instrument):
    """Calls a function once, just before the next step of a task whose name contains ``word``."""

    def __init__(self, word: str, function: Callable[[], None]) -> None:
        self.word, self.function = word, function

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if self.word in task.name:
            trio.lowlevel.remove_instrument(self)
            self.function()


async def test_data_from_before_a_disconnect_never_reaches_a_callback() -> None:
    """The data arrives, then the client disconnects, and then the reading task runs."""
    calls: list[object] = []
    connected_again = trio.Event()
    peers: list[Socket] = []

    async def serve(sock: Socket) -> None:
        peers.append(sock)
        await sock.recv()

    def reconnect() -> None:
        client.disconnect()
        assert client.connect("127.0.0.1", server.port, connected_again.set)

    async with trio.open_nursery() as nursery, hammerspoon.open_sockets() as hs:
        server = await trisock.bind(nursery, 0, serve, host="127.0.0.1")
        client = hs.new(lambda data, tag: calls.append(data))
        client.connect("127.0.0.1", server.port)
        while not (client.connected() and peers):
            await trio.lowlevel.checkpoint()
        client.read(3)
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.add_instrument(BeforeTask("_run_queue", reconnect))
        await peers[0].send(b"old")
        await connected_again.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert calls == []
        client.disconnect()
        await all_served(server, 2)
        server.stop()


async def test_an_ipv6_address_with_a_dotted_zone_is_not_ipv4(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connected = trio.Event()
    async with hammerspoon.open_sockets() as hs:
        port = hs.server(0).info()["localPort"]
        client = hs.new().connect("127.0.0.1", port, connected.set)
        assert client is not None
        await connected.wait()
        monkeypatch.setattr(Socket, "getlocal", lambda self: trisock.Address("fe80::1%eth0.5", 1))
        assert client.info()["isIPv6"]
        assert not client.info()["isIPv4"]


# ---- trisock.pluto outside Trio ----


def test_a_call_during_interpreter_shutdown_raises_instead_of_hanging() -> None:
    out = run_program(
        """
        import sys
        class Holder:
            def __init__(self):
                self.listener = socket.listen(0)
                self.s = socket.connect("127.0.0.1", self.listener.port)
            def __del__(self):
                try:
                    self.s.close()
                except RuntimeError as exc:
                    print(exc, flush=True)
        sys.modules["a last reference"] = Holder()
        """
    )
    assert "cannot be made in the background thread" in out


def test_sockets_are_still_open_in_atexit_functions() -> None:
    out = run_program(
        """
        import atexit
        atexit.register(lambda: print(c.send("bye"), s.recv()))
        listener = socket.listen(0)
        c = socket.connect("127.0.0.1", listener.port)
        s = listener.accept()
        """
    )
    assert out == "True b'bye'\n"


def test_a_signal_handler_can_fork_during_a_blocking_call() -> None:
    out = run_program(
        """
        import os, signal, sys
        def fork(*_):
            global child
            child = os.fork()
            if not child:
                sys.exit(7)
            s.send("the parent continues")
        signal.signal(signal.SIGALRM, fork)
        listener = socket.listen(0)
        c = socket.connect("127.0.0.1", listener.port)
        s = listener.accept()
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        received = c.recv()
        print(received, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """,
        *FORK_WARNS,
    )
    assert out == "b'the parent continues' 7\n"


def test_a_call_in_the_background_thread_raises_instead_of_hanging() -> None:
    s, _ = run_outside(pair())

    async def call() -> None:
        background.call(s._transport.sock.peek)

    with pytest.raises(RuntimeError, match="cannot be made in the background thread"):
        background.call(call)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_thread_that_fails_to_start_leaves_nothing_running(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    s, _ = run_outside(pair())
    background.stop()
    start = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        if error is KeyboardInterrupt:
            start(thread)
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        with pytest.raises(error):
            s.isopen()
    background.stop()
    assert not background_threads()
    assert s.isopen()


def test_calls_work_after_a_ctrl_c_during_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    s, _ = run_outside(pair())
    join = threading.Thread.join

    def interrupted(thread: threading.Thread) -> None:
        join(thread)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            background.stop()
    assert s.send("x")


def test_scheduler_run_raises_keyboard_interrupt_on_ctrl_c() -> None:
    out = run_program(
        """
        import signal, trio
        from trisock.pluto import scheduler
        async def interrupt():
            signal.raise_signal(signal.SIGINT)
            await trio.sleep_forever()
        sched = scheduler()
        listener = socket.bind(sched, 0, lambda s: s.send("hello"))
        sched.add(interrupt)
        try:
            sched.run()
        except KeyboardInterrupt:
            print("interrupted", socket.connect("127.0.0.1", listener.port))
        """
    )
    assert out == "interrupted None\n"


async def test_forgetting_to_await_connect_or_accept_raises_attribute_error() -> None:
    listener = pluto.socket.listen(0)
    for call in (pluto.socket.connect("127.0.0.1", listener.port), listener.accept()):
        with pytest.raises(AttributeError, match="inside Trio, await this call first"):
            call.close()
        s = await call
        assert s is not None
        await s.close()


def test_connect_returns_none_if_the_background_thread_cannot_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "trisock.pluto")
    listener = pluto.socket.listen(0)
    with monkeypatch.context() as patched:
        patched.setattr(trio, "run", raise_emfile)
        assert pluto.socket.connect("127.0.0.1", listener.port) is None
        assert "Too many open files" in caplog.text
        with pytest.raises(OSError, match="Too many open files"):
            listener.hasconnection()
    assert pluto.socket.connect("127.0.0.1", listener.port) is not None


async def test_a_handler_that_is_not_async_logs_an_error(caplog: pytest.LogCaptureFixture) -> None:
    sched = pluto.scheduler()
    listener = pluto.socket.bind(sched, 0, lambda s: s.getpeer())  # type: ignore[arg-type,return-value]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sched.run)
        client = await pluto.socket.connect("127.0.0.1", listener.port)
        assert client is not None
        assert await client.recv() is None
        await client.close()
        listener.close()
    assert "a handler must be an async function:" in caplog.text


def test_bind_and_add_raise_type_error_for_invalid_arguments() -> None:
    sched = pluto.scheduler()
    with pytest.raises(TypeError, match="a handler must be an async function, not 5"):
        pluto.socket.bind(sched, 0, 5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a server runs in a scheduler, not in None"):
        pluto.socket.bind(None, 0, print)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="runs functions, not None"):
        sched.add(None)  # type: ignore[arg-type]
    sched.run()
