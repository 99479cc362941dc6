"""Check the arguments of the functions in ``trisock.testing``."""

from __future__ import annotations


def check_bool(name: str, value: object) -> None:
    """Raise ``TypeError`` unless the value is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not a {type(value).__name__}")
