"""Model-based test: any mix of reads returns every byte, in order.

The peer sends data over a real connection, in arbitrary pieces (under TLS, even partial records).
The machine reads the data with every method and cancels reads at arbitrary points. The model is a
bytearray of the unread bytes, so each read has exactly one correct result. For more examples:

    python -m pytest -n 0 --times 250 tests/campaigns/test_machine.py

No random choice depends on the result of a read, so an example replays identically even if the
kernel coalesces segments.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
)

from helpers.fuzzing import Fuzz
from helpers.machine_peers import Message, Peer, T, TLSPeer, TrioRun
from helpers.machine_reads import (
    FAILURES,
    LIMIT,
    WAITS,
    Batch,
    Chunk,
    Exactly,
    Format,
    FrameFormat,
    LineFormat,
    Next,
    One,
    Opened,
    Peek,
    Read,
    Skip,
)
from trisock import (
    ClientTLS,
    ServerTLS,
    Socket,
    TLSError,
)
from trisock.testing import Authority

# ---- strategies ----

# A small alphabet makes delimiters, their prefixes and overlaps frequent.
letters = "ab\n"
delimiters = st.sampled_from([b"\n", b"a", b"aa", b"ab", b"aba", b"\n\n", b"b\na"])
texts = st.text(letters, max_size=20).map(str.encode)
lines = st.text(letters, min_size=1, max_size=20).map(str.encode)
limits = st.sampled_from([1, 2, 3, 4, 6, 10, 100, 20_000, 65536, 65536, 10_000_000, 10_000_000])

records = st.sampled_from([16384, 16384, 1, 2, 5, 600])
held = st.sampled_from([0, 0, 0, 1, 2, 5, 20, 30])
a_little = st.builds(Message, line=texts, record=records, held=held)
a_lot = st.builds(
    lambda line, size, record, held: Message(line, size // len(line), record, held),
    line=lines,
    size=st.sampled_from([600, 5_000, 20_000, 66_000, 100_000, 200_000]),
    record=records,
    held=held,
)
messages = st.one_of(a_little, a_little, a_little, a_lot)

# A read of frames parses the first letters of a text as the length of a frame.
formats: st.SearchStrategy[Format] = st.one_of(
    st.builds(LineFormat, delimiters, st.booleans(), limits),
    st.builds(FrameFormat, st.sampled_from([1, 1, "B", 2, "<H", 3]), limits),
)

single_reads = st.one_of(
    st.builds(
        Chunk,
        method=st.sampled_from(["recv", "recv", "receive_some", "__anext__"]),
        max_bytes=st.none() | st.sampled_from([1, 2, 3, 7, 1000]),
    ),
    st.builds(Exactly, st.integers(0, 12) | st.sampled_from([255, 1000, 16_385, 100_000])),
    st.builds(One, formats),
    st.builds(One, formats),
    st.just(Peek()),
)

# When to cancel a read. "before": before the read starts. "late": the read starts after its
# deadline. A number: after that many scheduler passes. "race": just as data arrives. "patient":
# only if the read still waits after all of ``meanwhile`` has been sent.
cancellations = st.sampled_from(
    ["patient", "patient", "patient", "before", "late", "race", 0, 1, 2, 5]
)
meanwhile = st.lists(messages, max_size=4)

families = st.sampled_from(["unix", "tcp"])
# How many bytes another task sends during the read: none, a few, or more than the buffers hold.
sizes = st.sampled_from([0, 0, 0, 0, 5, 300_000])

rarely = st.sampled_from([True, False, False, False, False])


# ---- the machine ----


class SocketMachine(RuleBasedStateMachine):
    """One connection and its model.

    ``unread`` holds the bytes that the peer has written and the socket has not read. It excludes
    the data of an incomplete TLS record.
    """

    iterators = Bundle("iterators")

    def __init__(self) -> None:
        super().__init__()
        self.trio = TrioRun()
        self.unread = bytearray()
        self.readable = 0  # bytes that have become readable since the start
        self.record_ends: deque[int] = deque()
        # The next chunks. The model knows them only after an ``unrecv`` or a ``peek``.
        self.front: deque[bytes] = deque()
        self.eof_seen = False
        self.failed = False
        self.opened: list[Opened] = []
        self.change_at_the_end = self.urgent_byte_sent = False
        self.raw: socket.socket | None = None
        self.sock: Socket = None  # type: ignore[assignment]
        self.peer: Peer = None  # type: ignore[assignment]

    def call(self, function: Callable[..., Awaitable[T]], *args: object) -> T:
        try:
            return self.trio.call(function, *args)
        except BaseException:
            self.failed = True
            raise

    def on_written(self, data: bytes) -> None:
        """Add bytes from the peer to the model: one TLS record, or a part of a plain stream."""
        self.unread += data
        self.readable += len(data)
        self.record_ends.append(self.readable)

    def connected(self, family: str) -> socket.socket:
        """Create ``sock``, and return the raw socket of its peer."""
        if family == "unix":
            ours, raw = socket.socketpair()
        else:
            with socket.create_server(("127.0.0.1", 0)) as listening:
                raw = socket.create_connection(listening.getsockname())
                ours, _ = listening.accept()
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.raw = raw
        self.synchronous = family == "unix"  # data arrives as soon as it is written
        self.sock = Socket(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
        return raw

    def start(self, message: Message) -> Opened:
        self.peer.send(message)
        return self.opens_an_iterator(LineFormat(b"\n", False, 65536))

    # ---- the peer ----

    @precondition(lambda self: self.peer.ending is None)
    @rule(message=messages)
    def peer_sends(self, message: Message) -> None:
        self.peer.send(message)

    # ---- reading ----

    @rule(
        read=single_reads,
        when=cancellations,
        meanwhile=meanwhile,
        sending=sizes,
        look=st.booleans(),
    )
    def reads(
        self, read: Read, when: str | int, meanwhile: list[Message], sending: int, look: bool
    ) -> None:
        self.call(self.perform, read, when, meanwhile, sending, look)

    @rule(target=iterators, format=formats)
    def opens_an_iterator(self, format: Format) -> Opened:
        self.opened.append(Opened(format.iterate(self.sock).__aiter__(), format))
        return self.opened[-1]

    @rule(
        opened=iterators,
        steps=st.sampled_from(["batch", 1, 2, 3, 4, 10, 1000, 30_000]),
        when=cancellations,
        meanwhile=meanwhile,
        sending=sizes,
        look=st.booleans(),
    )
    def reads_items(
        self,
        opened: Opened,
        steps: int | str,
        when: str | int,
        meanwhile: list[Message],
        sending: int,
        look: bool,
    ) -> None:
        many = Batch if isinstance(opened.format, LineFormat) else Next
        read = Next(opened, steps) if isinstance(steps, int) else many(opened)
        self.call(self.perform, read, when, meanwhile, sending, look)

    @rule(
        delimiter=delimiters,
        when=st.sampled_from(["patient", "patient", "before", "late"]),
        meanwhile=meanwhile,
        look=st.booleans(),
    )
    def skips(self, delimiter: bytes, when: str, meanwhile: list[Message], look: bool) -> None:
        """Skip to a delimiter.

        If the call is cancelled while data is in flight, the model cannot know how much of the data
        was dropped. So a call that may have to wait is cancelled before it begins.
        """
        if not self.synchronous and delimiter not in self.unread and not self.peer.ended:
            when = "before"
        self.call(self.perform, Skip(delimiter), when, meanwhile, 0, look)

    @precondition(lambda self: self.peer.ending is None)
    @rule(read=single_reads, line=lines)
    def reads_data_that_arrives_byte_by_byte(self, read: Read, line: bytes) -> None:
        single_bytes = [Message(line[n % len(line) :][:1]) for n in range(270)]
        self.call(self.perform, read, "trickling", single_bytes, 0, True)

    async def perform(
        self, read: Read, when: str | int, meanwhile: list[Message], sending: int, look: bool
    ) -> None:
        """Read in a separate task and check the result.

        ``sending``: the number of bytes that another task sends during the read. The peer receives
        them only after the read. ``look``: also call ``info``, which must have no side effect.
        """
        sock = self.sock
        self.peer.write()  # write what did not fit into the kernel's buffer earlier
        buffered = sock.info().buffered if look else None
        got: list[bytes] = []
        failures: list[BaseException] = []
        done = trio.Event()
        scope = trio.CancelScope()
        if when == "before":
            scope.cancel()
        elif when == "late":
            scope.deadline = trio.current_time() - 1

        async def task() -> None:
            try:
                with scope:
                    for _ in range(read.steps):
                        got.append(await read.step(sock))
            except tuple(FAILURES) as exc:
                failures.append(exc)
            finally:
                done.set()

        if self.peer.ending is not None:
            sending = 0
        async with trio.open_nursery() as nursery:
            if sending:
                nursery.start_soon(sock.send, b"s" * sending)
            nursery.start_soon(task)
            if when in ("patient", "trickling"):
                await self.supply(read, when, meanwhile, done)
                scope.cancel()
            elif when == "race":
                await trio.testing.wait_all_tasks_blocked()
                if self.peer.ending is None:
                    for each in meanwhile:
                        self.peer.send(each)
                scope.cancel()
            elif isinstance(when, int):
                for _ in range(when):
                    await trio.lowlevel.checkpoint()
                scope.cancel()
            await done.wait()
            assert await self.peer.receive(sending) == b"s" * sending

        results, ending, dropped = read.expected(self.unread, self.peer.ended, got)
        if scope.cancelled_caught:
            if when in ("patient", "trickling"):
                assert (len(got), ending) == (len(results), WAITS)
            if when in ("before", "late") and read.always_a_cancel_point:
                assert not got
            results = results[: len(got)]
        else:
            # As in Trio, a call that fails need not be a checkpoint.
            assert failures or when not in ("before", "late") or not read.always_a_cancel_point
            assert [FAILURES[type(exc)] for exc in failures] == ([ending] if ending else [])
        assert got == [each.returned for each in results]

        if isinstance(read, Chunk) and got and got[0]:
            self.check_chunk(got[0], read.limit, buffered)
        elif isinstance(read, Peek):
            if got and got[0]:
                self.check_peeked(got[0])
        elif got or when not in ("before", "late"):
            self.front.clear()
        consumed = sum(each.count for each in results)
        if when not in ("before", "late"):
            consumed += dropped
        del self.unread[:consumed]
        for failure in failures:
            read.check(failure, self.unread)
            self.eof_seen |= FAILURES[type(failure)] != LIMIT
        if isinstance(read, (Chunk, Peek)):
            self.eof_seen |= got == [b""]
        if buffered is not None:
            assert buffered - consumed <= sock.info().buffered <= len(self.unread)

    async def supply(
        self, read: Read, when: str | int, meanwhile: list[Message], done: trio.Event
    ) -> None:
        """Send more data whenever the read waits, until the read is done or no data is left."""
        coming = deque(meanwhile if self.peer.ending is None else ())
        while coming and when == "trickling" and not done.is_set():
            self.peer.send(coming.popleft())
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()
        while True:
            await trio.testing.wait_all_tasks_blocked()
            if done.is_set():
                return
            if read.expected(self.unread, self.peer.ended, []).ending != WAITS:
                # Over TCP, the data that the read needs may still be in flight.
                assert not self.synchronous, "the read still waits, although its data has arrived"
                await done.wait()
                return
            if coming:
                self.peer.send(coming.popleft())
            elif not self.peer.write():
                break
        with pytest.raises(trio.BusyResourceError):
            self.sock.unrecv(b"x")

    def check_chunk(self, chunk: bytes, limit: int | None, buffered: int | None) -> None:
        """Check that a received chunk has the right length, if the model knows the length."""
        if self.front:
            known = self.front.popleft()
            assert chunk == known[:limit]
            if known[len(chunk) :]:
                self.front.appendleft(known[len(chunk) :])
        elif buffered == 0 and limit is None and isinstance(self.peer, TLSPeer):
            # A chunk is one record, or several complete records if they are very small.
            start = self.readable - len(self.unread)
            while self.record_ends[0] <= start:
                self.record_ends.popleft()
            ends = [end - start for end in self.record_ends]
            assert len(chunk) in ends
            several = ends[: ends.index(len(chunk)) + 1]
            assert len(several) == 1 or max(map(int.__sub__, several, [0, *several])) < 256

    def check_peeked(self, chunk: bytes) -> None:
        """Check a chunk that was not consumed: later reads of a chunk must return it."""
        if not self.front:
            self.front.append(chunk)
        assert chunk == self.front[0]

    @rule(cancelled=st.booleans(), look=st.booleans())
    def peeks(self, cancelled: bool, look: bool) -> None:
        self.call(self.peek, cancelled, look)

    async def peek(self, cancelled: bool, look: bool) -> None:
        sock = self.sock
        self.peer.write()
        buffered = sock.info().buffered if look else None
        with trio.CancelScope() as scope:
            if cancelled:
                scope.cancel()
            chunk = await sock.peek()
        assert scope.cancelled_caught == cancelled
        if cancelled:
            return
        if chunk is None:
            assert not buffered
            if self.synchronous:
                assert not self.unread
                assert self.peer.ended != "clean"
        elif chunk == b"":
            assert (bytes(self.unread), self.peer.ended) == (b"", "clean")
            self.eof_seen = True
        else:
            assert self.unread.startswith(chunk)
            if look:
                assert sock.info().buffered >= len(chunk)
            self.check_peeked(chunk)

    @rule(
        data=st.one_of(texts, texts, a_lot.map(lambda message: message.data)),
        kind=st.sampled_from([bytes, bytearray, memoryview]),
    )
    def pushes_back(self, data: bytes, kind: Callable[[bytes], Any]) -> None:
        self.sock.unrecv(kind(data))
        self.unread[:0] = data
        if data:
            self.front.appendleft(data)

    # ---- sending, info, changes of TLS, and the end ----

    @precondition(lambda self: self.peer.ending is None)
    @rule(data=texts)
    def sends(self, data: bytes) -> None:
        self.call(self.send, data)

    async def send(self, data: bytes) -> None:
        await self.sock.send(data)
        assert await self.peer.receive(len(data)) == data

    @rule()
    def shows_its_state(self) -> None:
        """Check ``info``.

        This is a rule, not an invariant, because the call of ``info`` might affect the next read.
        """
        info = self.sock.info()
        assert info.isopen == self.sock.isopen()
        assert info.buffered <= len(self.unread)
        if self.unread or self.peer.ended is None:
            assert info.isopen
        elif self.eof_seen or (self.synchronous and type(self.peer) is Peer):
            assert not info.isopen

    @rule(now=rarely)
    def starts_or_stops_tls_at_the_end(self, now: bool) -> None:
        """If ``now`` is true, let the example end with ``change``, not with a read to EOF."""
        self.change_at_the_end |= now

    async def change(self) -> None:
        """During a stuck broadcast, start or stop TLS. Reads must fail while the call waits."""
        sock = self.sock

        async def broadcast() -> None:
            await sock._connection.sending.acquire()
            try:
                await trio.sleep_forever()
            finally:
                sock._connection.sending.release()

        async def change() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await (sock.stoptls() if sock.istls() else sock.starttls(_tls("server")))

        reads: list[Read] = [Next(opened, 1) for opened in self.opened]
        reads += [Chunk("recv", 1), Chunk("receive_some", None), Chunk("__anext__", None)]
        reads += [Batch(each) for each in self.opened if isinstance(each.format, LineFormat)]
        reads += [One(each.format) for each in self.opened]
        reads += [Exactly(0), Exactly(1), Skip(b"\n"), Peek()]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(broadcast)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(change)
            await trio.testing.wait_all_tasks_blocked()
            for refusal in (trio.BusyResourceError, trio.ClosedResourceError):
                for read in reads:
                    with pytest.raises(refusal):
                        await read.step(sock)
                with pytest.raises(refusal):
                    await sock.peek()
                with pytest.raises(refusal):
                    sock.unrecv(b"x")
                assert bytes(self.unread).startswith(sock._connection.buffer.peek_all())
                sock.abort()
            nursery.cancel_scope.cancel()

    def teardown(self) -> None:
        try:
            if not self.failed:
                self.call(self.change if self.change_at_the_end else self.read_to_eof)
        finally:
            if self.sock is not None:
                self.trio.call(self.abort)
            if self.raw is not None:
                self.raw.close()
            self.trio.close()

    async def read_to_eof(self) -> None:
        if self.peer.ending is None:
            self.peer.end("clean", fin=True)
        rest = bytearray()
        with contextlib.suppress(TLSError):
            while True:
                self.peer.write()
                chunk = await self.sock.recv()
                rest += chunk
                if not chunk:
                    assert self.peer.ended == "clean"
                    break
        assert rest == self.unread

    async def abort(self) -> None:
        self.sock.abort()
        assert self.sock.fileno() == -1


class PlainMachine(SocketMachine):
    """The connection does not use TLS."""

    @initialize(target=SocketMachine.iterators, family=families, message=messages)
    def connects(self, family: str, message: Message) -> Opened:
        self.peer = Peer(self.connected(family), self.on_written)
        return self.start(message)

    @precondition(lambda self: self.peer.ending is None)
    @rule(now=rarely)
    def peer_ends(self, now: bool) -> None:
        if now:
            self.peer.end("clean", fin=True)

    @precondition(lambda self: self.peer.ending is None and not self.urgent_byte_sent)
    @rule(now=rarely)
    def peer_sends_an_urgent_byte(self, now: bool) -> None:
        """Send an urgent byte, which is not part of the stream.

        The kernel keeps only one urgent byte. If the peer sent two, one of them would become data.
        """
        if now and not self.synchronous:
            with contextlib.suppress(BlockingIOError):
                self.peer.raw.send(b"!", socket.MSG_OOB)
                self.urgent_byte_sent = True


class TLSMachine(SocketMachine):
    """The connection uses TLS. The socket is the TLS client or the TLS server."""

    @initialize(
        target=SocketMachine.iterators,
        family=families,
        role=st.sampled_from(["client", "server"]),
        version=st.sampled_from([ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]),
        message=messages,
    )
    def connects(self, family: str, role: str, version: ssl.TLSVersion, message: Message) -> Opened:
        side = "client" if role == "server" else "server"
        raw = self.connected(family)
        self.peer = TLSPeer(raw, self.on_written, _peer_context(side, version), side)
        self.call(self.start_tls, _tls(role))
        return self.start(message)

    async def start_tls(self, tls: ClientTLS | ServerTLS) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.sock.starttls, tls)
            await self.peer.handshake()

    @precondition(lambda self: self.peer.ending is None)
    @rule(now=rarely, how=st.sampled_from(["clean", "clean", "cut"]), fin=st.booleans())
    def peer_ends(self, now: bool, how: str, fin: bool) -> None:
        if now:
            self.peer.end(how, fin=fin)


@functools.cache
def _authority() -> Authority:
    return Authority()


@functools.cache
def _tls(role: str) -> ClientTLS | ServerTLS:
    if role == "client":
        return _authority().client_tls("example.org")
    return _authority().server_tls("example.org")


@functools.cache
def _peer_context(side: str, version: ssl.TLSVersion) -> ssl.SSLContext:
    if side == "client":
        context = ssl.create_default_context(cadata=_authority().ca.decode())
    else:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        _authority().certificate("example.org").load_into(context)
    context.minimum_version = context.maximum_version = version
    return context


@pytest.mark.parametrize("machine", [PlainMachine, TLSMachine])
def test_any_mix_of_reads_returns_every_byte_in_order(
    machine: type[SocketMachine], fuzz: Fuzz
) -> None:
    fuzz.run_machine(machine, 40, steps=40)
