"""The paths of Unix sockets: hostile users, forks, locks and unusual directories.

Some of these tests need root, to become another user.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import shutil
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

import trisock
from helpers.forks import NOBODY, after_nobody, child, run_in_child
from helpers.pairs import closing
from helpers.unix_paths import accepts, leave_stale, listen_once

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory that every user can write to, like /tmp but not sticky."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o777)
    yield directory
    shutil.rmtree(directory)


# ---- fork ----


def serve_and_stop(listener: trisock.Listener) -> None:
    async def handler(sock: trisock.Socket) -> None: ...

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            server = await trisock.bind(nursery, listener, handler)
            server.stop(grace=0)

    trio.run(main)


@pytest.mark.parametrize("end", [serve_and_stop, trisock.Listener.abort])
def test_a_forked_child_does_not_remove_its_parents_path(
    path: Path, end: Callable[[trisock.Listener], None]
) -> None:
    listener = trisock.listen_unix_nowait(path)
    try:
        run_in_child(lambda: end(listener))
        assert accepts(listener, path)
    finally:
        listener.abort()
    assert not path.exists()


def test_a_forked_child_removes_the_path_it_made(path: Path) -> None:
    run_in_child(lambda: trisock.listen_unix_nowait(path).abort())
    assert not path.exists()


def test_a_child_that_drops_a_pluto_listener_keeps_the_path(path: Path) -> None:
    from trisock.pluto import listener as pluto_listener

    listening = trisock.listen_unix_nowait(path)
    listeners = [pluto_listener(listening, None)]
    run_in_child(listeners.clear)
    assert accepts(listening, path)
    listeners.clear()
    assert not path.exists()


def test_a_forked_child_does_not_close_an_accepted_connection(path: Path) -> None:
    listener = trisock.listen_unix_nowait(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert listener.hasconnection()

        def abort() -> None:
            assert not listener.hasconnection()
            listener.abort()

        run_in_child(abort)
        sock = trio.run(listener.accept)
        client.sendall(b"x")
        assert sock.stream.socket.recv  # still open
        assert sock.isopen()
        sock.abort()
    listener.abort()


# ---- mode ----


@contextlib.contextmanager
def after_bind(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> Iterator[None]:
    """Call ``act`` immediately after each ``bind(2)``."""

    class ActsAfterBind(socket.socket):
        def bind(self, address: object) -> None:
            super().bind(address)  # type: ignore[arg-type]
            act()

    with monkeypatch.context() as patch:
        patch.setattr(socket, "socket", ActsAfterBind)
        yield


def by_link(path: Path, victim: Path) -> None:
    path.unlink()
    path.symlink_to(victim)


def by_hard_link(path: Path, victim: Path) -> None:
    path.unlink()
    os.link(victim, path)


def by_rename(path: Path, victim: Path) -> None:
    os.rename(victim, path)
    os.link(path, victim)
    os.rename(victim, f"{victim}.moved")
    os.rename(f"{victim}.moved", victim)


SWAPS = [by_link, by_hard_link, by_rename]


@pytest.mark.parametrize("kind", ["file", "socket"])
@pytest.mark.parametrize("swap", SWAPS)
async def test_listening_on_a_swapped_path_fails_and_changes_no_mode(
    path: Path, monkeypatch: pytest.MonkeyPatch, swap: Callable[[Path, Path], None], kind: str
) -> None:
    victim = path.with_name("victim")
    if kind == "file":
        victim.write_text("precious")
    else:
        leave_stale(victim)
    victim.chmod(0o600)
    with after_bind(monkeypatch, lambda: swap(path, victim)):
        with pytest.raises(OSError, match="another file") as caught:
            await trisock.listen_unix(path, mode=0o666)
    assert caught.value.filename == str(path)
    assert stat.S_IMODE(victim.lstat().st_mode) == 0o600
    assert path.lstat()  # another program's file, so it is not removed


async def test_another_live_socket_renamed_into_place_keeps_its_mode(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = path.with_name("other")
    async with await trisock.listen_unix(other, mode=0o600):
        with after_bind(monkeypatch, lambda: os.rename(other, path)):
            with pytest.raises(FileExistsError, match="another file"):
                await trisock.listen_unix(path, mode=0o666)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        path.unlink()


@pytest.mark.parametrize("mode", [None, 0o600])
async def test_a_path_removed_after_bind_raises_an_oserror(
    path: Path, monkeypatch: pytest.MonkeyPatch, mode: int | None
) -> None:
    with after_bind(monkeypatch, path.unlink), pytest.raises(FileNotFoundError) as caught:
        await trisock.listen_unix(path, mode=mode)
    assert caught.value.filename == str(path)


@pytest.mark.parametrize("mode", [0, 0o600, 0o660, 0o666, 0o777])
@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
def test_the_mode_does_not_depend_on_the_umask(path: Path, mode: int, umask: int) -> None:

    def listen() -> None:
        os.umask(umask)
        for _ in range(2):
            listener = trisock.listen_unix_nowait(path, mode=mode)
            assert stat.S_IMODE(path.stat().st_mode) == mode
            listener.abort()
            assert not path.exists()
            leave_stale(path)  # the second round must replace this socket

    run_in_child(listen)


@needs_root
def test_the_mode_is_set_without_proc(tmp_path: Path) -> None:
    def listen() -> None:
        os.chroot(tmp_path)
        os.chdir("/")
        assert not os.path.exists("/proc")
        listener = trisock.listen_unix_nowait("/socket", mode=0o666)
        assert stat.S_IMODE(os.stat("/socket").st_mode) == 0o666
        listener.abort()
        assert os.listdir("/") == []

    run_in_child(listen)


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("free", range(6))
def test_running_out_of_descriptors_leaves_nothing_behind(
    path: Path, free: int, stale: bool
) -> None:
    if stale:
        leave_stale(path)

    def listen() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        taken: list[int] = []
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        for descriptor in taken[len(taken) - free :]:
            os.close(descriptor)
        error = None
        try:
            trisock.listen_unix_nowait(path, mode=0o600).abort()
        except OSError as exc:
            error = exc.errno
        if free < 2:
            assert error == errno.EMFILE
        if free > 4:
            assert error is None
        os.close(taken[0])
        left = os.listdir(path.parent)
        assert left == ([path.name] if error and stale else [])

    run_in_child(listen)


@needs_root
def test_a_hostile_user_cannot_change_another_files_mode(shared: Path, times: int) -> None:
    """Another user's process replaces the path with links, again and again."""
    path, victim = shared / "socket", shared.parent / f"{shared.name}.victim"
    victim.write_text("precious")
    victim.chmod(0o600)

    def swap() -> None:
        name, link = os.fsencode(path), os.fsencode(shared / "link")
        while True:
            os.symlink(victim, link)
            while not os.access(name, os.F_OK, follow_symlinks=False):
                pass
            os.rename(link, name)
            time.sleep(0.0001)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)

    try:
        with child(swap, user=NOBODY):
            for _ in range(300 * times):
                with contextlib.suppress(OSError):
                    trisock.listen_unix_nowait(path, mode=0o666).abort()
                assert stat.S_IMODE(victim.stat().st_mode) == 0o600
    finally:
        victim.unlink()


# ---- the lock file ----


@needs_root
@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("kind", [fcntl.LOCK_SH, fcntl.LOCK_EX])
def test_a_user_who_locks_the_directory_blocks_nobody(
    tmp_path: Path, path: Path, kind: int, stale: bool
) -> None:
    for directory in [tmp_path, *list(tmp_path.parents)[:2]]:
        directory.chmod(0o755)
    if stale:
        leave_stale(path)
    # Open the directory before the fork: some parent directories may be closed to another user.
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        with after_nobody(lambda: fcntl.flock(directory, kind)):
            listen_once(path)
    finally:
        os.close(directory)
    assert os.listdir(tmp_path) == []


@needs_root
@pytest.mark.parametrize("mode", [0o300, 0o1777, 0o700])
@pytest.mark.parametrize("stale", [False, True])
def test_listening_works_in_every_directory_where_bind_works(
    shared: Path, mode: int, stale: bool
) -> None:
    path = shared / "socket"
    os.chown(shared, NOBODY if mode != 0o1777 else 0, 0)
    shared.chmod(mode)

    def listen() -> None:
        if stale:
            leave_stale(path)
        listen_once(path, mode=0o666)

    run_in_child(listen, user=NOBODY)
    assert os.listdir(shared) == []


def make_symlink(path: Path) -> None:
    path.symlink_to("/dev/null")


def make_locked(path: Path, mode: int = 0o666) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, mode)
    fcntl.flock(descriptor, fcntl.LOCK_EX)


def make_locked_and_private(path: Path) -> None:
    make_locked(path, 0o600)  # only root and the file's owner can open the file


@needs_root
@pytest.mark.parametrize(
    "make", [make_symlink, os.mkfifo, os.mkdir, make_locked, make_locked_and_private]
)
def test_another_users_lock_file_blocks_nobody(shared: Path, make: Callable[[Path], None]) -> None:
    shared.chmod(0o1777)
    path = shared / "socket"
    lock = shared / ".socket.0.lock"
    leave_stale(path)
    with after_nobody(lambda: make(lock)):
        listen_once(path)
    assert os.listdir(shared) == [lock.name]


@contextlib.contextmanager
def blocked_replacement(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Yield while a thread in listen_unix_nowait has found a stale path and not yet replaced it."""
    inside, resume = threading.Event(), threading.Event()
    real = os.unlink

    def unlink(name: str | bytes, **options: int) -> None:
        if os.fsencode(name).endswith(b"socket") and not inside.is_set():
            inside.set()
            resume.wait(30)
        real(name, **options)  # type: ignore[arg-type]

    listeners: list[trisock.Listener] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", unlink)
        starter = threading.Thread(
            target=lambda: listeners.append(trisock.listen_unix_nowait(path))
        )
        starter.start()
        try:
            assert inside.wait(30)
            yield
        finally:
            resume.set()
            starter.join()
    assert accepts(listeners[0], path)
    listeners[0].abort()


def test_listen_unix_nowait_does_not_wait_for_another_call(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_stale(path)
    with blocked_replacement(path, monkeypatch):
        (lock,) = (name for name in tmp_path.iterdir() if name != path)
        assert stat.S_IMODE(lock.stat().st_mode) == 0o600
        with pytest.raises(BlockingIOError, match="starting to listen on this path") as caught:
            trisock.listen_unix_nowait(path)
        assert caught.value.filename == str(path)
        trisock.listen_unix_nowait(tmp_path / "other").abort()
    assert os.listdir(tmp_path) == []


async def test_listen_unix_times_out_if_another_call_does_not_finish(
    path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    leave_stale(path)
    with blocked_replacement(path, monkeypatch):
        with pytest.raises(TimeoutError, match="starting to listen on this path"):
            await trisock.listen_unix(path)


async def test_a_socket_between_bind_and_listen_is_not_stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as starting:
        starting.bind(str(path))
        with pytest.raises(OSError, match="in use"):
            await trisock.listen_unix(path)
        starting.listen()
        client = await trisock.connect_unix(path)
        async with closing(client):
            pass


async def test_a_dead_programs_lock_file_blocks_nobody(tmp_path: Path, path: Path) -> None:
    leave_stale(path)
    lock = tmp_path / f".socket.{os.geteuid()}.lock"
    lock.touch(0o600)
    async with await trisock.listen_unix(path):
        pass
    assert os.listdir(tmp_path) == []


@needs_root
def test_a_sticky_directory_keeps_another_users_stale_path(shared: Path) -> None:
    shared.chmod(0o1777)
    path = shared / "socket"
    leave_stale(path)
    path.chmod(0o777)

    def listen() -> None:
        with pytest.raises(PermissionError) as caught:
            trisock.listen_unix_nowait(path)
        assert caught.value.filename == str(path)

    run_in_child(listen, user=NOBODY)
    assert path.exists()
