"""Send a million datagrams over loopback. None may be lost, changed or mixed up.

    python tests/campaigns/datagrams.py [--count COUNT]

Several senders, over IPv4 and IPv6, send datagrams of 0 to 65,507 bytes to one socket. The receiver
knows each sender's next datagram, and the receiver address that this sender uses. After every 64
datagrams of a sender, the receiver acknowledges them, from the same address. (A sender's socket is
connected, so it receives from no other address.) A sender waits for the acknowledgement, and all
senders together have no more in flight than the kernel's buffer can hold. So the kernel must drop
nothing.

``test_datagram_flow.py`` runs this program with fewer datagrams.
"""

from __future__ import annotations

import argparse
import random
import socket
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import trio

sys.path.append(str(Path(__file__).parents[1]))  # a program needs this to import tests/helpers

import trisock
from helpers.memory import allocated
from trisock.pluto.blocking import run_trio  # raises a bare KeyboardInterrupt, not a group

LONGEST = 65507
PER_ACK = 64
_HOSTS = ("127.0.0.1", "127.0.0.2", "::1", "127.0.0.1")
_PATIENCE = 20  # seconds that a sender waits for an acknowledgement
_ACK = struct.Struct("!Q")
_SAMPLES = 20

# The most that the kernel may charge for 64 datagrams, in bytes. By default, Linux allows a buffer
# of 425,984 bytes.
_BATCH_ROOM = 400_000

# Every payload is a part of this block.
_BLOCK = random.Random(0).randbytes(2 * 65536)


def sizes(flow: int) -> Iterator[int]:
    """Yield the sizes of a sender's datagrams: mostly small, but one in 64 may have any size."""
    rng = random.Random(flow)
    ranges = [(0, 0), (1, 512), (513, 1472), (1473, 9216), (0, LONGEST)]
    while True:
        drawn = rng.choices(ranges, weights=[5, 60, 25, 8, 2], k=PER_ACK - 1)
        batch = [rng.randint(*each) for each in drawn]
        batch.append(rng.choice([0, LONGEST, rng.randint(0, LONGEST)]))
        rng.shuffle(batch)
        while sum(map(charge, batch)) > _BATCH_ROOM:
            batch[batch.index(max(batch))] = rng.randint(0, 1472)
        yield from batch


def payload(flow: int, number: int, size: int) -> bytes:
    """Return a datagram of a sender. Two datagrams of one size differ, unless they are tiny."""
    begin = (number * 40503 + flow * 10007) % 65536
    return _BLOCK[begin : begin + size]


def charge(size: int) -> int:
    """Return an upper bound, in bytes, of what the kernel charges for a datagram (truesize)."""
    return 2 * size + 1024 if size <= 9216 else size + 8192


class Room:
    """The room in the kernel's buffer, which the senders share."""

    def __init__(self, size: int) -> None:
        self._left = size
        self._changed = trio.Condition()

    async def take(self, size: int) -> None:
        async with self._changed:
            while self._left < size:
                await self._changed.wait()
            self._left -= size

    async def give(self, size: int) -> None:
        async with self._changed:
            self._left += size
            self._changed.notify_all()


@dataclass
class Result:
    """The outcome of a run.

    Attributes:
      wrong: a text for each wrong datagram or acknowledgement.
      dropped: how many datagrams the kernel dropped at any of the sockets (SO_RXQ_OVFL).
      memory: how many bytes ``malloc`` has allocated, sampled throughout the run.
    """

    sent: int = 0
    received: int = 0
    size: int = 0
    acknowledged: int = 0
    wrong: list[str] = field(default_factory=list)
    dropped: int = 0
    memory: list[int] = field(default_factory=list)
    seconds: float = 0

    @property
    def growth(self) -> int:
        """How many bytes the maximum of ``memory`` rose from the first half to the second."""
        half = len(self.memory) // 2
        return max(self.memory[half:], default=0) - max(self.memory[1:half], default=0)

    def __str__(self) -> str:
        return (
            f"{self.sent:,} datagrams sent, {self.received:,} received ({self.size:,} bytes), "
            f"{self.acknowledged:,} acknowledged, in {self.seconds:.0f} s\n"
            f"wrong: {self.wrong or 'none'}; SO_RXQ_OVFL: {self.dropped}\n"
            f"memory: {', '.join(f'{each / 1024:,.0f}' for each in self.memory)} KiB; "
            f"growth in the second half: {self.growth / 1024:+,.1f} KiB"
        )


class Receiver:
    """Receives the datagrams of all senders, and compares them with the expected ones."""

    def __init__(self, udp: trisock.UDPSocket, result: Result, count: int) -> None:
        self._udp = udp
        self._result = result
        self._sample_every = max(count // _SAMPLES, 1)
        self._flows: dict[trisock.Address, tuple[int, Iterator[int]]] = {}
        self._counts: dict[trisock.Address, int] = {}

    def expect(self, sender: trisock.Address, flow: int) -> None:
        self._flows[sender] = (flow, sizes(flow))
        self._counts[sender] = 0

    async def run(self) -> None:
        async for datagram in self._udp:
            sender = datagram.address
            flow, expected_sizes = self._flows[sender]
            number = self._counts[sender]
            self._check(datagram, flow, number, payload(flow, number, next(expected_sizes)))
            self._counts[sender] = number = number + 1
            if number % PER_ACK == 0:
                await self._udp.send(_ACK.pack(number), sender, source=datagram.destination)

    def _check(self, datagram: trisock.Datagram, flow: int, number: int, expected: bytes) -> None:
        result = self._result
        result.received += 1
        result.size += len(datagram.data)
        where = (_HOSTS[flow], self._udp.getlocal().port)
        if datagram.data != expected or datagram.truncated or datagram.destination != where:
            result.wrong.append(f"datagram {number} of sender {flow}: {datagram}")
        if result.received % self._sample_every == 0:
            result.memory.append(allocated())


async def send_all(
    client: trisock.UDPSocket, flow: int, count: int, room: Room, result: Result
) -> None:
    """Send the datagrams of one sender, and wait for an acknowledgement after every 64."""
    own_sizes = sizes(flow)
    for begin in range(0, count, PER_ACK):
        batch = [next(own_sizes) for _ in range(PER_ACK)]
        needed = sum(map(charge, batch))
        await room.take(needed)
        for number, size in enumerate(batch, start=begin):
            await client.send(payload(flow, number, size))
            result.sent += 1
        with trio.move_on_after(_PATIENCE) as patience:
            ack = await client.recv()
        if patience.cancelled_caught:
            result.wrong.append(f"lost: a datagram of sender {flow} before {begin + PER_ACK}")
            return
        if ack.data != _ACK.pack(begin + PER_ACK):
            result.wrong.append(f"a wrong acknowledgement for sender {flow}: {ack.data!r}")
        result.acknowledged += PER_ACK
        await room.give(needed)


async def run(count: int) -> Result:
    """Send ``count`` datagrams, rounded up so that each sender sends a multiple of 64."""
    result = Result()
    each = -(-count // len(_HOSTS) // PER_ACK) * PER_ACK
    begin = time.perf_counter()
    async with await trisock.open_udp() as udp, trio.open_nursery() as nursery:
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)  # as much as is permitted
        room = Room(udp.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF))
        receiver = Receiver(udp, result, each * len(_HOSTS))
        nursery.start_soon(receiver.run)
        clients = []
        async with trio.open_nursery() as senders:
            for flow, host in enumerate(_HOSTS):
                client = await trisock.connect_udp(host, udp.getlocal().port)
                clients.append(client)
                receiver.expect(client.getlocal(), flow)
                senders.start_soon(send_all, client, flow, each, room, result)
        for sock in (udp, *clients):
            result.dropped += sock.info().dropped or 0
            await sock.close()
    result.seconds = time.perf_counter() - begin
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=1_000_000)
    count = parser.parse_args().count

    async def run_and_show() -> None:
        result = await run(count)
        print(result)
        if result.wrong or result.dropped or result.received != result.sent:
            sys.exit(1)

    run_trio(run_and_show)


if __name__ == "__main__":
    main()
