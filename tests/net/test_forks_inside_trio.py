"""A child that is forked inside ``trio.run`` must leave the parent's epoll set alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing

import trisock
from helpers.forks import run_in_child
from trisock import Socket
from trisock.testing import serving


async def test_a_child_closing_a_listener_leaves_the_parents_accept_waiting() -> None:
    async with (
        await trisock.listen(0, host="127.0.0.1") as listener,
        trio.open_nursery() as nursery,
    ):

        async def accept() -> None:
            async with await listener.accept() as sock:
                assert await sock.recv() == b""

        nursery.start_soon(accept)
        await trio.testing.wait_all_tasks_blocked()
        run_in_child(listener.abort)
        async with await trisock.connect("127.0.0.1", listener.port):
            pass


async def test_a_child_that_stops_a_server_leaves_the_parent_serving() -> None:
    async with serving(Socket.recv) as s:
        await trio.testing.wait_all_tasks_blocked()
        run_in_child(lambda: s.server.stop(0))
        await s.connect()
        run_in_child(s.server.stop)
        assert len(s.server.connections) == 1
        assert not s.server.closing.is_set()


@pytest.mark.parametrize(
    "end",
    [Socket.abort, lambda sock: sock._connection.close_immediately()],
    ids=["abort", "close_immediately"],
)
@pytest.mark.parametrize("layer", ["tls"])
async def test_a_child_that_ends_tls_leaves_the_parents_read_waiting(
    end: Callable[[Socket], None], a: Socket, b: Socket
) -> None:
    async with trio.open_nursery() as nursery:

        async def read() -> None:
            assert await a.recv() == b"still here"

        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        run_in_child(lambda: end(a))
        await b.send(b"still here")


async def test_a_childs_abort_of_a_socket_ends_the_parents_read(a: Socket) -> None:
    async with trio.open_nursery() as nursery:

        async def read() -> None:
            with pytest.raises(trio.BrokenResourceError):
                while await a.recv():
                    pass
                raise trio.BrokenResourceError  # the read may also end with EOF

        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        run_in_child(a.abort)


def test_a_child_can_close_a_listener_made_before_the_fork() -> None:
    listener = trisock.listen_nowait(0, host="127.0.0.1")

    async def main() -> None:
        async def accept() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await listener.accept()

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(accept)
                await trio.testing.wait_all_tasks_blocked()
                await listener.close()

    run_in_child(lambda: trio.run(main))
    listener.abort()
