"""Network namespaces: a network of its own for some sockets of a test.

A socket stays in the namespace in which it was opened, so one run of Trio can use sockets of
several namespaces.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
from collections.abc import Iterator

import pytest

_CLONE_NEWNET = 0x40000000
_CURRENT = "/proc/thread-self/ns/net"

# Netlink's multicast groups for changes of interfaces and routes (linux/rtnetlink.h).
_RTMGRP_LINK = 1
_RTMGRP_IPV6_ROUTE = 0x400


class Namespace:
    """A network namespace. Its loopback interface is up.

    Args:
      descriptor: refers to the namespace.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Open sockets in this namespace during the block. Only this thread is affected."""
        before = os.open(_CURRENT, os.O_RDONLY)
        try:
            _call("setns", self.descriptor, _CLONE_NEWNET)
            try:
                yield
            finally:
                _call("setns", before, _CLONE_NEWNET)
        finally:
            os.close(before)

    def ip(self, arguments: str, *descriptors: int) -> None:
        """Run ``ip`` in this namespace. It inherits the given descriptors."""
        with self.entered():
            subprocess.run(["ip", *arguments.split()], check=True, pass_fds=descriptors)

    def change(self, arguments: str, question: str, answer: str) -> None:
        """Run ``ip arguments``, then wait until the output of ``ip question`` contains ``answer``.

        The kernel makes some changes only later, such as the route of a new IPv6 address.
        """
        with (
            self.entered(),
            socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as events,
        ):
            events.bind((0, _RTMGRP_LINK | _RTMGRP_IPV6_ROUTE))
            events.settimeout(10)
            self.ip(arguments)
            ask = ["ip", *question.split()]
            while answer not in subprocess.run(ask, capture_output=True, text=True).stdout:
                events.recv(65536)

    def add_ipv6(self, address: str, interface: str) -> None:
        """Add an address with a prefix of 64 bits to an interface that is up."""
        self.change(
            # nodad: duplicate address detection would delay the test.
            f"address add {address}/64 dev {interface} nodad",
            "-6 route show table local",
            f"local {address} ",
        )


@contextlib.contextmanager
def new_namespace() -> Iterator[Namespace]:
    """Make a namespace. Skip the test if that is not permitted."""
    before = os.open(_CURRENT, os.O_RDONLY)
    try:
        try:
            _call("unshare", _CLONE_NEWNET)
        except OSError as exc:
            pytest.skip(f"no network namespace: {exc}")
        try:
            namespace = Namespace(os.open(_CURRENT, os.O_RDONLY))
        finally:
            _call("setns", before, _CLONE_NEWNET)
    finally:
        os.close(before)
    try:
        namespace.ip("link set lo up")
        yield namespace
    finally:
        os.close(namespace.descriptor)


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Namespace, Namespace]]:
    """Make two namespaces with a cable between them.

    The interfaces are ``left`` and ``right``. They have the addresses 10.0.0.1 and 10.0.0.2,
    fd00::1 and fd00::2, fe80::1 and fe80::2.
    """
    with new_namespace() as left, new_namespace() as right:
        there = right.descriptor
        cable = f"link add left type veth peer name right netns /proc/self/fd/{there}"
        left.ip(cable, there)
        left.ip("link set left up")
        for namespace, name in ((right, "right"), (left, "left")):
            namespace.ip(f"link set {name} addrgenmode none")
            namespace.change(f"link set {name} up", f"-brief link show {name}", " UP ")
        for number, (namespace, name) in enumerate([(left, "left"), (right, "right")], start=1):
            namespace.ip(f"address add 10.0.0.{number}/24 broadcast 10.0.0.255 dev {name}")
            namespace.add_ipv6(f"fd00::{number}", name)
            namespace.add_ipv6(f"fe80::{number}", name)
        yield left, right


def _call(function: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
