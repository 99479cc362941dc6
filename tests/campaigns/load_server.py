"""The server for load.py. It runs in its own process, with its own memory and descriptors.

Requests and responses are lines of JSON on its standard input and output.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import gc
import json
import logging
import os
import resource
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import trio

sys.path.append(str(Path(__file__).parents[1]))  # a program needs this to import tests/helpers

import trisock
from helpers.programs import lines_of
from trisock import Certificate, ServerTLS, Socket

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup


class Gauge:
    """Measures the process without opening a descriptor, because all descriptors may be in use."""

    def __init__(self) -> None:
        self._status = os.open("/proc/self/status", os.O_RDONLY)
        self._clear = os.open("/proc/self/clear_refs", os.O_WRONLY)

    def read(self) -> dict[str, int | float]:
        gc.collect()
        with contextlib.suppress(AttributeError):  # Only glibc has malloc_trim.
            ctypes.CDLL(None).malloc_trim(0)  # Exclude memory that malloc keeps for later.
        status = dict(
            line.split(":", 1) for line in os.pread(self._status, 8192, 0).decode().splitlines()
        )
        return {
            "resident": int(status["VmRSS"].split()[0]) * 1024,
            "peak": int(status["VmHWM"].split()[0]) * 1024,
            "descriptors": sum(map(_is_open, range(resource.getrlimit(resource.RLIMIT_NOFILE)[0]))),
            "tasks": trio.lowlevel.current_statistics().tasks_living,
            "objects": len(gc.get_objects()),
            "blocks": sys.getallocatedblocks(),
            "cpu": time.process_time(),
        }

    def reset_peak(self) -> None:
        os.write(self._clear, b"5")


def _is_open(descriptor: int) -> bool:
    try:
        fcntl.fcntl(descriptor, fcntl.F_GETFD)
    except OSError:
        return False
    return True


class _Log(logging.Handler):
    """Counts log entries by level and unformatted message."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        self.counts[f"{record.levelname} {record.msg}"] += 1


class LoadServer:
    """The server under load. Its handler echoes lines."""

    def __init__(self) -> None:
        self._log = _Log()
        logging.getLogger("trisock").addHandler(self._log)
        logging.getLogger("trisock").setLevel(logging.INFO)
        self._gauge = Gauge()
        self._handlers = self._most_handlers = 0
        gc.freeze()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery, trio.lowlevel.FdStream(os.dup(0)) as stdin:
            async with contextlib.aclosing(lines_of(stdin)) as lines:
                self._server = await self._bind(nursery, **json.loads(await anext(lines)))
                print(json.dumps(self._server.port), flush=True)
                async for line in lines:
                    command, *arguments = json.loads(line)
                    response = await getattr(self, f"_do_{command}")(*arguments)
                    print(json.dumps(response), flush=True)
            nursery.cancel_scope.cancel()

    async def _bind(
        self,
        nursery: trio.Nursery,
        certificate: tuple[str, str] | None = None,
        descriptors: int | None = None,
        **options: Any,
    ) -> trisock.Server:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors or hard, hard))
        tls = None if certificate is None else ServerTLS(Certificate(*certificate))
        return await trisock.bind(nursery, 0, self._handle, tls=tls, **options)

    async def _handle(self, sock: Socket) -> None:
        self._handlers += 1
        self._most_handlers = max(self._most_handlers, self._handlers)
        try:
            async for line in sock.lines():
                if line.startswith(b"raise "):
                    await self._raise(sock, line.split()[1].decode())
                if line == b"bye":
                    return
                await sock.send(line, b"\n")
        finally:
            self._handlers -= 1

    async def _raise(self, sock: Socket, kind: str) -> None:
        if kind == "error":
            raise ValueError(kind)
        if kind == "group":
            raise ExceptionGroup(kind, [ValueError("one"), KeyError("two")])
        if kind == "nursery":
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                raise ValueError(kind)
        await sock.send(b"reset it now\n")
        try:
            await sock.recv()
        except trio.BrokenResourceError as exc:
            if kind == "both":
                raise ExceptionGroup(kind, [exc, ValueError("and more")]) from None
            raise

    # ---- requests ----

    async def _do_report(self) -> dict[str, object]:
        return {
            "stats": dataclasses.asdict(self._server.stats()),
            "logged": self._log.counts,
            "most_handlers": self._most_handlers,
            **self._gauge.read(),
        }

    async def _do_stats(self) -> dict[str, int]:
        return dataclasses.asdict(self._server.stats())

    async def _do_reset_peak(self) -> None:
        self._gauge.reset_peak()

    async def _do_broadcast(self, size: int, timeout: float) -> int:
        return await self._server.broadcast(payload(size), timeout=timeout)


def payload(size: int) -> bytes:
    return bytes(range(256)) * (size // 256)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only EOF on standard input stops the server
    trio.run(LoadServer().run)
