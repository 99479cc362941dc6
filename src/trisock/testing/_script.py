"""Script: one side of a conversation, as a list of steps."""

from __future__ import annotations

import contextlib
import logging
import math
import re
from typing import Protocol

import trio

from .. import Buffer, Socket, TLSArgument, TLSError
from .._net.frame_header import frame_header
from ._arguments import check_bool
from ._expectation import Expectation, Mismatch, expectation, shown

_logger = logging.getLogger("trisock.testing")

# OpenSSL's names for the peer's alerts. Its other names are errors that this side has found.
_ALERT = re.compile(r"(SSLV3|TLSV1|TLSV13)_")


class _Step(Protocol):
    async def run(self, sock: Socket) -> None: ...


class Script:
    r"""One side of a conversation: what to send, and what to expect, step by step.

    A script can be used as a handler, or as a client::

        server = Script().send(b"220 ready\r\n").expect(b"QUIT\r\n").send(b"221 bye\r\n")
        async with serving(server) as s:
            await program_under_test(s.server.port)

        client = Script().expect(b"220 ready\r\n").send(b"QUIT\r\n").expect(b"221 bye\r\n")
        await client(await s.connect())

    Each method adds a step and returns the script. A script does not change when it runs, so many
    connections can run the same script at the same time.

    Args:
      byte_by_byte: whether to send each byte by itself, and to let other tasks read it before the
        next byte is sent. This shows whether the peer depends on how its input is split.

    ``await script(sock)`` runs the steps. The socket stays open. (``bind`` closes it when its
    handler has ended.) The call raises:

      AssertionError: other bytes came, or the connection ended or broke. The message contains the
        number of the step, the peer, and the expected and the received bytes (up to 120 of each).
      trio.ClosedResourceError, trio.BusyResourceError: the test itself closed the socket, or uses
        it in another task at the same time.

    A script has no time limit. Where a peer may be silent, use ``trio.fail_after``. If a script is
    cancelled, it logs a warning on ``trisock.testing`` that names the current step. Bytes that an
    unfinished step has received are pushed back, so they are still unread.
    """

    def __init__(self, *, byte_by_byte: bool = False) -> None:
        check_bool("byte_by_byte", byte_by_byte)
        self._byte_by_byte = byte_by_byte
        self._steps: list[_Step] = []

    def __repr__(self) -> str:
        return f"<trisock.testing.Script of {len(self._steps)} steps>"

    def send(self, *buffers: Buffer) -> Script:
        """Send all bytes of all buffers."""
        for each in buffers:
            if not isinstance(each, (bytes, bytearray, memoryview)):
                raise TypeError(f"send takes bytes, not a {type(each).__name__}")
        return self._add(_Send(b"".join(buffers), self._byte_by_byte))

    def send_frame(self, body: Buffer, header: str | int = "!I") -> Script:
        """Send one length-prefixed frame.

        Args:
          body: the body.
          header: the format of the length in front of the body, as in ``Socket.frames``.

        Raises ``TypeError`` and ``ValueError`` if the header is invalid or the body is too long.
        """
        return self.send(_frame(body, header))

    def expect(self, expected: Buffer | re.Pattern[bytes]) -> Script:
        r"""Receive exactly these bytes, or a match of a pattern. What follows stays unread.

        Args:
          expected: bytes, or a compiled pattern of bytes. A match must begin at the first unread
            byte and end within 16,384 bytes. The pattern is tried on the first byte alone, then on
            the first two bytes, and so on, until it matches. So the result does not depend on how
            the input is split. A pattern should match up to the end of the message:
            ``re.compile(rb"\\d+")`` receives only the first digit of ``250``, and
            ``re.compile(rb"\\d+ [^\\n]*\\n")`` receives the whole line.

        Raises ``TypeError`` for ``str`` and for a pattern of ``str``, and ``ValueError`` for empty
        bytes.
        """
        return self._add(_Expect(expectation(expected)))

    def expect_frame(self, body: Buffer, header: str | int = "!I") -> Script:
        """Receive exactly one length-prefixed frame with this body. What follows stays unread.

        Args:
          body: the body. It may be empty.
          header: as in ``send_frame``.
        """
        return self.expect(_frame(body, header))

    def send_eof(self) -> Script:
        """Send EOF, and keep receiving, as ``Socket.send_eof`` does. TLS has no half-close."""
        return self._add(_SendEOF())

    def expect_eof(self, *, clean: bool = True) -> Script:
        """Expect the end of the stream: FIN or, under TLS, ``close_notify``.

        Args:
          clean: False also accepts a connection that breaks: by a reset or, under TLS, by an alert
            or an end without ``close_notify``. A program that raises an exception may cause these.
        """
        check_bool("clean", clean)
        return self._add(_ExpectEOF(clean))

    def starttls(self, tls: TLSArgument, *, refused: bool = False) -> Script:
        """Call ``Socket.starttls``, as client or as server.

        If there is an unread byte that no step has expected, the handshake fails, as in every
        program that uses ``Socket.starttls``.

        Args:
          tls: the TLS role, such as ``Authority.server_tls()`` or ``Authority.client_tls()``.
          refused: whether the peer must refuse the handshake, for example because it rejects the
            certificate. The peer refuses by an alert, or by closing the connection. The step fails
            if this side refuses, or if the peer does not speak TLS. This must be the last step,
            because the connection is closed. (With TLS 1.3, a server refuses a client's certificate
            only after the client's handshake. To expect that, use ``expect_eof(clean=False)`` as
            the next step.)
        """
        check_bool("refused", refused)
        return self._add(_StartTLS(tls, refused))

    def _add(self, step: _Step) -> Script:
        self._steps.append(step)
        return self

    async def __call__(self, sock: Socket) -> None:
        """Run the steps on a connection."""
        steps = list(self._steps)
        for number, step in enumerate(steps, 1):
            where = f"step {number} of {len(steps)}, with {sock.getpeer()}"
            try:
                await step.run(sock)
            except _StepError as exc:
                raise AssertionError(f"{where}: {exc}") from exc.__cause__
            except trio.BrokenResourceError as exc:
                raise AssertionError(f"{where}: {step} failed: {exc}") from exc
            except trio.Cancelled:
                _logger.warning("%s: cancelled at %s", where, step)
                raise


def _frame(body: Buffer, header: str | int) -> bytes:
    if not isinstance(body, (bytes, bytearray, memoryview)):
        raise TypeError(f"the body of a frame must be bytes, not a {type(body).__name__}")
    data = bytes(body)
    return frame_header(header).pack(len(data)) + data


class _StepError(Exception):
    """What happened instead of what was expected."""


class _Send:
    def __init__(self, data: bytes, byte_by_byte: bool) -> None:
        self._data = data
        self._byte_by_byte = byte_by_byte

    def __str__(self) -> str:
        return f"send {shown(self._data)}"

    async def run(self, sock: Socket) -> None:
        if not self._byte_by_byte:
            await sock.send(self._data)
            return
        for index in range(len(self._data)):
            await sock.send(self._data[index : index + 1])
            # In the first pass of the scheduler the reader wakes up, and in the second it reads.
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()


class _Expect:
    def __init__(self, expected: Expectation) -> None:
        self._expected = expected

    def __str__(self) -> str:
        return f"expect {self._expected}"

    async def run(self, sock: Socket) -> None:
        received = bytearray()
        size: int | None = None
        try:
            while size is None:
                chunk = await sock.recv()
                if not chunk:
                    after = f" after {shown(received)}" if received else ""
                    raise _StepError(f"expected {self._expected}, but the stream ended{after}")
                received += chunk
                size = self._expected.find(received, len(received) - len(chunk))
        except Mismatch as exc:
            raise _StepError(f"expected {self._expected}, but {exc}") from None
        except trio.BrokenResourceError as exc:
            after = f" after {shown(received)}" if received else ""
            raise _StepError(
                f"expected {self._expected}, but the connection broke{after}: {exc}"
            ) from exc
        finally:
            # If another task has closed the socket, nobody can read the rest.
            with contextlib.suppress(trio.ClosedResourceError, trio.BusyResourceError):
                sock.unrecv(received[size or 0 :])


class _SendEOF:
    def __str__(self) -> str:
        return "send the end of the stream"

    async def run(self, sock: Socket) -> None:
        await sock.send_eof()


class _ExpectEOF:
    def __init__(self, clean: bool) -> None:
        self._clean = clean

    def __str__(self) -> str:
        return "expect the end of the stream"

    async def run(self, sock: Socket) -> None:
        try:
            chunk = await sock.recv()
        except trio.BrokenResourceError as exc:
            if self._clean or _is_found_here(exc):
                raise
            return
        if chunk:
            sock.unrecv(chunk)
            raise _StepError(f"expected the end of the stream, but {shown(chunk)} came")


class _StartTLS:
    def __init__(self, tls: TLSArgument, refused: bool) -> None:
        self._tls = tls
        self._refused = refused

    def __str__(self) -> str:
        return "starttls"

    async def run(self, sock: Socket) -> None:
        if not self._refused:
            await sock.starttls(self._tls)
            return
        try:
            await sock.starttls(self._tls, handshake_timeout=math.inf)  # silence refuses nothing
        except TLSError as exc:
            if _is_found_here(exc):
                raise
        else:
            raise _StepError("expected that the peer refuses the handshake, but it succeeded")


def _is_found_here(exc: trio.BrokenResourceError) -> bool:
    """Return whether this side has found what broke TLS. Otherwise the peer has ended it."""
    reason = exc.reason if isinstance(exc, TLSError) else None
    return reason is not None and not _ALERT.match(reason)
