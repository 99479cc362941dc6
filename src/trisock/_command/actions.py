"""What each command does. Each function returns the exit status."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

from . import interrupts, output
from .check import BAD, GOOD, Options, Result
from .check_all import Finished, check_all
from .connect import ConversationFailedError, Ends, converse
from .demo import demo as run_demo
from .progress import Progress
from .report import show_on_terminal, to_json, to_line
from .roles import Roles
from .urls import Target


def check(targets: Sequence[Target], options: Options, *, parallel: int, as_json: bool) -> int:
    """Check URLs, and show the results. The worst status of a URL is the exit status.

    After Ctrl-C, this shows the results so far, and raises ``KeyboardInterrupt``.
    """
    console = None if as_json else output.terminal(sys.stdout)
    in_lines = not as_json and console is None

    def show(result: Result) -> None:
        if in_lines:
            output.show(to_line(result))

    finished = Finished(show)
    progress = Progress(output.terminal(sys.stderr), len(targets))
    interrupted = False
    try:
        interrupts.run(
            functools.partial(
                check_all, targets, options, finished, parallel=parallel, progress=progress
            )
        )
    except KeyboardInterrupt:
        interrupted = True
        finished.show_rest()
    results = finished.results()
    if as_json:
        output.show(to_json(results))
    elif console is not None and results:
        show_on_terminal(console, results)
    if interrupted:
        output.say(f"interrupted: {len(results)} of {len(targets)} checked")
        raise KeyboardInterrupt
    return max(result.status for result in results)


def connect(target: Target, roles: Roles, *, proxy_protocol: bool, keep_lf: bool) -> int:
    """Talk to a server until it ends the connection."""
    ends = Ends(output.descriptor(sys.stdin), output.descriptor(sys.stdout), output.notify)
    try:
        interrupts.run(
            functools.partial(
                converse, target, roles, ends, proxy_protocol=proxy_protocol, keep_lf=keep_lf
            )
        )
    except ConversationFailedError as exc:
        output.say(f"trisock: {exc}")
        return BAD
    return GOOD


def demo() -> int:
    """Show the demo."""
    interrupts.run(functools.partial(run_demo, output.plain_console()))
    return GOOD
