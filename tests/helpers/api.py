"""The public API as text, one line for each name: ``tests/project/api.txt``.

After an intended change, regenerate the file::

    cd tests; python -m helpers.api

The text comes from the source. So the text is the same on every Python, and has overloads and
annotations as written.
"""

from __future__ import annotations

import ast
import copy
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

from .definitions import FUNCTIONS, Found, Function, find

SNAPSHOT = Path(__file__).parents[1] / "project/api.txt"
COMMAND = "cd tests; python -m helpers.api"

PUBLIC_MODULES = [
    "trisock",
    "trisock.starttls",
    "trisock.testing",
    "trisock.pluto",
    "trisock.hammerspoon",
    "trisock.gunicorn",
]

# Programs get these objects from trisock and never construct them. So the constructors of these
# classes are not public.
NOT_CONSTRUCTED = {
    "trisock.Frames",
    "trisock.LineBatches",
    "trisock.Lines",
    "trisock.Server",
    "trisock.Service",
    "trisock.hammerspoon.Socket",
    "trisock.hammerspoon.Sockets",
    "trisock.hammerspoon.UDPSocket",
    "trisock.hammerspoon.UDPSockets",
    "trisock.pluto.async_socket",
    "trisock.pluto.listener",
    "trisock.pluto.server",
    "trisock.pluto.socket",
    "trisock.testing.FaultyRelay",
}

# The members of these classes are not public: only gunicorn or the Socket calls them.
NO_MEMBERS = {"trisock.gunicorn.TrioWorker", "(IdleBlock)"}

# The special methods that a program calls by a statement or an operator.
SPECIAL = {
    *("__aenter__", "__aexit__", "__aiter__", "__anext__", "__await__", "__bool__", "__call__"),
    *("__enter__", "__exit__", "__iter__", "__len__"),
}


def snapshot() -> str:
    """Return the whole API as text."""
    return "".join(f"{line}\n" for line in [*public_lines(), *private_lines()])


def public_names() -> dict[str, Found | None]:
    """Return each public name, with its module, and its definition (``None`` for a module)."""
    result = {}
    for path in PUBLIC_MODULES:
        module = path.removeprefix("trisock").lstrip(".")
        names = find(module, "__all__")
        assert names is not None
        (statement,) = names.statements
        assert isinstance(statement, ast.Assign)
        for name in sorted(ast.literal_eval(statement.value)):
            result[f"{path}.{name}"] = find(module, name)
    return result


def public_lines() -> Iterator[str]:
    for path, found in public_names().items():
        if found is None:
            yield f"{path}: module"
        else:
            yield from (line for _, line in describe(found, path))


def private_lines() -> list[str]:
    """Return the lines of the private types that public signatures name, such as a Literal."""
    public = {(each.module, each.name) for each in public_names().values() if each is not None}
    known: dict[tuple[str, str], list[str]] = {}
    left = [(found, path) for path, found in public_names().items() if found is not None]
    while left:
        for module, line in describe(*left.pop()):
            for name in re.findall(r"\w+", line.partition(":")[2]):
                named = find(module, name)
                if named is None or not named.is_type or (named.module, name) in {*public, *known}:
                    continue
                left.append((named, f"({name})"))
                known[named.module, name] = [text for _, text in describe(*left[-1])]
    return sorted((line for lines in known.values() for line in lines), key=first_word)


def first_word(line: str) -> str:
    return re.split(r"[.: ]", line)[0]


# ---- one name ----


def describe(found: Found, path: str) -> Iterator[tuple[str, str]]:
    """Yield the lines of a name, each with the module that its annotations belong to."""
    if found.class_ is not None:
        yield from describe_class(found, path)
    elif found.functions:
        yield from (
            (found.module, f"{path}: {text}") for text in signatures(found.functions, found)
        )
    else:
        text = ast.unparse(found.statements[0]).removeprefix(found.name)
        if "MappingProxyType" in text:
            module = importlib.import_module(f"trisock.{found.module}")
            text = text.partition(" = ")[0] + f" = {dict(getattr(module, found.name))}"
        yield found.module, path + text


def describe_class(found: Found, path: str) -> Iterator[tuple[str, str]]:
    """Yield the lines of a class, including the members that it inherits from private classes."""
    assert found.class_ is not None
    outside: list[str] = []
    fields: dict[str, list[tuple[str, str]]] = {}
    methods: dict[str, list[tuple[str, str]]] = {}
    for each in with_private_bases(found, outside):
        for name, lines in fields_of(each).items():
            fields.setdefault(name, lines)
        for name, lines in methods_of(each).items():
            methods.setdefault(name, lines)
    inherited = f"({', '.join(outside)})" if outside else ""
    decorators = "".join(f"@{ast.unparse(each)} " for each in found.class_.decorator_list)
    yield found.module, f"{path}: {decorators}class{inherited}"
    for name, lines in [*fields.items(), *sorted(methods.items())]:
        if is_public(name, path):
            yield from ((module, f"{path}.{name}{text}") for module, text in lines)


def is_public(name: str, path: str) -> bool:
    if path in NO_MEMBERS:
        return False
    if name == "__init__":
        return path not in NOT_CONSTRUCTED and not path.startswith("(")
    return name in SPECIAL or not name.startswith("_")


def with_private_bases(found: Found, outside: list[str]) -> Iterator[Found]:
    """Yield a class and its private bases. Add the names of its other bases to ``outside``."""
    public = {(each.module, each.name) for each in public_names().values() if each is not None}
    assert found.class_ is not None
    yield found
    for base in found.class_.bases:
        text = ast.unparse(base)
        inner = find(found.module, text.partition("[")[0])
        if inner is None or (inner.module, inner.name) in public:
            if text not in outside:
                outside.append(text)
        else:
            yield from with_private_bases(inner, outside)


# ---- members ----


def fields_of(found: Found) -> dict[str, list[tuple[str, str]]]:
    """Return the annotated attributes of a class, in their order."""
    assert found.class_ is not None
    result = {}
    for each in found.class_.body:
        if isinstance(each, ast.AnnAssign):
            default = "" if each.value is None else f" = {ast.unparse(each.value)}"
            text = f": {ast.unparse(each.annotation)}{default}"
            result[ast.unparse(each.target)] = [(found.module, text)]
    return result


def methods_of(found: Found) -> dict[str, list[tuple[str, str]]]:
    """Return the methods of a class, and the attributes that they assign."""
    assert found.class_ is not None
    methods: dict[str, list[Function]] = {}
    result: dict[str, list[tuple[str, str]]] = {}
    for each in found.class_.body:
        if isinstance(each, FUNCTIONS):
            methods.setdefault(each.name, []).append(each)
    for name, functions in methods.items():
        texts = signatures(functions, found, method=True)
        result[name] = [(found.module, f": {text}") for text in texts]
    for functions in methods.values():
        for name, text in assigned(functions[-1]):
            result.setdefault(name, [(found.module, text)])
    for name in fields_of(found):
        result.pop(name, None)
    return result


def assigned(method: Function) -> Iterator[tuple[str, str]]:
    """Yield the attributes of ``self`` that a method assigns, with the annotation if it has one."""
    arguments = [*method.args.args, *method.args.kwonlyargs]
    parameters = {each.arg: each.annotation for each in arguments}
    for node in ast.walk(method):
        if isinstance(node, ast.Assign):
            targets, annotation = node.targets, parameters.get(ast.unparse(node.value))
        elif isinstance(node, ast.AnnAssign):
            targets, annotation = [node.target], node.annotation
        else:
            continue
        for target in targets:
            owner, _, name = ast.unparse(target).partition(".")
            if owner == "self" and name.isidentifier():
                yield name, "" if annotation is None else f": {ast.unparse(annotation)}"


# ---- signatures ----


def signatures(functions: list[Function], found: Found, *, method: bool = False) -> list[str]:
    """Return the text of each overload, or of the function."""
    overloads = [each for each in functions if "overload" in decorators_of(each)]
    return [signature(each, found, method=method) for each in overloads or functions]


def signature(function: Function, found: Found, *, method: bool) -> str:
    """Return ``async def(arguments) -> result``, with each field of an unpacked ``TypedDict``."""
    arguments = copy.deepcopy(function.args)
    decorators = decorators_of(function)
    if method and "staticmethod" not in decorators:
        del (arguments.posonlyargs or arguments.args)[0]  # self or cls
    options = arguments.kwarg and arguments.kwarg.annotation
    if isinstance(options, ast.Subscript) and ast.unparse(options.value) == "Unpack":
        unpacked = find(found.module, ast.unparse(options.slice))
        assert unpacked is not None
        arguments.kwarg = None
        for name, ((_, annotation),) in fields_of(unpacked).items():
            typed = ast.parse(annotation.removeprefix(": "), mode="eval").body
            arguments.kwonlyargs.append(ast.arg(name, typed))
            arguments.kw_defaults.append(ast.Constant(...))
    words = [f"@{each}" for each in decorators]
    words += ["async"] if isinstance(function, ast.AsyncFunctionDef) else []
    result = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return " ".join([*words, f"def({ast.unparse(arguments)}){result}"])


def decorators_of(function: Function) -> list[str]:
    return [ast.unparse(each).partition("(")[0] for each in function.decorator_list]


if __name__ == "__main__":
    SNAPSHOT.write_text(snapshot(), encoding="utf-8")
    print(f"written: {SNAPSHOT}")
