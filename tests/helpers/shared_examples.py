"""An example server that is started once for all tests of a module."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import tempfile
from collections.abc import Iterator

from helpers.deadline import DEADLINE
from helpers.examples import command


@dataclasses.dataclass
class SharedServer:
    """A running TLS server.

    Attributes:
      ca: the path of its CA certificate.
    """

    port: int
    ca: str


@contextlib.contextmanager
def shared(name: str, ca: str) -> Iterator[SharedServer]:
    """Run an example server. At the end, SIGTERM must stop it with status 0 and an empty stderr."""
    arguments = command(name, "--port", "0", "--write-ca", ca)
    with (
        tempfile.TemporaryFile() as stderr,
        subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=stderr) as process,
    ):
        try:
            assert process.stdout is not None
            yield SharedServer(int(process.stdout.readline().split()[-1]), ca)
            process.terminate()
            assert process.wait(DEADLINE) == 0
            stderr.seek(0)
            assert stderr.read() == b""
        finally:
            process.kill()
