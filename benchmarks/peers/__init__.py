"""The servers to compare, one module for each library.

Each server is written as an experienced user of the library would write it, without tuning. All
servers read at most 64 KiB, write 64 KiB at a time, and keep the library's default for TCP_NODELAY.
There are eight kinds of work on a connection, and one kind with datagrams. The servers of bare Trio
and trisock can do all kinds. HAProxy can do only ``relay``. The other servers cannot do ``relay``
and ``line-echo``, and the servers of anyio and gevent cannot do ``udp-echo`` either:

- ``echo``: echo everything until EOF.
- ``line-echo``: echo line after line until EOF. Two more peers do only this work. They use
  trisock with idle blocks, and show the cost of these blocks.
- ``receive``: receive a request, which is a decimal number, and echo it. Then read and drop that
  number of bytes, and respond with the number of bytes received. Repeat.
- ``send``: receive a request, which is a decimal number (a multiple of 65536), and respond with
  that number of bytes. Repeat.
- ``lines``: count lines until EOF, and respond with the count.
- ``batches``: like ``lines``, but read lists of lines if the library supports this.
- ``frames``: count length-prefixed frames until EOF, and respond with the count. The header is a
  big-endian integer of 4 bytes.
- ``relay``: connect to the upstream port, and copy data and EOF both ways.
- ``udp-echo``: echo each datagram. One more peer does only this work. It uses trisock on all
  addresses, and answers from the address that the datagram was sent to.
"""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass

BASIC_WORKS = ("echo", "receive", "send", "lines", "batches", "frames")
WORKS_WITH_UDP = (*BASIC_WORKS, "udp-echo")
ALL_WORKS = (*WORKS_WITH_UDP, "line-echo", "relay")


@dataclass(frozen=True)
class Peer:
    """A library, or one way to run a library.

    Attributes:
      name: the name on the command line and in the tables.
      title: a description.
      module: the server's module.
      flavour: the event loop, if the module supports several.
      packages: the required packages. Their versions are recorded with the results.
      works: the kinds of work that the server can do.
      programs: the required programs.
      source: a directory for the server's ``PYTHONPATH``, to run another build.
    """

    name: str
    title: str
    module: str
    flavour: str = ""
    packages: tuple[str, ...] = ()
    works: tuple[str, ...] = BASIC_WORKS
    programs: tuple[str, ...] = ()
    source: str = ""

    @property
    def missing(self) -> list[str]:
        """The required packages and programs that are not installed."""
        packages = [each for each in self.packages if importlib.util.find_spec(each) is None]
        return packages + [each for each in self.programs if shutil.which(each) is None]


SUBJECT = "trisock"  # the peer that has targets
BASE = "trio"  # ratios are relative to this peer

# fmt: off
PEERS = {peer.name: peer for peer in [
    Peer(BASE, "bare Trio",
         "benchmarks.peers.trio", packages=("trio",), works=ALL_WORKS),
    Peer(SUBJECT, "trisock",
         "benchmarks.peers.trisock", packages=("trisock", "trio"), works=ALL_WORKS),
    Peer("trisock-idle-lines", "trisock with lines(idle=True)",
         "benchmarks.peers.trisock", "idle-lines", packages=("trisock", "trio"),
         works=("line-echo",)),
    Peer("trisock-idle-block", "trisock with an idle block for each line",
         "benchmarks.peers.trisock", "idle-block", packages=("trisock", "trio"),
         works=("line-echo",)),
    Peer("trisock-all-addresses", "trisock on all addresses, answering from the one asked",
         "benchmarks.peers.trisock", "all-addresses", packages=("trisock", "trio"),
         works=("udp-echo",)),
    Peer("anyio-trio", "anyio on Trio",
         "benchmarks.peers.anyio", "trio", packages=("anyio", "trio")),
    Peer("anyio-asyncio", "anyio on asyncio",
         "benchmarks.peers.anyio", "asyncio", packages=("anyio",)),
    Peer("asyncio", "asyncio streams",
         "benchmarks.peers.asyncio", works=WORKS_WITH_UDP),
    Peer("uvloop", "asyncio streams on uvloop",
         "benchmarks.peers.asyncio", "uvloop", packages=("uvloop",), works=WORKS_WITH_UDP),
    Peer("gevent", "gevent",
         "benchmarks.peers.gevent", packages=("gevent",)),
    Peer("epoll", "a bare epoll loop, the minimum cost",
         "benchmarks.peers.epoll", works=WORKS_WITH_UDP),
    Peer("haproxy", "HAProxy in TCP mode, the upper limit for a relay",
         "benchmarks.peers.haproxy", works=("relay",), programs=("haproxy",)),
]}
# fmt: on
