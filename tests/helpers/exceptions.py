"""Exception groups."""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup


def leaves_of(exc: BaseException) -> list[BaseException]:
    """Return the exceptions in nested groups, or the exception itself."""
    if isinstance(exc, BaseExceptionGroup):
        return [leaf for each in exc.exceptions for leaf in leaves_of(each)]
    return [exc]
