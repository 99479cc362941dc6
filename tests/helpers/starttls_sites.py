"""Run the servers of starttls_servers.py with a certificate, files and a port."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import trisock
from helpers.authority import issue
from helpers.starttls_servers import Site
from trisock import Certificate, Socket, testing
from trisock.testing import Authority

Server = Callable[[Site, Socket], Awaitable[None]]

# 1 MiB: many TLS records, and more than fits in the buffers of a connection.
MAIL = b"Subject: big\r\n\r\n.\r\n..\r\n" + b"".join(b"%062d\r\n" % n for n in range(16_384))
FILE = random.Random(1).randbytes(1_048_576 + 3)


def make_site(authority: Authority, directory: Path) -> Site:
    (directory / "files").mkdir(parents=True)
    (directory / "ca.pem").write_bytes(authority.ca)
    return Site(site_certificate(authority), directory / "files")


def site_certificate(authority: Authority, *names: str) -> Certificate:
    """Return a certificate for ``names``. The default is the names of the local host."""
    names = names or ("localhost", "127.0.0.1", "::1")
    # OpenLDAP rejects a certificate without a common name.
    return issue(authority, *names, common_name=names[0])


@contextlib.asynccontextmanager
async def serving(server: Server, site: Site) -> AsyncIterator[trisock.Server]:
    """Run a server for the duration of a block. Raises the errors of ``testing.serving``."""
    async with testing.serving(functools.partial(server, site), host=None) as s:
        yield s.server
