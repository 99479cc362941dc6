"""Run real programs during a test. (conftest.py handles ``@pytest.mark.needs(program, ...)``.)"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import trio


@contextlib.asynccontextmanager
async def running(*command: str | Path, **options: Any) -> AsyncIterator[trio.Process]:
    """Run a program for the duration of a block."""
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(
            lambda task_status: trio.run_process(
                list(map(str, command)),
                check=False,
                task_status=task_status,
                **options,
            )
        )
        try:
            yield process
        finally:
            process.terminate()


async def lines_of(stream: trio.abc.ReceiveStream) -> AsyncGenerator[bytes, None]:
    buffer = b""
    async for chunk in stream:
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            yield line


async def run(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return await trio.run_process(
        list(arguments), stdin=stdin, capture_stdout=True, capture_stderr=True, check=False
    )


async def curl(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return await run(
        "curl", "--disable", "--silent", "--show-error", "--noproxy", "*", "--max-time", "30",
        *arguments, stdin=stdin,
    )  # fmt: skip
