"""Run a handler, notice when it ends, and abandon it if it does not end."""

from __future__ import annotations

import ctypes
import functools
import socket
from collections.abc import Awaitable, Callable, Generator
from typing import Any

import trio

from .. import Handler, Socket
from .._guard import leaves
from ._watchdog import NoCheckpoint, Watchdog

# In bytes. When the buffer is full of short answers, Linux waits 40 ms for a delayed
# acknowledgement. With 16 KiB, it waited 20 times before a client that does not read had blocked
# the handler.
_SMALL_BUFFER = 65536


class WatchedHandler:
    """A handler for ``bind`` that runs the given handler.

    Attributes:
      narrow: whether to give new connections a small send buffer.
      started: how many calls of the handler have started, one for each connection.
      running: how many calls of the handler are running.
      is_stuck: whether a call was ended because it ran too long without a checkpoint.
      is_abandoned: whether calls were abandoned because they did not end when cancelled.
    """

    def __init__(self, handler: Handler, watchdog: Watchdog) -> None:
        self._handler = handler
        self._watchdog = watchdog
        self._changed = trio.Event()
        self.narrow = False
        self.started = 0
        self.running = 0
        self.is_stuck = False
        self.is_abandoned = False

    async def __call__(self, sock: Socket) -> None:
        """Run the handler for one connection."""
        if self.narrow:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SMALL_BUFFER)
        self.started += 1
        self.running += 1
        self._notify()
        try:
            with self._watchdog.watching():
                await _Call(self._handler(sock), self)
        except BaseException as exc:
            if not any(issubclass(type(leaf), NoCheckpoint) for leaf in leaves(exc)):
                raise
            self.is_stuck = True
        finally:
            self.running -= 1
            self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition on ``started`` and ``running`` is true."""
        while not condition():
            await self._changed.wait()

    def abandon(self) -> None:
        """Abandon all running calls.

        A call ends when it next wakes up. A call that waits for its own socket wakes up, because
        the client has closed the connection.
        """
        self.is_abandoned = True


class _Call:
    """One call of the handler. The call runs step by step, until the handler is abandoned."""

    def __init__(self, call: Awaitable[object], watched: WatchedHandler) -> None:
        self._call = call
        self._watched = watched

    def __await__(self) -> Generator[Any, Any, None]:
        steps = self._call.__await__()
        assert isinstance(steps, Generator)
        step = functools.partial(steps.send, None)
        while True:
            try:
                trap = step()
            except StopIteration:
                return
            try:
                step = functools.partial(steps.send, (yield trap))
            except BaseException as exc:
                step = functools.partial(steps.throw, exc)
            if self._watched.is_abandoned:
                _close(steps)
                return


def _close(steps: Generator[Any, Any, object]) -> None:
    """End a call with an exception. If the call continues anyway, never run it again."""
    for _ in range(3):
        try:
            steps.close()
        except RuntimeError:  # the call has ignored the GeneratorExit
            continue
        except BaseException:  # noqa: S110 (the call has ended)
            pass
        return
    # Python closes a coroutine again before destroying it, at the latest at exit. A handler that
    # catches everything in a loop could then loop forever. So keep this coroutine alive forever.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(steps))
