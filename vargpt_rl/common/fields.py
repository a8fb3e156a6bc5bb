"""Fields of settings classes, read from their source: names, defaults and docstrings without importing anything.

Help and completion need them at once, while importing ``configs.schema`` takes seconds.
"""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).parents[2]
"""Folder of the packages."""


@cache
def config_groups() -> dict[str, list[str]]:
    """Return the groups of YAML files of a run's settings, each with its choices."""
    groups: dict[str, list[str]] = {}
    for path in sorted((ROOT / "configs").glob("*/*.yaml")):
        groups.setdefault(path.parent.name, []).append(path.stem)
    return groups


@dataclass(frozen=True)
class ClassPath:
    """A class by module and name."""

    module: str
    name: str


@dataclass(frozen=True)
class FieldSource:
    """A field as it is written. ``default`` is None if it must be given; ``group`` is the settings class that it is."""

    name: str
    default: str | None
    doc: str
    group: ClassPath | None


def class_path(text: str) -> ClassPath:
    """Read ``module:Name``."""
    module, _, name = text.partition(":")
    return ClassPath(module, name)


@cache
def _module(name: str) -> ast.Module:
    path = ROOT.joinpath(*name.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def _find(module: str, name: str) -> tuple[str, ast.ClassDef] | None:
    """Return the class that ``name`` is in ``module``, and the module that defines it; None if it is no class here."""
    for node in _module(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inside = ROOT / node.module.split(".")[0]
                if (alias.asname or alias.name) == name and inside.is_dir():
                    return _find(node.module, alias.name)
    return None


def class_doc(path: ClassPath) -> str:
    """Return the docstring of a class, with code between single backticks."""
    found = _find(path.module, path.name)
    return (ast.get_docstring(found[1]) or "").replace("``", "`") if found else ""


@cache
def class_fields(path: ClassPath) -> dict[str, FieldSource]:
    """Return the fields of a dataclass and of those it inherits from, by name."""
    found = _find(path.module, path.name)
    if found is None:
        raise LookupError(f"{path.module} has no class {path.name}")
    module, node = found
    fields: dict[str, FieldSource] = {}
    for base in node.bases:
        if isinstance(base, ast.Name) and _find(module, base.id):
            fields |= class_fields(ClassPath(module, base.id))
    for statement, after in zip_longest(node.body, node.body[1:]):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if ast.unparse(statement.annotation).startswith("ClassVar"):
                continue
            name = statement.target.id
            fields[name] = FieldSource(name, _default(statement.value), _doc(after), _group(module, statement))
    return fields


def _default(value: ast.expr | None) -> str | None:
    """Return a default as a user would type it; "" if only the program knows it."""
    if value is None:
        return None
    if isinstance(value, ast.Call):
        return _made_default(value)
    if not isinstance(value, ast.Constant):
        return ""
    if value.value is None:
        return "null"
    return str(value.value).lower() if isinstance(value.value, bool) else str(value.value)


def _made_default(call: ast.Call) -> str:
    """Return the default of ``field(default_factory=...)`` if it is a list or a dictionary; else ""."""
    made = next((keyword.value for keyword in call.keywords if keyword.arg == "default_factory"), None)
    if isinstance(made, ast.Name):
        return {"list": "[]", "dict": "{}"}.get(made.id, "")
    items = made.body.elts if isinstance(made, ast.Lambda) and isinstance(made.body, ast.List) else []
    words = [str(item.value) for item in items if isinstance(item, ast.Constant)]
    return f"[{','.join(words)}]" if words and len(words) == len(items) else ""


def _doc(statement: ast.stmt | None) -> str:
    """Return the text of a statement that is a string, with code between single backticks."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return inspect.cleandoc(str(statement.value.value)).replace("``", "`")
    return ""


def _group(module: str, statement: ast.AnnAssign) -> ClassPath | None:
    kind = statement.annotation
    found = _find(module, kind.id) if isinstance(kind, ast.Name) else None
    if found and any("dataclass" in ast.unparse(decorator) for decorator in found[1].decorator_list):
        return ClassPath(found[0], found[1].name)
    return None


def dotted_fields(path: ClassPath, prefix: str = "") -> Iterator[tuple[str, FieldSource]]:
    """Yield the dotted key of each field and of the fields of its groups; a group before its fields."""
    for name, field in class_fields(path).items():
        yield f"{prefix}{name}", field
        if field.group is not None:
            yield from dotted_fields(field.group, f"{prefix}{name}.")


def key_shown(field: FieldSource) -> str:
    """Return ``key=default``, or ``group.*``."""
    if field.group is not None:
        return f"{field.name}.*"
    return f"{field.name}={'...' if field.default in (None, '') else field.default}"


def first_sentence(text: str) -> str:
    """Return the first sentence of a docstring on one line."""
    line = " ".join(text.partition("\n\n")[0].split())
    head, stop, _ = line.partition(". ")
    return head + stop.strip()


def meaning(field: FieldSource) -> str:
    """Return the first sentence about a key, or about the group that it is."""
    return first_sentence(field.doc or (class_doc(field.group) if field.group else ""))
