"""The memory held by objects and by ``malloc``."""

from __future__ import annotations

import ctypes
import gc
import sys

from trisock._net.receive_buffer import ReceiveBuffer


def held(buffer: ReceiveBuffer) -> int:
    """Return the size of all objects that a buffer keeps alive, each counted once."""
    seen: dict[int, object] = {}
    waiting: list[object] = [getattr(buffer, name) for name in buffer.__slots__]
    while waiting:
        each = waiting.pop()
        if id(each) not in seen and not isinstance(each, (type, int)):
            seen[id(each)] = each
            waiting += gc.get_referents(each)
    return sum(map(sys.getsizeof, seen.values()))


class _Mallinfo2(ctypes.Structure):
    """glibc's counters of ``malloc`` (mallinfo(3))."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def allocated() -> int:
    """Return how many bytes ``malloc`` has allocated (OpenSSL's included), or 0 if unknown."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return 0
    mallinfo.restype = _Mallinfo2
    info = mallinfo()
    return int(info.uordblks + info.hblkhd)
