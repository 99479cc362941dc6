"""listen_unix: the path comes and goes with its listener."""

from __future__ import annotations

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


async def test_a_path_goes_away_with_its_listener(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    listener = await trisock.listen_unix(path)
    assert listener.port == 0
    assert listener.addresses == ((str(path), 0),)
    assert stat.S_ISSOCK(path.stat().st_mode)
    await listener.close()
    assert not path.exists()


async def test_a_path_that_is_somebody_elses_by_then_stays(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    async with await trisock.listen_unix(path):
        path.unlink()
        path.touch()
    assert path.exists()
    path.unlink()
    async with await trisock.listen_unix(path):
        path.unlink()


async def test_a_relative_path_goes_away_also_after_chdir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with await trisock.listen_unix("socket"):
        monkeypatch.chdir("/")
        assert (tmp_path / "socket").exists()
    assert not (tmp_path / "socket").exists()


async def test_a_path_where_somebody_listens_is_in_use(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    async with await trisock.listen_unix(path) as listener:
        for _ in range(2):
            with pytest.raises(OSError, match="in use") as caught:
                await trisock.listen_unix(path)
            assert caught.value.errno == errno.EADDRINUSE
            assert caught.value.filename == str(path)
        assert not listener.hasconnection()  # asking has left no connection behind
        client = await trisock.connect_unix(path)
        async with closing(client, await listener.accept()):
            pass


async def test_a_stale_path_is_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with await trisock.listen_unix(path) as listener:
        client = await trisock.connect_unix(path)
        async with closing(client, await listener.accept()):
            pass
    path.write_text("precious")
    with pytest.raises(OSError, match="in use"):
        await trisock.listen_unix(path)
    assert path.read_text() == "precious"


async def test_only_one_of_several_starters_wins(tmp_path: Path) -> None:
    """Each of them finds the path stale; the lock lets only one replace it."""
    path = tmp_path / "socket"
    starter = (
        "import sys, trio, trisock\n"
        "async def main():\n"
        "    print('ready', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    try:\n"
        "        async with await trisock.listen_unix(sys.argv[1]) as listener:\n"
        "            print('won', flush=True)\n"
        "            await trio.to_thread.run_sync(sys.stdin.readline)\n"
        "    except OSError:\n"
        "        print('lost', flush=True)\n"
        "trio.run(main)\n"
    )
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        starters = [
            subprocess.Popen(
                [sys.executable, "-c", starter, str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(4)
        ]

        for process in starters:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in starters:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        results = [process.stdout.readline().strip() for process in starters]  # type: ignore[union-attr]
        for process in starters:
            process.communicate("\n")
        assert sorted(results) == ["lost", "lost", "lost", "won"]
        assert not path.exists()


async def test_the_mode_is_set_before_the_first_client_can_connect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "socket"
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


async def test_a_missing_directory_is_an_oserror_with_the_path(tmp_path: Path) -> None:
    path = tmp_path / "nothing" / "socket"
    with pytest.raises(FileNotFoundError) as caught:
        await trisock.listen_unix(path)
    assert caught.value.filename == str(path)


async def test_a_mode_that_cannot_be_set_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "socket"

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(os, "chmod", refuse)
    with pytest.raises(PermissionError):
        await trisock.listen_unix(path, mode=0o600)
    assert not path.exists()


async def test_a_cancelled_close_of_a_listener_closes_it(tmp_path: Path) -> None:
    listener = await trisock.listen_unix(tmp_path / "socket")
    with trio.CancelScope() as scope:
        scope.cancel()
        await listener.close()
    assert scope.cancelled_caught
    assert not (tmp_path / "socket").exists()
    with pytest.raises(trio.ClosedResourceError):
        listener.hasconnection()


async def test_errors_name_the_path_also_where_no_descriptor_is_left(
    tmp_path: Path,
) -> None:
    path = tmp_path / "sock"
    for call in (trisock.listen_unix, trisock.connect_unix):
        with few_descriptors(0), pytest.raises(OSError, match="Too many open files") as caught:
            await call(path)
        assert (caught.value.errno, caught.value.filename) == (errno.EMFILE, str(path))


def test_a_plain_call_listens_on_a_path_outside_trio(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    listener = trisock.listen_unix_nowait(path, mode=0o600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(OSError, match="in use") as caught:
        trisock.listen_unix_nowait(path)
    assert caught.value.errno == errno.EADDRINUSE
    listener.abort()
    assert not path.exists()
