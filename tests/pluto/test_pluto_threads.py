"""Pluto's objects in different Trio runs, threads and processes."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import socket as stdlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio
import trio.testing

from helpers.deadline import DEADLINE
from helpers.pluto import (
    STRICT,
    Thread,
    background_threads,
    in_child,
    in_thread,
    pair,
    raise_emfile,
    raw_peer,
    recv_in_thread,
    refuse_thread,
    run_outside,
    run_program,
    signal_main_thread,
)
from trisock.pluto import socket
from trisock.pluto.trio_thread import TrioThread

pytestmark = pytest.mark.usefixtures("bounded")  # some tests make blocking calls


def converse(client: Any, server: Any) -> None:
    client.send("hello")
    assert server.recv() == b"hello"


# ---- inside and outside Trio ----

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


def check_refused(s: Any, listening: Any, why: str) -> None:
    for thing, calls in ((s, CALLS), (listening, LISTENER_CALLS)):
        for call in calls:
            with pytest.raises(RuntimeError, match=f"this {type(thing).__name__} was {why}"):
                call(thing)
    assert not s.istls()  # istls, getside and getpeer work everywhere
    assert s.getside() == "client"
    assert s.getpeer()


def test_objects_made_outside_trio_cannot_be_used_inside_trio() -> None:
    client, server = run_outside(pair())
    listening = socket.listen(0)

    async def use() -> None:
        check_refused(client, listening, "made outside Trio: it cannot be used inside Trio")

    trio.run(use)
    converse(client, server)


def test_objects_made_in_a_trio_run_work_only_there() -> None:
    made = []
    why = "made inside Trio: it cannot be used"

    async def make() -> None:
        client, _ = await pair()
        made.extend([client, socket.listen(0)])
        await in_thread(lambda: check_refused(*made, f"{why} outside Trio"))

    async def use() -> None:
        check_refused(*made, f"{why} in another run of Trio")

    trio.run(make)
    check_refused(*made, f"{why} outside Trio")
    trio.run(use)


# ---- threads ----


def test_several_threads_can_use_different_sockets_concurrently() -> None:
    def exchange(number: int) -> None:
        client, server = run_outside(pair())
        for n in range(50):
            client.send(f"{number} {n}")
            assert server.recv() == f"{number} {n}".encode()

    for thread in [Thread(functools.partial(exchange, number)) for number in range(8)]:
        thread.result()


def test_one_thread_can_read_a_socket_while_another_sends() -> None:
    client, raw = run_outside(raw_peer())
    with raw:
        reading = recv_in_thread(client)
        client.send("question")
        assert raw.recv(100) == b"question"
        raw.sendall(b"answer")
        assert reading.result() == b"answer"


def test_two_threads_cannot_read_from_one_socket_concurrently() -> None:
    client, raw = run_outside(raw_peer())
    with raw:
        reading = recv_in_thread(client)
        for call in (client.recv, client.peek, lambda: client.unrecv("x")):
            with pytest.raises(trio.BusyResourceError, match="reading"):
                call()
        raw.sendall(b"hello")
        assert reading.result() == b"hello"


def test_recv_returns_none_when_another_thread_closes_the_socket() -> None:
    client, raw = run_outside(raw_peer())
    with raw:
        reading = recv_in_thread(client)
        client.close()
        assert reading.result() is None


# ---- the background thread ----


@contextlib.contextmanager
def no_descriptors_left() -> Iterator[None]:
    """During the block, use up all descriptors of the process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    descriptors: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                descriptors.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for each in descriptors:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_failed_thread_start_raises_oserror_and_can_be_retried(own_thread: TrioThread) -> None:
    with no_descriptors_left():
        for _ in range(2):
            with pytest.raises(OSError, match="Too many open files"):
                own_thread.call(trio.lowlevel.checkpoint)
    own_thread.stop()  # stop also works after a failed start
    own_thread.call(trio.lowlevel.checkpoint)
    with no_descriptors_left():
        own_thread.call(trio.lowlevel.checkpoint)  # the thread is already running
    own_thread.stop()
    with no_descriptors_left(), pytest.raises(OSError, match="Too many open files"):
        own_thread.call(trio.lowlevel.checkpoint)
    own_thread.call(trio.lowlevel.checkpoint)  # this call starts a new thread


def test_ctrl_c_during_a_failed_thread_start_raises_keyboard_interrupt(
    own_thread: TrioThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trio.run
    interrupted = threading.Event()

    def fail(*_: Any) -> None:
        monkeypatch.setattr(trio, "run", run)
        signal_main_thread()
        interrupted.wait(DEADLINE)
        raise_emfile()

    monkeypatch.setattr(trio, "run", fail)
    with pytest.raises(KeyboardInterrupt):
        own_thread.call(trio.lowlevel.checkpoint)
    failing = background_threads()
    interrupted.set()
    for each in failing:
        each.join()
    own_thread.call(trio.lowlevel.checkpoint)


def test_calls_work_after_the_system_refuses_to_start_a_thread(
    own_thread: TrioThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse_thread)
        with pytest.raises(RuntimeError, match="new thread"):
            own_thread.call(trio.lowlevel.checkpoint)
    own_thread.call(trio.lowlevel.checkpoint)


def test_the_background_thread_starts_with_the_first_call() -> None:
    printed = run_program(
        """
        import threading
        def threads():
            print([each.name for each in threading.enumerate() if each.name == "trisock"])
        threads()
        listening = socket.listen(0)
        threads()
        listening.hasconnection()
        threads()
        """,
        *STRICT,
    )
    assert printed == "[]\n[]\n['trisock']\n"


def test_a_process_with_open_sockets_exits_silently() -> None:
    run_program(
        """
        import threading
        listening = socket.listen(0)
        client = socket.connect("127.0.0.1", listening.port)
        server = listening.accept()
        waiting = socket.connect("127.0.0.1", listening.port)
        assert listening.hasconnection()
        bound = socket.bind(scheduler(), 0, print)
        threading.Thread(target=server.recv, daemon=True).start()
        while not server._transport.sock._connection.reading.in_use:
            server.istls()
        """,
        *STRICT,
    )


# ---- fork ----


def test_parent_and_child_work_after_a_fork_before_any_call() -> None:
    listening = socket.listen(0)
    in_child(lambda: converse(*run_outside(pair())))
    in_child(lambda: converse(socket.connect("127.0.0.1", listening.port), listening.accept()))
    converse(*run_outside(pair()))


def test_child_and_parent_work_after_a_fork() -> None:
    client, server = run_outside(pair())
    converse(client, server)

    def use_sockets() -> None:
        assert not background_threads()
        converse(server, client)
        converse(*run_outside(pair()))
        in_child(lambda: converse(client, server))  # the child forks a child of its own
        converse(client, server)

    in_child(use_sockets)
    assert not background_threads()  # the fork has stopped the background thread
    converse(client, server)
    in_child(use_sockets)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Trio's resolver thread may still run
def test_names_resolve_before_and_after_a_fork() -> None:
    def by_name() -> None:
        with stdlib.create_server(("127.0.0.1", 0)) as listening:
            assert socket.connect("localhost", listening.getsockname()[1]) is not None

    by_name()
    in_child(by_name)
    by_name()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # os.fork warns if threads run
def test_child_and_parent_work_after_a_fork_during_a_call() -> None:
    client, raw = run_outside(raw_peer())
    with raw:
        reading = recv_in_thread(client)

        def use_sockets() -> None:
            client.send("from the child")
            converse(*run_outside(pair()))

        in_child(use_sockets)
        assert raw.recv(100) == b"from the child"
        client.send("from the parent")
        assert raw.recv(100) == b"from the parent"
        raw.sendall(b"hello")
        assert reading.result() == b"hello"


def test_a_fork_inside_trio_does_not_disturb_the_run() -> None:
    client, server = run_outside(pair())

    async def main() -> None:
        in_child(lambda: os.fstat(client._transport.sock.fileno()))
        await trio.lowlevel.checkpoint()

    trio.run(main)
    converse(client, server)


def test_fork_between_calls_emits_no_warning(times: int) -> None:
    run_program(
        f"""
        import os
        listening = socket.listen(0)
        client = socket.connect("127.0.0.1", listening.port)
        server = listening.accept()
        for _ in range(5 * {times}):
            client.send("x")
            assert server.recv() == b"x"
            number = os.fork()
            if not number:
                client.send("y")
                assert server.recv() == b"y"
                break
            assert os.waitpid(number, 0)[1] == 0  # the child ran to the end of the program
        """,
        *STRICT,
        timeout=DEADLINE * times,
    )


def test_calls_work_on_a_platform_without_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "register_at_fork")
    thread = TrioThread()
    thread.call(trio.lowlevel.checkpoint)
    thread.stop()
