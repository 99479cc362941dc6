"""An error that only a peer can cause is logged in one line at INFO, without a traceback."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

import trisock
from helpers.failures import few_descriptors
from helpers.pairs import all_served
from helpers.server import bound, connect, logged
from trisock import ServerTLS, Socket
from trisock.testing import serving

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

Part = Callable[[Socket], Awaitable[object]]

PEERS = 20


async def read_lines(sock: Socket) -> None:
    async for line in sock.lines(max_bytes=512):
        await sock.send(line)


async def read_in_a_nursery(sock: Socket) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_lines, sock)
        nursery.start_soon(trio.sleep_forever)


async def read_in_a_group(sock: Socket) -> None:
    try:
        await read_lines(sock)
    except Exception as exc:
        raise ExceptionGroup("again", [exc, ExceptionGroup("in it", [exc])]) from None


async def send_forever(sock: Socket) -> None:
    while True:
        await sock.send(bytes(100_000))


async def send_a_long_line(client: Socket) -> None:
    await client.send(b"x" * 512)
    await client.send_eof()
    async for _ in client:
        pass


async def send_half_a_line(client: Socket) -> None:
    await client.send(b"QUI")
    await client.send_eof()


async def reset(client: Socket) -> None:
    await client.send(b"x")
    await trio.testing.wait_all_tasks_blocked()
    client.abort()


CASES: list[tuple[Part, Part]] = [
    *((reader, send_a_long_line) for reader in (read_lines, read_in_a_nursery, read_in_a_group)),
    *((reader, send_half_a_line) for reader in (read_lines, read_in_a_nursery, read_in_a_group)),
    *((part, reset) for part in (read_in_a_nursery, send_forever)),
]


@pytest.mark.parametrize(
    ("handler", "peer"), CASES, ids=lambda each: getattr(each, "__name__", None)
)
async def test_a_peers_error_is_logged_in_one_line(
    handler: Part, peer: Part, log: pytest.LogCaptureFixture
) -> None:
    async with serving(handler) as s:
        for _ in range(PEERS):
            async with await s.connect() as client:
                await peer(client)
                while s.server.connections:
                    await trio.lowlevel.checkpoint()
        await all_served(s.server, PEERS)
    stats = s.server.stats()
    assert (stats.peer_errors, stats.handler_errors) == (PEERS, 0)
    lines = [each for each in log.records if each.name == "trisock.server"]
    assert len(lines) == PEERS
    for each in lines:
        assert each.levelno == logging.INFO
        assert not each.exc_info
        assert each.getMessage().startswith("closed the connection with 127.0.0.1:")
        assert each.getMessage().count("127.0.0.1:") == 1
        assert "\n" not in each.getMessage()
        assert len(each.getMessage()) < 200


async def test_a_forged_record_is_logged_in_one_line(
    server_tls: ServerTLS, log: pytest.LogCaptureFixture
) -> None:
    async with serving(read_lines, tls=server_tls) as s:
        client = await s.connect()
        os.write(client.fileno(), b"not TLS" * 10)
        await all_served(s.server, 1)
    assert s.server.stats() == trisock.ServerStats(accepted=1, peer_errors=1)
    assert not [each for each in log.records if each.levelno > logging.INFO or each.exc_info]


@pytest.mark.parametrize("way", ["cause", "group", "new error"])
async def test_a_handlers_own_error_is_logged_with_its_traceback(
    way: str, log: pytest.LogCaptureFixture
) -> None:
    async def handler(sock: Socket) -> None:
        try:
            await sock.recv_exactly(10)
        except trisock.IncompleteReadError as exc:
            if way == "cause":
                raise ValueError("the request was cut short") from exc
            if way == "group":
                raise ExceptionGroup("both", [exc, ValueError("and a fault")]) from None
            raise trisock.IncompleteReadError(b"", 5) from None  # the handler's own error

    async with bound(handler) as server:
        async with await connect(server) as client:
            await client.send(b"half")
    assert server.stats() == trisock.ServerStats(accepted=1, handler_errors=1)
    (record,) = logged(log, logging.ERROR)
    assert record.exc_info


async def return_immediately(_: Socket) -> None:
    """Return, so that the server closes the connection."""


def run_on_a_fast_clock(main: Callable[[], Awaitable[None]]) -> None:
    """Run ``main`` in a separate Trio run.

    An async test has a deadline, and this clock would jump to that deadline.
    """
    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_descriptor_exhaustion_is_logged_once_a_minute(log: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with bound(return_immediately, max_connections=100) as server:
            clients = [
                socket.create_connection((host, server.port))
                for host in ("127.0.0.1", "::1")
                for _ in range(3)
            ]
            with few_descriptors(0):
                await trio.sleep(150)
                lines.extend(logged(log, logging.ERROR))
            for client in clients:
                client.close()

    lines: list[logging.LogRecord] = []
    run_on_a_fast_clock(main)
    assert [each.exc_info for each in lines] == [None] * 3
    failed = r"the listener on \S+:[0-9]+ and \S+:[0-9]+: accept failed with EMFILE \(.*\)"
    todo = r"; raise the process's limit of open files \(ulimit -n\), or lower max_connections"
    assert re.fullmatch(f"{failed}, so clients wait{todo}", lines[0].getMessage())
    again = f"{failed} [0-9]+ times in the last 60 seconds{todo}"
    assert all(re.fullmatch(again, each.getMessage()) for each in lines[1:])


def test_recurring_descriptor_exhaustion_is_logged_once_a_minute(
    log: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        async with bound(return_immediately, host="127.0.0.1") as server:
            for _ in range(5):
                with socket.create_connection(("127.0.0.1", server.port)), few_descriptors(0):
                    await trio.sleep(2)
                await trio.sleep(2)

    run_on_a_fast_clock(main)
    lines = logged(log, logging.ERROR)
    assert len(lines) == 1
    assert lines[0].exc_info is None
