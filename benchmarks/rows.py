"""The rows of the table: each is one kind of work, with what trisock is meant to reach in it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One kind of work.

    Attributes:
      name: what it is called on the command line and in the docs.
      title: what it is called in the table.
      work: what the server does: ``echo``, ``receive``, ``send`` or ``lines``.
      load: what the client does.
      amount: how much work one measurement is.
      quick_amount: the same for a quick look.
      unit: what is counted.
      target: trisock's figure relative to bare Trio's.
      tls: whether it is over TLS.
      connections: how many connections there are at a time.
      is_memory: whether the figure is memory, and so better if lower.
    """

    name: str
    title: str
    work: str
    load: str
    amount: int
    quick_amount: int
    unit: str
    target: float
    tls: bool = False
    connections: int = 1


ROWS = [
    Row("echo64", "echo, 64 connections", "echo", "echo", 64000, 12800, "messages", 1.5, connections=64),
    Row("echo1", "echo, 1 connection", "echo", "echo", 20000, 4000, "messages", 1.12),
    Row("tls-echo1", "TLS echo, 1 connection", "echo", "echo", 20000, 4000, "messages", 1.3, tls=True),
]
