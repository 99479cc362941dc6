"""Waiting datagrams, and tasks that wait for them."""

from __future__ import annotations

import trio

from trisock import UDPSocket
from trisock._net.syscalls import poll_readable


def is_waiting(udp: UDPSocket) -> bool:
    """Return whether a datagram has arrived. On loopback, it arrives before the send returns."""
    return poll_readable(udp.fileno()) != 0


async def receive_twice(udp: UDPSocket) -> int:
    """Receive in two tasks at once. Return how many got BusyResourceError."""
    refused = 0

    async def receive() -> None:
        nonlocal refused
        try:
            await udp.recv()
        except trio.BusyResourceError:
            refused += 1

    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(receive)
    return refused
