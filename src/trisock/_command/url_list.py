"""The URLs to check: those of the command line, and those of standard input."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from typing import TextIO

from .urls import Target, parse

#: Stands for the URLs of standard input.
STDIN = "-"


def parse_all(urls: Sequence[str], stdin: TextIO | None) -> tuple[Target, ...]:
    """Parse the URLs of servers with TLS.

    Args:
      urls: the URLs. ``STDIN`` stands for the URLs in ``stdin``, one on each line. A comment begins
        with ``#``, at the beginning of a line or after white space.
      stdin: standard input, or ``None`` if it is closed.

    Raises: ``ValueError`` if a URL is wrong, or if there are no URLs. The message lists all wrong
    URLs, with their line numbers in ``stdin``. ``OSError`` if ``stdin`` cannot be read.
    """
    targets: list[Target] = []
    errors: list[str] = []
    for where, url in _with_places(urls, stdin):
        try:
            targets.append(_with_tls(parse(url)))
        except ValueError as exc:
            errors.append(f"{where}{exc}")
    if len(errors) > 1:
        raise ValueError("".join(f"\n  {each}" for each in errors))
    if errors:
        raise ValueError(errors[0])
    if not targets:
        raise ValueError("standard input has no URLs")
    return tuple(targets)


def _with_places(urls: Sequence[str], stdin: TextIO | None) -> Iterator[tuple[str, str]]:
    """Yield pairs: a prefix for error messages that says where the URL is, and the URL."""
    for url in urls:
        if url != STDIN:
            yield "", url
        elif stdin is None:
            raise ValueError(f"'{STDIN}' means standard input, which is closed")
        else:
            yield from _lines(stdin)


def _lines(stdin: TextIO) -> Iterator[tuple[str, str]]:
    if isinstance(stdin, io.TextIOWrapper):
        stdin.reconfigure(errors="surrogateescape")  # as for sys.argv; ``parse`` rejects these
    for number, line in enumerate(stdin, 1):
        url = re.sub(r"(^|\s)#.*", "", line.removeprefix("\ufeff"), flags=re.DOTALL).strip()
        if url:
            yield f"line {number}: ", url


def _with_tls(target: Target) -> Target:
    if not target.scheme.tls:
        raise ValueError(f"'{target.url}' has no TLS to check")
    return target
