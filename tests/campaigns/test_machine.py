"""A Socket against a bytearray: any mix of reads keeps every byte, in order, on a real connection.

The machine says things as the peer, in any pieces (under TLS also pieces of a record), and reads
them in every way there is, cancelled at any moment or not. The model is what was said and
not yet consumed, so each read has one right answer. A run of the tests tries a few examples; to
try many:

    TRISOCK_EXAMPLES=10000 python -m pytest tests/campaigns/test_machine.py

What is drawn never depends on what was read, so that an example runs again in the same way although
the kernel may join what was sent in pieces, or not.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
)

from helpers.authority import Authority
from helpers.machine_peers import Peer, Said, T, TLSPeer, TrioRun
from helpers.machine_reads import FAILURES, LIMIT, WAITS, Chunk, Exactly, Next, Opened, Read, Until
from trisock import (
    ClientTLS,
    ServerTLS,
    Socket,
    TLSError,
)

EXAMPLES = int(os.environ.get("TRISOCK_EXAMPLES", "100"))


# ---- what is drawn ----

# Few different bytes, so that delimiters, their fronts and their overlaps are everywhere.
letters = "ab\n"
delimiters = st.sampled_from([b"\n", b"a", b"aa", b"ab", b"aba", b"\n\n", b"b\na"])
texts = st.text(letters, max_size=20).map(str.encode)
lines = st.text(letters, min_size=1, max_size=20).map(str.encode)
limits = st.sampled_from([1, 2, 3, 4, 6, 10, 100, 20_000, 65536, 65536, 10_000_000, 10_000_000])

records = st.sampled_from([16384, 16384, 1, 2, 5, 600])
held = st.sampled_from([0, 0, 0, 1, 2, 5, 20, 30])
a_little = st.builds(Said, line=texts, record=records, held=held)
a_lot = st.builds(
    lambda line, size, record, held: Said(line, size // len(line), record, held),
    line=lines,
    size=st.sampled_from([600, 5_000, 20_000, 66_000, 100_000, 200_000]),
    record=records,
    held=held,
)
said = st.one_of(a_little, a_little, a_little, a_lot)

single_reads = st.one_of(
    st.builds(
        Chunk,
        method=st.sampled_from(["recv", "recv", "receive_some", "__anext__"]),
        max_bytes=st.none() | st.sampled_from([1, 2, 3, 7, 1000]),
    ),
    st.builds(Exactly, st.integers(0, 12) | st.sampled_from([255, 1000, 16_385, 100_000])),
    st.builds(Until, delimiters, limits),
)

# When a read is cancelled: before it begins; by a deadline that has passed; after so many passes
# through the scheduler; while it waits, at the very moment when more arrives; or not, as
# long as more comes ("meanwhile"), and then when it is certain to wait for ever.
moments = st.sampled_from(["patient", "patient", "patient", "before", "late", "race", 0, 1, 2, 5])
meanwhile = st.lists(said, max_size=4)

families = st.sampled_from(["unix", "tcp"])
# What another task sends meanwhile: nothing, little, or more than there is room for.
sizes = st.sampled_from([0, 0, 0, 0, 5, 300_000])

seldom = st.sampled_from([True, False, False, False, False])


# ---- the machine ----


class SocketMachine(RuleBasedStateMachine):
    """One connection, and its model.

    ``left`` is what can be read and was not: all that was said up to now, but for what a record
    that is not whole holds back.
    """

    iterators = Bundle("iterators")

    def __init__(self) -> None:
        super().__init__()
        self.trio = TrioRun()
        self.left = bytearray()
        self.heard = 0
        self.record_ends: deque[int] = deque()
        # The chunks that are known to come next: pushed back or peeked at.
        self.front: deque[bytes] = deque()
        self.end_met = False
        self.failed = False
        self.opened: list[Opened] = []
        self.changes = self.urged = False
        self.raw: socket.socket | None = None
        self.sock: Socket = None  # type: ignore[assignment]
        self.peer: Peer = None  # type: ignore[assignment]

    def call(self, function: Callable[..., Awaitable[T]], *args: object) -> T:
        try:
            return self.trio.call(function, *args)
        except BaseException:
            self.failed = True
            raise

    def hear(self, data: bytes) -> None:
        """Be told by the peer that it has written this: one TLS record, or a part of the stream."""
        self.left += data
        self.heard += len(data)
        self.record_ends.append(self.heard)

    def connected(self, family: str) -> socket.socket:
        """Make ``sock`` and return the raw socket at its other end."""
        if family == "unix":
            ours, raw = socket.socketpair()
        else:
            with socket.create_server(("127.0.0.1", 0)) as listening:
                raw = socket.create_connection(listening.getsockname())
                ours, _ = listening.accept()
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.raw = raw
        self.synchronous = family == "unix"  # what was written has arrived
        self.sock = Socket(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
        return raw

    def begins(self, said: Said) -> Opened:
        self.peer.say(said)
        return self.opens_lines(delimiter=b"\n", keep_ends=False, max_bytes=65536)

    # ---- the peer ----

    @precondition(lambda self: self.peer.ending is None)
    @rule(said=said)
    def says(self, said: Said) -> None:
        self.peer.say(said)

    # ---- reading ----

    @rule(read=single_reads, when=moments, meanwhile=meanwhile, sending=sizes, look=st.booleans())
    def reads(
        self, read: Read, when: str | int, meanwhile: list[Said], sending: int, look: bool
    ) -> None:
        self.call(self.perform, read, when, meanwhile, sending, look)

    @rule(
        target=iterators,
        delimiter=delimiters,
        keep_ends=st.booleans(),
        max_bytes=limits,
    )
    def opens_lines(self, delimiter: bytes, keep_ends: bool, max_bytes: int) -> Opened:
        lines = self.sock.lines(delimiter=delimiter, keep_ends=keep_ends, max_bytes=max_bytes)
        self.opened.append(Opened(lines.__aiter__(), delimiter, keep_ends, max_bytes))
        return self.opened[-1]

    @rule(
        opened=iterators,
        steps=st.integers(1, 4) | st.sampled_from([10, 1000, 30_000]),
        when=moments,
        meanwhile=meanwhile,
        sending=sizes,
        look=st.booleans(),
    )
    def reads_lines(
        self,
        opened: Opened,
        steps: int,
        when: str | int,
        meanwhile: list[Said],
        sending: int,
        look: bool,
    ) -> None:
        self.call(self.perform, Next(opened, steps), when, meanwhile, sending, look)

    @precondition(lambda self: self.peer.ending is None)
    @rule(read=single_reads, line=lines)
    def reads_what_comes_byte_by_byte(self, read: Read, line: bytes) -> None:
        drops = [Said(line[n % len(line) :][:1]) for n in range(270)]
        self.call(self.perform, read, "dripping", drops, 0, True)

    async def perform(
        self, read: Read, when: str | int, meanwhile: list[Said], sending: int, look: bool
    ) -> None:
        """Read, in a task of its own, and check what comes.

        ``sending``: another task sends so many bytes, which the peer does not take before the
        read is over. ``look``: also at what is buffered, which must change nothing.
        """
        sock = self.sock
        self.peer.write()  # what the kernel had no room for
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
            if when in ("patient", "dripping"):
                await self.supply(read, when, meanwhile, done)
                scope.cancel()
            elif when == "race":
                await trio.testing.wait_all_tasks_blocked()
                if self.peer.ending is None:
                    for each in meanwhile:
                        self.peer.say(each)
                scope.cancel()
            elif isinstance(when, int):
                for _ in range(when):
                    await trio.lowlevel.checkpoint()
                scope.cancel()
            await done.wait()
            assert await self.peer.receive(sending) == b"s" * sending

        taken, ending = read.expected(self.left, self.peer.ended, got)
        if scope.cancelled_caught:
            if when in ("patient", "dripping"):
                assert (len(got), ending) == (len(taken), WAITS)
            if when in ("before", "late") and read.always_a_cancel_point:
                assert not got
            taken = taken[: len(got)]
        else:
            # An error need not be a checkpoint, as Trio has it; a success is one.
            assert failures or when not in ("before", "late") or not read.always_a_cancel_point
            assert [FAILURES[type(exc)] for exc in failures] == ([ending] if ending else [])
        assert got == [each.returned for each in taken]

        if isinstance(read, Chunk) and got and got[0]:
            self.check_chunk(got[0], read.limit, buffered)
        elif got or when not in ("before", "late"):
            self.front.clear()
        consumed = sum(each.count for each in taken)
        del self.left[:consumed]
        for failure in failures:
            read.check(failure, self.left)
            self.end_met |= FAILURES[type(failure)] != LIMIT
        if isinstance(read, Chunk):
            self.end_met |= got == [b""]
        if buffered is not None:
            assert buffered - consumed <= sock.info().buffered <= len(self.left)

    async def supply(
        self, read: Read, when: str | int, meanwhile: list[Said], done: trio.Event
    ) -> None:
        """Say more whenever the read waits; return once it is done or certain to wait for ever."""
        coming = deque(meanwhile if self.peer.ending is None else ())
        while coming and when == "dripping" and not done.is_set():
            self.peer.say(coming.popleft())
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()
        while True:
            await trio.testing.wait_all_tasks_blocked()
            if done.is_set():
                return
            if read.expected(self.left, self.peer.ended, []).ending != WAITS:
                # Over TCP what it needs may be on its way.
                assert not self.synchronous, "the read waits for what has come"
                await done.wait()
                return
            if coming:
                self.peer.say(coming.popleft())
            elif not self.peer.write():
                break
        with pytest.raises(trio.BusyResourceError):
            self.sock.unrecv(b"x")

    def check_chunk(self, chunk: bytes, limit: int | None, buffered: int | None) -> None:
        """Check where a chunk that was received ends, if that is known."""
        if self.front:
            known = self.front.popleft()
            assert chunk == known[:limit]
            if known[len(chunk) :]:
                self.front.appendleft(known[len(chunk) :])
        elif buffered == 0 and limit is None and isinstance(self.peer, TLSPeer):
            # One record; or, of very small ones that came together, several: whole ones.
            start = self.heard - len(self.left)
            while self.record_ends[0] <= start:
                self.record_ends.popleft()
            ends = [end - start for end in self.record_ends]
            assert len(chunk) in ends
            several = ends[: ends.index(len(chunk)) + 1]
            assert len(several) == 1 or max(map(int.__sub__, several, [0, *several])) < 256

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
                assert not self.left
                assert self.peer.ended != "clean"
        elif chunk == b"":
            assert (bytes(self.left), self.peer.ended) == (b"", "clean")
            self.end_met = True
        else:
            assert self.left.startswith(chunk)
            if look:
                assert sock.info().buffered >= len(chunk)
            if not self.front:
                self.front.append(chunk)
            assert chunk == self.front[0]

    @rule(
        data=st.one_of(texts, texts, a_lot.map(lambda said: said.data)),
        kind=st.sampled_from([bytes, bytearray, memoryview]),
    )
    def pushes_back(self, data: bytes, kind: Callable[[bytes], Any]) -> None:
        self.sock.unrecv(kind(data))
        self.left[:0] = data
        if data:
            self.front.appendleft(data)

    # ---- the rest ----

    @precondition(lambda self: self.peer.ending is None)
    @rule(data=texts)
    def sends(self, data: bytes) -> None:
        self.call(self.send, data)

    async def send(self, data: bytes) -> None:
        await self.sock.send(data)
        assert await self.peer.receive(len(data)) == data

    @rule()
    def tells(self) -> None:
        """Say what is known. No invariant: between two reads there need not be a look."""
        info = self.sock.info()
        assert info.isopen == self.sock.isopen()
        assert info.buffered <= len(self.left)
        if self.left or self.peer.ended is None:
            assert info.isopen
        elif self.end_met or (self.synchronous and type(self.peer) is Peer):
            assert not info.isopen

    @rule(now=seldom)
    def changes_at_the_end(self, now: bool) -> None:
        """Let the last thing be a ``starttls`` or ``stoptls`` that waits while others read."""
        self.changes |= now

    async def change(self) -> None:
        """Change what the connection carries, behind a broadcast that is stuck; read meanwhile."""
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
        reads += [Exactly(0), Exactly(1), Until(b"\n", 65536)]
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
                assert bytes(self.left).startswith(sock._connection.buffer.peek_all())
                sock.abort()
            nursery.cancel_scope.cancel()

    def teardown(self) -> None:
        try:
            if not self.failed:
                self.call(self.change if self.changes else self.read_to_the_end)
        finally:
            if self.sock is not None:
                self.trio.call(self.abort)
            if self.raw is not None:
                self.raw.close()
            self.trio.close()

    async def read_to_the_end(self) -> None:
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
        assert rest == self.left

    async def abort(self) -> None:
        self.sock.abort()
        assert self.sock.fileno() == -1


class ClearMachine(SocketMachine):
    """The connection is in the clear."""

    @initialize(target=SocketMachine.iterators, family=families, said=said)
    def connects(self, family: str, said: Said) -> Opened:
        self.peer = Peer(self.connected(family), self.hear)
        return self.begins(said)

    @precondition(lambda self: self.peer.ending is None)
    @rule(now=seldom)
    def peer_ends(self, now: bool) -> None:
        if now:
            self.peer.end("clean", fin=True)

    @precondition(lambda self: self.peer.ending is None and not self.urged)
    @rule(now=seldom)
    def peer_sends_an_urgent_byte(self, now: bool) -> None:
        """It is no part of the stream. The kernel keeps one: a second one would be."""
        if now and not self.synchronous:
            with contextlib.suppress(BlockingIOError):
                self.peer.raw.send(b"!", socket.MSG_OOB)
                self.urged = True


class EncryptedMachine(SocketMachine):
    """The connection has turned to TLS, in either role."""

    @initialize(
        target=SocketMachine.iterators,
        family=families,
        role=st.sampled_from(["client", "server"]),
        version=st.sampled_from([ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]),
        said=said,
    )
    def connects(self, family: str, role: str, version: ssl.TLSVersion, said: Said) -> Opened:
        side = "client" if role == "server" else "server"
        raw = self.connected(family)
        self.peer = TLSPeer(raw, self.hear, _peer_context(side, version), side)
        self.call(self.start_tls, _tls(role))
        return self.begins(said)

    async def start_tls(self, tls: ClientTLS | ServerTLS) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.sock.starttls, tls)
            await self.peer.handshake()

    @precondition(lambda self: self.peer.ending is None)
    @rule(now=seldom, how=st.sampled_from(["clean", "clean", "cut"]), fin=st.booleans())
    def peer_ends(self, now: bool, how: str, fin: bool) -> None:
        if now:
            self.peer.end(how, fin=fin)


@functools.cache
def _authority() -> Authority:
    return Authority()


@functools.cache
def _tls(role: str) -> ClientTLS | ServerTLS:
    if role == "client":
        return ClientTLS("example.org", ca=_authority().pem)
    return ServerTLS(_authority().issue("example.org"))


@functools.cache
def _peer_context(side: str, version: ssl.TLSVersion) -> ssl.SSLContext:
    if side == "client":
        context = ssl.create_default_context()
        _authority().ca.configure_trust(context)
    else:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        _authority().ca.issue_cert("example.org").configure_cert(context)
    context.minimum_version = context.maximum_version = version
    return context


SETTINGS = settings(
    max_examples=EXAMPLES,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

TestAnyMixOfReadsInTheClearKeepsEveryByte = ClearMachine.TestCase
TestAnyMixOfReadsInTheClearKeepsEveryByte.settings = SETTINGS
TestAnyMixOfReadsUnderTLSKeepsEveryByte = EncryptedMachine.TestCase
TestAnyMixOfReadsUnderTLSKeepsEveryByte.settings = SETTINGS
