"""What is allocated outside of Python, too."""

from __future__ import annotations

import ctypes


class _Mallinfo2(ctypes.Structure):
    """What glibc tells of ``malloc`` (mallinfo(3))."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def allocated() -> int:
    """Return how many bytes are allocated by ``malloc``, of OpenSSL too; 0 where nobody tells."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return 0
    mallinfo.restype = _Mallinfo2
    info = mallinfo()
    return int(info.uordblks + info.hblkhd)
