"""The command line: ``trisock`` or ``python -m trisock``. It needs the extra ``cli``."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    try:
        from ._command.main import run
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] not in ("click", "rich"):
            raise
        print("the command needs click and rich: pip install 'trisock[cli]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
