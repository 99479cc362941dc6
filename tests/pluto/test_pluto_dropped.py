"""Garbage collection closes Pluto's objects and loses no sent data."""

from __future__ import annotations

import contextlib
import gc
import os
import socket as stdlib
from typing import Any

import pytest

from helpers.deadline import DEADLINE
from helpers.pluto import (
    Thread,
    both_sides,
    check_not_listening,
    echo,
    got,
    raw_peer,
    recv_all,
    serve_once,
    tls_pair,
    wait_for_client,
)
from trisock.pluto import scheduler, socket

pytestmark = pytest.mark.usefixtures("bounded")  # some tests make blocking calls


@both_sides
async def test_a_dropped_socket_is_closed_silently_and_delivers_sent_data() -> None:
    client, raw = await raw_peer()
    with raw:
        message = bytes(range(256)) * 256
        await got(client.send(message))
        del client
        gc.collect()
        assert recv_all(raw) == message


@both_sides
async def test_a_dropped_tls_socket_is_closed_silently(
    certs: list[dict[str, str | bytes]], trusted: None
) -> None:
    client, server = await tls_pair(certs)
    del client
    gc.collect()
    assert await got(server.recv()) is None


@both_sides
async def test_a_temporary_socket_lives_until_its_call_ends() -> None:
    port, peer = serve_once(b"response")

    unowned: list[Any] = []
    s = await got(socket.connect("127.0.0.1", port))
    await got(s.send("request"))
    unowned.append(s)
    del s
    assert await got(unowned.pop().recv()) == b"response"
    assert peer.result() == b"request"


async def test_a_temporary_socket_from_connect_lives_until_recv_returns() -> None:
    with stdlib.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]

        def greet() -> None:
            with listening.accept()[0] as raw:
                gc.collect()
                raw.sendall(b"welcome")

        peer = Thread(greet)
        assert await (await socket.connect("127.0.0.1", port)).recv() == b"welcome"
        peer.result()


@both_sides
async def test_a_dropped_listener_is_closed_silently() -> None:
    listening = socket.listen(0)
    port = listening.port
    del listening
    gc.collect()
    check_not_listening(port)


@both_sides
async def test_a_dropped_listener_closes_its_pending_client() -> None:
    listening = socket.listen(0)
    with stdlib.create_connection(("127.0.0.1", listening.port), timeout=DEADLINE) as raw:
        await wait_for_client(listening)
        del listening
        gc.collect()
        with contextlib.suppress(ConnectionResetError):
            assert raw.recv(1) == b""


@both_sides
async def test_dropping_an_unstarted_scheduler_closes_its_listener() -> None:
    sched = scheduler()
    port = socket.bind(sched, 0, echo).port
    stdlib.create_connection(("127.0.0.1", port)).close()  # the port is open
    del sched
    gc.collect()
    check_not_listening(port)


@both_sides
async def test_dropping_a_closed_socket_closes_no_other_descriptor() -> None:
    client, raw = await raw_peer()
    with raw:
        number = client._transport.sock.fileno()
        await got(client.close())
        with open(os.devnull) as other:
            os.dup2(other.fileno(), number)
        try:
            del client
            gc.collect()
        finally:
            os.close(number)  # raises if garbage collection has closed the descriptor
