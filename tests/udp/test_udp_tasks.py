"""One task receives, and any number of tasks send: conflicts, checkpoints and timeouts."""

from __future__ import annotations

import errno
import os
import re
import socket

import pytest
import trio
import trio.testing

from helpers.checkpoints import is_schedule_point
from helpers.full_buffer import full_buffer
from helpers.waiting import receive_twice
from trisock import Address, UDPSocket, open_udp


async def test_a_second_receiver_gets_busyresourceerror(
    udp: UDPSocket, port: int, raw: socket.socket
) -> None:
    text = r"another task is receiving from the UDP socket \[::\]:\d+: only one task"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(udp.recv)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError, match=text):
            await udp.recv()
        with pytest.raises(trio.BusyResourceError, match=text):
            async for _ in udp:
                raise AssertionError("another task receives")
        raw.sendto(b"x", ("127.0.0.1", port))
        with pytest.raises(trio.BusyResourceError, match=text):  # though a datagram has arrived
            await udp.recv()
    raw.sendto(b"y", ("127.0.0.1", port))
    assert (await udp.recv()).data == b"y"


async def test_a_receiver_at_its_schedule_point_excludes_other_receivers(
    udp: UDPSocket, client: UDPSocket
) -> None:
    await client.send(b"first")
    await client.send(b"second")
    assert await receive_twice(udp) == 1
    assert (await udp.recv()).data == b"second"


async def test_any_number_of_tasks_may_send(udp: UDPSocket, client: UDPSocket) -> None:
    sizes = [0, 1, 100, 1000]

    async def send(number: int) -> None:
        for size in sizes:
            await client.send(bytes([number]) * size)

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(send, number)
    got = [(await udp.recv()).data for _ in range(80)]
    for number in range(20):
        assert [len(data) for data in got if set(data) == {number}] == sizes[1:]


async def test_sends_wait_for_room_one_after_the_other(udp: UDPSocket, client: UDPSocket) -> None:
    with full_buffer(7):
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(client.send, bytes([number]))
    assert {(await udp.recv()).data[0] for _ in range(3)} == {0, 1, 2}


async def test_a_send_that_has_waited_can_fail(udp: UDPSocket, port: int) -> None:
    with (
        full_buffer(2, then=errno.ENETDOWN),
        pytest.raises(OSError, match=rf"cannot send to 127\.0\.0\.1:{port}: Network is down"),
    ):
        await udp.send(b"x", ("127.0.0.1", port))
    with full_buffer(1, then=errno.ENETDOWN), pytest.raises(OSError, match=r" from 127\.0\.0\.2:"):
        await udp.send(b"x", ("127.0.0.1", port), source=("127.0.0.2", port))


async def test_a_send_that_waits_ends_with_the_socket(client: UDPSocket) -> None:
    with full_buffer(1):
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                with pytest.raises(trio.ClosedResourceError, match="already closed"):
                    await client.send(b"x")

            nursery.start_soon(send)
            await trio.lowlevel.checkpoint()
            client.abort()


def context_of(error: BaseException) -> list[type[BaseException]]:
    """Return the classes of the exceptions that a traceback shows before this exception."""
    context = error.__context__
    return [] if context is None else [type(context), *context_of(context)]


async def test_an_error_after_a_wait_does_not_show_eagain(udp: UDPSocket, port: int) -> None:
    with full_buffer(1, then=errno.ENETDOWN), pytest.raises(OSError, match="Network") as caught:
        await udp.send(b"x", ("127.0.0.1", port))
    assert BlockingIOError not in context_of(caught.value)
    async with trio.open_nursery() as nursery:

        async def receive() -> None:
            with pytest.raises(trio.ClosedResourceError) as caught:
                await udp.recv()
            assert BlockingIOError not in context_of(caught.value)

        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        udp.abort()


# ---- checkpoints ----


async def test_at_least_one_of_sixteen_sends_is_a_schedule_point(client: UDPSocket) -> None:
    found = [await is_schedule_point(client.send(b"x")) for _ in range(100)]
    assert all(any(found[i : i + 16]) for i in range(len(found) - 15))
    assert sum(found) < 10


async def test_at_least_one_of_sixteen_receives_is_a_schedule_point(
    udp: UDPSocket, client: UDPSocket
) -> None:
    for _ in range(100):
        await client.send(b"x")
    found = [await is_schedule_point(udp.recv()) for _ in range(100)]
    assert all(any(found[i : i + 16]) for i in range(len(found) - 15))
    assert sum(found) < 10


async def test_at_least_one_of_sixteen_calls_in_turn_is_a_schedule_point(udp: UDPSocket) -> None:
    found = []
    for _ in range(50):
        await_send = udp.send(b"x", ("127.0.0.1", udp.getlocal().port))
        found += [await is_schedule_point(await_send), await is_schedule_point(udp.recv())]
    assert all(any(found[i : i + 16]) for i in range(len(found) - 15))


@pytest.mark.parametrize(
    ("address", "source"),
    [
        (("127.0.0.1", 0), None),  # The kernel refuses the port.
        (("fe80::1%absent", 9), None),  # trisock refuses the zone.
        (("127.0.0.1", 9), "fe80::1%absent"),
    ],
)
async def test_at_least_one_of_sixteen_failed_sends_is_a_schedule_point(
    udp: UDPSocket, port: int, address: tuple[str, int], source: str | None
) -> None:
    """A retry loop must neither starve other tasks nor ignore its cancellation."""

    async def send() -> None:
        where = Address(*address)
        with pytest.raises(OSError, match=rf"cannot send to {re.escape(str(where))}[ :]"):
            await udp.send(b"x", address, source=None if source is None else (source, port))

    found = [await is_schedule_point(send()) for _ in range(100)]
    assert all(any(found[i : i + 16]) for i in range(len(found) - 15))
    with trio.CancelScope() as scope:
        scope.cancel()
        await send()
    assert scope.cancelled_caught


async def test_at_least_one_of_sixteen_calls_on_a_closed_socket_is_a_schedule_point(
    udp: UDPSocket,
) -> None:
    await udp.close()

    async def call(number: int) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await (udp.send(b"x", ("127.0.0.1", 9)) if number % 2 else udp.recv())

    found = [await is_schedule_point(call(number)) for number in range(100)]
    assert all(any(found[i : i + 16]) for i in range(len(found) - 15))


async def test_a_flood_does_not_starve_other_tasks(udp: UDPSocket, port: int) -> None:
    """A server that never has to wait lets another task run."""
    runs = 0

    async def other() -> None:
        nonlocal runs
        while True:
            await trio.lowlevel.checkpoint()
            runs += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await udp.send(b"x", ("127.0.0.1", port))
        count = 0
        async for datagram in udp:
            await udp.send(datagram.data, datagram.address)
            count += 1
            if count == 160:
                nursery.cancel_scope.cancel()
                break
    assert runs >= 2 * 160 // 16 - 1


async def test_calls_that_wait_are_checkpoints(udp: UDPSocket, client: UDPSocket) -> None:
    async with trio.open_nursery() as nursery:

        async def receive() -> None:
            for _ in range(30):
                with trio.testing.assert_checkpoints():
                    await udp.recv()

        nursery.start_soon(receive)
        for _ in range(30):
            await trio.testing.wait_all_tasks_blocked()
            await client.send(b"x")


async def test_the_other_methods_are_checkpoints(udp: UDPSocket, client: UDPSocket) -> None:
    with trio.testing.assert_checkpoints():
        async with await open_udp():
            pass
    for host in ("127.0.0.1", "::1"):
        with trio.testing.assert_checkpoints():
            other = await open_udp(host=host)
        await other.close()
    await client.send(b"x")
    udp.stop_receiving()
    for call in (udp.recv, udp.close, udp.close, udp.wait_closed):
        with trio.testing.assert_checkpoints():
            await call()


@pytest.mark.parametrize("ready", [True, False])
async def test_a_cancelled_call_does_nothing(
    udp: UDPSocket, client: UDPSocket, raw: socket.socket, ready: bool
) -> None:
    if ready:
        await client.send(b"kept")
    with trio.CancelScope() as scope:
        scope.cancel()
        await udp.recv()
    assert scope.cancelled_caught
    with trio.CancelScope() as scope:
        scope.cancel()
        await udp.send(b"not sent", raw.getsockname())
    assert scope.cancelled_caught
    await udp.send(b"sent", raw.getsockname())
    assert raw.recv(100) == b"sent"
    if ready:
        assert (await udp.recv()).data == b"kept"


async def test_a_timeout_loses_no_datagram(udp: UDPSocket, client: UDPSocket) -> None:
    """Each datagram is returned once, whether the datagram or the timeout comes first."""
    got = []
    for number in range(200):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def receive() -> None:
                    got.append((await udp.recv()).data)

                nursery.start_soon(receive)
                for _ in range(number % 3):
                    await trio.lowlevel.checkpoint()
                await client.send(number.to_bytes(2, "big"))
                for _ in range(number % 5):
                    await trio.lowlevel.checkpoint()
                scope.cancel()
    udp.stop_receiving()
    got += [datagram.data async for datagram in udp]
    assert [int.from_bytes(data, "big") for data in got] == list(range(200))


async def test_recv_waits_again_if_another_process_takes_the_datagram(
    udp: UDPSocket, port: int, raw: socket.socket
) -> None:
    class Thief(trio.abc.Instrument):
        """Receives the datagram after Trio has woken the reader, as a forked child may do."""

        taken = b""

        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            if not self.taken and task is receiver:
                with socket.socket(fileno=os.dup(udp.fileno())) as twin:
                    self.taken = twin.recv(100)

    thief = Thief()
    receiver = None
    async with trio.open_nursery() as nursery:

        async def receive() -> None:
            nonlocal receiver
            receiver = trio.lowlevel.current_task()
            assert (await udp.recv()).data == b"second"

        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.add_instrument(thief)
        raw.sendto(b"first", ("127.0.0.1", port))
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.remove_instrument(thief)
        assert thief.taken == b"first"
        raw.sendto(b"second", ("127.0.0.1", port))


async def test_a_wake_up_by_other_code_changes_nothing(udp: UDPSocket, client: UDPSocket) -> None:
    async with trio.open_nursery() as nursery:

        async def receive() -> None:
            assert (await udp.recv()).data == b"hello"

        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.notify_closing(udp.fileno())
        await trio.testing.wait_all_tasks_blocked()
        await client.send(b"hello")
