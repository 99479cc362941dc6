"""Run the command: parse its arguments, act, and turn the outcome into an exit status."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

import click

from . import output
from .arguments import Action, cli
from .demo import MissingExtraError

# Further exit statuses, besides those of ``check``.
_SUCCESS, _MISSING_EXTRA, _WRONG_USAGE = 0, 1, 3
_INTERRUPTED, _BROKEN_PIPE = 130, 141  # what a shell reports for SIGINT and SIGPIPE


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
    except SystemExit as exc:  # from click: after a shell completion, or a broken pipe
        if not exc.code:
            return _SUCCESS
        output.discard(sys.stdout)
        return _BROKEN_PIPE
    except BrokenPipeError:
        output.discard(sys.stdout)
        return _BROKEN_PIPE
    except OSError as exc:  # an error of stdin or stdout: the actions handle network errors
        output.discard(sys.stdout)
        output.say(f"trisock: input or output failed: {exc}")
        return _WRONG_USAGE


def _act(arguments: Sequence[str] | None) -> int:
    """Parse with click. Then act outside click, which would exit with 1 if a pipe breaks."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    action: Action | int | None = cli.main(given, prog_name="trisock", standalone_mode=False)
    if callable(action):
        return action()
    return _SUCCESS  # click has shown the help or the version


def _usage(error: click.ClickException) -> str:
    """Return what click would write to stderr. (Click itself fails if stderr is not writable.)"""
    text = io.StringIO()
    error.show(text)
    return text.getvalue().rstrip("\n")
