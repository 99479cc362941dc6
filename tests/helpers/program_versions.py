"""The versions of the programs that the interop tests use, as Debian's packages."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

# Debian's wrappers, and the program that each one runs in the newest PostgreSQL.
_BEHIND = {"pg_ctlcluster": "postgres", "psql": "psql"}


def package_of(program: str) -> str:
    """Return a program's package and version, or a text that says why there is none."""
    path = _path(program)
    if path is None:
        return f"{program} (not installed)"
    # dpkg knows only the path in the package: no symbolic links, and perhaps no /usr.
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
