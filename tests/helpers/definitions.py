"""Find the definition of a name in trisock's source, including code for type checkers only."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from .floors import MODULES, name_of

Function: TypeAlias = "ast.FunctionDef | ast.AsyncFunctionDef"

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

PATHS = {name_of(path): path for path in MODULES}


@dataclass(frozen=True)
class Found:
    """A name's definition. An overloaded function has several.

    Attributes:
      module: the module that defines it, without ``trisock.``.
    """

    module: str
    name: str
    statements: tuple[ast.stmt, ...]

    @property
    def class_(self) -> ast.ClassDef | None:
        return next((each for each in self.statements if isinstance(each, ast.ClassDef)), None)

    @property
    def functions(self) -> list[Function]:
        return [each for each in self.statements if isinstance(each, FUNCTIONS)]

    @property
    def is_type(self) -> bool:
        """Whether this is a class or a variable (for example a type alias), not a function."""
        return not self.functions


def find(module: str, name: str) -> Found | None:
    """Find what a name means in a module. Return ``None`` if trisock does not define it."""
    own = tuple(each for each in statements(module) if name in names_defined(each))
    if own:
        return Found(module, name, own)
    for statement in statements(module):
        if isinstance(statement, ast.ImportFrom) and statement.module is not None:
            for alias in statement.names:
                if name == (alias.asname or alias.name):
                    source = imported_from(module, statement)
                    return None if source is None else find(source, alias.name)
    return None


@functools.cache
def statements(module: str) -> tuple[ast.stmt, ...]:
    return tuple(unconditional(ast.parse(PATHS[module].read_text(encoding="utf-8")).body))


def unconditional(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements, including those inside an ``if``, such as ``if TYPE_CHECKING``."""
    for statement in body:
        if isinstance(statement, ast.If):
            yield from unconditional([*statement.body, *statement.orelse])
        else:
            yield statement


def names_defined(statement: ast.stmt) -> list[str]:
    if isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, ast.Assign):
        return [each.id for each in statement.targets if isinstance(each, ast.Name)]
    if isinstance(statement, ast.AnnAssign):
        return [ast.unparse(statement.target)]
    return []


def imported_from(module: str, statement: ast.ImportFrom) -> str | None:
    """Return the module that a statement imports from, or ``None`` for other packages."""
    if not statement.level:
        return None
    parts = module.split(".") if module else []
    if PATHS[module].name != "__init__.py":
        parts.pop()
    package = parts[: len(parts) - (statement.level - 1)]
    return ".".join([*package, statement.module or ""])
