"""The allowed imports between rooms, and docstrings of everything public."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter

import pytest
from project_paths import ROOT
from room_arrows import ARROWS

PACKAGES = ("formats", "converter", "loader")
OUTSIDE_FOR_FORMATS = {"numpy", "safetensors", "torch", "msgspec", "zstandard", "xxhash"}
# Converter and loader both read repositories: tokens, retries and errors stand in one room.
HUB_ROOM = "formats.hub"

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
every_module = pytest.mark.parametrize("module", MODULES)


@cache
def imports(module: str) -> frozenset[str]:
    """Return every module that `module` imports, at any depth: ours by full name, others by their
    package.
    """
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            parent = str(node.module)
            found |= {
                f"{parent}.{a.name}" if f"{parent}.{a.name}" in MODULES else parent
                for a in node.names
            }
    return frozenset(name if name in MODULES else name.partition(".")[0] for name in found)


def package(module: str) -> str:
    return module.partition(".")[0]


def room(module: str) -> str:
    """Return the room of a module: its folder."""
    is_room = MODULES[module].name == "__init__.py"
    return module if is_room else module.rpartition(".")[0]


@cache
def arrows() -> dict[str, set[str]]:
    """Return room -> other rooms that it imports."""
    found: dict[str, set[str]] = {room(module): set() for module in MODULES}
    for module in MODULES:
        others = {room(other) for other in imports(module) if other in MODULES}
        found[room(module)] |= others - {room(module)}
    return found


def test_walk_finds_the_modules() -> None:
    assert {"formats", "formats.packing", "formats.index"} <= set(MODULES)
    assert imports("formats.expert") >= {"formats.packing", "torch", "dataclasses"}


def test_the_table_has_every_room() -> None:
    assert ARROWS.keys() == arrows().keys()


@pytest.mark.parametrize("source", sorted(arrows()))
def test_rooms_import_along_the_tables_arrows_alone(source: str) -> None:
    unknown = {
        f"{module} imports {other}"
        for module in MODULES
        if room(module) == source
        for other in imports(module)
        if other in MODULES and room(other) not in {source, *ARROWS[source].split()}
    }
    assert unknown == set(), "add the arrow to tests/support/room_arrows.py only if it must be"


@pytest.mark.parametrize("source", sorted(arrows()))
def test_the_table_has_no_arrow_too_many(source: str) -> None:
    assert set(ARROWS[source].split()) - arrows()[source] == set()


def test_formats_knows_neither_and_only_commands_use_both() -> None:
    for source, text in ARROWS.items():
        for target in text.split():
            crosses = package(target) != package(source)
            from_commands = source.startswith("converter.cli") and package(target) == "loader"
            assert not crosses or package(target) == "formats" or from_commands, (source, target)


def test_rooms_import_in_no_circle() -> None:
    """A package's own modules are its entry: rooms below may use them, and they use the rooms."""
    inner = {source: set(text.split()) for source, text in ARROWS.items() if "." in source}
    try:
        TopologicalSorter({s: targets & inner.keys() for s, targets in inner.items()}).prepare()
    except CycleError as e:
        pytest.fail(f"rooms import in a circle: {' → '.join(e.args[1])}")


@pytest.mark.parametrize("module", [m for m in MODULES if package(m) == "formats"])
def test_formats_imports_little(module: str) -> None:
    outside = {package(other) for other in imports(module)} - set(sys.stdlib_module_names)
    allowed = OUTSIDE_FOR_FORMATS | {"formats"}
    if room(module) == HUB_ROOM:
        allowed |= {"huggingface_hub"}
    assert outside <= allowed


def test_no_imports_go_in_a_circle() -> None:
    graph = {
        module: {other for other in imports(module) if other in MODULES} - {module}
        for module in MODULES
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        pytest.fail(f"imports go in a circle: {' → '.join(e.args[1])}")


@cache
def described_methods() -> set[str]:
    """Names of methods that have a docstring in some class."""
    nodes = [node for path in MODULES.values() for node in ast.walk(ast.parse(path.read_text()))]
    methods = [
        m
        for c in nodes
        if isinstance(c, ast.ClassDef)
        for m in c.body
        if isinstance(m, ast.FunctionDef)
    ]
    return {method.name for method in methods if ast.get_docstring(method)}


def undocumented(module: str) -> Iterator[str]:
    """Return public classes, functions and methods without a docstring.

    Exempt are properties whose name says everything, and methods that a base class or an interface
    may describe.
    """
    tree = ast.parse(MODULES[module].read_text())
    if not ast.get_docstring(tree):
        yield module
    described = described_methods()
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield f"{module}.{node.name}"
        if isinstance(node, ast.ClassDef) and not node.bases:
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    is_property = any(
                        isinstance(d, ast.Name) and d.id == "property"
                        for d in method.decorator_list
                    )
                    if not is_property and method.name not in described:
                        yield f"{module}.{node.name}.{method.name}"


@every_module
def test_everything_public_has_a_docstring(module: str) -> None:
    assert list(undocumented(module)) == []


@every_module
def test_no_exported_function_is_named_like_its_module(module: str) -> None:
    own = module.rpartition(".")[2]
    names = [
        n.name
        for n in ast.parse(MODULES[module].read_text()).body
        if isinstance(n, ast.FunctionDef)
    ]
    assert own not in names or own == "main"
