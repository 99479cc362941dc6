"""Frames: the async iterator over the length-prefixed frames of a connection."""

from __future__ import annotations

from .batch_iterator import BatchIterator


class Frames(BatchIterator):
    """The async iterator that ``Socket.frames`` returns.

    Each frame is consumed only when it is returned, so you can leave the loop at any time.
    """

    __slots__ = ()
