"""listen_unix: the path exists exactly while the listener is open."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

import trisock
from helpers.failures import few_descriptors
from helpers.pairs import closing


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "socket"


def make_stale(path: Path) -> None:
    """Leave a socket's file behind, as a killed process does."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


async def assert_accepts(listener: trisock.Listener, path: Path) -> None:
    client = await trisock.connect_unix(path)
    async with closing(client, await listener.accept()):
        pass


async def test_closing_a_listener_removes_its_path(path: Path) -> None:
    listener = await trisock.listen_unix(path)
    assert listener.port == 0
    assert listener.addresses == ((str(path), 0),)
    assert stat.S_ISSOCK(path.stat().st_mode)
    await listener.close()
    assert not path.exists()


async def test_closing_a_listener_keeps_a_path_that_was_replaced(path: Path) -> None:
    async with await trisock.listen_unix(path):
        path.unlink()
        path.touch()
    assert path.exists()
    path.unlink()
    async with await trisock.listen_unix(path):
        path.unlink()


async def test_closing_a_listener_removes_a_relative_path_after_chdir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with await trisock.listen_unix("socket"):
        monkeypatch.chdir("/")
        assert (tmp_path / "socket").exists()
    assert not (tmp_path / "socket").exists()


async def test_listen_unix_refuses_a_path_that_is_in_use(path: Path) -> None:
    async with await trisock.listen_unix(path) as listener:
        for _ in range(2):
            with pytest.raises(OSError, match="in use") as caught:
                await trisock.listen_unix(path)
            assert caught.value.errno == errno.EADDRINUSE
            assert caught.value.filename == str(path)
        assert not listener.hasconnection()  # the attempts have left no connection behind
        await assert_accepts(listener, path)


async def test_listen_unix_replaces_a_stale_socket_and_no_other_file(path: Path) -> None:
    make_stale(path)
    async with await trisock.listen_unix(path) as listener:
        await assert_accepts(listener, path)
    path.write_text("precious")
    with pytest.raises(OSError, match="in use"):
        await trisock.listen_unix(path)
    assert path.read_text() == "precious"


STARTER = """
import sys, trio, trisock

async def main():
    while True:
        print("ready", flush=True)
        if not sys.stdin.readline():
            return
        try:
            async with await trisock.listen_unix(sys.argv[1]):
                print("won", flush=True)
                sys.stdin.readline()
        except OSError:
            print("lost", flush=True)
            sys.stdin.readline()

trio.run(main)
"""


def test_only_one_of_several_processes_replaces_a_stale_socket(path: Path, times: int) -> None:
    """All processes find the socket stale. The lock lets only one process replace the socket."""
    with contextlib.ExitStack() as stack:
        starters = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", STARTER, str(path)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for _ in range(4)
        ]

        def tell_all_to_continue() -> None:
            for starter in starters:
                assert starter.stdin is not None
                starter.stdin.write("\n")
                starter.stdin.flush()

        def answers() -> list[str]:
            return [starter.stdout.readline().strip() for starter in starters]  # type: ignore[union-attr]

        for _ in range(100 * times):  # without the lock, one round in a hundred has two winners
            assert answers() == ["ready"] * 4
            make_stale(path)
            tell_all_to_continue()
            assert sorted(answers()) == ["lost", "lost", "lost", "won"]
            tell_all_to_continue()
        assert answers() == ["ready"] * 4
        assert not path.exists()


async def test_the_mode_is_set_before_the_first_client_can_connect(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []

    class Watching(socket.socket):
        def listen(self, backlog: int = 0) -> None:
            modes.append(stat.S_IMODE(path.stat().st_mode))
            super().listen(backlog)

    monkeypatch.setattr("trisock._net.unix_path.socket.socket", Watching)
    async with await trisock.listen_unix(path, mode=0o640):
        assert modes == [0o640]
    async with await trisock.listen_unix(path, mode=0o666):
        assert modes == [0o640, 0o666]


async def test_further_clients_wait_if_the_backlog_is_full(path: Path) -> None:
    async with await trisock.listen_unix(path, backlog=2):
        with contextlib.ExitStack() as clients:
            for _ in range(3):  # Linux queues one client more than the backlog
                sock = clients.enter_context(socket.socket(socket.AF_UNIX))
                sock.setblocking(False)
                sock.connect(str(path))
            with socket.socket(socket.AF_UNIX) as sock, pytest.raises(BlockingIOError):
                sock.setblocking(False)
                sock.connect(str(path))


async def test_a_missing_directory_raises_an_oserror_with_the_path(tmp_path: Path) -> None:
    path = tmp_path / "nothing" / "socket"
    with pytest.raises(FileNotFoundError) as caught:
        await trisock.listen_unix(path)
    assert caught.value.filename == str(path)


async def test_a_mode_that_cannot_be_set_leaves_nothing_behind(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(os, "chmod", refuse)
    with pytest.raises(PermissionError):
        await trisock.listen_unix(path, mode=0o600)
    assert not path.exists()


async def test_a_cancelled_close_still_closes_the_listener(tmp_path: Path) -> None:
    listener = await trisock.listen_unix(tmp_path / "socket")
    with trio.CancelScope() as scope:
        scope.cancel()
        await listener.close()
    assert scope.cancelled_caught
    assert not (tmp_path / "socket").exists()
    with pytest.raises(trio.ClosedResourceError):
        listener.hasconnection()


async def test_running_out_of_descriptors_raises_an_oserror_with_the_path(
    tmp_path: Path,
) -> None:
    path = tmp_path / "sock"
    for call in (trisock.listen_unix, trisock.connect_unix):
        with few_descriptors(0), pytest.raises(OSError, match="Too many open files") as caught:
            await call(path)
        assert (caught.value.errno, caught.value.filename) == (errno.EMFILE, str(path))


def test_listen_unix_nowait_works_outside_trio(path: Path) -> None:
    listener = trisock.listen_unix_nowait(path, mode=0o600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(OSError, match="in use") as caught:
        trisock.listen_unix_nowait(path)
    assert caught.value.errno == errno.EADDRINUSE
    listener.abort()
    assert not path.exists()
