"""Every public async name has a cancellation test; methods of trio.abc are full checkpoints."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import trio
import trio.testing

import trisock
from helpers.cancellation import LAYERS, TLS, Connections, connect_to, covered
from trisock import hammerspoon, pluto, starttls


def public_async_names() -> set[str]:
    """Return the public names that are awaited, iterated over or entered asynchronously."""
    names = {"pluto.socket.connect", "pluto.scheduler.run"}  # not async, but return an awaitable
    for module, prefix in (
        (trisock, ""),
        (starttls, "starttls."),
        (pluto, "pluto."),
        (hammerspoon, "hammerspoon."),
    ):
        for name in module.__all__:
            thing = getattr(module, name)
            if not inspect.isclass(thing):
                if is_async(thing):
                    names.add(f"{prefix}{name}")
                continue
            for attribute in dir(thing):
                if is_public(attribute) and is_async(getattr(thing, attribute)):
                    names.add(f"{prefix}{name}.{attribute}")
    # Skip async_socket, which has the functions of socket, and __aenter__, which does not wait.
    return {
        name
        for name in names
        if not name.startswith("pluto.async_socket.") and not name.endswith(".__aenter__")
    }


def is_public(name: str) -> bool:
    return not name.startswith("_") or name.startswith("__a")


def is_async(thing: object) -> bool:
    if not callable(thing):
        return False
    function = inspect.unwrap(thing)
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


def test_every_public_async_name_has_a_cancellation_test() -> None:
    tests = Path(__file__).parent.glob("test_cancelled_*.py")
    assert public_async_names() == set().union(*map(covered, tests))


@pytest.mark.parametrize("layer", LAYERS)
async def test_socket_methods_of_trio_abc_are_full_checkpoints(
    layer: str, connections: Connections
) -> None:
    async with connections.pair(layer) as (sock, peer):
        for call in (
            sock.wait_send_all_might_not_block,
            lambda: sock.send_all(b""),
            lambda: sock.send_all(b"x"),
        ):
            with trio.testing.assert_checkpoints():
                await call()
        sock.unrecv(b"pushed back")
        peer.say(b"arrived")
        peer.end()
        for expected in (b"pushed back", b"arrived", b"", b""):
            with trio.testing.assert_checkpoints():
                assert await sock.receive_some() == expected
        if layer not in TLS:
            with trio.testing.assert_checkpoints():
                await sock.send_eof()
        for close in (sock.aclose, sock.aclose, lambda: sock.__aexit__(None, None, None)):
            with trio.testing.assert_checkpoints():
                await close()


async def test_listener_methods_of_trio_abc_are_full_checkpoints() -> None:
    listener = trisock.listen_nowait(0)
    with connect_to(listener), connect_to(listener):
        for accept in (listener.accept, lambda: anext(listener)):
            with trio.testing.assert_checkpoints():
                sock = await accept()
            sock.abort()
        for _ in range(2):
            with trio.testing.assert_checkpoints():
                await listener.aclose()
