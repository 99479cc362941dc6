"""The common part of all servers: the command line, and the setup of the process."""

from __future__ import annotations

import argparse
import cProfile
import ctypes
import os
import signal
import ssl
from dataclasses import dataclass
from pathlib import Path

HOST = "127.0.0.1"
READ_SIZE = 65536
BLOCK_SIZE = 65536
BLOCK = b"x" * BLOCK_SIZE
WORKS = [
    *("echo", "line-echo", "receive", "send", "lines", "batches", "frames", "relay"),
    "udp-echo",
]

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


@dataclass(frozen=True)
class Options:
    """The options of a server.

    Attributes:
      work: what to do on each connection, as in ``benchmarks.peers``.
      tls: the directory of ``chain.pem`` and ``key.pem``, or ``None`` for plain TCP.
      flavour: the event loop, if a peer supports several.
      upstream: the port to which a relay connects.
    """

    work: str
    tls: Path | None
    flavour: str
    upstream: int = 0

    def server_context(self) -> ssl.SSLContext | None:
        """Return an SSL context with our certificate, or ``None`` for plain TCP."""
        if self.tls is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.tls / "chain.pem", self.tls / "key.pem")
        return context


def parse_options() -> Options:
    """Parse the command line, and set up the process as the driver requests."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("--tls", type=Path)
    parser.add_argument("--flavour", default="")
    parser.add_argument("--upstream", type=int, default=0)
    parser.add_argument("--core", type=int, help="the core to run on")
    parser.add_argument(
        "--parent", type=int, help="the PID of the driver: exit when the driver dies"
    )
    parser.add_argument("--profile", type=Path, help="write a profile to this file on SIGTERM")
    args = parser.parse_args()
    if args.core is not None:
        os.sched_setaffinity(0, {args.core})
    if args.parent is not None:
        _end_with(args.parent)
    if args.profile is not None:
        _profile_to(args.profile)
    return Options(args.work, args.tls, args.flavour, args.upstream)


def announce(port: int) -> None:
    """Print the server's port for the driver."""
    print(port, flush=True)


def _end_with(parent: int) -> None:
    """Make the kernel kill this process when the parent dies."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the call
        os._exit(1)


def _profile_to(path: Path) -> None:
    profile = cProfile.Profile()

    def finish(*_: object) -> None:
        profile.disable()
        profile.dump_stats(path)
        os._exit(0)

    signal.signal(signal.SIGTERM, finish)
    profile.enable()
