"""Run HAProxy, which sends and receives PROXY headers."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

from helpers.programs import running

CONFIG = """
defaults
    mode tcp
    timeout connect 60s
    timeout client 60s
    timeout server 60s
listen proxy
    bind fd@{fd} {bind}
    {lines}
    server only 127.0.0.1:{port} {server}
"""


@contextlib.asynccontextmanager
async def haproxy(
    where: str | Path, port: int, directory: Path, *, server: str, bind: str = "", lines: str = ""
) -> AsyncIterator[int]:
    """Run HAProxy on a socket that already listens. It forwards connections to ``port``.

    Args:
      where: the IP address or Unix path on which HAProxy listens.
      directory: where to write the configuration file.
      server, bind: options for the configuration's ``server`` and ``bind`` lines.
      lines: further lines of the configuration.

    Yield HAProxy's own port, or 0 if it listens on a path.
    """
    if isinstance(where, Path):
        family: int = socket.AF_UNIX
    else:
        family = socket.AF_INET6 if ":" in where else socket.AF_INET
    with socket.socket(family) as listening:
        listening.bind(str(where) if isinstance(where, Path) else (where, 0))
        listening.listen()
        fd = listening.fileno()
        config = directory / "haproxy.cfg"
        config.write_text(CONFIG.format(fd=fd, port=port, server=server, bind=bind, lines=lines))
        async with running(
            *("haproxy", "-db", "-f", config), pass_fds=[fd], stderr=subprocess.DEVNULL
        ):
            yield 0 if isinstance(where, Path) else listening.getsockname()[1]
