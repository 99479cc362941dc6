"""Pluto's objects that the program drops: they are closed, and lose nothing."""

from __future__ import annotations

import contextlib
import gc
import os
import socket as stdlib
import warnings
from typing import Any

import pytest

from helpers.deadline import DEADLINE
from helpers.pluto import (
    Thread,
    both_sides,
    checkpoint,
    echo,
    got,
    pair,
    raw_peer,
    serve_once,
    starttls_on_both,
)
from trisock.pluto import scheduler, socket

pytestmark = pytest.mark.usefixtures("bounded")  # some of these calls block


def end_of(raw: stdlib.socket) -> bytes:
    return b"".join(iter(lambda: raw.recv(65536), b""))


@both_sides
async def test_a_socket_that_is_dropped_is_closed_without_a_word() -> None:
    client, raw = await raw_peer()
    with raw, warnings.catch_warnings():
        warnings.simplefilter("error")
        await got(client.send("hello"))
        del client
        gc.collect()
        assert end_of(raw) == b"hello"


@both_sides
async def test_what_a_dropped_socket_has_sent_arrives() -> None:
    client, raw = await raw_peer()
    with raw:
        message = bytes(range(256)) * 256
        await got(client.send(message))
        del client
        gc.collect()
        assert end_of(raw) == message


@both_sides
async def test_a_dropped_socket_under_tls_is_closed_without_a_word(
    certs: list[dict[str, str | bytes]], trusted: None
) -> None:
    client, server = await pair()
    await starttls_on_both(client, server, "localhost", certs)
    del client
    gc.collect()
    assert await got(server.recv()) is None


@both_sides
async def test_a_temporary_lives_until_its_call_is_done() -> None:
    port, peer = serve_once(b"answer")

    unowned: list[Any] = []
    s = await got(socket.connect("127.0.0.1", port))
    await got(s.send("request"))
    unowned.append(s)
    del s
    assert await got(unowned.pop().recv()) == b"answer"
    assert peer.result() == b"request"


async def test_a_temporary_of_connect_lives_until_its_recv_is_done() -> None:
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
async def test_a_listener_that_is_dropped_is_closed_without_a_word() -> None:
    listening = socket.listen(0)
    port = listening.port
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del listening
        gc.collect()
    with pytest.raises(ConnectionRefusedError):
        stdlib.create_connection(("127.0.0.1", port))


@both_sides
async def test_a_listener_that_is_dropped_closes_what_hasconnection_found() -> None:
    listening = socket.listen(0)
    with stdlib.create_connection(("127.0.0.1", listening.port), timeout=DEADLINE) as raw:
        while not listening.hasconnection():
            await got(checkpoint())
        del listening
        gc.collect()
        with contextlib.suppress(ConnectionResetError):
            assert raw.recv(1) == b""


@both_sides
async def test_a_listener_of_bind_that_is_dropped_unserved_is_closed() -> None:
    sched = scheduler()
    port = socket.bind(sched, 0, echo).port
    stdlib.create_connection(("127.0.0.1", port)).close()  # the scheduler has it
    del sched
    gc.collect()
    with pytest.raises(ConnectionRefusedError):
        stdlib.create_connection(("127.0.0.1", port))


@both_sides
async def test_a_closed_socket_that_is_dropped_closes_no_other() -> None:
    client, raw = await raw_peer()
    with raw:
        number = client._sock.fileno()
        await got(client.close())
        with open(os.devnull) as other:
            os.dup2(other.fileno(), number)
        try:
            del client
            gc.collect()
        finally:
            os.close(number)  # it is still there
