"""The servers to compare, one module for each library.

Each server is written as an experienced user of the library would write it, without tuning. All
servers read at most 64 KiB, write 64 KiB at a time, and keep the library's default for TCP_NODELAY.
All can do these kinds of work on a connection:

- ``echo``: echo everything until EOF.
- ``receive``: echo the request, which is a decimal number, then read and drop that number of bytes,
  and respond with the number received. Repeat.
- ``send``: receive a request, which is a decimal number (a multiple of 65536), and respond with
  that number of bytes. Repeat.
- ``lines``: count lines until EOF, and respond with the count.
- ``batches``: the same, by lists of lines if the library has them.
- ``frames``: count length-prefixed frames until EOF, and respond with the count. The header is a
  big-endian integer of 4 bytes.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    """A library, or a way to run it.

    Attributes:
      name: the name on the command line and in the tables.
      title: a description.
      module: the server's module.
      flavour: the event loop, if the module supports several.
      packages: the required packages. Their versions are recorded with the results.
      source: a directory for the server's ``PYTHONPATH``, to run another build.
    """

    name: str
    title: str
    module: str
    flavour: str = ""
    packages: tuple[str, ...] = ()
    source: str = ""

    @property
    def missing(self) -> list[str]:
        """The required packages that are not installed."""
        return [each for each in self.packages if importlib.util.find_spec(each) is None]


SUBJECT = "trisock"  # the peer that has targets
BASE = "trio"  # ratios are relative to this peer

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
    Peer("epoll", "a bare epoll loop, the minimum cost",
         "benchmarks.peers.epoll"),
]}
# fmt: on
