"""A proxy that simulates the worst possible network between a client and a server.

``HostileNetwork`` always splits, coalesces and delays data. At the byte where the plan has a fault,
the network closes, resets, corrupts or stalls the connection. ``Track`` finds the phase of each
byte: it counts plain text bytes, whose number is in the plan, and reads the headers of TLS records.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator

import trio

from helpers.pairs import RESET
from hostile_plan import DOWN, INJECTED_LINE, LINES, MARKER, UP, Fault, Kind, Mode, Phase, Plan

# ---- the phase of a byte ----

_CHANGE_CIPHER_SPEC, _ALERT, _HANDSHAKE, _APPLICATION_DATA = 20, 21, 22, 23
_HEADER = 5
_TICKETS = 2  # the number of session tickets that a TLS 1.3 server sends


class Track:
    """Tracks the phase of the bytes that one side sends, and detects forbidden bytes. Does no I/O.

    Attributes:
      phase: the phase of the last byte.
      notified: whether the side has sent a complete close_notify.
      complaint: the first error in the bytes, or ``""``.
      header: the bytes of an incomplete record header.
      other: the track of the other direction.
    """

    other: Track

    def __init__(self, plan: Plan, direction: str) -> None:
        self.phase = Phase.CONNECT
        self.notified = False
        self.complaint = ""
        self._up = direction == UP
        self._newer = plan.version == "TLSv1.3"
        self._clear: list[tuple[str, bytes]] = []  # expected plain text
        self._encrypted = plan.mode != Mode.PLAIN
        if (Phase.CLEAR, direction) in plan.sizes:
            self._clear.append((Phase.CLEAR, plan.payload(Phase.CLEAR, direction)))
        if plan.mode in (Mode.UPGRADED, Mode.RETURNED):
            phase = Phase.COMMAND if self._up else Phase.RESPONSE
            self._clear.append((phase, LINES[phase]))
        self._after = plan.payload(Phase.AFTER, direction) if plan.mode == Mode.RETURNED else None
        self._secret = plan.sizes.get((Phase.SECRET, direction), 0)
        self.header = b""
        self._left = 0  # bytes of the record's body still to come
        self._last_of_flight = False
        self._tickets = _TICKETS if self._newer else 0
        self._changed = False
        self._seen = b""  # the last bytes, which may be the start of the marker

    def feed(self, data: bytes) -> Iterator[tuple[str, bytes]]:
        """Split data where phases and records start. Yield tuples of a phase and a part."""
        while data:
            if self._clear:
                phase, expected = self._clear.pop(0)
                part, data = data[: len(expected)], data[len(expected) :]
                if not expected.startswith(part):
                    self._complain(f"wrong bytes in the {phase}", part)
                if len(expected) > len(part):
                    self._clear.insert(0, (phase, expected[len(part) :]))
                self.phase = phase
                yield phase, part
            elif not self._encrypted:
                self._complain("bytes after the last phase", data)
                yield Phase.CLOSE, data
                return
            elif not self._left:
                missing = _HEADER - len(self.header)
                self.header, data = self.header + data[:missing], data[missing:]
                if len(self.header) == _HEADER:
                    header, self.header = self.header, b""
                    self._record_begins(header)
                    yield self.phase, header
            else:
                part, data = data[: self._left], data[self._left :]
                self._left -= len(part)
                self._check_secrecy(part)
                if not self._left and self.phase in (Phase.STOP, Phase.CLOSE):
                    self._notified()
                yield self.phase, part

    def _complain(self, what: str, data: bytes) -> None:
        self.complaint = self.complaint or f"{what}: {data[:40]!r}"

    def _check_secrecy(self, part: bytes) -> None:
        if MARKER in self._seen + part:
            self._complain("TLS data in plain text", part)
        self._seen = part[-len(MARKER) + 1 :]

    def _notified(self) -> None:
        self.notified = True
        self._encrypted = False
        if self._after is not None:
            self._clear.append((Phase.AFTER, self._after))

    def _record_begins(self, header: bytes) -> None:
        kind, version, self._left = struct.unpack("!BHH", header)
        if not _CHANGE_CIPHER_SPEC <= kind <= _APPLICATION_DATA or version >> 8 != 3:
            self._complain("an invalid TLS record header", header)
        self.phase = self._phase_of(kind, self._left)

    def _phase_of(self, kind: int, length: int) -> str:
        if self.phase in (Phase.CONNECT, Phase.COMMAND, Phase.RESPONSE):
            return Phase.FLIGHT1 if self._up else Phase.FLIGHT2
        if self.phase == Phase.FLIGHT2 and self.other.phase == Phase.FLIGHT1:
            return Phase.FLIGHT2
        if self.phase in (Phase.FLIGHT1, Phase.FLIGHT2):
            self._changed = False
            return self._in_last_flight(kind)
        if self.phase in (Phase.FLIGHT3, Phase.FLIGHT4) and not self._last_of_flight:
            return self._in_last_flight(kind)
        # A TLS 1.3 record ends with its real content type (1 byte) and a tag (16 bytes).
        if kind == _ALERT or (self._newer and self._secret <= 0):
            return Phase.STOP if self._after is not None else Phase.CLOSE
        self._secret -= length - 17
        return Phase.SECRET

    def _in_last_flight(self, kind: int) -> str:
        """Return the record's phase. The flight's last record is Finished or the last ticket."""
        if self._newer and not self._up:
            self._tickets -= 1
            self._last_of_flight = self._tickets == 0
        else:
            self._last_of_flight = self._changed
            self._changed = kind == _CHANGE_CIPHER_SPEC
        return Phase.FLIGHT3 if self._up else Phase.FLIGHT4


# ---- the network ----

_NARROW = 8192  # bytes in a small kernel buffer (Linux doubles the number)
_MAX_PIECE = 262_144


class _Stopped(Exception):
    """This direction carries no more data."""


class HostileNetwork:
    """The proxy for one client. Its behaviour follows a plan.

    Args:
      plan: the plan.
      server_port: the port of the server.
      expect: called with the proxy's own port, before the proxy connects to the server.
      accepted: waits until the server has accepted the connection.

    Attributes:
      port: the port to which the client connects.
      reached: whether the proxy has connected to the server.
      struck: the faults that have happened so far.
      trouble: set by a fault after which a side may wait forever.
      still: set when both directions have ended or are silent forever.
      up, down: the two directions.
    """

    def __init__(
        self,
        plan: Plan,
        server_port: int,
        expect: Callable[[int], object],
        accepted: Callable[[], Awaitable[object]],
    ) -> None:
        self.plan = plan
        self._server_port = server_port
        self._expect = expect
        self._accepted = accepted
        self.reached = False
        self.struck: list[Fault] = []
        self.trouble = trio.Event()
        self.still = trio.Event()
        self.up, self.down = _Direction(self, UP), _Direction(self, DOWN)
        self.up.other, self.down.other = self.down, self.up
        self.up.track.other, self.down.track.other = self.down.track, self.up.track
        self._connect_fault = next(
            (each for each in plan.faults if each.phase == Phase.CONNECT), None
        )
        self._sockets = [self._socket(narrow=plan.flows[UP].narrow)]
        self.port: int = self._sockets[0].getsockname()[1]
        if not plan.has(Kind.REFUSE):
            self._sockets[0].listen(1)

    def _socket(self, *, narrow: bool) -> socket.socket:
        sock = socket.socket()
        sock.setblocking(False)
        sock.bind(("127.0.0.1", 0))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF) if narrow else ():
            sock.setsockopt(socket.SOL_SOCKET, option, _NARROW)
        return sock

    async def run(self) -> None:
        """Relay a client's connection until both directions have ended."""
        try:
            if self._connect_fault is None:
                await self._carry(await self._accept(), await self._reach())
            else:
                self.record(self._connect_fault)
                await self._fail_at_connect(self._connect_fault)
        finally:
            self.still.set()
            for sock in self._sockets:
                trio.lowlevel.notify_closing(sock)
                sock.close()

    async def _accept(self) -> trio.SocketStream:
        await trio.lowlevel.wait_readable(self._sockets[0])
        sock, _ = self._sockets[0].accept()
        return self._stream(sock)

    async def _reach(self) -> trio.SocketStream:
        sock = self._socket(narrow=self.plan.flows[DOWN].narrow)
        stream = self._stream(sock)
        self._expect(sock.getsockname()[1])
        sock.connect_ex(("127.0.0.1", self._server_port))
        self.reached = True
        await self._accepted()
        return stream

    def _stream(self, sock: socket.socket) -> trio.SocketStream:
        self._sockets.append(sock)
        return trio.SocketStream(trio.socket.from_stdlib_socket(sock))

    async def _carry(self, client: trio.SocketStream, server: trio.SocketStream) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.up.carry, client, server)
            nursery.start_soon(self.down.carry, server, client)
            await self.up.stopped.wait()
            await self.down.stopped.wait()
            self.still.set()

    async def _fail_at_connect(self, fault: Fault) -> None:
        if fault.kind == Kind.REFUSE:
            return
        if fault.kind == Kind.STALL and fault.how & 1:  # the client stays in the backlog
            await self.stall()
        client = await self._accept()
        server = await self._reach() if fault.how & 2 else None
        if fault.kind == Kind.RESET:
            self.reset()
        elif fault.kind == Kind.STALL:
            await self.stall()
        elif server is None:
            self.down.finished = True
            await self.up.end(client, client)
        else:
            self.up.scope.cancel()
            self.down.scope.cancel()
            await self._carry(client, server)

    def record(self, fault: Fault) -> None:
        self.struck.append(fault)
        if fault.kind in (Kind.STALL, Kind.CORRUPT, Kind.INJECT):
            self.trouble.set()

    async def stall(self) -> None:
        self.still.set()
        await trio.sleep_forever()

    def reset(self) -> None:
        for sock in self._sockets[1:]:
            if sock.fileno() >= 0:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                trio.lowlevel.notify_closing(sock)
                sock.close()


class _Direction:
    """One direction.

    Attributes:
      other: the other direction.
      finished: whether a FIN was relayed.
      notified: whether an undamaged close_notify was relayed.
      scope: the network or the other direction cancels this scope to stop this direction.
      stopped: set when this direction relays no more data.
    """

    other: _Direction

    def __init__(self, network: HostileNetwork, direction: str) -> None:
        plan = network.plan
        self._network = network
        self._flow = plan.flows[direction]
        self._faults = [
            each
            for each in plan.faults
            if each.direction == direction and each.phase != Phase.CONNECT
        ]
        self._rng = random.Random(f"{plan.seed} {direction}")
        self.track = Track(plan, direction)
        self.finished = False
        self.notified = False
        self.scope = trio.CancelScope()
        self.stopped = trio.Event()
        self._silent = False
        self._phase = Phase.CONNECT
        self._passed = 0  # Bytes relayed in this phase.
        self._tiny = 0  # Bytes still to send in tiny pieces.
        self._naps = self._flow.naps
        self._target_closed = False
        self._in_one_piece = False  # whether to send the next part without splitting it
        self._damaged_end = False

    async def carry(self, source: trio.SocketStream, target: trio.SocketStream) -> None:
        """Relay everything until EOF or a fault."""
        await self._carry(source, target)
        self.stopped.set()
        if self._silent:
            await trio.sleep_forever()

    async def _carry(self, source: trio.SocketStream, target: trio.SocketStream) -> None:
        with contextlib.suppress(_Stopped), self.scope:
            while data := await self._receive(source):
                for phase, part in list(self.track.feed(data)):
                    await self._pass_on(phase, part, target)
            await self._send(self.track.header, target)
            await self._pass_on(Phase.CLOSE, b"", target, last=True)
            await self._finish(target)
            return
        if not self._silent:
            await self.end(source, target)

    async def end(self, source: trio.SocketStream, target: trio.SocketStream) -> None:
        """Send a FIN, then discard all further data, because unread data would cause a reset."""
        await self._finish(target)
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await source.receive_some():
                list(self.track.feed(bytes(data)))

    async def _finish(self, target: trio.SocketStream) -> None:
        self.finished = True
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await target.send_eof()

    async def _receive(self, source: trio.SocketStream) -> bytes:
        try:
            data = bytes(await source.receive_some())
            for _ in range(self._flow.gather if data else 0):
                await trio.lowlevel.cancel_shielded_checkpoint()  # a cancel must not lose the data
                with contextlib.suppress(BlockingIOError):
                    data += os.read(source.socket.fileno(), _MAX_PIECE)
                if len(data) > _MAX_PIECE:
                    break
            return data
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            self._network.reset()
            raise _Stopped from None

    async def _pass_on(
        self, phase: str, part: bytes, target: trio.SocketStream, *, last: bool = False
    ) -> None:
        if phase != self._phase:
            self._phase, self._passed, self._tiny = phase, 0, self._flow.tiny
        begin, self._passed = self._passed, self._passed + len(part)
        for fault in self._faults:
            if fault.phase == phase and (last or fault.offset < self._passed):
                self._faults.remove(fault)
                cut = max(fault.offset - begin, 0)
                await self._send(part[:cut], target)
                self._network.record(fault)
                part = self._strike(fault, part[cut:])
                self._damaged_end |= phase in (Phase.STOP, Phase.CLOSE) and not last
                break
        await self._send(part, target)
        self.notified = self.track.notified and not self._damaged_end

    def _strike(self, fault: Fault, part: bytes) -> bytes:
        """Return the damaged part, or stop one direction or both and raise ``_Stopped``."""
        if fault.kind == Kind.CORRUPT:
            return _damaged(part, fault.how)
        if fault.kind == Kind.INJECT:
            self._in_one_piece = True
            return part[:1] + INJECTED_LINE + part[1:]
        if fault.kind == Kind.RESET:
            self._network.reset()
        both = fault.kind == Kind.TRUNCATE or (fault.kind == Kind.STALL and fault.how & 1)
        for direction in (self, self.other) if both else (self,):
            direction._silent = fault.kind == Kind.STALL
            direction.scope.cancel()
        raise _Stopped

    async def _send(self, part: bytes, target: trio.SocketStream) -> None:
        try:
            while part and not self._target_closed:
                size = self._rng.randint(1, self._flow.largest)
                if self._tiny > 0:
                    size = self._rng.randint(1, 3)
                    self._tiny -= size
                if self._in_one_piece:
                    size, self._in_one_piece = len(part), False
                await target.send_all(part[:size])
                part = part[size:]
                for _ in range(self._rng.randint(0, self._flow.pause)):
                    await trio.lowlevel.checkpoint()
                if self._naps > 0 and self._rng.random() < 0.2:
                    self._naps -= 1
                    await trio.sleep(0.001)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._target_closed = True


def _damaged(part: bytes, how: int) -> bytes:
    """Insert a byte at the start, remove the first byte, or flip bits of the first byte."""
    way, how = how % 4, how // 4
    if way == 0 or not part:
        return bytes([how % 256]) + part
    if way == 1:
        return part[1:]
    change = 1 << how % 8 if way == 2 else 1 + how % 255
    return bytes([part[0] ^ change]) + part[1:]
