"""trisock.testing.socket_pair: the two ends of a connection."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import trio

import trisock
from helpers.pairs import closing
from trisock.testing import socket_pair


@pytest.mark.parametrize("tls", [False, True])
async def test_the_two_ends_are_connected(tls: bool) -> None:
    client, server = await socket_pair(tls=tls)
    async with closing(client, server):
        assert (client.getside(), server.getside()) == ("client", "server")
        assert (client.getpeer(), server.getpeer()) == (server.getlocal(), client.getlocal())
        assert (client.istls(), server.istls()) == (tls, tls)
        if tls:
            assert client.tls is not None
            assert client.tls.server_hostname == "localhost"
        await client.send(b"to the server\n")
        await server.send(b"to the client\n")
        assert await server.recv_line() == b"to the server"
        assert await client.recv_line() == b"to the client"


async def test_tls_is_a_bool() -> None:
    with pytest.raises(TypeError, match="tls must be True or False, not a str"):
        await socket_pair(tls="localhost")  # type: ignore[arg-type]


@pytest.mark.parametrize("tls", [False, True])
async def test_a_cancelled_call_leaves_nothing_open(tls: bool) -> None:
    # Each round cancels the call one pass of the scheduler later, until the call succeeds.
    for passes in range(100):
        pair = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancel_after, passes, nursery.cancel_scope)
            pair = await socket_pair(tls=tls)
            nursery.cancel_scope.cancel()
        if pair is not None:
            break
    assert passes > 3
    assert pair is not None
    for sock in pair:
        sock.abort()


async def test_a_call_cancelled_between_connect_and_accept_leaves_nothing_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = trisock.connect
    clients = []

    async def connect(host: str, port: int) -> trisock.Socket:
        clients.append(await real(host, port))
        scope.cancel()
        return clients[0]

    monkeypatch.setattr(trisock, "connect", connect)
    with trio.CancelScope() as scope:
        await socket_pair()
    assert scope.cancelled_caught
    assert clients[0].fileno() == -1


async def cancel_after(passes: int, scope: trio.CancelScope) -> None:
    for _ in range(passes):
        await trio.lowlevel.checkpoint()
    scope.cancel()


async def test_a_stranger_that_connects_first_is_not_the_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = trisock.connect
    strangers = []

    async def connect(host: str, port: int) -> trisock.Socket:
        strangers.append(await real(host, port))
        return await real(host, port)

    monkeypatch.setattr(trisock, "connect", connect)
    client, server = await socket_pair()
    async with closing(client, server, *strangers):
        assert server.getpeer() == client.getlocal()
        with pytest.raises(trio.BrokenResourceError):
            await strangers[0].recv()


def test_only_certificates_need_trustme() -> None:
    program = """
        import sys
        sys.modules["trustme"] = None  # as if it were not installed
        import trio
        from trisock.testing import Authority, Script, serving, socket_pair

        async def main():
            a, b = await socket_pair()
            async with a, b, serving(Script().expect_eof()) as s:
                await s.connect()
            for tls in (False, True):
                try:
                    await socket_pair(tls=True) if tls else Authority()
                except ImportError as exc:
                    print(exc)

        trio.run(main)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    text = "trisock.testing makes certificates with trustme: pip install 'trisock[testing]'\n"
    assert result.stdout == text * 2
