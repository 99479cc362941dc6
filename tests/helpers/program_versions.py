"""The versions of the programs that the interop tests use, as Debian's packages."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

# Debian's programs that run those of the newest PostgreSQL.
_BEHIND = {"pg_ctlcluster": "postgres", "psql": "psql"}


def package_of(program: str) -> str:
    """Return the package and the version of a program, or say that it belongs to no package."""
    path = _path(program)
    if path is None:
        return f"{program} (not installed)"
    # dpkg knows a path as the package wrote it: without links, and perhaps without /usr.
    names = dict.fromkeys([str(path), str(path.resolve()), str(path).removeprefix("/usr")])
    for name in names:
        package = _dpkg_query("--search", name).partition(": ")[0]
        if package:
            return _dpkg_query("--show", "--showformat=${Package} ${Version}", package)
    return f"{program} (no package)"


def _path(program: str) -> Path | None:
    if real := _BEHIND.get(program):
        found = Path("/usr/lib/postgresql").glob(f"*/bin/{real}")
        return max(found, key=lambda path: int(path.parts[-3]), default=None)
    which = shutil.which(program)
    return None if which is None else Path(which)


def _dpkg_query(*arguments: str) -> str:
    if shutil.which("dpkg-query") is None:
        return ""
    done = subprocess.run(["dpkg-query", *arguments], check=False, capture_output=True, text=True)
    return done.stdout.strip()
