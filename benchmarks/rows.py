"""The rows of the benchmark. Each is one kind of work, with a target ratio for trisock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .peers.serving import BLOCK_SIZE

Work = Literal[
    "echo", "line-echo", "receive", "send", "lines", "batches", "frames", "relay", "udp-echo"
]
Load = Literal[
    "echo",
    "visit",
    "visit_singly",
    "upload",
    "download",
    "lines",
    "frames",
    "idle",
    "relay",
    "idle_relays",
    "udp_echo",
    "udp_echo_singly",
]

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class Row:
    """One kind of work.

    Attributes:
      name: the name on the command line and in the docs.
      title: a description.
      work: the server's part.
      load: the client's part.
      unit: the unit of work (in a memory row, connections).
      amount: the number of units in one measurement of a full run.
      quick: the number of units in one measurement of a quick run.
      target: the minimum ratio of trisock's figure to bare Trio's (for memory, the maximum).
      tls: whether connections use TLS.
      connections: the number of connections that are open before the work begins.
    """

    name: str
    title: str
    work: Work
    load: Load
    unit: str
    amount: int
    quick: int
    target: float
    tls: bool = field(default=False, kw_only=True)
    connections: int = field(default=1, kw_only=True)

    @property
    def is_memory(self) -> bool:
        """Whether the figure is bytes per connection, where lower is better."""
        return self.load in ("idle", "idle_relays")

    def warm_up(self, amount: int) -> int:
        """Return the amount of warm-up work: a tenth (for bytes, rounded up to whole blocks)."""
        return (
            -(-amount // 10 // BLOCK_SIZE) * BLOCK_SIZE
            if self.unit == "bytes"
            else max(amount // 10, 1)
        )

    def meets_target(self, ratio: float) -> bool:
        """Return whether a ratio to bare Trio meets the target."""
        return ratio <= self.target if self.is_memory else ratio >= self.target


# fmt: off
ROWS = {row.name: row for row in [
    Row("echo64", "echo, 64 connections, 64 bytes", "echo", "echo",
        "messages", 60_000, 12_000, 1.5, connections=64),
    Row("echo1", "echo, 1 connection, 64 bytes", "echo", "echo",
        "messages", 20_000, 4_000, 1.12),
    Row("line-echo", "echo of lines, 1 connection, 64 bytes", "line-echo", "echo",
        "messages", 20_000, 4_000, 1.0),
    Row("connections", "connect, 1 echo, close", "echo", "visit",
        "connections", 5_000, 1_000, 1.9, connections=0),
    Row("connections1", "connect, 1 echo, close, one at a time", "echo", "visit_singly",
        "connections", 5_000, 1_000, 1.3, connections=0),
    Row("receive", "read and drop", "receive", "upload",
        "bytes", GIB, 256 * MIB, 1.3),
    Row("send", "write", "send", "download",
        "bytes", GIB, 256 * MIB, 1.5),
    Row("lines", "64-byte lines, pipelined", "lines", "lines",
        "lines", 4_000_000, 500_000, 2.0, connections=0),
    Row("batches", "64-byte lines in batches, pipelined", "batches", "lines",
        "lines", 4_000_000, 500_000, 3.5, connections=0),
    Row("frames", "frames of 60 bytes, pipelined", "frames", "frames",
        "frames", 2_000_000, 250_000, 2.0, connections=0),
    Row("tls-echo1", "TLS: echo, 1 connection, 64 bytes", "echo", "echo",
        "messages", 20_000, 3_000, 1.3, tls=True),
    Row("tls-handshakes", "TLS: connect, 1 echo, close", "echo", "visit",
        "connections", 1_500, 300, 1.2, tls=True, connections=0),
    Row("tls-receive", "TLS: read and drop", "receive", "upload",
        "bytes", 256 * MIB, 64 * MIB, 1.8, tls=True),
    Row("tls-send", "TLS: write", "send", "download",
        "bytes", 256 * MIB, 64 * MIB, 1.3, tls=True),
    Row("memory", "memory of an idle connection", "echo", "idle",
        "connections", 1_000, 300, 1.3, connections=0),
    Row("tls-memory", "memory of an idle TLS connection", "echo", "idle",
        "connections", 1_000, 300, 1.1, tls=True, connections=0),
    Row("relay", "relay between two connections", "relay", "relay",
        "bytes", GIB, 256 * MIB, 1.2, connections=0),
    Row("relay-memory", "memory of an idle relay", "relay", "idle_relays",
        "connections", 1_000, 300, 1.1, connections=0),
    Row("udp-echo64", "UDP: echo, 64 clients, 64 bytes", "udp-echo", "udp_echo",
        "datagrams", 100_000, 20_000, 1.5, connections=0),
    Row("udp-echo1", "UDP: echo, 1 client, 64 bytes", "udp-echo", "udp_echo_singly",
        "datagrams", 40_000, 8_000, 0.95, connections=0),
]}
# fmt: on


def amount_text(number: int, unit: str) -> str:
    """Format an amount of work, such as 256 MiB or 60,000 messages."""
    return f"{number / MIB:,g} MiB" if unit == "bytes" else f"{number:,} {unit}"
