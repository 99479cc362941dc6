"""While send_file waits for a pipe or a disk, other tasks run, and send_file can be cancelled."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import socket
import threading
import tty
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import pytest
import trio
import trio.testing

from helpers.pairs import clog, closing
from trisock import Socket
from trisock.testing import socket_pair

Write = Callable[[bytes], object]
Silent = tuple[BinaryIO, Write]


@pytest.fixture
def kind() -> str:
    return "pipe"


@pytest.fixture
def silent(kind: str) -> Iterator[Silent]:
    """A pipe or similar file that has no data yet, and a function that writes to its other end."""
    with contextlib.ExitStack() as stack:
        if kind.endswith("socket"):
            one, other = (stack.enter_context(each) for each in socket.socketpair())
            buffering = 0 if kind == "raw socket" else -1
            yield stack.enter_context(one.makefile("rb", buffering=buffering)), other.sendall
        else:
            if kind == "terminal":
                writing, reading = pty.openpty()
                tty.setraw(reading)
            else:
                reading, writing = os.pipe()
            stack.callback(os.close, writing)
            file = stack.enter_context(open(reading, "rb", buffering=0 if kind == "pipe" else -1))
            yield file, lambda data: os.write(writing, data)


ALL_KINDS = pytest.mark.parametrize(
    "kind", ["pipe", "buffered pipe", "terminal", "socket", "raw socket"]
)


@pytest.mark.parametrize("layer", ["plain", "tls"])
@ALL_KINDS
async def test_send_file_can_be_cancelled_while_it_waits_for_data(
    a: Socket, b: Socket, silent: Silent
) -> None:
    file, write = silent
    flags = fcntl.fcntl(file.fileno(), fcntl.F_GETFL)
    descriptors = os.listdir("/proc/self/fd")
    ended = trio.Event()

    async def send() -> None:
        try:
            await a.send_file(file)
        finally:
            ended.set()

    async with trio.open_nursery() as nursery, trio.open_nursery() as sending:
        sending.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        sending.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await trio.testing.wait_all_tasks_blocked(0.01)
            was_cancelled = ended.is_set()
            write(b"kept")  # wakes any thread that is still reading, so that the test can end
        nursery.cancel_scope.cancel()
    assert was_cancelled
    assert os.listdir("/proc/self/fd") == descriptors
    assert fcntl.fcntl(file.fileno(), fcntl.F_GETFL) == flags
    # The connection still works, and no byte of the file was lost.
    await a.send(b"free ")
    assert await a.send_file(file, count=4) == 4
    assert await b.recv_exactly(9) == b"free kept"


@pytest.mark.parametrize("layer", ["plain", "tls"])
@pytest.mark.parametrize("how", ["close", "abort", "cancelled close"])
async def test_closing_the_socket_ends_a_send_file_that_waits(
    how: str, layer: str, a: Socket, b: Socket, silent: Silent
) -> None:
    file, write = silent
    ended = trio.Event()

    async def send() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await a.send_file(file)
        ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        write(b"a part")
        assert await b.recv() == b"a part"
        await trio.testing.wait_all_tasks_blocked(0.01)
        if how == "abort":
            a.abort()
        else:
            with trio.CancelScope() as scope:
                if how == "cancelled close":
                    scope.cancel()
                await a.close()
        await trio.testing.wait_all_tasks_blocked(0.01)
        was_woken = ended.is_set()
        write(b"also wakes a thread that still reads")
    assert was_woken
    if layer == "tls":
        with pytest.raises(trio.BrokenResourceError):
            await b.recv()


@pytest.mark.parametrize("family", ["unix"])
@ALL_KINDS
async def test_a_pipe_is_not_read_while_sending_would_block(
    a: Socket, b: Socket, silent: Silent
) -> None:
    await clog(a)
    file, write = silent
    write(b"kept")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.send_file, file)
        await trio.testing.wait_all_tasks_blocked(0.01)
        nursery.cancel_scope.cancel()
    assert file.read(4) == b"kept"
    assert a.info().isopen
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.send, b"sending continues")
        while not (await b.recv()).endswith(b"sending continues"):
            pass


@pytest.mark.parametrize("kind", ["buffered pipe"])
async def test_bytes_read_ahead_from_a_pipe_are_sent_immediately(
    a: Socket, b: Socket, silent: Silent
) -> None:
    file, write = silent
    write(b"header\nbody")
    assert file.readline() == b"header\n"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.send_file, file)
        assert await b.recv_exactly(4) == b"body"
        write(b" and more")
        assert await b.recv_exactly(9) == b" and more"
        nursery.cancel_scope.cancel()


async def test_several_sends_of_one_pipe_send_each_byte_once(silent: Silent) -> None:
    file, write = silent
    pairs = [await socket_pair() for _ in range(3)]
    async with closing(*(sock for each in pairs for sock in each)):
        async with trio.open_nursery() as nursery:
            for a, _ in pairs:
                nursery.start_soon(a.send_file, file)
            got = 0
            for number in range(30):
                await trio.testing.wait_all_tasks_blocked()
                write(b"%02d" % number)
                await trio.testing.wait_all_tasks_blocked()
                got += sum([len((await b.peek() and await b.recv()) or b"") for _, b in pairs])
            nursery.cancel_scope.cancel()
        assert got == 60


async def test_an_offset_into_a_pipe_is_refused(a: Socket, b: Socket, silent: Silent) -> None:
    file, write = silent
    write(b"12345")
    with pytest.raises(OSError, match="offset must be 0 for a file that cannot seek"):
        await a.send_file(file, 2)
    assert await a.send_file(file, count=3) == 3
    await a.send(b"!")
    assert await b.recv_exactly(4) == b"123!"


async def test_a_slow_pipe_delays_no_other_task(a: Socket, b: Socket) -> None:
    reading, writing = os.pipe()
    requests = [threading.Event() for _ in range(3)]
    in_time: list[bool] = []
    progress: list[int] = []

    def write() -> None:
        with open(writing, "wb", buffering=0) as pipe:
            for request in requests:
                in_time.append(request.wait(10))  # times out if the reader blocks all tasks
                pipe.write(b"piece ")

    async def send() -> None:
        with open(reading, "rb", buffering=0) as pipe:
            assert await a.send_file(pipe, progress=progress.append) == 18

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, write)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(send)
        for number, request in enumerate(requests):
            await trio.testing.wait_all_tasks_blocked()  # the reader waits for data
            assert progress == [6, 12][:number]
            request.set()
            assert await b.recv_exactly(6) == b"piece "
            await b.send(b"thanks")
            assert await a.recv() == b"thanks"
    assert in_time == [True] * 3
    assert progress == [6, 12, 18]


@pytest.mark.parametrize("layer", ["plain", "tls"])
@pytest.mark.parametrize("kind", ["file", "memory", "pipe", "gzip", "custom"])
@pytest.mark.parametrize("count", [None, 0])
async def test_send_file_is_a_cancel_point_for_every_file(
    kind: str, count: int | None, a: Socket, b: Socket, make_file: Any
) -> None:
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as pipe, open(writing, "wb"):
        file = pipe if kind == "pipe" else make_file(kind, b"")
        if count == 0:
            with trio.testing.assert_checkpoints():
                assert await a.send_file(file, count=count) == 0
        with trio.CancelScope() as scope:
            scope.cancel()
            await a.send_file(file, count=count)
        assert scope.cancelled_caught
    await a.send(b"free")
    assert await b.recv() == b"free"


@pytest.mark.parametrize("layer", ["tls"])
async def test_send_file_can_be_cancelled_while_the_disk_hangs(
    a: Socket,
    b: Socket,
    make_file: Any,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
) -> None:
    called, respond, ended = (threading.Event() for _ in range(3))
    real = os.pread

    def pread(*args: int) -> bytes:
        called.set()
        respond.wait(30)
        try:
            return real(*args)
        finally:
            ended.set()

    file = make_file("file", b"content")
    descriptors = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "pread", pread)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.send_file, file)
        while not called.is_set():
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert not ended.is_set()
    await a.send(b"free")
    assert await b.recv() == b"free"
    respond.set()
    assert ended.wait(30)
    # Wait until the thread has closed its duplicate of the file's descriptor.
    while not set(os.listdir("/proc/self/fd")) <= descriptors:
        await trio.lowlevel.checkpoint()
