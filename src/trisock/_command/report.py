"""Show results: a table or blocks on a terminal, one line for each result in a pipe, or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .check import BAD, EXPIRES_SOON, GOOD, Result
from .explain import listed

# The words of Nagios.
_WORDS = {GOOD: "OK", EXPIRES_SOON: "WARNING", BAD: "CRITICAL"}
_STYLES = {GOOD: "green", EXPIRES_SOON: "yellow", BAD: "red"}
_SUMMARY = {GOOD: "good", EXPIRES_SOON: "soon to expire", BAD: "bad"}

# In columns. A narrower table has no room for the cipher names of TLS 1.3.
_MIN_TABLE_WIDTH = 74


def to_json(results: Sequence[Result]) -> str:
    """Return the results as a JSON list, in ASCII."""
    return json.dumps([_to_object(each) for each in results], indent=2)


def _to_object(result: Result) -> dict[str, object]:
    return {
        "url": result.url,
        "status": result.status,
        "error": result.error,
        "verified": result.verified,
        "version": result.version,
        "cipher": result.cipher,
        "alpn": result.alpn,
        "names": list(result.certificate.names),
        "issuer": result.certificate.issuer,
        "not_before": _iso(result.certificate.not_before),
        "not_after": _iso(result.certificate.not_after),
        "days_left": result.days_left,
        "injection": result.injection,
    }


def _iso(date: datetime | None) -> str | None:
    return None if date is None else date.isoformat()


def to_line(result: Result) -> str:
    """Return a result as one line."""
    parts = [result.error] if result.error else []
    parts += [part for part in (_expiry(result), _names(result), _issuer(result)) if part]
    parts += [part for part in (_connection(result), _injection(result)) if part]
    return f"{_WORDS[result.status]} {result.url}: {'; '.join(parts)}"


def show_on_terminal(console: Console, results: Sequence[Result]) -> None:
    """Print a table (on a narrow terminal, a block for each result), and then a summary."""
    shown = to_table(results) if console.width >= _MIN_TABLE_WIDTH else to_blocks(results)
    console.print(shown, _summary(results))


def to_table(results: Sequence[Result]) -> RenderableType:
    """Return a table with an empty line after it. A table needs ``_MIN_TABLE_WIDTH`` columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, expand=False)
    table.add_column("Status", no_wrap=True)
    table.add_column("URL", overflow="fold", max_width=34)
    table.add_column("Certificate", overflow="fold")
    table.add_column("Expires", no_wrap=True)
    for result in results:
        style = _STYLES[result.status]
        table.add_row(
            Text(_WORDS[result.status], f"bold {style}"),
            Text(result.url),
            _details(result, style),
            _dates(result, style),
        )
    return Padding(table, (0, 0, 1, 0), expand=False)


def to_blocks(results: Sequence[Result]) -> RenderableType:
    """Return a block of lines and an empty line for each result. Blocks fit any width."""
    return Group(*map(_block, results))


def _block(result: Result) -> RenderableType:
    style = _STYLES[result.status]
    word = (_WORDS[result.status], f"bold {style}")
    head = Text.assemble(word, f" {result.url}", overflow="fold")
    details = _details(result, style, (_expiry(result), style))
    return Group(head, Padding(details, (0, 0, 1, 2), expand=False))


def _details(result: Result, style: str, *more: tuple[str, str]) -> Text:
    """Describe the certificate and the connection. ``Text`` interprets no markup.

    ``more``: further lines, each with its style.
    """
    text = Text(overflow="fold")
    for part, how in (
        (result.error, style),
        (_names(result), ""),
        (_issuer(result), "dim"),
        (_connection(result), "dim"),
        (_injection(result), "dim"),
        *more,
    ):
        if part:
            text.append("\n" if text else "").append(part, how)
    return text


def _dates(result: Result, style: str) -> Text:
    if result.days_left is None or result.certificate.not_after is None:
        return Text("")
    text = Text(f"{result.certificate.not_after:%Y-%m-%d}")
    return text.append(f"\n{_days(result.days_left)}", style)


def _summary(results: Sequence[Result]) -> Text:
    text = Text(f"{len(results)} checked: ")
    counts = {status: sum(each.status == status for each in results) for status in _WORDS}
    found = [(status, count) for status, count in counts.items() if count]
    for index, (status, count) in enumerate(found):
        text.append(", " if index else "")
        text.append(f"{count} {_SUMMARY[status]}", _STYLES[status])
    return text


def _expiry(result: Result) -> str:
    if result.days_left is None:
        return ""
    return f"expires {result.certificate.not_after:%Y-%m-%d} ({_days(result.days_left)})"


def _days(number: int) -> str:
    if number < 0:
        return "expired"
    return "1 day left" if number == 1 else f"{number} days left"


def _names(result: Result) -> str:
    return f"for {listed(result.certificate.names)}" if result.version else ""


def _issuer(result: Result) -> str:
    issuer = result.certificate.issuer
    trust = "" if result.verified else ", not verified"
    return f"issued by {issuer}{trust}" if issuer else ""


def _connection(result: Result) -> str:
    return " ".join(filter(None, (result.version, result.cipher, result.alpn)))


def _injection(result: Result) -> str:
    if result.injection is None:
        return ""
    return "injection possible" if result.injection else "no injection"
