"""Run the command: parse, act, and turn every end into an exit status."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

import click

from . import output
from .arguments import cli
from .demo import MissingExtraError

# The exit statuses besides those of ``check``.
_MISSING_EXTRA, _WRONG_USAGE = 1, 3
_INTERRUPTED, _BROKEN_PIPE = 130, 141  # as a shell shows SIGINT and SIGPIPE


def run(arguments: Sequence[str] | None) -> int:
    """Run the command line and return the exit status. ``None`` means ``sys.argv``."""
    output.escape_unencodable()
    try:
        status = _act(arguments)
        output.flush()
        return status
    except click.ClickException as exc:
        exc.show()
        return _WRONG_USAGE
    except MissingExtraError as exc:
        output.say(str(exc))
        return _MISSING_EXTRA
    except (KeyboardInterrupt, click.Abort):
        return _INTERRUPTED
    except (BrokenPipeError, SystemExit):  # click exits if the reader of its help has gone
        output.discard()
        return _BROKEN_PIPE
    except OSError as exc:  # of stdin or stdout: those of the network are handled below
        output.discard()
        output.say(f"trisock: input or output failed: {exc}")
        return _WRONG_USAGE


def _act(arguments: Sequence[str] | None) -> int:
    """Parse with click, then act. click itself would turn a broken pipe into the status 1."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    action = cli.main(given, prog_name="trisock", standalone_mode=False)
    if isinstance(action, functools.partial):
        status: int = action()
        return status
    return 0  # help, or the version
