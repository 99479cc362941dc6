"""What a group of the program's exceptions is split into."""

from __future__ import annotations

import sys

from trisock._guard import split_errors

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup


def test_a_mixed_group_becomes_errors_and_all_others() -> None:
    error, interrupt, leaving = ValueError(), KeyboardInterrupt(), SystemExit()
    errors, others = split_errors(BaseExceptionGroup("mixed", [error, interrupt, leaving]))
    assert isinstance(errors, BaseExceptionGroup)
    assert isinstance(others, BaseExceptionGroup)
    assert errors.exceptions == (error,)
    assert others.exceptions == (interrupt, leaving)
