"""Pluto's objects among runs of Trio, threads and processes."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import resource
import signal
import socket as stdlib
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio
import trio.testing

from helpers.deadline import DEADLINE
from helpers.pluto_kit import Thread, finish, in_thread, pair, raise_in_main, raw_peer, wait_a_pass
from trisock.pluto import socket
from trisock.pluto.trio_thread import TrioThread

pytestmark = pytest.mark.usefixtures("bounded")  # some of these calls block

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


def test_what_was_made_inside_trio_is_for_that_run_only() -> None:
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


def test_a_failed_start_is_an_oserror_and_later_calls_work(own: TrioThread) -> None:
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


def test_ctrl_c_during_a_failed_start_is_a_keyboard_interrupt(
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


def test_the_thread_lives_from_the_first_call_to_the_end() -> None:
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


def test_fork_after_calls_lets_child_and_parent_go_on() -> None:
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
