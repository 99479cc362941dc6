"""The floors of the house: who may import whom. ``docs/design.md`` has the picture."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import trisock

SOURCE = Path(trisock.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))

# From the bottom up. A module imports from its own floor and from those below.
FLOORS = [
    {"_text", "_uncopied", "_fork"},
    {"_guard", "_arguments"},
    {"_address", "_errors"},
    {"_tls"},
    {"_net"},
    {"_server"},
    {"_connect"},
    {""},  # the public names
    {"pluto", "hammerspoon", "__main__"},  # the faces
]

# Faces use public names only, and these: the guard around calls of the program's code, text from
# outside, and what the public names have no plain call for.
OPEN_TO_FACES = {"_guard", "_text", "_connect", "_address"}


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def floor_of(module: str) -> int:
    top = module.split(".")[0]
    return next(number for number, floor in enumerate(FLOORS) if top in floor)


def imports_of(path: Path) -> set[str]:
    """Return the modules of trisock that a module imports; ``""`` is the public one."""
    name = name_of(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    modules = {name_of(each) for each in MODULES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names if each.name.split(".")[0] == "trisock"]
            found |= {each.removeprefix("trisock").removeprefix(".") for each in names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            parts = package.split(".") if package else []
            parts = parts[: len(parts) - (node.level - 1)]
            base = ".".join([*parts, *([node.module] if node.module else [])])
            for each in node.names:
                below = f"{base}.{each.name}" if base else each.name
                # In pluto and hammerspoon a name may be a module's and a class's.
                found.add(below if below in modules and node.module is None else base)
    return found - {name}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    name = name_of(path)
    for imported in imports_of(path):
        assert floor_of(imported) <= floor_of(name), f"{name} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_faces_use_public_names(path: Path) -> None:
    face = name_of(path).split(".")[0]
    if face not in FLOORS[-1]:
        return
    for imported in imports_of(path):
        assert imported in {"", *OPEN_TO_FACES} or imported.split(".")[0] == face
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "trisock":
            assert node.attr in trisock.__all__


def test_no_imports_go_in_a_circle() -> None:
    graph = {name_of(path): imports_of(path) for path in MODULES}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way, name])
        if name not in done:
            for each in graph[name]:
                visit(each, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())
