"""Load plug-ins that a config names by path: rewards, preference builders, data sources.

A path is "package.module:Name" or "file.py:name", the file relative to the working directory. A file that other users
can write or replace, on the whole way to it, is not run.
"""

import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import stat
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, cast

REWARD = ("images", "prompts")
"""Arguments of a reward."""
BUILDER = ("samples", "winners", "sample_rewards", "winner_rewards")
"""Arguments of a preference builder."""


TRUSTED = (Path(sys.prefix), Path(sys.base_prefix), Path(__file__).parents[2])
"""Where the interpreter, its libraries and this project's code lie: whoever can write there needs no plug-in."""


def load_plugin(path: str) -> Any:
    """Return the object that ``path`` names.

    Raises ValueError, naming the path, if it is malformed or the module, file or name does not exist. Errors in the
    plug-in's own code are passed on.
    """
    where, colon, name = path.rpartition(":")
    if not colon or not where or not name.isidentifier():
        raise ValueError(f"plugin {path!r}: expected 'package.module:Name' or 'file.py:name'")
    module = _load_file(path, where) if where.endswith(".py") else _import(path, where)
    if not hasattr(module, name):
        public = ", ".join(sorted(n for n in vars(module) if not n.startswith("_")))
        raise ValueError(f"plugin {path!r}: {where} has no {name!r}; it has {public or 'no names'}")
    return getattr(module, name)


def _import(path: str, where: str) -> ModuleType:
    if not all(part.isidentifier() for part in where.split(".")):
        raise ValueError(f"plugin {path!r}: {where!r} is neither a module's name nor a .py file")
    try:
        for name in accumulate(where.split("."), "{}.{}".format):  # finding a module imports the package around it
            _check_module(path, name)
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        # A module that the plugin itself fails to import is an error of the plugin, not of the path.
        if error.name is None or not f"{where}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"plugin {path!r}: there is no module {error.name!r}") from error


def _check_module(path: str, name: str) -> None:
    """ValueError if others can write what is run on import of a module: its source, compiled code, or its folders."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        return
    files = [Path(file) for file in (spec.origin, spec.cached) if file and spec.has_location]
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    for place in [*files, *(file.parent for file in files), *folders]:
        if os.path.lexists(place) and not any(place.is_relative_to(trusted) for trusted in TRUSTED):
            _check_own(path, place)


class _FromSource(importlib.machinery.SourceFileLoader):
    """Loads a module from its source alone."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _load_file(path: str, where: str) -> ModuleType:
    if not Path(where).is_file():
        raise ValueError(f"plugin {path!r}: there is no file {Path(where).resolve()}")
    _check_own(path, Path(where))
    file = Path(where).resolve()
    name = f"plugin_{file.stem}_{hashlib.blake2b(str(file).encode(), digest_size=4).hexdigest()}"
    # Not by way of __pycache__, whose files are run instead of the source and need not be of its author.
    spec = importlib.util.spec_from_loader(name, _FromSource(name, str(file)), origin=str(file))
    assert spec is not None and spec.loader is not None  # a loader was given
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look up their module while they are created. It is removed again afterwards: other processes cannot
    # import it, and cloudpickle pickles by value only what it finds in no module.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


def _check_own(path: str, file: Path) -> None:
    """Raise ValueError if another user of the machine can write or replace the file, or a folder or link to it."""
    for place in _way(file):
        if _is_others(place):
            raise ValueError(
                f"plugin {path!r}: {place} can be written by every user here, or belongs to another; expected it to be "
                f"yours, not writable by others (chmod o-w)"
            )


def _way(file: Path) -> list[Path]:
    """Return everything that decides what ``file`` is: itself, its folders, links among them and their targets."""
    found: dict[Path, None] = {}
    unseen = [Path(os.path.abspath(file))]
    while unseen:
        way = unseen.pop()
        for place in [way, *way.parents]:
            if place in found:
                continue
            found[place] = None
            if place.is_symlink():
                unseen.append(Path(os.path.abspath(place.parent / os.readlink(place))))
    return list(found)


def _is_others(place: Path) -> bool:
    """Tell whether a user other than this one and root can write a file, or put another into its place."""
    own = place.lstat()
    if own.st_uid not in (0, os.getuid()):
        return True
    if stat.S_ISLNK(own.st_mode) or not own.st_mode & stat.S_IWOTH:
        return False
    return not (stat.S_ISDIR(own.st_mode) and own.st_mode & stat.S_ISVTX)  # as /tmp: only owners replace their files


def make_plugin(path: str, options: dict[str, object], arguments: Sequence[str] = REWARD) -> Callable:
    """Load the callable that ``path`` names, with ``options``. Raises ValueError as `make_callable` does."""
    return make_callable(load_plugin(path), options, arguments)


def make_callable(obj: Callable, options: dict[str, object], arguments: Sequence[str] = REWARD) -> Callable:
    """Instantiate a class with ``options``, or bind them as a function's keyword-only arguments.

    Raises ValueError if the options do not fit, or the result cannot be called with ``arguments``.
    """
    check_callable(obj, options, arguments)
    if inspect.isclass(obj):
        return cast(Callable, obj(**options))
    return partial(obj, **options) if options else obj


def check_callable(obj: object, options: dict[str, object], arguments: Sequence[str] = REWARD) -> None:
    """Raise ValueError if `make_callable` would, without creating anything."""
    name = getattr(obj, "__qualname__", repr(obj))
    if inspect.isclass(obj):
        signature = inspect.signature(obj)
        try:
            signature.bind(**options)
        except TypeError as error:
            raise ValueError(f"{name}{signature}: {error}; the options given are {options}") from error
        call = next((vars(kind)["__call__"] for kind in obj.__mro__ if "__call__" in vars(kind)), None)
        if call is None:
            raise ValueError(
                f"{name} cannot be called: give the class a method __call__({', '.join(['self', *arguments])})"
            )
        _check_arguments(f"{name}.__call__", call, ["self", *arguments], {})
    elif not callable(obj):
        raise ValueError(f"{name} cannot be called")
    else:
        taken = [p for p in inspect.signature(obj).parameters.values() if p.kind is p.KEYWORD_ONLY]
        needed = {p.name for p in taken if p.default is p.empty}
        if not needed <= options.keys() <= {p.name for p in taken}:
            names = ", ".join(p.name for p in taken)
            raise ValueError(
                f"{name} takes {f'the options {names}' if names else 'no options'}, but was given {options}"
            )
        _check_arguments(name, obj, arguments, options)


def _check_arguments(name: str, call: Callable, arguments: Sequence[str], options: dict[str, object]) -> None:
    signature = inspect.signature(call)
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        raise ValueError(f"{name}{signature}: {error}; it is called with ({', '.join(arguments)})") from error
