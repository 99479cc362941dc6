"""Programs, forked children, threads and resets, for the tests of ``trisock.pluto``."""

from __future__ import annotations

import errno
import os
import signal
import socket as stdlib
import subprocess
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from helpers.deadline import DEADLINE
from helpers.pluto_kit import Thread, got, pair, starttls_on_both, wait_a_pass

FORK_WARNS = ("-W", "ignore::DeprecationWarning")  # Python 3.12 warns of a fork beside threads
STRICT = ("-X", "dev", "-W", "error")


def run_program(
    text: str,
    *options: str,
    prelude: str = "from trisock.pluto import scheduler, socket\n",
    timeout: float = DEADLINE,
) -> str:
    """Run a program, which must succeed without a complaint; return what it prints."""
    done = subprocess.run(
        [sys.executable, *options, "-c", prelude + textwrap.dedent(text)],
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def in_child(function: Callable[[], object]) -> None:
    """Run a function in a forked child, which must not fail or hang."""
    number = os.fork()
    if not number:
        status = 1
        try:
            signal.alarm(DEADLINE)
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == 0


def background_threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "trisock"]


def recv_in_thread(sock: Any) -> Thread:
    """Start a thread that reads, outside Trio, and wait until it does."""
    thread = Thread(sock.recv)
    while not sock._sock._connection.reading.in_use:
        wait_a_pass()
    return thread


def no_new_thread(_: threading.Thread) -> NoReturn:
    """Fail as ``Thread.start`` does when the system refuses a thread."""
    raise RuntimeError("can't start new thread")


def no_descriptors(*_: object) -> NoReturn:
    raise OSError(errno.EMFILE, "Too many open files")


def reset(raw: stdlib.socket) -> None:
    """Close a socket so that its peer sees a reset."""
    raw.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    raw.close()


async def client_waits(listening: Any) -> None:
    """Wait until ``hasconnection`` finds a client."""
    while not listening.hasconnection():
        await got(wait_a_pass())


async def tls_pair(certs: object) -> tuple[Any, Any]:
    """Return the two ends (client, server) of a connection under TLS."""
    client, server = await pair()
    assert await starttls_on_both(client, server, "localhost", certs) == (True, True)
    return client, server
