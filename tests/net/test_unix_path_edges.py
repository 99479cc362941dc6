"""Edge cases of Unix paths: missing features, failed calls, and races with other programs."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

import trisock
from helpers.unix_paths import leave_stale
from trisock._net import unix_path as _unix

PROC = "/proc/self/fd/"


def test_a_failed_listen_call_leaves_no_path(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(sock: socket.socket, backlog: int) -> None:
        raise OSError(5, "broken")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="broken"):
        patch.setattr(socket.socket, "listen", broken)
        trisock.listen_unix_nowait(path)
    assert os.listdir(path.parent) == []


def test_a_directory_is_not_mistaken_for_our_socket(path: Path) -> None:
    with pytest.raises(OSError, match="another file"):
        _unix._identity("s", path.parent.lstat())


def test_the_mode_is_set_even_if_fchmod_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int, mode: int) -> None:
        raise OSError(22, "not here")

    monkeypatch.setattr(_unix.os, "fchmod", broken)
    listener = trisock.listen_unix_nowait(path, mode=0o600)
    assert stat.S_IMODE(os.lstat(path).st_mode) == 0o600
    listener.abort()


@pytest.mark.parametrize("follows", [True, False])
@pytest.mark.parametrize("swapped", [True, False])
def test_without_proc_the_mode_is_set_by_name(
    path: Path, monkeypatch: pytest.MonkeyPatch, follows: bool, swapped: bool
) -> None:
    really_chmod = os.chmod

    def chmod(name: str, mode: int, follow_symlinks: bool = True) -> None:
        if str(name).startswith(PROC):
            if swapped:
                os.unlink(path)
                leave_stale(path)
            raise FileNotFoundError(name)
        really_chmod(name, mode)

    with monkeypatch.context() as patch:
        patch.setattr(_unix.os, "chmod", chmod)
        patch.setattr(_unix.os, "supports_follow_symlinks", {chmod} if follows else set())
        if swapped:
            with pytest.raises(OSError, match="another file"):
                trisock.listen_unix_nowait(path, mode=0o600)
            return
        listener = trisock.listen_unix_nowait(path, mode=0o600)
    assert stat.S_IMODE(os.lstat(path).st_mode) == 0o600
    listener.abort()


def test_a_stale_path_is_replaced_even_without_o_path(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_unix, "_O_PATH", None)
    leave_stale(path)
    listener = trisock.listen_unix_nowait(path, mode=0o600)
    listener.abort()
    assert os.listdir(path.parent) == []


def test_a_path_that_no_longer_exists_is_stale(path: Path) -> None:
    assert _unix._is_stale(str(path))


def test_failing_to_remove_a_stale_path_raises_an_oserror(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise PermissionError(1, "not yours")

    leave_stale(path)
    with monkeypatch.context() as patch:
        patch.setattr(_unix, "_unlink", broken)
        with pytest.raises(PermissionError) as caught:
            _unix._remove_stale(str(path))
    assert caught.value.filename == str(path)


def test_a_lock_that_keeps_disappearing_raises_blocking_io_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_open = _unix._open_lock

    def open_and_unlink(lock: bytes) -> int | None:
        descriptor = really_open(lock)
        os.unlink(lock)
        return descriptor

    leave_stale(path)
    monkeypatch.setattr(_unix, "_open_lock", open_and_unlink)
    with pytest.raises(BlockingIOError, match="another program"):
        trisock.listen_unix_nowait(path)


def test_failing_to_open_the_lock_raises_an_oserror(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> int:
        raise OSError(24, "too many open files")

    monkeypatch.setattr(_unix.os, "open", broken)
    with pytest.raises(OSError, match="too many open files"):
        _unix._open_lock(b"lock")


@pytest.mark.parametrize(
    ("mode", "error"), [(-1, ValueError), (0o10000, ValueError), (True, TypeError)]
)
def test_an_invalid_mode_is_refused(path: Path, mode: int, error: type[Exception]) -> None:
    with pytest.raises(error, match="mode must be"):
        trisock.listen_unix_nowait(path, mode=mode)
    assert os.listdir(path.parent) == []


async def test_no_error_shows_a_path_that_cannot_be_encoded() -> None:
    with pytest.raises(ValueError, match="cannot be encoded") as caught:
        await trisock.listen_unix("secret\ud800")
    assert "secret" not in str(caught.value)
    assert caught.value.__context__ is None
