"""NotCopyable: a base class for objects that must not be copied, such as sockets and servers."""

from __future__ import annotations

from typing import NoReturn


class NotCopyable:
    """Makes ``copy.copy``, ``copy.deepcopy`` and ``pickle`` raise a ``TypeError`` that says why.

    A copy would share the descriptor but not the state: after ``starttls`` on the original, the
    copy would continue in plain text.
    """

    __slots__ = ()

    def __copy__(self) -> NoReturn:
        self._refuse("copied")

    def __deepcopy__(self, memo: object) -> NoReturn:
        self._refuse("copied")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self._refuse("pickled")

    def _refuse(self, what: str) -> NoReturn:
        name = type(self).__name__
        raise TypeError(
            f"a {name} cannot be {what}: a second object would use the same connection or "
            "listening socket without knowing its state"
        )
