"""Where a source tree breaks the rules of its layout, read from its files: one line for each fault."""

from __future__ import annotations

import ast
import dataclasses
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Module:
    """One file of a package; ``name`` is the dotted one, a package's own for its ``__init__``."""

    name: str
    path: Path
    text: str
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"


def read_package(folder: Path) -> dict[str, Module]:
    """All modules of the package in ``folder`` by their dotted names."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = [folder.name, *path.relative_to(folder).with_suffix("").parts]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        found[name] = Module(name, path, text, ast.parse(text))
    return found


def import_statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Those inside functions too; not those that only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in (
            getattr(child.test, "id", ""),
            getattr(child.test, "attr", ""),
        ):
            yield from import_statements(ast.Module(child.orelse, []))
        elif not isinstance(child, ast.expr):
            yield from import_statements(child)


def imported_names(module: Module) -> Iterator[tuple[str, ...]]:
    """Dotted names of what it imports, each with the shorter name that stands for it if the longer is no module."""
    for statement in import_statements(module.tree):
        if isinstance(statement, ast.Import):
            yield from ((alias.name,) for alias in statement.names)
            continue
        source = statement.module or ""
        if statement.level:
            parts = module.name.split(".")
            kept = len(parts) - statement.level + module.is_package
            source = ".".join(filter(None, [*parts[:kept], source]))
        yield from ((f"{source}.{alias.name}", source) for alias in statement.names)


def import_graph(modules: dict[str, Module]) -> dict[str, set[str]]:
    """Which modules of the package each one imports.

    A package's ``__init__`` counts where it is imported by name. What stands around everything, the outermost one, is
    left out.
    """
    graph = {}
    for module in modules.values():
        found = (next((name for name in names if name in modules), "") for names in imported_names(module))
        graph[module.name] = {name for name in found if "." in name and name != module.name}
    return {name: imported for name, imported in graph.items() if "." in name}


def room_of(name: str, modules: dict[str, Module]) -> str:
    """The folder a module stands in; one at the top is a room of its own."""
    folder = name.rpartition(".")[0]
    return name if modules[name].is_package or "." not in folder else folder


def room_graph(modules: dict[str, Module]) -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for name, imported in import_graph(modules).items():
        room = room_of(name, modules)
        graph.setdefault(room, set()).update({room_of(other, modules) for other in imported} - {room})
    return graph


def circles(graph: dict[str, set[str]]) -> list[str]:
    """One circle, if there are any."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        # The library's arrows go from what is imported to what imports it.
        return [" -> ".join(reversed(error.args[1]))]
    return []


def strays(modules: dict[str, Module], allowed: set[str]) -> list[str]:
    """Modules at the top that have no place there."""
    top = {name for name, module in modules.items() if name.count(".") == 1 and not module.is_package}
    return sorted(name for name in top if name.partition(".")[2] not in allowed)


def long_files(modules: dict[str, Module], most: int) -> list[str]:
    lengths = {name: len(module.text.splitlines()) for name, module in modules.items()}
    return [f"{name}: {length} lines" for name, length in lengths.items() if length > most]


def long_functions(modules: dict[str, Module], most: int) -> list[str]:
    """Lines are counted from ``def`` to the last statement."""
    found = []
    for module in modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > most:
                    found.append(f"{module.name}.{node.name}: {length} lines")
    return found


def without_docstring(modules: dict[str, Module]) -> list[str]:
    return [name for name, module in modules.items() if not ast.get_docstring(module.tree)]


def imports_among(modules: dict[str, Module], names: set[str]) -> list[str]:
    """Imports between modules that may not know one another."""
    graph = import_graph(modules)
    return [f"{name} imports {other}" for name in sorted(names) for other in sorted(graph[name] & names)]


def imported_test_files(tests: dict[str, Module]) -> list[str]:
    """Test files named in an import, or in a string, which may be a program with one."""
    files = {name for name in tests if name.rpartition(".")[2].startswith("test_")}
    found = []
    for module in tests.values():
        names = {name for names in imported_names(module) for name in names}
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "test_" in node.value:
                names.update(re.findall(r"\btests(?:\.\w+)*\.test_\w+", node.value))
        found += [f"{module.name} imports {name}" for name in sorted(names & files)]
    return found
