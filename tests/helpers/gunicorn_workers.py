"""gunicorn's workers without a master: each runs in the test's process."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

from gunicorn.config import Config
from gunicorn.glogging import Logger

from trisock import Socket
from trisock.gunicorn import TrioWorker


class Program:
    """A stand-in for gunicorn's application object, which loads the user's program."""

    def __init__(self, app: Any) -> None:
        self.callable = None
        self._app = app

    def wsgi(self) -> Any:
        if isinstance(self._app, BaseException):
            raise self._app
        self.callable = self._app
        return self._app


@contextlib.contextmanager
def worker_maker() -> Iterator[Callable[..., Any]]:
    """Yield a function that makes a worker, listening on a port of its own."""
    with contextlib.ExitStack() as stack:

        def make(app: Any, **settings: object) -> Any:
            config = Config()
            for name, value in settings.items():
                config.set(name, value)
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            log = Logger(config)
            stack.callback(log.error_log.handlers.clear)
            program: Any = Program(app)
            worker: Any = TrioWorker(
                1, os.getppid(), [listening], program, config.timeout / 2, config, log
            )
            worker.pid = os.getpid()
            worker.test_address = listening.getsockname()
            stack.callback(worker.tmp.close)
            return worker

        yield make


async def echo_lines(sock: Socket) -> None:
    async for line in sock.lines(max_bytes=100):
        await sock.send(line, b"\n")
