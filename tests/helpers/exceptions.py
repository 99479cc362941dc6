"""Exception groups, and an exception that breaks the code that handles it."""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup


def leaves_of(exc: BaseException) -> list[BaseException]:
    """Return the exceptions in nested groups, or the exception itself."""
    if isinstance(exc, BaseExceptionGroup):
        return [leaf for each in exc.exceptions for leaf in leaves_of(each)]
    return [exc]


class HostileError(Exception):
    """Raises an exception when it is logged, compared, hashed or tested for truth."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("compared")

    def __bool__(self) -> bool:
        raise RuntimeError("tested for truth")

    def __str__(self) -> str:
        raise RuntimeError("printed")
