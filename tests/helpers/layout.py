"""Read a source tree's imports and check that they follow the order of its rooms."""

import ast
import importlib.metadata
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ImportEdge:
    """One imported module (or name of a module) with its place, as ``path:line``."""

    importer: str
    imported: str
    place: str
    for_types: bool = False
    """Under ``if TYPE_CHECKING``: never executed."""

    def __str__(self) -> str:
        return f"{self.place}: {self.importer} imports {self.imported}"


def module_name(path: Path) -> str:
    """Dotted name of a relative path: ``a/b.py`` and ``a/b/__init__.py`` are both ``a.b``."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_tree(root: Path, packages: Sequence[str]) -> dict[Path, ast.Module]:
    """Parse every Python file of ``packages``; keys are relative to ``root``."""
    paths = sorted(path for package in packages for path in (root / package).rglob("*.py"))
    return {path.relative_to(root): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def read_imports(tree: dict[Path, ast.Module]) -> list[ImportEdge]:
    """List the tree's imports of itself, at module level and inside functions.

    ``from a import b`` counts as an import of ``a.b`` if that is a module, otherwise of ``a``.
    """
    modules = {module_name(path) for path in tree}
    return [
        ImportEdge(
            importer=module_name(path),
            imported=name if name in modules else name.rpartition(".")[0],
            place=f"{path}:{line}",
            for_types=line in lines_for_types,
        )
        for path, parsed in tree.items()
        for lines_for_types in [_lines_for_types(parsed)]
        for name, line in _imported_names(path, parsed)
        if name in modules or name.rpartition(".")[0] in modules
    ]


def _lines_for_types(parsed: ast.Module) -> set[int]:
    """Lines under ``if TYPE_CHECKING``."""
    blocks = [
        node
        for node in ast.walk(parsed)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    ]
    return {line for block in blocks for node in block.body for line in range(node.lineno, node.end_lineno + 1)}


def _imported_names(path: Path, parsed: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            folders = list(path.parts[: len(path.parts) - node.level]) if node.level else []
            source = ".".join([*folders, *([node.module] if node.module else [])])
            yield from ((f"{source}.{alias.name}", node.lineno) for alias in node.names)


def room_of(module: str, rooms: Sequence[str]) -> str | None:
    """Return the room that holds a module, or None."""
    return next((room for room in rooms if module == room or module.startswith(room + ".")), None)


def upward_imports(imports: Sequence[ImportEdge], rooms: Sequence[str]) -> list[ImportEdge]:
    """Imports that point from a room to one listed before it."""
    rank = {room: i for i, room in enumerate(rooms)}
    upward = []
    for found in imports:
        source = room_of(found.importer, rooms)
        target = room_of(found.imported, rooms)
        if source is not None and target is not None and rank[target] < rank[source]:
            upward.append(found)
    return upward


def forbidden_imports(
    imports: Sequence[ImportEdge], importers: Sequence[str], imported: Sequence[str]
) -> list[ImportEdge]:
    """Imports of any of ``imported`` (modules and what is below them) by any of ``importers``."""
    return [x for x in imports if room_of(x.importer, importers) and room_of(x.imported, imported)]


def import_circle(imports: Sequence[ImportEdge]) -> list[str]:
    """Modules that import each other in a circle, the first one repeated at the end; empty without one."""
    edges = defaultdict(set)
    for found in imports:
        if found.imported != found.importer and not found.for_types:
            edges[found.importer].add(found.imported)
    finished: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in finished:
            return []
        for target in sorted(edges.get(module, ())):
            if circle := visit(target, [*trail, module]):
                return circle
        finished.add(module)
        return []

    return next((circle for module in sorted(edges) if (circle := visit(module, []))), [])


def repeated_classes(tree: dict[Path, ast.Module]) -> dict[str, list[str]]:
    """Class names defined more than once, with their places."""
    places = defaultdict(list)
    for path, parsed in tree.items():
        for node in ast.walk(parsed):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{path}:{node.lineno}")
    return {name: found for name, found in places.items() if len(found) > 1}


def shadowing_modules(tree: dict[Path, ast.Module], own: Sequence[str]) -> list[Path]:
    """Files and folders named like a module of the standard library or of an installed package."""
    taken = (set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())) - {*own, "__main__"}
    return [path for path in tree if (path.parent.name if path.stem == "__init__" else path.stem) in taken]
