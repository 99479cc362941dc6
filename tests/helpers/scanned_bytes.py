"""A bytes subclass that counts how many bytes its search methods scan."""

from __future__ import annotations


class ScannedBytes(bytes):
    """Bytes whose search methods add the number of scanned bytes to ``ScannedBytes.scanned``.

    Slices and concatenations are also ``ScannedBytes``. ``index``, ``partition``, ``count`` and
    ``in`` raise NotImplementedError, because they do not add to ``scanned``.
    """

    scanned = 0

    def find(self, sub: bytes, start: int = 0, end: int | None = None) -> int:  # type: ignore[override]
        end = len(self) if end is None else min(end, len(self))
        at = super().find(sub, start, end)
        ScannedBytes.scanned += (at + len(sub) if at >= 0 else end) - start
        return at

    def rfind(self, sub: bytes, start: int = 0, end: int | None = None) -> int:  # type: ignore[override]
        end = len(self) if end is None else min(end, len(self))
        at = super().rfind(sub, start, end)
        ScannedBytes.scanned += end - max(at, start)
        return at

    def split(self, sep: bytes, maxsplit: int = -1) -> list[bytes]:  # type: ignore[override]
        ScannedBytes.scanned += len(self)
        return super().split(sep, maxsplit)

    def index(self, *_: object) -> int:
        raise NotImplementedError("override this method to count the bytes it scans")

    partition = count = __contains__ = index  # type: ignore[assignment]

    def __getitem__(self, key: slice) -> ScannedBytes:  # type: ignore[override]
        return ScannedBytes(super().__getitem__(key))

    def __add__(self, other: bytes) -> ScannedBytes:  # type: ignore[override]
        return ScannedBytes(super().__add__(other))

    def __radd__(self, other: bytes) -> ScannedBytes:
        return ScannedBytes(other + bytes(self))
