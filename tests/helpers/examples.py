"""The examples, run as programs or loaded as modules."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from helpers.documents import ROOT

EXAMPLES = ROOT / "examples"


def command(name: str, *args: str) -> list[str]:
    # In development mode, Python reports each file that a program leaves open.
    return [sys.executable, "-X", "dev", str(EXAMPLES / f"{name}.py"), *args]


class Running:
    """A running example."""

    def __init__(self, process: trio.Process, stderr: Any) -> None:
        self.process = process
        self.complaints = ""  # what stderr must contain at the end
        self._stderr = stderr
        self._printed = b""
        self._asked_to_stop = False
        self.port = 0

    async def line(self) -> str:
        """Wait for the next line that the example prints."""
        assert self.process.stdout is not None
        while b"\n" not in self._printed:
            chunk = await self.process.stdout.receive_some()
            if not chunk:
                raise AssertionError(
                    f"the example exited and wrote to stderr: {self._read_stderr().decode()}"
                )
            self._printed += chunk
        line, _, self._printed = self._printed.partition(b"\n")
        return line.decode().rstrip("\r")

    def ask_to_stop(self, signum: signal.Signals = signal.SIGTERM) -> None:
        if not self._asked_to_stop:  # a second signal would kill the example
            self._asked_to_stop = True
            self.process.send_signal(signum)

    async def stop(self) -> None:
        """Stop the example, and check its exit status and stderr."""
        self.ask_to_stop()
        status = await self.process.wait()
        complaints = self._read_stderr()
        assert complaints.decode() == self.complaints
        assert status == 0

    def _read_stderr(self) -> bytes:
        self._stderr.seek(0)
        return bytes(self._stderr.read())


@asynccontextmanager
async def started(arguments: list[str], **options: Any) -> AsyncIterator[Running]:
    with tempfile.TemporaryFile() as stderr:
        process = await trio.lowlevel.open_process(
            arguments, stdout=subprocess.PIPE, stderr=stderr, **options
        )
        assert process.stdout is not None
        try:
            yield Running(process, stderr)
        finally:
            if process.returncode is None:
                process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
                await process.stdout.aclose()
                if process.stdin is not None:
                    await process.stdin.aclose()


@asynccontextmanager
async def running(name: str, *args: str) -> AsyncIterator[Running]:
    """Run an example server. When the block ends, SIGTERM must stop the server with status 0."""
    async with started(command(name, "--port", "0", *args)) as server:
        words = (await server.line()).rsplit(maxsplit=1)
        assert words[0] == "listening on port"
        server.port = int(words[1])
        yield server
        await server.stop()


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # @dataclass looks up the module here
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


sni_router = load("sni_router")


def name_or_value_error(message: bytes) -> None:
    """Check that ``server_name`` returns, or raises exactly ValueError, not a subclass."""
    error: type[Exception] = ValueError
    name = None
    try:
        name = sni_router.server_name(message)
    except ValueError as exc:
        error = type(exc)
    assert error is ValueError
    assert name is None or name.isascii()
