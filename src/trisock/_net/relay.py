"""relay: copy both ways between two connections until both directions have ended.

A relay has one task for each direction. The task reads from the source and sends to the sink, in
turn. So it holds at most the result of one read, and a slow sink slows its source down.

While such a task is blocked in a send, no task reads from its source. So another task then checks
once a second whether the source has hung up, and whether the sink accepts data. This checking task
starts before a send that may block, and ends when no send is in progress. So an idle relay has no
checking task.

The kernel could move the bytes without copying them (``splice``, through a pipe). Compared with
``recv`` and ``send``, it was equally fast for pieces of 64 KiB, 1.3 times as fast for 256 KiB, and
twice as fast for 1 MiB. But each relay would need two pipes (four descriptors), and an unprivileged
user may have only 64 pipes of 1 MiB.
"""

from __future__ import annotations

import enum
import errno
import math
import os
import socket as stdlib_socket
from collections.abc import Sequence

import trio

from .. import _guard
from .._arguments import quoted, seconds_or_inf
from .._text import format_seconds
from .connection import Connection
from .connection_state import ConnectionState
from .linger import wait_until_acknowledged
from .socket import Socket, connection_of
from .syscalls import peer_ended, send_queue_size

# How many seconds one direction may be silent after the other direction has ended, if there is no
# idle_timeout. The peer that ended its direction may be gone, which only a send to this peer would
# show.
_HALF_CLOSED_TIMEOUT = 60.0

# The interval (seconds) at which the source and the sink of a send in progress are checked.
_BLOCKED_INTERVAL = 1.0


async def relay(a: Socket, b: Socket, *, idle_timeout: float | None = None) -> tuple[int, int]:
    """Copy data both ways between two sockets until both directions have ended, then close both.

    Data in the receive buffers is relayed first. A slow receiver slows the sender down: ``relay``
    holds at most the result of one read for each direction (128 KiB; under TLS, the records in 128
    KiB of ciphertext).

    This table shows what the peer of ``b`` sees and what ``relay`` does when the peer of ``a`` does
    something. The roles of ``a`` and ``b`` can be swapped.

    ==============================  ====================================  ==========================
    peer of ``a``                   peer of ``b``                         ``relay``
    ==============================  ====================================  ==========================
    ends its direction (FIN, or     plain text: FIN, and may continue     continues until the other
    ``close_notify`` under TLS)     sending. TLS: ``close_notify``, as    direction has ended
                                    soon as ``b``'s direction has ended
    resets the connection           a reset                               ``BrokenResourceError``
    ends TLS without                a reset                               ``TLSError``
    ``close_notify``, or forges a
    record
    closes the connection but is    all data that the peer of ``a`` had   ``BrokenResourceError``
    still being sent data           sent, then a reset
    does not read                   waits for room                        waits
    does not read for the time      a reset                               ``BrokenResourceError``
    limit
    is silent for the time limit,   the end of the stream (FIN or         returns
    like the peer of ``b``          ``close_notify``)
    ==============================  ====================================  ==========================

    ``SSLStream`` has no half-closed state, so ``close_notify`` can only be sent by closing. On a
    Unix socket, the peer sees a reset only if data from this peer is unread. Otherwise it sees EOF.

    Args:
      a: one socket.
      b: the other socket.
      idle_timeout: the time limit in seconds, more than 0. When no byte has moved in either
        direction for this long, both directions count as ended. ``None`` means no limit while both
        directions are open. After one direction has ended, or a peer has hung up while its data
        cannot be delivered, the limit is 60 seconds. The peer's kernel reports progress only after
        the peer's program has read many KiB. So a peer that reads slowly can look stalled for
        seconds, and a limit of a few seconds may reset its connection.

    Returns: the number of bytes from ``a`` to ``b``, and from ``b`` to ``a``. The result does not
    tell whether the peers or the time limit ended the relay.

    Raises:
      trio.BrokenResourceError: a connection is broken (``TLSError`` is a subclass). The message
        names the address of the peer that broke it. The other connection was aborted, because its
        peer must not see a clean end. Also raised if data for a peer was pending, but the peer
        accepted none of it within the time limit. Also raised if an earlier send on a socket was
        cut short.
      trio.ClosedResourceError: a socket was closed, before the call or by another task, or
        ``send_eof`` was called on it. The other socket was aborted.
      trio.BusyResourceError: another task is using one of the sockets. Nothing has changed.
      TypeError, ValueError: an argument is invalid, or ``a`` and ``b`` are the same socket. Nothing
        has changed.

    Both sockets are closed when ``relay`` returns or raises, except after the errors that change
    nothing. If cancelled, ``relay`` aborts both. If cancelled after both directions have ended, it
    closes both immediately. Once ``relay`` is called, any other read or send on the sockets gets
    ``BusyResourceError``, and a server's ``broadcast`` skips them. If a broadcast to one of the
    sockets is already in progress, ``relay`` first waits until the broadcast has finished.
    """
    for name, sock in ("a", a), ("b", b):
        if not isinstance(sock, Socket):
            raise TypeError(f"{name} must be a trisock.Socket, not {quoted(sock)}")
    if a is b:
        raise ValueError("a and b must be two different sockets")
    limit = seconds_or_inf("idle_timeout", idle_timeout)
    if limit == 0:
        raise ValueError(f"idle_timeout must be more than 0, not {quoted(idle_timeout)}")
    ends = connection_of(a), connection_of(b)
    # No await between the checks and the reservations: another task must not begin a send.
    for end in ends:
        if not end.transport.closing:
            end.check_idle()
    for end in ends:
        end.reserve(ConnectionState.RELAYED)
    # The reservations and locks are never released, because both connections are always closed.
    try:
        for end in ends:
            await end.sending.acquire()  # waits only for a broadcast in progress
            end.layer.check_sending()
        counts = await _Relay(*ends, limit).run()
        await _close(*ends)
    except BaseException:
        for end in ends:
            end.abort()
        raise
    return counts


async def _close(a: Connection, b: Connection) -> None:
    """Close both gracefully and concurrently, because each close may wait for its peer."""
    with _guard.bare():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.close)
            await b.close()


class _State(enum.Enum):
    """What the task of a direction is doing."""

    READING = enum.auto()
    SENDING = enum.auto()  # may be blocked, and holds data that the sink has not accepted
    ENDED = enum.auto()


class _Direction:
    """One direction of a relay.

    Invariant: ``failure`` and ``broken`` are set together.

    Attributes:
      state: what its task is doing.
      count: how many bytes the sink has accepted.
      progress: a measure of how far the send in progress was at the last check. It changes when the
        sink accepts bytes.
      failure: the error that ended this direction before the source's EOF.
      broken: the connection that caused this error, which is the source or the sink.
    """

    __slots__ = ("broken", "count", "failure", "progress", "sink", "source", "state")

    def __init__(self, source: Connection, sink: Connection) -> None:
        self.source = source
        self.sink = sink
        self.state = _State.READING
        self.count = 0
        self.progress: tuple[int, int] = (0, 0)
        self.failure: Exception | None = None
        self.broken: Connection | None = None

    def fail(self, broken: Connection, failure: Exception) -> None:
        self.broken = broken
        self.failure = failure


class _Relay:
    """The state of one relay.

    Invariant: once a direction has failed, the other direction may run only if its source is the
    broken connection, because that peer may have sent data before the connection broke.
    ``_last_moved`` is the time at which the relay last relayed data or EOF, or a sink last accepted
    data.
    """

    __slots__ = ("_checking", "_directions", "_last_moved", "_limit", "_limited", "_nursery")

    def __init__(self, a: Connection, b: Connection, idle_timeout: float) -> None:
        self._directions = _Direction(a, b), _Direction(b, a)
        self._limit = _HALF_CLOSED_TIMEOUT if idle_timeout == math.inf else idle_timeout
        self._limited = idle_timeout != math.inf  # whether a task enforces the limit
        self._checking = False  # whether a task checks sends in progress
        self._last_moved = trio.current_time()

    async def run(self) -> tuple[int, int]:
        """Copy until both directions have ended. Returns the number of bytes each way."""
        there, back = self._directions
        try:
            with _guard.bare():
                async with trio.open_nursery() as self._nursery:
                    if self._limited:
                        self._nursery.start_soon(self._limit_silence)
                    self._nursery.start_soon(self._run_direction, back)
                    await self._run_direction(there)
            failed = self._failed_direction()
            if failed is None:
                return there.count, back.count
            await self._deliver_complete_data(failed.broken)
            assert failed.failure is not None
            raise failed.failure
        finally:
            there.failure = back.failure = None  # their tracebacks refer to the directions

    def _failed_direction(self) -> _Direction | None:
        """Return the direction whose error decides the outcome, or ``None`` after a clean end."""
        failed = [each for each in self._directions if each.failure is not None]
        for each in failed:
            # A read's error explains the failure better than a send's, because reads receive TLS
            # alerts.
            if each.broken is each.source:
                return each
        if failed:
            return failed[0]
        for each in self._directions:
            if each.state is _State.SENDING:  # the time limit has passed
                why = f"the peer has accepted no data for {format_seconds(self._limit)}"
                each.fail(each.sink, each.sink.transport.broken(why))
                return each
        return None

    async def _deliver_complete_data(self, broken: Connection | None) -> None:
        """If all data from the broken connection was relayed, wait until that data has arrived."""
        for each in self._directions:
            if each.source is broken and each.state is _State.ENDED and each.failure is None:
                await wait_until_acknowledged(each.sink.socket)

    # ---- one direction ----

    async def _run_direction(self, direction: _Direction) -> None:
        try:
            await self._copy(direction)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            if direction.state is _State.READING:
                self._end_with(direction, exc)
            else:  # first relay data that the sink's peer sent earlier
                direction.fail(direction.sink, exc)
        direction.state = _State.ENDED
        if all(each.state is _State.ENDED for each in self._directions):
            self._nursery.cancel_scope.cancel()  # ends the checking tasks
        else:
            self._limit_the_rest()

    async def _copy(self, direction: _Direction) -> None:
        """Copy all data, and then EOF."""
        source, sink = direction.source, direction.sink
        while source.buffer:
            source.check_open()  # a closed connection keeps its buffer
            await self._send(direction, [source.buffer.take_chunk(None)])
        while chunk := await source.layer.receive():
            if source.tls is not None:
                await self._send(direction, [chunk, *source.tls.receive_pending()])
            elif sink.tls is not None:
                await self._send(direction, [chunk])
            else:  # the hot path (benchmark row relay). A pass has one checkpoint: ``receive``
                self._last_moved = trio.current_time()
                direction.state = _State.SENDING
                sent = sink.transport.send_nowait(chunk)
                if sent < len(chunk):
                    await self._send_rest(sink, memoryview(chunk)[sent:])
                direction.state = _State.READING
                direction.count += len(chunk)
        self._last_moved = trio.current_time()
        direction.state = _State.SENDING
        if sink.tls is None:
            await sink.transport.send_eof()
        else:
            sink.tls.check_sending()  # ``close_notify`` will be sent by the close

    async def _send(self, direction: _Direction, chunks: Sequence[bytes]) -> None:
        self._last_moved = trio.current_time()
        direction.state = _State.SENDING
        self._start_checking()
        await direction.sink.layer.send(chunks)
        direction.state = _State.READING
        direction.count += sum(map(len, chunks))

    async def _send_rest(self, sink: Connection, data: memoryview) -> None:
        """Send plain text that the kernel did not accept at once."""
        self._start_checking()
        while data:
            await sink.transport.wait_writable()
            data = data[sink.transport.send_nowait(data) :]

    # ---- time limits ----

    def _limit_the_rest(self) -> None:
        """From now on, end the relay when no byte has moved for the time limit."""
        if not self._limited:
            self._limited = True
            self._last_moved = trio.current_time()
            self._nursery.start_soon(self._limit_silence)

    async def _limit_silence(self) -> None:
        # One task serves the whole relay. A deadline for each chunk would cost more than copying
        # it.
        while (deadline := self._last_moved + self._limit) > trio.current_time():
            await trio.sleep_until(deadline)
            # If the event loop was blocked, bytes may have arrived in time. Let them move first.
            await trio.lowlevel.checkpoint()
            self._look_for_progress()
        self._nursery.cancel_scope.cancel()

    def _look_for_progress(self) -> None:
        """Update ``_last_moved`` if a sink has accepted a part of the send in progress."""
        for each in self._directions:
            sink = each.sink
            if each.state is _State.SENDING and sink.socket.fileno() >= 0:
                progress = sink.transport.sent_count, send_queue_size(sink.socket)
                if progress != each.progress:
                    each.progress = progress
                    self._last_moved = trio.current_time()

    # ---- sends in progress ----

    def _start_checking(self) -> None:
        if not self._checking:
            self._checking = True
            self._nursery.start_soon(self._check_sends)

    async def _check_sends(self) -> None:
        while sending := [each for each in self._directions if each.state is _State.SENDING]:
            self._look_for_progress()
            for each in sending:
                self._check_source(each)
            await trio.sleep(min(_BLOCKED_INTERVAL, self._limit / 4))
        self._checking = False

    def _check_source(self, direction: _Direction) -> None:
        """Detect that the source is gone while no task reads from it."""
        source = direction.source
        try:
            descriptor = source.transport.descriptor()
        except trio.ClosedResourceError as exc:
            self._end_with(direction, exc)
            return
        if peer_ended(descriptor):
            # A peer that has sent FIN may be gone. A peer that has sent a reset is gone.
            number = source.socket.getsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_ERROR)
            if number in (0, errno.EPIPE):  # EPIPE: the peer had sent FIN, so its data is complete
                self._limit_the_rest()
            else:
                self._end_with(direction, source.transport.broken(os.strerror(number)))

    def _end_with(self, direction: _Direction, failure: Exception) -> None:
        """End the relay, because the source of this direction is broken or closed."""
        direction.fail(direction.source, failure)
        self._nursery.cancel_scope.cancel()
