"""The three ways to restart a server, for restarts.py.

Each way is a context manager that starts the server. It yields the port, and a function that
restarts the server once and returns when the new one serves.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import trio

from helpers.programs import lines_of

Restart: TypeAlias = "Callable[[], Awaitable[None]]"
Start: TypeAlias = "contextlib.AbstractAsyncContextManager[tuple[int, Restart]]"
Way: TypeAlias = "Callable[[Path, dict[str, str]], Start]"

_HERE = Path(__file__).parent
_SERVER = [sys.executable, str(_HERE / "restart_server.py")]
_WORKERS = 2

_HAPROXY = """
defaults
    mode tcp
    timeout connect 200ms
    timeout client 60s
    timeout server 60s
    retries 100
listen restarts
    bind fd@{fd}
    server only 127.0.0.1:{port} send-proxy-v2
"""


class _Processes:
    """The processes of one server, in order of their start."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self._environment = {**os.environ, **environment}
        self._notify = trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify_path = str(directory / "notify")
        self.current: trio.Process

    async def __aenter__(self) -> _Processes:
        await self._notify.bind(self._notify_path)
        self._environment["NOTIFY_SOCKET"] = self._notify_path
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._notify.close()

    async def start(self, nursery: trio.Nursery, number: int, **options: Any) -> None:
        """Start the server, and wait until it says READY. It must exit with status 0."""
        self.current = await nursery.start(
            lambda task_status: trio.run_process(
                [*_SERVER, str(number)],
                env=self._environment,
                task_status=task_status,
                **options,
            )
        )
        await self.until(b"READY=1")

    async def until(self, message: bytes) -> None:
        while message not in (await self._notify.recv(1000)).split(b"\n"):
            pass


@contextlib.asynccontextmanager
async def inherited(
    directory: Path, environment: dict[str, str]
) -> AsyncIterator[tuple[int, Restart]]:
    """A new process inherits the listening socket. Then the old process gets SIGTERM."""
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listening:
        fd = listening.fileno()
        environment = {**environment, "INHERITED": "1"}
        async with (
            _Processes(directory, environment) as processes,
            trio.open_nursery() as nursery,
        ):
            await processes.start(nursery, fd, pass_fds=[fd])

            async def restart() -> None:
                old = processes.current
                await processes.start(nursery, fd, pass_fds=[fd])
                old.terminate()

            yield listening.getsockname()[1], restart
            processes.current.terminate()


@contextlib.asynccontextmanager
async def behind_haproxy(
    directory: Path, environment: dict[str, str]
) -> AsyncIterator[tuple[int, Restart]]:
    """The server stops, and starts again on the same port. HAProxy holds the new clients."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    environment = {**environment, "PROXIED": "1"}
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listening:
        fd = listening.fileno()
        config = directory / "haproxy.cfg"
        config.write_text(_HAPROXY.format(fd=fd, port=port))
        async with (
            _Processes(directory, environment) as processes,
            trio.open_nursery() as nursery,
        ):
            haproxy = await nursery.start(
                lambda task_status: trio.run_process(
                    ["haproxy", "-db", "-f", str(config)],
                    pass_fds=[fd],
                    check=False,
                    stderr=subprocess.DEVNULL,
                    task_status=task_status,
                )
            )
            await processes.start(nursery, port)

            async def restart() -> None:
                processes.current.terminate()
                await processes.current.wait()
                await processes.start(nursery, port)

            yield listening.getsockname()[1], restart
            processes.current.terminate()
            await processes.current.wait()
            haproxy.terminate()


@contextlib.asynccontextmanager
async def gunicorn(
    directory: Path, environment: dict[str, str]
) -> AsyncIterator[tuple[int, Restart]]:
    """gunicorn's master gets SIGHUP, and replaces its workers."""
    config = directory / "gunicorn.conf.py"
    config.write_text('def post_worker_init(worker):\n    print("ready", flush=True)\n')
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listening:
        fd = listening.fileno()
        command = [
            *(sys.executable, "-m", "gunicorn", "--config", str(config), "--chdir", str(_HERE)),
            *("--worker-class", "trisock.gunicorn.TrioWorker", "--workers", str(_WORKERS)),
            *("--bind", f"fd://{fd}", "--log-level", "warning"),
        ]
        if "CERTIFICATE" in environment:
            command += ["--certfile", environment["CERTIFICATE"], "--keyfile", environment["KEY"]]
        async with trio.open_nursery() as nursery:
            master = await nursery.start(
                lambda task_status: trio.run_process(
                    [*command, "restart_server:handler"],
                    env={**os.environ, **environment},
                    stdout=subprocess.PIPE,
                    pass_fds=[fd],
                    task_status=task_status,
                )
            )
            async with contextlib.aclosing(lines_of(master.stdout)) as ready:

                async def restart() -> None:
                    master.send_signal(signal.SIGHUP)
                    await workers_start()

                async def workers_start() -> None:
                    for _ in range(_WORKERS):
                        await anext(ready)

                await workers_start()
                yield listening.getsockname()[1], restart
                master.terminate()
                await master.wait()


WAYS: dict[str, Way] = {
    "inherited": inherited,
    "haproxy": behind_haproxy,
    "gunicorn": gunicorn,
}
