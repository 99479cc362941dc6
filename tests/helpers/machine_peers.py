"""For test_machine.py: a plain-text peer, a TLS peer, and a Trio run that advances on demand."""

from __future__ import annotations

import contextlib
import functools
import queue
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import trio
import trio.testing

# In seconds. A call that takes longer fails.
BOUND = 10

T = TypeVar("T")


class TrioRun:
    """A Trio run that advances only during a call from outside."""

    def __init__(self) -> None:
        self._callbacks: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._call: Callable[[], Awaitable[Any]] | None = None
        self._outcome: tuple[Any, BaseException | None] | None = None
        self._over = False
        trio.lowlevel.start_guest_run(
            self._main, run_sync_soon_threadsafe=self._callbacks.put, done_callback=self._done
        )

    async def _main(self) -> None:
        # Between calls this task never blocks, so that Trio needs no thread to wait for I/O.
        while not self._over:
            if self._call is not None:
                call, self._call = self._call, None
                try:
                    with trio.fail_after(BOUND):
                        self._outcome = await call(), None
                except BaseException as exc:
                    self._outcome = None, exc
            await trio.lowlevel.checkpoint()

    def _done(self, outcome: Any) -> None:
        self._outcome = None, getattr(outcome, "error", None)

    def call(self, function: Callable[..., Awaitable[T]], *args: object) -> T:
        self._call = functools.partial(function, *args)
        return self._advance()  # type: ignore[no-any-return]

    def close(self) -> None:
        self._over = True
        self._advance()

    def _advance(self) -> Any:
        self._outcome = None
        while self._outcome is None:
            self._callbacks.get(timeout=2 * BOUND)()
        value, failure = self._outcome
        if failure is not None:
            raise failure
        return value


# ---- the peer ----


@dataclass(frozen=True)
class Message:
    """The data of one send: ``line``, repeated ``times`` times."""

    line: bytes
    times: int = 1
    record: int = 16384  # How many bytes of the data go into one TLS record.
    held: int = 0  # How many trailing wire bytes the peer withholds until its next send.

    @property
    def data(self) -> bytes:
        return self.line * self.times


class Peer:
    """The other end of a plain connection: a raw socket, and the bytes to write to it.

    The peer calls ``on_written`` with the data that the Socket can now read. Without TLS, this data
    is every written byte. With TLS, it is the content of each completely written record.
    """

    def __init__(self, raw: socket.socket, on_written: Callable[[bytes], None]) -> None:
        raw.setblocking(False)
        self.raw = raw
        self.on_written = on_written
        self.wire = bytearray()  # Not yet written.
        self.held = 0  # How many trailing bytes of ``wire`` are withheld.
        self.ending: str | None = None  # How the stream will end, or None if undecided.
        self.ended: str | None = None  # How the stream has ended, or None if it has not.
        self.fin = False

    def send(self, message: Message) -> None:
        self.encode(message)
        self.held = min(message.held, len(self.wire))
        self.write()

    def end(self, how: str, *, fin: bool) -> None:
        """End the stream.

        A ``"clean"`` end sends the withheld bytes and close_notify (under TLS), and then FIN if
        ``fin`` is true. A ``"cut"`` drops the withheld bytes, and sends FIN without close_notify.
        """
        if how == "cut":
            del self.wire[len(self.wire) - self.held :]
        else:
            self.encode_end()
        self.held = 0
        self.ending = how
        self.fin = fin or how == "cut"
        self.write()

    def write(self) -> bool:
        """Write pending bytes until EAGAIN; return whether anything was written."""
        wrote = False
        with contextlib.suppress(BlockingIOError):
            while due := len(self.wire) - self.held:
                count = self.raw.send(self.wire[: min(due, 262_144)])
                self.written(bytes(self.wire[:count]))
                del self.wire[:count]
                wrote = True
        if self.ending is not None and self.ended is None and not self.wire:
            if self.fin:
                self.raw.shutdown(socket.SHUT_WR)
            self.ended = self.ending
            wrote = True
        return wrote

    async def receive(self, count: int) -> bytes:
        """Return the next ``count`` bytes that the Socket has sent."""
        got = b""
        while len(got) < count:
            got += await self.receive_some(count - len(got))
        return got

    async def read_wire(self, max_bytes: int) -> bytes:
        await trio.lowlevel.wait_readable(self.raw)
        data = self.raw.recv(max_bytes)
        assert data, "the Socket has ended the connection"
        return data

    async def receive_some(self, max_bytes: int) -> bytes:
        return await self.read_wire(max_bytes)

    def encode(self, message: Message) -> None:
        self.wire += message.data

    def encode_end(self) -> None:
        """Do nothing: only FIN ends a plain stream."""

    def written(self, wire: bytes) -> None:
        self.on_written(wire)


class TLSPeer(Peer):
    """The other end of a TLS connection."""

    def __init__(
        self,
        raw: socket.socket,
        on_written: Callable[[bytes], None],
        context: ssl.SSLContext,
        side: str,
    ) -> None:
        super().__init__(raw, on_written)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(
            self.incoming,
            self.outgoing,
            server_side=side == "server",
            server_hostname="example.org" if side == "client" else None,
        )
        # Each record that is not fully written yet, as (number of unwritten bytes, data).
        self.records: deque[tuple[int, bytes]] = deque()

    async def handshake(self) -> None:
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                self.put(b"")
                self.write()
                self.incoming.write(await self.read_wire(65536))
            else:
                self.put(b"")
                self.write()
                return

    def put(self, plain: bytes) -> None:
        wire = self.outgoing.read()
        self.wire += wire
        self.records.append((len(wire), plain))

    def encode(self, message: Message) -> None:
        data = message.data
        size = max(message.record, len(data) // 700)
        for start in range(0, len(data), size):
            plain = data[start : start + size]
            for part in (plain[:16384], plain[16384:]):
                if part:
                    self.tls.write(part)
                    self.put(part)

    def encode_end(self) -> None:
        # unwrap() raises SSLWantReadError if the Socket's close_notify has not arrived.
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        self.put(b"")

    def written(self, wire: bytes) -> None:
        count = len(wire)
        while self.records and self.records[0][0] <= count:
            size, plain = self.records.popleft()
            count -= size
            if plain:
                self.on_written(plain)
        if count:
            size, plain = self.records[0]
            self.records[0] = size - count, plain

    async def receive_some(self, max_bytes: int) -> bytes:
        while True:
            try:
                return self.tls.read(max_bytes)
            except ssl.SSLWantReadError:
                self.incoming.write(await self.read_wire(65536))
