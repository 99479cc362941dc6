"""The paths of Unix sockets: hostile neighbours, forks, locks and odd directories.

Most of these need another user, and so root.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import shutil
import signal
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
from helpers.pairs import closing

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def die_with(code: int) -> None:
    os._exit(code)


@contextlib.contextmanager
def child(function: Callable[[], object], *, user: int | None = None) -> Iterator[int]:
    """Run a function in a forked child, as another user; its status is 0 if it returned."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if user is not None:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
            function()
            status = 0
        finally:
            die_with(status)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def run_in_child(function: Callable[[], object], *, user: int | None = None) -> None:
    with child(function, user=user) as pid:
        assert os.waitpid(pid, 0)[1] == 0


@pytest.fixture
def shared() -> Iterator[Path]:
    """Give a directory where every user can write, as in /tmp but not sticky."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o777)
    yield directory
    shutil.rmtree(directory)


def leave_stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


def accepts(listener: trisock.Listener, path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        return listener.hasconnection()


# ---- fork ----


def serve_and_stop(listener: trisock.Listener) -> None:
    async def handler(sock: trisock.Socket) -> None: ...

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            server = await trisock.bind(nursery, listener, handler)
            server.stop(grace=0)

    trio.run(main)


@pytest.mark.parametrize("end", [serve_and_stop, trisock.Listener.abort])
def test_a_forked_child_does_not_remove_the_path(
    tmp_path: Path, end: Callable[[trisock.Listener], None]
) -> None:
    path = tmp_path / "socket"
    listener = trisock.listen_unix_nowait(path)
    try:
        run_in_child(lambda: end(listener))
        assert accepts(listener, path)
    finally:
        listener.abort()
    assert not path.exists()


def test_a_forked_child_removes_the_path_it_made(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    run_in_child(lambda: trisock.listen_unix_nowait(path).abort())
    assert not path.exists()


def test_a_pluto_listener_dropped_in_a_child_leaves_the_path(tmp_path: Path) -> None:
    from trisock.pluto import listener as pluto_listener

    path = tmp_path / "socket"
    listening = trisock.listen_unix_nowait(path)
    listeners = [pluto_listener(listening, None)]

    run_in_child(listeners.clear)
    assert accepts(listening, path)
    listeners.clear()
    assert not path.exists()


def test_an_accepted_connection_stays_the_parents(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    listener = trisock.listen_unix_nowait(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert listener.hasconnection()

        def look() -> None:
            assert not listener.hasconnection()
            listener.abort()

        run_in_child(look)
        sock = trio.run(listener.accept)
        client.sendall(b"x")
        assert sock.stream.socket.recv  # still open
        assert sock.isopen()
        sock.abort()
    listener.abort()


# ---- mode ----


@contextlib.contextmanager
def after_bind(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> Iterator[None]:
    """Let somebody act once, between bind(2) and what follows."""

    class Watched(socket.socket):
        def bind(self, address: object) -> None:
            super().bind(address)  # type: ignore[arg-type]
            act()

    with monkeypatch.context() as patch:
        patch.setattr(socket, "socket", Watched)
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
async def test_a_swapped_path_is_an_oserror_and_no_mode_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: Callable[[Path, Path], None], kind: str
) -> None:
    path, victim = tmp_path / "socket", tmp_path / "victim"
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
    assert path.lstat()  # what is there is not ours to remove


async def test_a_live_socket_of_ours_in_its_place_keeps_its_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "socket", tmp_path / "other"
    async with await trisock.listen_unix(other, mode=0o600):
        with after_bind(monkeypatch, lambda: os.rename(other, path)):
            with pytest.raises(FileExistsError, match="another file"):
                await trisock.listen_unix(path, mode=0o666)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        path.unlink()


@pytest.mark.parametrize("mode", [None, 0o600])
async def test_a_path_that_is_removed_at_once_is_an_oserror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int | None
) -> None:
    path = tmp_path / "socket"
    with after_bind(monkeypatch, path.unlink), pytest.raises(FileNotFoundError) as caught:
        await trisock.listen_unix(path, mode=mode)
    assert caught.value.filename == str(path)


@pytest.mark.parametrize("mode", [0, 0o600, 0o660, 0o666, 0o777])
@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
def test_the_mode_is_exact_whatever_the_umask(tmp_path: Path, mode: int, umask: int) -> None:
    path = tmp_path / "socket"

    def listen() -> None:
        os.umask(umask)
        for _ in range(2):
            listener = trisock.listen_unix_nowait(path, mode=mode)
            assert stat.S_IMODE(path.stat().st_mode) == mode
            listener.abort()
            assert not path.exists()
            leave_stale(path)

    run_in_child(listen)


@needs_root
def test_the_mode_is_set_where_there_is_no_proc(tmp_path: Path) -> None:
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
def test_without_descriptors_nothing_is_left_behind(tmp_path: Path, free: int, stale: bool) -> None:
    path = tmp_path / "socket"
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
        left = os.listdir(tmp_path)
        assert left == ([path.name] if error and stale else [])

    run_in_child(listen)


@needs_root
def test_a_hostile_neighbour_changes_no_mode(shared: Path, times: int) -> None:
    """Another user swaps the path for links all the time, as fast as he can."""
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


# ---- the lock ----


@needs_root
@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("kind", [fcntl.LOCK_SH, fcntl.LOCK_EX])
def test_who_may_only_read_the_directory_stops_nobody(
    tmp_path: Path, kind: int, stale: bool
) -> None:
    path = tmp_path / "socket"
    for directory in [tmp_path, *list(tmp_path.parents)[:2]]:
        directory.chmod(0o755)
    if stale:
        leave_stale(path)
    reading, writing = os.pipe()
    # Opened before: the directories above need not let others in.
    directory_fd = os.open(tmp_path, os.O_RDONLY)

    def lock() -> None:
        fcntl.flock(directory_fd, kind)
        os.write(writing, b"x")
        signal.pause()

    try:
        with child(lock, user=NOBODY):
            assert os.read(reading, 1) == b"x"
            listener = trisock.listen_unix_nowait(path)
            assert accepts(listener, path)
            listener.abort()
    finally:
        for descriptor in (reading, writing, directory_fd):
            os.close(descriptor)
    assert os.listdir(tmp_path) == []


@needs_root
@pytest.mark.parametrize("mode", [0o300, 0o1777, 0o700])
@pytest.mark.parametrize("stale", [False, True])
def test_where_bind_works_listening_works(shared: Path, mode: int, stale: bool) -> None:
    path = shared / "socket"
    os.chown(shared, NOBODY if mode != 0o1777 else 0, 0)
    shared.chmod(mode)

    def listen() -> None:
        if stale:
            leave_stale(path)
        listener = trisock.listen_unix_nowait(path, mode=0o666)
        assert accepts(listener, path)
        listener.abort()

    run_in_child(listen, user=NOBODY)
    assert os.listdir(shared) == []


def make_symlink(path: Path) -> None:
    path.symlink_to("/dev/null")


def make_locked(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    fcntl.flock(descriptor, fcntl.LOCK_EX)


@needs_root
@pytest.mark.parametrize("make", [make_symlink, os.mkfifo, os.mkdir, make_locked])
def test_a_foreign_lock_file_stops_nobody(shared: Path, make: Callable[[Path], None]) -> None:
    shared.chmod(0o1777)
    path = shared / "socket"
    lock = shared / ".socket.0.lock"
    leave_stale(path)
    reading, writing = os.pipe()

    def put() -> None:
        make(lock)
        os.write(writing, b"x")
        signal.pause()

    try:
        with child(put, user=NOBODY):
            assert os.read(reading, 1) == b"x"
            listener = trisock.listen_unix_nowait(path)
            assert accepts(listener, path)
            listener.abort()
    finally:
        os.close(reading)
        os.close(writing)
    assert os.listdir(shared) == [lock.name]


@contextlib.contextmanager
def replacing_held(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stop another starter between finding the path stale and binding it."""
    inside, go_on = threading.Event(), threading.Event()
    real = os.unlink

    def unlink(name: str | bytes, **options: int) -> None:
        if os.fsencode(name).endswith(b"socket") and not inside.is_set():
            inside.set()
            go_on.wait(30)
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
            go_on.set()
            starter.join()
    assert accepts(listeners[0], path)
    listeners[0].abort()


def test_a_plain_call_does_not_wait_for_another_starter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "socket"
    leave_stale(path)
    with replacing_held(path, monkeypatch):
        (lock,) = (name for name in tmp_path.iterdir() if name != path)
        assert stat.S_IMODE(lock.stat().st_mode) == 0o600
        with pytest.raises(BlockingIOError, match="starting to listen on this path") as caught:
            trisock.listen_unix_nowait(path)
        assert caught.value.filename == str(path)
        trisock.listen_unix_nowait(tmp_path / "other").abort()
    assert os.listdir(tmp_path) == []


async def test_waiting_for_another_starter_has_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    path = tmp_path / "socket"
    leave_stale(path)
    with replacing_held(path, monkeypatch):
        with pytest.raises(TimeoutError, match="starting to listen on this path"):
            await trisock.listen_unix(path)


async def test_a_socket_that_does_not_listen_yet_is_not_stale(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as starting:
        starting.bind(str(path))
        with pytest.raises(OSError, match="in use"):
            await trisock.listen_unix(path)
        starting.listen()
        client = await trisock.connect_unix(path)
        async with closing(client):
            pass


async def test_a_lock_file_left_by_a_dead_program_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    leave_stale(path)
    lock = tmp_path / f".socket.{os.geteuid()}.lock"
    lock.touch(0o600)
    async with await trisock.listen_unix(path):
        pass
    assert os.listdir(tmp_path) == []


@needs_root
def test_a_stale_path_of_another_user_stays_in_a_sticky_directory(shared: Path) -> None:
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
