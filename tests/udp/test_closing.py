"""close, abort and stop_receiving: which calls they wake, and which calls work afterwards."""

from __future__ import annotations

import contextlib
import gc
import socket
import weakref
from collections.abc import Awaitable, Callable
from typing import NoReturn

import pytest
import trio
import trio.testing

from helpers.forks import run_in_child
from helpers.resolver import Resolver
from helpers.waiting import receive_twice
from trisock import UDPSocket, connect_udp, open_udp, open_udp_nowait


async def close(udp: UDPSocket) -> None:
    await udp.close()


async def aclose(udp: UDPSocket) -> None:
    await udp.aclose()


async def abort(udp: UDPSocket) -> None:
    udp.abort()


async def leave(udp: UDPSocket) -> None:
    async with udp:
        pass


async def stop(udp: UDPSocket) -> None:
    udp.stop_receiving()


CLOSES = [close, aclose, abort, leave]

every_close = pytest.mark.parametrize("end", CLOSES)
every_end = pytest.mark.parametrize("end", [*CLOSES, stop])


@every_end
async def test_closing_or_stop_receiving_ends_a_waiting_recv(end: object, udp: UDPSocket) -> None:
    async with trio.open_nursery() as nursery:

        async def receive() -> None:
            with pytest.raises(
                trio.ClosedResourceError,
                match=r"already closed .*\[::\]:|\[::\]:.* receives no more",
            ):
                await udp.recv()

        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        await end(udp)  # type: ignore[operator]


@every_end
async def test_closing_or_stop_receiving_ends_a_loop(
    end: object, udp: UDPSocket, client: UDPSocket
) -> None:
    got = []
    async with trio.open_nursery() as nursery:

        async def receive() -> None:
            async for datagram in udp:
                got.append(datagram.data)

        nursery.start_soon(receive)
        await client.send(b"first")
        await trio.testing.wait_all_tasks_blocked()
        await end(udp)  # type: ignore[operator]
    assert got == [b"first"]


@every_close
@pytest.mark.parametrize("of", ["udp", "client"])
async def test_reads_and_sends_fail_after_a_close(
    end: object, of: str, udp: UDPSocket, client: UDPSocket
) -> None:
    sock = udp if of == "udp" else client
    address = sock.getpeer() or ("127.0.0.1", 9)
    await end(sock)  # type: ignore[operator]
    assert not sock.isopen()
    assert sock.fileno() == -1
    for call in (sock.recv, lambda: sock.recv(5), lambda: sock.send(b"x", address)):
        with pytest.raises(
            trio.ClosedResourceError, match=r"^this side has already closed the UDP socket "
        ):
            await call()
    for change in (
        lambda: sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF),
        lambda: sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 9999),
    ):
        with pytest.raises(
            trio.ClosedResourceError, match=r"^this side has already closed the UDP socket "
        ):
            change()
    async for _ in sock:
        raise AssertionError("nothing is received")
    await sock.wait_closed()
    sock.stop_receiving()
    await end(sock)  # type: ignore[operator]  # a second time


@pytest.mark.parametrize("host", [None, "127.0.0.1"])
async def test_a_close_during_a_lookup_fails_the_send(host: str | None) -> None:
    async with await open_udp(host=host) as udp:
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                with pytest.raises(trio.ClosedResourceError, match="already closed"):
                    await udp.send(b"x", ("localhost", 9))

            nursery.start_soon(send)
            await trio.lowlevel.checkpoint()
            await udp.close()


@every_close
async def test_a_send_that_looks_up_a_name_ends_with_the_socket(
    end: Callable[[UDPSocket], Awaitable[None]],
) -> None:
    """A name server that does not answer must not delay the end of a program."""

    class SilentResolver(Resolver):
        async def getaddrinfo(self, *_: object) -> NoReturn:  # type: ignore[override]
            await trio.sleep_forever()
            raise AssertionError("it was not cancelled")

    trio.socket.set_custom_hostname_resolver(SilentResolver())
    async with await open_udp() as udp, trio.open_nursery() as nursery:

        async def send() -> None:
            with pytest.raises(trio.ClosedResourceError, match="already closed"):
                await udp.send(b"x", ("name", 9))

        for _ in range(2):
            nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        udp.stop_receiving()  # sending still works
        await trio.testing.wait_all_tasks_blocked()
        assert len(nursery.child_tasks) == 2
        await end(udp)


async def test_wait_closed_waits_for_the_close(udp: UDPSocket) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(udp.wait_closed)
        await trio.testing.wait_all_tasks_blocked()
        udp.stop_receiving()
        await trio.testing.wait_all_tasks_blocked()
        assert nursery.child_tasks
        udp.abort()


async def test_a_descriptor_closed_by_other_code_counts_as_closed(
    udp: UDPSocket, client: UDPSocket
) -> None:
    for sock in (udp, client):
        socket.close(sock._socket.detach())
        with pytest.raises(trio.ClosedResourceError, match="already closed"):
            await sock.recv()
        sock.abort()
        await sock.wait_closed()


# ---- stop_receiving ----


async def test_datagrams_that_arrived_before_stop_receiving_are_received(
    udp: UDPSocket, client: UDPSocket
) -> None:
    for number in range(20):
        await client.send(bytes([number]))
    udp.stop_receiving()
    udp.stop_receiving()  # changes nothing
    got = [datagram.data[0] async for datagram in udp]
    assert got == list(range(20))
    await client.send(b"too late")
    with pytest.raises(
        trio.ClosedResourceError, match=r"the UDP socket .* receives no more: stop_receiving"
    ):
        await udp.recv()
    await udp.send(b"still", client.getlocal())
    assert (await client.recv()).data == b"still"


async def test_after_stop_receiving_a_flood_does_not_keep_the_loop_alive(
    udp: UDPSocket, client: UDPSocket
) -> None:
    udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    held = udp.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 512
    udp.stop_receiving()
    count = 0
    await client.send(b"flood")
    async for _ in udp:
        count += 1
        await client.send(b"flood")
    assert held <= count <= held + 1


async def test_after_stop_receiving_an_icmp_error_is_still_raised() -> None:
    async with await open_udp(host="127.0.0.1") as gone:
        port = gone.getlocal().port
    async with await connect_udp("127.0.0.1", port) as client:
        await client.send(b"anyone?")
        client.stop_receiving()
        with pytest.raises(ConnectionRefusedError, match="cannot receive from"):
            await client.recv()
        with pytest.raises(trio.ClosedResourceError):
            await client.recv()


async def test_after_stop_receiving_there_is_still_only_one_receiver(
    udp: UDPSocket, client: UDPSocket
) -> None:
    for data in (b"first", b"second"):
        await client.send(data)
    udp.stop_receiving()
    assert await receive_twice(udp) == 1
    assert (await udp.recv()).data == b"second"


async def test_a_close_discards_unread_datagrams(udp: UDPSocket, client: UDPSocket) -> None:
    await client.send(b"x")
    udp.stop_receiving()
    await udp.close()
    with pytest.raises(trio.ClosedResourceError, match="already closed"):
        await udp.recv()


async def test_a_datagram_that_arrives_at_the_stop_is_received(
    udp: UDPSocket, client: UDPSocket
) -> None:
    got = []
    async with trio.open_nursery() as nursery:

        async def receive() -> None:
            got.extend([datagram.data async for datagram in udp])

        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        udp.stop_receiving()
        await client.send(b"just in time")  # before the task runs again
    assert got == [b"just in time"]


# ---- forks ----


@every_end
async def test_a_child_that_ends_the_socket_leaves_the_parents_recv_waiting(
    end: object, udp: UDPSocket, client: UDPSocket
) -> None:
    def in_child() -> None:
        if end is stop:
            udp.stop_receiving()
        else:
            udp.abort()

    async with trio.open_nursery() as nursery:

        async def receive() -> None:
            assert (await udp.recv()).data == b"still here"

        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        run_in_child(in_child)
        await client.send(b"still here")


def test_each_process_can_use_the_socket_in_its_own_run(raw: socket.socket) -> None:
    udp = open_udp_nowait(host="127.0.0.1")

    async def answer() -> None:
        datagram = await udp.recv()
        await udp.send(datagram.data, datagram.address)
        await udp.close()

    for process in (run_in_child, lambda function: function()):
        raw.sendto(b"hello", udp.getlocal())
        process(lambda: trio.run(answer))
        assert raw.recv(100) == b"hello"


# ---- memory ----


async def used(udp: UDPSocket) -> None:
    await udp.send(b"x", udp.getlocal())
    await udp.recv()


async def cancelled(udp: UDPSocket) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await udp.recv()


async def failed(udp: UDPSocket) -> None:
    for address in (("127.0.0.1", 0), ("fe80::1%absent", 9)):
        with contextlib.suppress(OSError):
            await udp.send(b"x", address)
    with contextlib.suppress(OSError):
        udp.join_group("224.0.0.251", "absent")


@pytest.mark.parametrize("use", [used, cancelled, failed])
@every_end
async def test_a_closed_socket_is_freed_without_the_garbage_collector(
    end: Callable[[UDPSocket], Awaitable[None]], use: Callable[[UDPSocket], Awaitable[None]]
) -> None:
    gc.collect()
    gc.disable()
    try:
        udp = await open_udp(host="127.0.0.1")
        client = await connect_udp("127.0.0.1", udp.getlocal().port)
        await client.send(b"x")
        await udp.recv()
        await use(udp)
        for each in (udp, client):
            await end(each)
            with contextlib.suppress(trio.ClosedResourceError):
                await each.recv()
            await each.close()
        references = [weakref.ref(udp), weakref.ref(client)]
        del udp, client, each
        assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()
