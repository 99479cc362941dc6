"""Run a real gunicorn with ``trisock.gunicorn.TrioWorker``, and load it with clients."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import trio

import trisock
from helpers.programs import lines_of
from trisock import ClientTLS

# Answers each line with the worker's PID and the line. Some lines are commands.
APP = """
import os
import time

from trisock.gunicorn import App


async def handler(sock):
    async for line in sock.lines(max_bytes=100):
        if line == b"block":
            # Do not log: if SIGABRT arrives during the call, its handler cannot log.
            os.write(2, b"blocks\\n")
            time.sleep(60)
        elif line == b"exit":
            raise SystemExit
        elif line == b"who":
            line = str(sock.getpeer()).encode()
        await sock.send(b"%d %b\\n" % (os.getpid(), line))
"""


class Master:
    """A running gunicorn.

    Attributes:
      log: the lines that it has logged.
    """

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.log: list[str] = []
        self.port = 0
        self._more = trio.Event()

    async def read_log(self) -> None:
        assert self.process.stderr is not None
        async for line in lines_of(self.process.stderr):
            self.log.append(line.decode())
            self._more.set()
            self._more = trio.Event()

    def found(self, pattern: str) -> list[str]:
        """Return all matches of the pattern's group in the log."""
        return re.findall(pattern, "\n".join(self.log))

    async def logged(self, pattern: str, times: int = 1) -> list[str]:
        """Wait until the log matches a pattern at least ``times`` times."""
        while len(found := self.found(pattern)) < times:
            await self._more.wait()
        return found

    async def workers(self, number: int) -> list[int]:
        """Wait until ``number`` workers have been started. Return their PIDs."""
        return [int(pid) for pid in await self.logged(r"Booting worker with pid: (\d+)", number)]

    async def exited(self, pid: int) -> None:
        """Wait until a worker has logged its exit."""
        await self.logged(rf"Worker exiting \(pid: ({pid})\)")

    async def ask(self, line: bytes, *, tls: ClientTLS | None = None) -> tuple[int, bytes]:
        """Connect and ask one question. Return the worker's PID and the answer."""
        async with await trisock.connect("127.0.0.1", self.port, tls=tls) as sock:
            await sock.send(line, b"\n")
            answer = await sock.recv_line(max_bytes=200)
        pid, _, text = answer.partition(b" ")
        return int(pid), text


@contextlib.asynccontextmanager
async def gunicorn(
    folder: Path,
    *options: str | Path,
    app: str = APP,
    target: str | None = "app:handler",
    port: int = 0,
    status: int = 0,
) -> AsyncIterator[Master]:
    """Run gunicorn for the duration of a block. At the end, it stops gracefully.

    Args:
      app: the text of the module ``app``.
      target: the program in ``app``. If ``None``, gunicorn.conf.py sets program and worker class.
      status: the expected exit status.
    """
    (folder / "app.py").write_text(app)
    command = [sys.executable, "-m", "gunicorn", "--no-control-socket"]
    command += ["--bind", f"127.0.0.1:{port}", *map(str, options)]
    if target is not None:
        command += ["--worker-class", "trisock.gunicorn.TrioWorker", target]
    process = await trio.lowlevel.open_process(
        command, cwd=folder, stderr=subprocess.PIPE, start_new_session=True
    )
    master = Master(process)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(master.read_log)
            master.port = int((await master.logged(r"Listening at: https?://[^:]+:(\d+)"))[0])
            yield master
            process.terminate()
            assert await process.wait() == status
    except BaseException:
        print(*master.log, sep="\n")  # pytest shows this if the test fails
        raise
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also a second master, after SIGUSR2
        with trio.CancelScope(shield=True):
            await process.wait()
        assert process.stderr is not None
        with trio.CancelScope() as scope:
            scope.cancel()
            await process.stderr.aclose()


class Load:
    """Clients that connect, ask, and read the answer, again and again. Any failure is raised.

    Attributes:
      answers: how many answers each worker has given, by PID.
    """

    def __init__(self, master: Master) -> None:
        self._master = master
        self._more = trio.Event()
        self._ended = False
        self.asked = 0
        self.answers: Counter[int] = Counter()

    @contextlib.asynccontextmanager
    async def running(self, clients: int) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            for _ in range(clients):
                nursery.start_soon(self._ask_without_pause)
            yield
            self._ended = True
        assert self.asked == self.answers.total()

    async def _ask_without_pause(self) -> None:
        while not self._ended:
            self.asked += 1
            question = b"%d" % self.asked
            pid, answer = await self._master.ask(question)
            assert answer == question
            self.answers[pid] += 1
            self._more.set()
            self._more = trio.Event()

    async def answered(self, by: list[int], times: int = 20) -> None:
        """Wait until each of these workers has given ``times`` more answers."""
        before = self.answers.copy()
        while any(self.answers[pid] - before[pid] < times for pid in by):
            await self._more.wait()
