"""Load plug-ins that a config names by path: rewards, preference builders, data sources.

A path is "package.module:Name" or "file.py:name", the file relative to the working directory. A file that other users
can write is not run.
"""

import hashlib
import importlib
import importlib.util
import inspect
import os
import stat
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, cast

REWARD = ("images", "prompts")
"""Arguments of a reward."""
BUILDER = ("samples", "winners", "sample_rewards", "winner_rewards")
"""Arguments of a preference builder."""


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
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        # A module that the plugin itself fails to import is an error of the plugin, not of the path.
        if error.name is None or not f"{where}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"plugin {path!r}: there is no module {error.name!r}") from error


def _load_file(path: str, where: str) -> ModuleType:
    file = Path(where).resolve()
    if not file.is_file():
        raise ValueError(f"plugin {path!r}: there is no file {file}")
    _check_own(path, file)
    name = f"plugin_{file.stem}_{hashlib.blake2b(str(file).encode(), digest_size=4).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"plugin {path!r}: {file} is no Python file")
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
    """Raise ValueError if any user of the machine can write or replace the file."""
    own = file.stat()
    folder = file.parent.stat()
    shared = bool(folder.st_mode & stat.S_IWOTH)  # like /tmp, where only owners can replace their files
    trusted = folder.st_mode & stat.S_ISVTX and own.st_uid in (0, os.getuid())
    if own.st_mode & stat.S_IWOTH or (shared and not trusted):
        raise ValueError(f"plugin {path!r}: {file} can be written by every user here; expected it not to (chmod o-w)")


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
