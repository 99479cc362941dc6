"""Modules import only from their own or lower floors (``docs/design.md``). Files stay small."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import trisock
from helpers.floors import FACES, MODULES, PUBLIC, floor_of, imports_of, name_of

# The faces are trisock.pluto, trisock.hammerspoon, trisock.testing and the command line. They use
# public names and six private modules: _guard protects calls to the user's code, _text escapes
# untrusted text, _not_copyable refuses copies, and _connect, _address and _net.frame_header contain
# functions that have no public name.
OPEN_TO_FACES = {
    "_guard",
    "_text",
    "_not_copyable",
    "_connect",
    "_address",
    "_net.frame_header",
}

TESTS = sorted(Path(__file__).parents[1].rglob("*.py"))

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

# The maximum number of lines of a module, a class and a test file, for readability.
MODULE_LINES, CLASS_LINES, TEST_LINES = 500, 450, 600


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    """The modules, parsed."""
    return {name_of(path): ast.parse(path.read_text()) for path in MODULES}


def test_modules_import_only_from_their_floor_or_lower_floors() -> None:
    for path in MODULES:
        name = name_of(path)
        for imported in imports_of(path):
            assert floor_of(imported) <= floor_of(name), f"{name} must not import {imported}"


def test_faces_use_public_names(trees: dict[str, ast.Module]) -> None:
    for path in MODULES:
        name = name_of(path)
        face = name.split(".")[0]
        if face not in FACES:
            continue
        for imported in imports_of(path):
            assert imported in {*PUBLIC, *OPEN_TO_FACES} or imported.split(".")[0] == face, name
        for node in ast.walk(trees[name]):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "trisock":
                assert node.attr in trisock.__all__, name


def test_there_are_no_circular_imports() -> None:
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


def test_no_module_uses_another_modules_private_names(trees: dict[str, ast.Module]) -> None:
    for name, tree in trees.items():
        attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        own = {node.name for node in ast.walk(tree) if isinstance(node, FUNCTIONS)}
        own |= {node.attr for node in attributes if ast.unparse(node.value) in ("self", "cls")}
        private = {node.attr for node in attributes if re.match("_[a-z]", node.attr)}
        assert private <= own, name


def test_modules_and_classes_stay_small(trees: dict[str, ast.Module]) -> None:
    for path in MODULES:
        assert path.read_text().count("\n") <= MODULE_LINES, path
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < CLASS_LINES, f"{name}.{node.name}"


def test_test_files_stay_small() -> None:
    for path in TESTS:
        assert path.read_text().count("\n") <= TEST_LINES, path


def test_the_docs_name_every_test_file_of_a_module() -> None:
    tests = Path(__file__).parents[1]
    docs = (tests.parent / "docs/design.md").read_text()
    folders = ("net", "tls", "starttls", "server", "testing", "udp")
    files = [file for folder in folders for file in (tests / folder).glob("test_*.py")]
    assert [file.stem for file in files if f"`{file.stem}`" not in docs] == []


def test_a_normal_run_excludes_only_the_campaigns(
    pytestconfig: pytest.Config,
) -> None:
    tests = Path(__file__).parents[1]
    folders = {f"tests/{path.parent.name}" for path in tests.glob("*/test_*.py")}
    assert set(pytestconfig.getini("testpaths")) == folders - {"tests/campaigns"}
