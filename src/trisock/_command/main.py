"""Run the command: parse, act, and turn every end into an exit status."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

import click

from . import output
from .arguments import Action, cli
from .demo import MissingExtraError

# The exit statuses besides those of ``check``.
_SUCCESS, _MISSING_EXTRA, _WRONG_USAGE = 0, 1, 3
_INTERRUPTED, _BROKEN_PIPE = 130, 141  # as a shell shows SIGINT and SIGPIPE


def run(arguments: Sequence[str] | None) -> int:
    """Run the command line and return the exit status. ``None`` means ``sys.argv``."""
    output.escape_unencodable()
    try:
        status = _act(arguments)
        output.flush()
        return status
    except click.ClickException as exc:
        output.say(_usage(exc))
        return _WRONG_USAGE
    except MissingExtraError as exc:
        output.say(str(exc))
        return _MISSING_EXTRA
    except (KeyboardInterrupt, click.Abort):
        return _INTERRUPTED
    except SystemExit as exc:  # click's shell completion, or the reader of click's help has gone
        if not exc.code:
            return _SUCCESS
        output.discard(sys.stdout)
        return _BROKEN_PIPE
    except BrokenPipeError:
        output.discard(sys.stdout)
        return _BROKEN_PIPE
    except OSError as exc:  # of stdin or stdout: those of the network are handled below
        output.discard(sys.stdout)
        output.say(f"trisock: input or output failed: {exc}")
        return _WRONG_USAGE


def _act(arguments: Sequence[str] | None) -> int:
    """Parse with click, then act outside it: click exits with 1 if a pipe breaks."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    action: Action | int | None = cli.main(given, prog_name="trisock", standalone_mode=False)
    if callable(action):
        return action()
    return _SUCCESS  # click has shown the help or the version


def _usage(error: click.ClickException) -> str:
    """Return what click would write to stderr. It fails if it cannot write there."""
    text = io.StringIO()
    error.show(text)
    return text.getvalue().rstrip("\n")
