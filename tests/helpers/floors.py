"""The floors (layers) of the package: which module may import which (see ``docs/design.md``).

To draw the actual imports::

    cd tests; python -m helpers.floors ../docs/imports.svg
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import trisock

SOURCE = Path(trisock.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))

# The floors, from the bottom up. A module may import only from its own and from lower floors.
FLOORS = [
    {"_text", "_not_copyable", "_fork"},
    {"_guard", "_arguments"},
    {"_address", "_errors"},
    {"_tls"},
    {"starttls"},  # below the Socket: only calls public methods of the Socket it gets
    {"_net"},
    {"_udp"},
    {"_server"},
    {"_connect"},
    {""},  # The public names.
    {"pluto", "hammerspoon", "testing", "gunicorn", "_command"},  # These use the public names.
    {"__main__"},  # Runs the command.
]

# The faces may import only PUBLIC: the public names, and a public module.
FACES = FLOORS[-2]
PUBLIC = {"", "starttls"}


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def floor_of(module: str) -> int:
    top = module.split(".")[0]
    return next(number for number, floor in enumerate(FLOORS) if top in floor)


def imports_of(path: Path) -> set[str]:
    """Return the names of the trisock modules that a module imports (``""`` is the package).

    Imports that only a type checker sees do not count.
    """
    name = name_of(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    modules = {name_of(each) for each in MODULES}
    found = set()
    tree = ast.parse(path.read_text())
    for node in list(ast.walk(tree)):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names if each.name.split(".")[0] == "trisock"]
            found |= {each.removeprefix("trisock").removeprefix(".") for each in names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            parts = package.split(".") if package else []
            parts = parts[: len(parts) - (node.level - 1)]
            base = ".".join([*parts, *([node.module] if node.module else [])])
            for each in node.names:
                below = f"{base}.{each.name}" if base else each.name
                # In pluto and hammerspoon, ``each`` may be a class with the same name as a module.
                found.add(below if below in modules and node.module is None else base)
    return found - {name}


def rows() -> list[list[str]]:
    """Return the modules in rows, from the bottom up. A module imports only from lower rows."""
    graph = {name_of(path): imports_of(path) for path in MODULES}
    left = sorted(graph, key=floor_of)
    found: list[list[str]] = []
    while left:
        floor = floor_of(left[0])
        row = [
            name for name in left if floor_of(name) == floor and not graph[name].intersection(left)
        ]
        found.append(row)
        left = [name for name in left if name not in row]
    return found


def draw(target: str) -> None:
    """Draw each module in its row, with an arrow per import."""
    from matplotlib import pyplot  # installed with the benchmarks

    places: dict[str, tuple[float, float]] = {}
    for y, row in enumerate(rows()):
        for index, name in enumerate(row):
            places[name] = ((index + 0.5 + 0.2 * (y % 2)) / (len(row) + 0.2), y)
    figure, axes = pyplot.subplots(figsize=(14, 14))
    axes.set(xlim=(0, 1), ylim=(-0.5, len(rows()) - 0.5))
    axes.axis("off")
    for path in MODULES:
        for imported in imports_of(path):
            arrow = {"arrowstyle": "->", "color": "0.75", "linewidth": 0.5}
            axes.annotate("", places[imported], places[name_of(path)], arrowprops=arrow)
    colors = pyplot.colormaps["Pastel1"]
    for name, place in places.items():
        box = {"boxstyle": "round", "facecolor": colors(floor_of(name)), "edgecolor": "0.4"}
        text = (name or "trisock").replace(".", "\n")
        axes.text(*place, text, ha="center", va="center", fontsize=7, bbox=box)
    pyplot.rcParams["svg.hashsalt"] = "floors"  # the file changes only if an import changes
    figure.savefig(target, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    draw(sys.argv[1])
