"""Unix paths where a system lacks something, or somebody is faster."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

import trisock
from trisock._net import unix_path as _unix

PROC = "/proc/self/fd/"


def stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def test_a_listen_that_fails_leaves_no_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(sock: socket.socket, backlog: int) -> None:
        raise OSError(5, "broken")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="broken"):
        patch.setattr(socket.socket, "listen", broken)
        trisock.listen_unix_nowait(tmp_path / "s")
    assert os.listdir(tmp_path) == []


def test_what_is_no_socket_is_not_ours(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="another file"):
        _unix._identity("s", os.lstat(tmp_path))


def test_a_mode_is_set_where_a_socket_cannot_be_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(descriptor: int, mode: int) -> None:
        raise OSError(22, "not here")

    monkeypatch.setattr(_unix.os, "fchmod", broken)
    listener = trisock.listen_unix_nowait(tmp_path / "s", mode=0o600)
    assert stat.S_IMODE(os.lstat(tmp_path / "s").st_mode) == 0o600
    listener.abort()


@pytest.mark.parametrize("follows", [True, False])
@pytest.mark.parametrize("swapped", [True, False])
def test_without_proc_the_mode_is_set_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, follows: bool, swapped: bool
) -> None:
    really_chmod = os.chmod

    def chmod(path: str, mode: int, follow_symlinks: bool = True) -> None:
        if str(path).startswith(PROC):
            if swapped:
                os.unlink(tmp_path / "s")
                stale(tmp_path / "s")
            raise FileNotFoundError(path)
        really_chmod(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(_unix.os, "chmod", chmod)
        patch.setattr(_unix.os, "supports_follow_symlinks", {chmod} if follows else set())
        if swapped:
            with pytest.raises(OSError, match="another file"):
                trisock.listen_unix_nowait(tmp_path / "s", mode=0o600)
            return
        listener = trisock.listen_unix_nowait(tmp_path / "s", mode=0o600)
    assert stat.S_IMODE(os.lstat(tmp_path / "s").st_mode) == 0o600
    listener.abort()


def test_a_stale_path_is_replaced_where_there_is_no_o_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_unix, "_O_PATH", None)
    stale(tmp_path / "s")
    listener = trisock.listen_unix_nowait(tmp_path / "s", mode=0o600)
    listener.abort()
    assert os.listdir(tmp_path) == []


def test_a_path_that_is_gone_was_stale(tmp_path: Path) -> None:
    assert _unix._is_stale(str(tmp_path / "s"))


def test_a_stale_path_that_cannot_be_removed_is_an_oserror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise PermissionError(1, "not yours")

    stale(tmp_path / "s")
    with monkeypatch.context() as patch:
        patch.setattr(_unix, "_unlink", broken)
        with pytest.raises(PermissionError) as caught:
            _unix._remove_stale(str(tmp_path / "s"))
    assert caught.value.filename == str(tmp_path / "s")


def test_a_lock_that_its_holder_keeps_removing_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_open = _unix._open_lock

    def removed_at_once(path: bytes) -> int | None:
        descriptor = really_open(path)
        os.unlink(path)
        return descriptor

    stale(tmp_path / "s")
    monkeypatch.setattr(_unix, "_open_lock", removed_at_once)
    with pytest.raises(BlockingIOError, match="another program"):
        trisock.listen_unix_nowait(tmp_path / "s")


def test_without_a_descriptor_for_the_lock_it_is_an_oserror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> int:
        raise OSError(24, "too many open files")

    monkeypatch.setattr(_unix.os, "open", broken)
    with pytest.raises(OSError, match="too many open files"):
        _unix._open_lock(b"lock")


@pytest.mark.parametrize(
    ("mode", "error"), [(-1, ValueError), (0o10000, ValueError), (True, TypeError)]
)
def test_a_mode_that_is_none_is_refused(tmp_path: Path, mode: int, error: type[Exception]) -> None:
    with pytest.raises(error, match="mode is"):
        trisock.listen_unix_nowait(tmp_path / "s", mode=mode)
    assert os.listdir(tmp_path) == []


async def test_a_path_that_cannot_be_encoded_is_not_quoted() -> None:
    with pytest.raises(ValueError, match="cannot be encoded") as caught:
        await trisock.listen_unix("secret\ud800")
    assert "secret" not in str(caught.value)
    assert caught.value.__context__ is None
