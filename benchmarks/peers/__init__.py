"""The servers that are compared, one module for each library.

Each shows what somebody who knows the library would write, with nothing tuned and nothing
hampered: they read 64 KiB at most, write 64 KiB at a time, and have TCP_NODELAY or not as
the library has it. All do the same four works on a connection:

- ``echo``: send back what comes, until the end.
- ``receive``: a request, which is a decimal number, is echoed; then so many bytes are read and
  dropped, and how many they were is answered. Then comes the next request.
- ``send``: a request is answered by so many bytes (a multiple of 64 KiB).
- ``lines``: count lines until the end, and answer how many they were.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    """A library, or a way to run it.

    Attributes:
      name: what it is called on the command line and in the table.
      title: what it is.
      module: which module is its server.
      flavour: which event loop, where that module has several.
      packages: what it needs, and so whose versions belong to the result.
      source: a directory that comes first on the server's ``PYTHONPATH``: another build.
    """

    name: str
    title: str
    module: str
    flavour: str = ""
    packages: tuple[str, ...] = ()
    source: str = ""

    @property
    def missing(self) -> list[str]:
        """The packages that it needs and that are not installed."""
        return [each for each in self.packages if importlib.util.find_spec(each) is None]


SUBJECT = "trisock"  # which the others are there for
BASE = "trio"  # to which all others are relative

# fmt: off
PEERS = {peer.name: peer for peer in [
    Peer(BASE, "bare Trio",
         "benchmarks.peers.trio", packages=("trio",)),
    Peer(SUBJECT, "trisock",
         "benchmarks.peers.trisock", packages=("trisock", "trio")),
    Peer("anyio-trio", "anyio on Trio",
         "benchmarks.peers.anyio", "trio", packages=("anyio", "trio")),
    Peer("anyio-asyncio", "anyio on asyncio",
         "benchmarks.peers.anyio", "asyncio", packages=("anyio",)),
    Peer("asyncio", "asyncio streams",
         "benchmarks.peers.asyncio"),
    Peer("uvloop", "asyncio streams on uvloop",
         "benchmarks.peers.asyncio", "uvloop", packages=("uvloop",)),
    Peer("gevent", "gevent",
         "benchmarks.peers.gevent", packages=("gevent",)),
    Peer("epoll", "a bare epoll loop, the floor",
         "benchmarks.peers.epoll"),
]}
# fmt: on
