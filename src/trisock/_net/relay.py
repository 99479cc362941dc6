"""relay: copy both ways between two connections until both directions have ended.

A relay has one task for each direction. The task reads from the source and sends to the sink, in
turn. So it holds the result of one read at most, and a slow sink slows its source down.

While such a task is blocked in a send, nobody reads from its source. So another task then checks
once a second whether the source has hung up. That task is started by a send that blocks, and ends
when no send is blocked, so an idle relay does not need it.

The kernel could move the bytes without copying them (``splice``, through a pipe). For pieces of 64
KiB this was 1.0 times as fast as ``recv`` and ``send``, for 256 KiB 1.3 times, and for 1 MiB twice.
But each relay would need two pipes (four descriptors), and an unprivileged user may have 64 pipes
of 1 MiB.
"""

from __future__ import annotations

import errno
import math
import os
import socket as stdlib_socket
from collections.abc import Sequence

import trio

from .._arguments import quoted, seconds_or_inf
from .connection import Connection
from .linger import wait_until_acknowledged
from .socket import Socket, connection_of
from .syscalls import has_hung_up, send_queue_size

# Seconds that one direction may be silent after the other has ended, if there is no idle_timeout.
# A peer that has ended its direction may be gone, which only a send to it would show.
_HALF_CLOSED_TIMEOUT = 60.0

# How often (seconds) to look at the source and the sink of a send that is blocked.
_BLOCKED_INTERVAL = 1.0


async def relay(a: Socket, b: Socket, *, idle_timeout: float | None = None) -> tuple[int, int]:
    """Copy data both ways between two sockets until both directions have ended. Then close both.

    Data that is in the receive buffers already is relayed first. A slow receiver slows the sender
    down: ``relay`` holds at most the result of one read for each direction (128 KiB; under TLS, the
    records in 128 KiB of ciphertext).

    This table shows what happens when the peer of ``a`` does something, and what the peer of ``b``
    sees. The roles of ``a`` and ``b`` can be swapped.

    ==============================  ====================================  ==========================
    peer of ``a``                   peer of ``b``                         ``relay``
    ==============================  ====================================  ==========================
    ends its direction (FIN, or     plain text: FIN, and may go on        goes on until the other
    ``close_notify`` under TLS)     sending. TLS: ``close_notify``, as    direction has ended
                                    soon as ``b``'s direction has ended
    resets the connection           a reset                               ``BrokenResourceError``
    ends TLS without                a reset                               ``TLSError``
    ``close_notify``, or forges a
    record
    closes the connection but is    the rest of what the peer of ``a``    ``BrokenResourceError``
    still being sent data           had sent, then a reset
    does not read                   waits for room                        waits
    does not read for the time      a reset                               ``BrokenResourceError``
    limit
    is silent for the time limit,   the end of the stream (FIN or         returns
    as the peer of ``b`` is         ``close_notify``)
    ==============================  ====================================  ==========================

    TLS has no half-closed state, so ``close_notify`` can only be sent by closing. On a Unix socket
    there is no reset, and the peer sees EOF instead.

    Args:
      a: one socket.
      b: the other socket.
      idle_timeout: the time limit in seconds. When no byte has moved in either direction for this
        long, both directions count as ended. ``None`` means no limit while both directions are
        open. Once one direction has ended, the limit is then 60 seconds. The same holds once the
        sender of data that cannot be delivered has hung up.

    Returns: the number of bytes from ``a`` to ``b``, and from ``b`` to ``a``.

    Raises:
      trio.BrokenResourceError: a connection is broken (``TLSError`` is a subclass). The message
        names the address of the peer that broke it. The other connection was aborted, because its
        peer must not see a clean end. Also raised if a peer read nothing for the time limit while
        data for it was waiting.
      trio.ClosedResourceError: a socket was closed, before the call or by another task. The other
        one was aborted.
      trio.BusyResourceError: another task is using one of the sockets. Nothing has changed.
      TypeError, ValueError: an argument is invalid, or both sockets are the same one. Nothing has
        changed.

    Both sockets are closed when ``relay`` returns or raises, except after the errors that change
    nothing. If cancelled, ``relay`` aborts both. If cancelled after both directions have ended, it
    closes both immediately. While ``relay`` runs, any other read or send on the sockets gets
    ``BusyResourceError``, and a server's ``broadcast`` leaves them out.
    """
    for name, sock in ("a", a), ("b", b):
        if not isinstance(sock, Socket):
            raise TypeError(f"{name} must be a trisock.Socket, not {quoted(sock)}")
    if a is b:
        raise ValueError("a and b must be two different sockets")
    limit = seconds_or_inf("idle_timeout", idle_timeout)
    ends = connection_of(a), connection_of(b)
    for end in ends:
        end.reading.check()
        end.sending.check()
    try:
        with ends[0].reading, ends[1].reading:
            async with ends[0].sending, ends[1].sending:
                counts = await _Relay(*ends, limit).run()
                await _close(*ends)
                return counts
    except BaseException:
        for end in ends:
            end.abort()
        raise


async def _close(a: Connection, b: Connection) -> None:
    """Close both gracefully, at the same time: each close may wait for its peer."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.close)
        await b.close()


class _Direction:
    """One direction of a relay.

    Attributes:
      count: how many bytes the sink has accepted.
      sending: whether its task is sending to the sink (and may be blocked), not reading.
      ended: whether its task has ended.
      complete: whether the sink has got everything up to the end of the source.
      queue_size: the number of bytes in the sink's send queue when a send was last seen blocked.
    """

    __slots__ = ("complete", "count", "ended", "queue_size", "sending", "sink", "source")

    def __init__(self, source: Connection, sink: Connection) -> None:
        self.source = source
        self.sink = sink
        self.count = self.queue_size = 0
        self.sending = self.ended = self.complete = False


class _Relay:
    """The state of one relay.

    Invariant: ``_failure`` is a broken connection and its error. Once it is set, only the direction
    whose source is the broken connection may still run: its peer may have sent data before it
    broke. ``_last_moved`` is the time at which the last byte moved or the last direction ended.
    """

    __slots__ = (
        "_checking",
        "_directions",
        "_failure",
        "_last_moved",
        "_limit",
        "_limited",
        "_nursery",
    )

    def __init__(self, a: Connection, b: Connection, idle_timeout: float) -> None:
        self._directions = _Direction(a, b), _Direction(b, a)
        self._limit = _HALF_CLOSED_TIMEOUT if idle_timeout == math.inf else idle_timeout
        self._limited = idle_timeout != math.inf  # whether a task enforces the limit
        self._checking = False  # whether a task looks after blocked sends
        self._last_moved = trio.current_time()
        self._failure: tuple[Connection, Exception] | None = None

    async def run(self) -> tuple[int, int]:
        """Copy until both directions have ended. Returns the number of bytes each way."""
        there, back = self._directions
        async with trio.open_nursery() as self._nursery:
            if self._limited:
                self._nursery.start_soon(self._limit_silence)
            self._nursery.start_soon(self._run_direction, back)
            await self._run_direction(there)
        for direction in self._directions:
            if direction.sending and self._failure is None:  # what it holds will not be sent
                why = f"the peer has accepted no data for {self._limit:g} seconds"
                self._failure = direction.sink, direction.sink.transport.broken(why)
        if self._failure is not None:
            await self._raise_failure(*self._failure)
        return there.count, back.count

    async def _raise_failure(self, broken: Connection, failure: Exception) -> None:
        self._failure = None  # or the error and its traceback would form a cycle
        try:
            for direction in self._directions:
                if direction.source is broken and direction.complete:
                    await wait_until_acknowledged(direction.sink.socket)
            raise failure
        finally:
            del failure

    def _end_with(self, broken: Connection, failure: Exception) -> None:
        """End the relay immediately, with this error, unless the other connection broke first.

        The last error of a connection counts: a read knows better than a send why it broke, because
        TLS has alerts.
        """
        if self._failure is None or self._failure[0] is broken:
            self._failure = broken, failure
        self._nursery.cancel_scope.cancel()

    # ---- one direction ----

    async def _run_direction(self, direction: _Direction) -> None:
        try:
            await self._copy(direction)
            direction.complete = True
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            broken = direction.sink if direction.sending else direction.source
            if not direction.sending or isinstance(exc, trio.ClosedResourceError):
                self._end_with(broken, exc)
            elif self._failure is None:  # first relay what the sink's peer had sent before
                self._failure = broken, exc
        direction.sending = False
        direction.ended = True
        self._last_moved = trio.current_time()
        if all(each.ended for each in self._directions):
            self._nursery.cancel_scope.cancel()  # ends the tasks that check
        else:
            self._limit_the_rest()

    async def _copy(self, direction: _Direction) -> None:
        """Copy everything, and the end of the stream."""
        source, sink = direction.source, direction.sink
        while source.buffer:
            direction.sending = True
            await trio.lowlevel.checkpoint()
            await self._send(direction, [source.buffer.take_chunk(None)])
        while chunk := await source.layer.receive():
            if source.tls is not None:
                await self._send(direction, [chunk, *source.tls.receive_pending()])
            elif sink.tls is not None:
                await self._send(direction, [chunk])
            else:  # the hot path (row relay). Each pass has one checkpoint, in ``receive``.
                self._last_moved = trio.current_time()
                direction.sending = True
                sent = sink.transport.send_nowait(chunk)
                if sent < len(chunk):
                    await self._send_rest(direction, memoryview(chunk)[sent:])
                direction.sending = False
                direction.count += len(chunk)
        direction.sending = True
        if sink.tls is None:
            await sink.transport.send_eof()

    async def _send(self, direction: _Direction, chunks: Sequence[bytes]) -> None:
        self._last_moved = trio.current_time()
        direction.sending = True
        if not self._checking:
            self._check_while_blocked()
        await direction.sink.layer.send(chunks)
        direction.sending = False
        direction.count += sum(map(len, chunks))

    async def _send_rest(self, direction: _Direction, data: memoryview) -> None:
        """Send what the kernel did not accept at once, in plain text."""
        if not self._checking:
            self._check_while_blocked()
        transport = direction.sink.transport
        while data:
            await transport.wait_writable()
            data = data[transport.send_nowait(data) :]

    # ---- time limits ----

    def _limit_the_rest(self) -> None:
        """From now on, end the relay when no byte has moved for the time limit."""
        if not self._limited:
            self._limited = True
            self._last_moved = trio.current_time()
            self._nursery.start_soon(self._limit_silence)

    async def _limit_silence(self) -> None:
        # One task for the whole relay: a deadline for each chunk would cost more than the chunk.
        while (  # noqa: ASYNC110 (the deadline moves)
            deadline := self._last_moved + self._limit
        ) > trio.current_time():
            await trio.sleep_until(deadline)
        self._nursery.cancel_scope.cancel()

    def _check_while_blocked(self) -> None:
        self._checking = True
        self._nursery.start_soon(self._check_blocked_sends)

    async def _check_blocked_sends(self) -> None:
        while blocked := [each for each in self._directions if each.sending]:
            for direction in blocked:
                self._check_blocked_send(direction)
            await trio.sleep(min(_BLOCKED_INTERVAL, self._limit / 4))
        self._checking = False

    def _check_blocked_send(self, direction: _Direction) -> None:
        """Notice a sink that still reads, if slowly, and a source that is gone."""
        source, sink = direction.source, direction.sink
        if source.fileno() < 0:
            self._end_with(source, trio.ClosedResourceError("this socket was already closed"))
        if source.fileno() < 0 or sink.fileno() < 0:  # closed by another task
            return
        queue_size = send_queue_size(sink.socket)
        if queue_size != direction.queue_size:
            direction.queue_size = queue_size
            self._last_moved = trio.current_time()
        if has_hung_up(source.fileno()):
            # A peer that has ended its direction may be gone. A peer that has reset is gone.
            number = source.socket.getsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_ERROR)
            if number in (0, errno.EPIPE):  # EPIPE: it had sent FIN before, so its data is complete
                self._limit_the_rest()
            else:
                self._end_with(source, source.transport.broken(os.strerror(number)))
