"""Callbacks of hs.socket's objects: their order, and the exceptions that they raise."""

# ruff: noqa: N802 (tests are named after hs.socket's names)

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import trisock
from helpers.hammerspoon import (
    LOCALHOST,
    Calls,
    Log,
    connect_to,
    connected,
    errors_in,
    fail,
    fail_in_a_group,
    fail_later,
    until,
)
from helpers.pairs import closing
from trisock import hammerspoon
from trisock.hammerspoon import Sockets

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup


async def test_callbacks_can_be_async(hs: Sockets, calls: Calls) -> None:
    async def callback(*arguments: object) -> None:
        await trio.lowlevel.checkpoint()
        calls(*arguments)

    client = hs.new(callback)
    async with await trisock.listen(0, host=LOCALHOST) as listener:
        client.connect(LOCALHOST, listener.port, callback)
        client.write("x\n", 1, callback).read("\n", 2)
        peer = await listener.accept()
        async with closing(peer):
            await peer.send(await peer.recv())
            assert await calls.take(3) == [(), (1,), (b"x\n", 2)]


async def test_an_objects_callbacks_run_one_at_a_time_in_order(hs: Sockets, calls: Calls) -> None:
    resume = trio.Event()

    async def connecting() -> None:
        calls("connected")
        await resume.wait()
        calls("still connecting")

    client = hs.new(calls)
    async with await trisock.listen(0, host=LOCALHOST) as listener:
        client.connect(LOCALHOST, listener.port, connecting)
        client.write("x\n", 1, calls)
        client.read("\n", 2)
        client.read("\n", 3)
        peer = await listener.accept()
        async with closing(peer):
            assert await calls.next() == ("connected",)
            assert await peer.recv() == b"x\n"  # the write does not wait for the callback
            await peer.send(b"a\nb\n")
            assert await calls.none()
            # The callbacks of another object do not wait for this object's callbacks.
            async with connected(hs, fn=calls) as (other, others_peer):
                other.read("\n")
                await others_peer.send(b"other\n")
                assert await calls.next() == (b"other\n", -1)
            resume.set()
            assert await calls.next() == ("still connecting",)
            assert await calls.take(3) == [(1,), (b"a\n", 2), (b"b\n", 3)]


@pytest.mark.parametrize(
    ("callback", "words"), [(fail, "plain"), (fail_later, "async"), (fail_in_a_group, "in a group")]
)
async def test_a_callback_error_is_logged_and_later_callbacks_run(
    hs: Sockets, calls: Calls, log: Log, callback: Callable[..., object], words: str
) -> None:
    client = hs.new(callback)
    async with await trisock.listen(0, host=LOCALHOST) as listener:
        client.connect(LOCALHOST, listener.port, callback)
        client.write("x\n", callback).read("\n")
        peer = await listener.accept()
        async with closing(peer):
            await peer.send(await peer.recv())
            await until(lambda: len(errors_in(log)) == 3)
            assert errors_in(log) == [f"a callback of {client!r} failed"] * 3
            assert f"ZeroDivisionError: {words}" in log.text
            client.setCallback(calls).read("\n")
            await peer.send(b"later\n")
            assert await calls.next() == (b"later\n", -1)


async def test_an_error_from_a_cancelled_callback_is_logged(log: Log) -> None:
    begun = trio.Event()

    async def fail_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            raise ZeroDivisionError("while it was cancelled") from None

    async def callback() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail_when_cancelled)
            nursery.start_soon(trio.sleep_forever)
            begun.set()

    async with hammerspoon.open_sockets() as hs:
        async with connected(hs) as (client, peer):
            client.disconnect().connect(*peer.getlocal(), callback)
            await begun.wait()
    [error] = errors_in(log)
    assert re.fullmatch(r"a callback of hs\.socket: .* failed", error)
    assert "ZeroDivisionError: while it was cancelled" in log.text


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), BaseExceptionGroup("group", [KeyboardInterrupt()])]
)
async def test_open_sockets_raises_a_BaseException_from_a_callback(error: BaseException) -> None:
    def callback() -> None:
        raise error

    with pytest.raises(BaseException) as caught:  # noqa: PT011
        async with hammerspoon.open_sockets() as hs:
            connect_to(hs.server(0), hs.new(), callback)
            await trio.sleep_forever()
    assert isinstance(caught.value, BaseExceptionGroup)
    assert caught.value.split(KeyboardInterrupt)[1] is None  # the group holds nothing else


class Group(BaseExceptionGroup[Exception]):
    """A BaseExceptionGroup that holds only Exceptions."""


async def test_a_BaseExceptionGroup_of_Exceptions_from_a_callback_is_logged(
    hs: Sockets, log: Log
) -> None:
    def callback() -> None:
        raise Group("group", [ZeroDivisionError("in a group")])

    async with connected(hs) as (client, peer):
        client.disconnect().connect(*peer.getlocal(), callback)
        await until(lambda: errors_in(log))
        assert "ZeroDivisionError: in a group" in log.text


async def test_an_async_callback_can_reconnect_its_own_object(hs: Sockets, calls: Calls) -> None:
    async def callback(data: bytes, tag: int) -> None:
        calls(data, tag)
        if data == b"again\n":
            client.disconnect()
            await trio.lowlevel.checkpoint()
            assert client.connect(LOCALHOST, listener.port, reconnected) is client
            client.write("me again\n").read("\n", 2)
            await wait_all_tasks_blocked(0.01)
            calls("still in the first callback")

    def reconnected() -> None:
        calls("connected")

    async with await trisock.listen(0, host=LOCALHOST) as listener:
        client = hs.new(callback)
        client.connect(LOCALHOST, listener.port)
        client.read("\n", 1)
        client.read("\n", 99)  # is dropped
        peer = await listener.accept()
        async with closing(peer):
            await peer.send(b"again\n")
            again = await listener.accept()
            async with closing(again):
                assert await peer.recv() == b""
                assert await again.recv_until(b"\n") == b"me again\n"
                await again.send(b"welcome\n")
                assert await calls.take(4) == [
                    (b"again\n", 1),
                    ("still in the first callback",),
                    ("connected",),
                    (b"welcome\n", 2),
                ]
                assert await calls.none()
