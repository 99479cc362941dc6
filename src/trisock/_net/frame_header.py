"""FrameHeader: the length in front of each frame. It does no I/O."""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Callable

from .._arguments import quoted

# The header sizes, in bytes, for which ``struct`` has a code.
_FORMATS = {1: "!B", 2: "!H", 4: "!I", 8: "!Q"}

_MAX_SIZE = 8


def frame_header(header: str | int) -> FrameHeader:
    """Return the ``FrameHeader`` of a format. Raises ``TypeError`` or ``ValueError``."""
    if isinstance(header, bool) or not isinstance(header, (str, int)):
        raise TypeError(
            'header must be a struct format such as "!I", or a number of bytes, '
            f"not {quoted(header)}"
        )
    return _parsed(header)


class FrameHeader:
    """The header of length-prefixed frames: one unsigned integer, the length of the body.

    Args:
      header: a ``struct`` format of one unsigned integer, such as ``"!I"``, or the size of a
        big-endian integer in bytes, 1 to 8. A format begins with its byte order, because otherwise
        ``struct`` uses the byte order and the sizes of this machine.

    Raises:
      ValueError: ``header`` is neither a valid format nor a valid size.

    Attributes:
      size: the size of the header, in bytes.
      max_length: the maximum length of a body, in bytes, which is limited by the header's size.
    """

    __slots__ = ("_pack", "_unpack_from", "max_length", "size")

    def __init__(self, header: str | int) -> None:
        self._unpack_from: Callable[[bytes, int], tuple[int]]
        self._pack: Callable[[int], bytes]
        if isinstance(header, str):
            # Without "!", ">" or "<", a wire format would depend on the machine. A format of one
            # byte does not depend on the machine.
            if not re.fullmatch("[!><]?B|[!><][HILQ]", header):
                raise ValueError(
                    'header must be a struct format of one unsigned integer after "!", ">" or "<", '
                    f'such as "!I", not {quoted(header)}'
                )
            self._set_format(header)
        elif not 1 <= header <= _MAX_SIZE:
            raise ValueError(f"header must be 1 to {_MAX_SIZE} bytes, not {quoted(header)}")
        elif header in _FORMATS:
            self._set_format(_FORMATS[header])
        else:
            self.size = header
            self._pack = lambda length: length.to_bytes(header, "big")
            self._unpack_from = lambda data, start: (
                int.from_bytes(data[start : start + header], "big"),
            )
        self.max_length: int = 256**self.size - 1

    def _set_format(self, text: str) -> None:
        format = struct.Struct(text)
        self.size = format.size
        self._pack = format.pack
        self._unpack_from = format.unpack_from

    def pack(self, length: int) -> bytes:
        """Return the header of a body of this length. Raises ``ValueError`` if it is too long."""
        if length > self.max_length:
            raise ValueError(
                f"a frame of {length} bytes is too long for its header: at most {self.max_length}"
            )
        return self._pack(length)

    def length(self, data: bytes) -> int:
        """Return the length of the body, from the header at the start of ``data``."""
        return self._unpack_from(data, 0)[0]

    def split(
        self, chunk: bytes, start: int, stop: int, max_bytes: int, max_frames: int
    ) -> tuple[list[bytes], int]:
        """Split off the whole frames between ``start`` and ``stop``.

        Stops before a frame that is incomplete or longer than ``max_bytes``, and after
        ``max_frames`` frames.

        Returns: the frames' bodies, and the offset of the first byte after them.
        """
        bodies: list[bytes] = []
        size, unpack_from = self.size, self._unpack_from
        for _ in range(max_frames):
            body = start + size
            if body > stop:
                break
            (length,) = unpack_from(chunk, start)
            end = body + length
            if end > stop or length > max_bytes:
                break
            bodies.append(chunk[body:end])
            start = end
        return bodies, start


# Parsing a format takes time, and programs use few formats.
_parsed = functools.lru_cache(FrameHeader)
