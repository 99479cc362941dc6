"""TrioWorker without a master: its worker runs in the test's process."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
import trio
import trio.testing
from gunicorn.arbiter import Arbiter

import trisock
from helpers.gunicorn_workers import echo_lines as echo
from helpers.gunicorn_workers import worker_maker
from helpers.server import limit_of_the_backlog
from trisock import Socket
from trisock.gunicorn import App, TrioWorker


@pytest.fixture
def make_worker() -> Iterator[Callable[..., TrioWorker]]:
    with worker_maker() as make:
        yield make


async def ask(worker: TrioWorker) -> bytes:
    """Connect, send one request, and return the response, or ``b""`` if there is none."""
    with contextlib.suppress(ConnectionResetError, trio.BrokenResourceError):
        async with await trisock.connect(*worker.test_address) as sock:
            await sock.send(b"hello\n")
            return await sock.recv()
    return b""


def serve(
    worker: TrioWorker, client: Callable[[], Awaitable[object]], *, seconds: float = 20
) -> None:
    """Run the worker, and run ``client`` in the same Trio run."""

    @contextlib.asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        with trio.fail_after(seconds):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client)
                yield

    worker.load_wsgi()
    worker._app = dataclasses.replace(worker._app, lifespan=lifespan)
    worker.run()


class Recorded(Exception):
    """Raised instead of serving clients."""


# ---- loading ----


def test_after_a_syntax_error_with_reload_clients_are_reset(make_worker: Any) -> None:
    files: list[str] = []

    class Reloader:
        add_extra_file = staticmethod(files.append)

    worker = make_worker(SyntaxError("bad", ("app.py", 1, 1, "x", 1, 1)), reload=True)
    worker.reloader = Reloader()

    async def client() -> None:
        assert await ask(worker) == b""
        worker.handle_exit(signal.SIGTERM, None)

    serve(worker, client)
    assert files == ["app.py"]


def test_a_syntax_error_without_reload_is_raised(make_worker: Any) -> None:
    with pytest.raises(SyntaxError):
        make_worker(SyntaxError()).load_wsgi()


def test_a_program_that_has_configured_logging_keeps_it(make_worker: Any) -> None:
    logger = logging.getLogger("trisock")
    assert logger.hasHandlers()  # pytest has added handlers to the root logger
    make_worker(echo).load_wsgi()
    assert not logger.handlers


def test_a_worker_that_cannot_listen_has_not_booted(make_worker: Any) -> None:
    worker = make_worker("not a handler")
    worker.booted = True  # gunicorn sets this before it calls run
    worker.load_wsgi()
    with pytest.RaisesGroup(TypeError, flatten_subgroups=True):
        worker.run()
    assert not worker.booted


def test_a_lifespan_that_exits_halts_gunicorn(make_worker: Any) -> None:
    @contextlib.asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        sys.exit("no database")
        yield

    worker = make_worker(App(echo, lifespan=lifespan))
    worker.load_wsgi()
    with pytest.raises(SystemExit) as raised:
        worker.run()
    assert raised.value.code == Arbiter.WORKER_BOOT_ERROR


# ---- serving ----


def test_the_worker_tells_the_master_that_it_is_alive(make_worker: Any) -> None:
    worker = make_worker(echo, timeout=1)
    notified: list[trio.Event] = []
    worker.notify = lambda: notified.append(trio.Event())

    async def client() -> None:
        assert await ask(worker) == b"hello\n"
        while len(notified) < 3:
            await trio.sleep(0.01)
        assert worker.booted
        worker.handle_exit(signal.SIGTERM, None)

    serve(worker, client)


def test_the_worker_stops_if_its_master_is_gone(
    make_worker: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    worker = make_worker(echo)
    worker.ppid = -1

    async def client() -> None:
        pass

    serve(worker, client)
    assert "the master is gone" in caplog.text


def test_the_worker_stops_if_the_reloader_asks_for_it(make_worker: Any) -> None:
    worker = make_worker(echo, timeout=1)

    async def client() -> None:
        assert await ask(worker) == b"hello\n"
        worker.alive = False

    serve(worker, client)


def test_the_worker_keeps_the_backlog_that_the_master_has_set(make_worker: Any) -> None:
    worker = make_worker(echo)
    worker.sockets[0].listen(7)

    async def client() -> None:
        assert await ask(worker) == b"hello\n"
        assert limit_of_the_backlog(worker._server._listening.sockets[0]) == 7
        worker.handle_exit(signal.SIGTERM, None)

    serve(worker, client)


def test_max_requests_counts_connections(make_worker: Any) -> None:
    worker = make_worker(echo, max_requests=2)

    async def client() -> None:
        assert await ask(worker) == b"hello\n"
        assert worker.alive
        assert await ask(worker) == b"hello\n"

    serve(worker, client)
    assert worker.nr == 2


def test_an_interrupt_in_a_handler_ends_only_this_worker(
    make_worker: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(sock: Socket) -> None:
        raise KeyboardInterrupt

    worker = make_worker(handler)
    with pytest.raises(SystemExit) as raised:
        serve(worker, lambda: ask(worker))
    assert raised.value.code == 1
    assert "KeyboardInterrupt" in caplog.text


def test_an_error_of_the_lifespan_is_raised(make_worker: Any) -> None:
    worker = make_worker(echo)

    async def client() -> None:
        raise Recorded

    with pytest.RaisesGroup(Recorded, flatten_subgroups=True):
        serve(worker, client)


# ---- stopping ----


def copies_of(sock: socket.socket) -> int:
    """Return how many descriptors of this process are the same socket."""
    name = f"socket:[{os.fstat(sock.fileno()).st_ino}]"
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return sum(os.path.islink(link) and os.readlink(link) == name for link in links)


def test_a_stopping_worker_leaves_new_clients_to_its_siblings(make_worker: Any) -> None:
    worker = make_worker(echo)
    sibling = worker.sockets[0].dup()

    async def client() -> None:
        async with await trisock.connect(*worker.test_address) as sock:
            await sock.send(b"one\n")
            assert await sock.recv() == b"one\n"
            for _ in range(3):  # the master sends SIGTERM again and again
                worker.handle_exit(signal.SIGTERM, None)
            while copies_of(sibling) > 1:
                await trio.lowlevel.checkpoint()
            async with await trisock.connect(*worker.test_address):
                sibling.accept()[0].close()
            await sock.send(b"two\n")  # the grace is not over
            assert await sock.recv() == b"two\n"

    with sibling:
        sibling.settimeout(10)
        serve(worker, client)
    assert not worker.alive


@pytest.mark.parametrize(("timeout", "grace"), [(30, 29), (5, 4.5)])
def test_handlers_and_notifications_end_shortly_before_the_graceful_timeout(
    timeout: int, grace: float, make_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = trio.testing.MockClock(autojump_threshold=0.01)
    monkeypatch.setattr(trio, "run", functools.partial(trio.run, clock=clock))
    cancelled_at = 0.0
    notified_at: list[float] = []
    begin = clock.current_time()

    async def handler(sock: Socket) -> None:
        nonlocal cancelled_at
        try:
            await trio.sleep_forever()
        finally:
            cancelled_at = trio.current_time()
            with trio.CancelScope(shield=True):  # outlasts the grace
                await trio.sleep(100)

    worker = make_worker(handler, graceful_timeout=timeout)
    worker.notify = lambda: notified_at.append(trio.current_time())

    async def client() -> None:
        async with await trisock.connect(*worker.test_address):
            while worker._server is None or not worker._server.connections:
                await trio.lowlevel.checkpoint()
            worker.handle_exit(signal.SIGTERM, None)
            await trio.sleep(10)
            worker.handle_exit(signal.SIGTERM, None)  # must not start a second grace

    serve(worker, client, seconds=1000)
    assert cancelled_at - begin == pytest.approx(grace, abs=0.5)
    assert grace - 1.5 < notified_at[-1] - begin < grace + 0.5


@pytest.mark.parametrize("term_first", [False, True])
def test_sigquit_ends_connections_and_calls_worker_int_once(
    term_first: bool, make_worker: Any
) -> None:
    hooks: list[object] = []
    worker = make_worker(echo, worker_int=hooks.append)

    async def client() -> None:
        async with await trisock.connect(*worker.test_address) as sock:
            await sock.send(b"one\n")
            assert await sock.recv() == b"one\n"
            if term_first:
                worker.handle_exit(signal.SIGTERM, None)
            worker.handle_quit(signal.SIGQUIT, None)
            worker.handle_exit(signal.SIGTERM, None)
            worker.handle_quit(signal.SIGINT, None)
            assert await sock.recv() == b""

    serve(worker, client)
    assert hooks == [worker]


def test_a_hook_that_raises_is_logged(make_worker: Any, caplog: pytest.LogCaptureFixture) -> None:
    def worker_int(worker: object) -> None:
        raise Recorded

    worker = make_worker(echo, worker_int=worker_int)

    async def client() -> None:
        worker.handle_quit(signal.SIGQUIT, None)

    serve(worker, client)
    assert f"worker {os.getpid()}: worker_int failed" in caplog.text


def test_a_log_that_cannot_be_reopened_is_logged(
    make_worker: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker(echo)

    def reopen_files() -> None:
        raise PermissionError

    monkeypatch.setattr(worker.log, "reopen_files", reopen_files)
    worker.handle_usr1(signal.SIGUSR1, None)
    assert "reopening the logs failed" in caplog.text


def test_a_signal_before_the_server_listens_ends_the_worker(make_worker: Any) -> None:
    worker = make_worker(echo)
    worker.load_wsgi()
    worker.handle_exit(signal.SIGTERM, None)
    worker.run()
    assert not worker.booted


def test_sigquit_exits_while_the_program_loads(make_worker: Any) -> None:
    hooks: list[object] = []
    worker = make_worker(echo, worker_int=hooks.append)
    with pytest.raises(SystemExit):
        worker.handle_quit(signal.SIGQUIT, None)
    assert hooks == [worker]


@pytest.mark.parametrize("name", ["handle_exit", "handle_quit"])
def test_a_signal_ends_a_lifespan_that_is_starting(name: str, make_worker: Any) -> None:
    @contextlib.asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        getattr(worker, name)(signal.SIGTERM, None)
        await trio.sleep_forever()
        yield

    worker = make_worker(App(echo, lifespan=lifespan))
    worker.load_wsgi()
    worker.run()
    assert not worker.booted


@pytest.mark.parametrize("error", [Recorded, SystemExit])
def test_an_error_of_a_worker_told_to_stop_never_halts_gunicorn(
    error: type[BaseException], make_worker: Any
) -> None:
    @contextlib.asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        worker.handle_exit(signal.SIGTERM, None)
        try:
            await trio.sleep_forever()
        finally:
            raise error
        yield

    worker = make_worker(App(echo, lifespan=lifespan))
    worker.load_wsgi()
    if error is SystemExit:
        with pytest.raises(SystemExit) as raised:
            worker.run()
        assert raised.value.code == 1
    else:
        with pytest.RaisesGroup(error, flatten_subgroups=True):
            worker.run()
        assert worker.booted  # if a worker has not booted, the master halts


def test_a_signal_between_lifespan_and_listening_stops_the_server(make_worker: Any) -> None:
    @contextlib.asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        worker.alive = False  # the reloader does the same
        yield

    worker = make_worker(App(echo, lifespan=lifespan))
    worker.load_wsgi()
    worker.run()


@pytest.mark.parametrize("where", ["handler", "task of the lifespan", "Trio"])
def test_sigabrt_ends_the_worker_wherever_it_is(
    where: str, make_worker: Any, caplog: pytest.LogCaptureFixture
) -> None:
    hooks: list[object] = []
    cleanups: list[str] = []

    def abort() -> None:
        worker.handle_abort(signal.SIGABRT, sys._getframe())

    async def handler(sock: Socket) -> None:
        if where == "handler":
            abort()
        await trio.sleep_forever()

    async def client() -> None:
        if where == "Trio":
            trio.lowlevel.current_trio_token().run_sync_soon(abort)
        elif where == "task of the lifespan":
            abort()
        with trio.CancelScope(shield=True):
            await ask(worker)
        try:
            await trio.sleep(10)
        except trio.Cancelled:
            cleanups.append(where)
            raise

    worker = make_worker(handler, worker_abort=hooks.append)
    with pytest.raises(SystemExit) as raised:
        serve(worker, client)
    assert raised.value.code == 1
    assert hooks == [worker]
    assert "was aborted (SIGABRT) here:" in caplog.text
    assert "in abort" in caplog.text
    assert "ended" not in caplog.text
    assert cleanups == ([] if where == "task of the lifespan" else [where])


def test_an_aborted_worker_exits_though_its_program_raises(make_worker: Any) -> None:
    async def handler(sock: Socket) -> None:
        try:
            worker.handle_abort(signal.SIGABRT, None)
        except SystemExit:
            await trio.sleep_forever()  # the program ignores the exit

    @contextlib.asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, worker)
            try:
                yield
            finally:
                raise Recorded

    worker = make_worker(App(handler, lifespan=lifespan))
    worker.load_wsgi()
    with pytest.raises(SystemExit) as raised:
        worker.run()
    assert raised.value.code == 1
