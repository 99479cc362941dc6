"""UDPSocket: the public interface of a UDP socket."""

from __future__ import annotations

from . import groups
from .receiving import Receiver
from .sending import Sender


class UDPSocket(Receiver, Sender):
    """A UDP socket: it sends and receives datagrams.

    ``open_udp`` and ``connect_udp`` create UDPSockets. The constructor takes a bound UDP socket, of
    ``socket`` or ``trio.socket``, such as one that systemd has opened. Afterwards, only the
    UDPSocket may use that socket.

    One task may receive; a second one gets ``trio.BusyResourceError``. Any number of tasks may send
    at the same time, because a datagram is sent as a whole.

    Every async method is a cancel point. A cancelled call has received nothing and sent nothing.
    If 16 calls of ``send`` and ``recv`` in a row do not wait, at least one of them is a schedule
    point.

    After ``close``, an iteration ends, and other methods raise ``trio.ClosedResourceError``, except
    those that only return information.

    Raises:
      TypeError, ValueError: the argument is not a bound UDP socket over IPv4 or IPv6.

    A UDPSocket cannot be copied or pickled (``TypeError``). After a fork, both processes have the
    socket. Only one of the two receives each datagram. A close in one process leaves the socket
    open in the other.
    """

    def join_group(self, group: str, interface: str | int | None = None) -> None:
        """Join a multicast group: receive the datagrams that are sent to it.

        On Linux, a socket receives only from groups that it has joined. On other systems, it may
        also receive from groups that other programs have joined.

        Args:
          group: the address of the group, such as ``"224.0.0.251"`` or ``"ff02::fb%eth0"``.
          interface: the name or the number of the interface to receive on. ``None``: the zone of
            ``group`` or, without a zone, an interface that the system chooses.

        Raises:
          OSError: there is no such interface (``ENODEV``), the group was joined already
            (``EADDRINUSE``), or the socket does not support this kind of address
            (``EAFNOSUPPORT``).
          trio.ClosedResourceError: the socket is closed.
          TypeError, ValueError: ``group`` is not the address of a group, or ``interface`` is
            invalid.

        To receive the group's datagrams, the socket must be bound to the group's port, either
        without a host or with the group as the host. Sending to a group needs no membership.
        """
        self._check_open()
        groups.join(self._socket, group, interface)

    def leave_group(self, group: str, interface: str | int | None = None) -> None:
        """Leave a multicast group. ``close`` leaves all groups.

        Args: those with which the group was joined.

        Raises:
          OSError: the group was not joined on this interface (``EADDRNOTAVAIL``).
          trio.ClosedResourceError, TypeError, ValueError: as in ``join_group``.
        """
        self._check_open()
        groups.leave(self._socket, group, interface)
