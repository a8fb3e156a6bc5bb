"""Command lines of the form ``key=value``: a dataclass declares the keys, their types and defaults.

Values are taken literally (a folder called ``2024_01`` is not a number). Settings inside a named group are dotted,
``sources.NAME.format=jsonl``; a list is ``[a,b]`` or its only item. Every error is one line that names the key.
Values that look like secrets are rejected. ``-h`` and ``--help`` print what the program does and its keys.

`run_program` turns errors into exit codes: 0 done, 1 failed, 2 bad argument or input. The loop has its own, since an
error in training must keep its traceback; it adds 75 (EX_TEMPFAIL), stopped by a signal and to be started again.
"""

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vargpt_rl.common.errors import first_line
from vargpt_rl.common.fields import ClassPath, class_fields, key_shown, meaning
from vargpt_rl.common.logs import configure_logging
from vargpt_rl.common.secret_check import check_secrets
from vargpt_rl.common.settings import bare, build, field_types, kind_at, split_list
from vargpt_rl.common.streams import make_outputs_lasting
from vargpt_rl.common.usage import asks_for_usage

Command = TypeVar("Command")


class CommandFailed(RuntimeError):
    """The arguments were right, but the program could not do its work: exit code 1."""


def _value(kind: Any, text: str) -> str | list[str]:
    text = text.replace("${", r"\${")  # literal: not a reference to another key
    return split_list(text) if get_origin(bare(kind)) is list else text


def load_command(kind: type[Command], arguments: list[str]) -> Command:
    """Build the dataclass from arguments. Raises ValueError for any wrong, repeated or missing key."""
    settings = OmegaConf.structured(kind)
    given: set[str] = set()
    for argument in arguments:
        key, equals, value = argument.partition("=")
        check_secrets(value, key)  # before an error message could repeat one
        names = key.split(".")
        try:
            if not equals:
                raise ValueError(f"expected key=value, where the key is one of {', '.join(field_types(kind))}")
            nested: Any = _value(kind_at(kind, names), value)
            for name in reversed(names):
                nested = {name: nested}
            settings = OmegaConf.merge(settings, nested)
        except (OmegaConfBaseException, ValueError) as error:
            raise ValueError(f"{argument}: {first_line(error)}") from error
        if key in given:
            raise ValueError(f"{argument}: {key} is given twice")
        given.add(key)
    missing = sorted(OmegaConf.missing_keys(settings))
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ValueError(f"{', '.join(missing)} {verb} not given: expected {' '.join(f'{key}=...' for key in missing)}")
    return build(kind, settings)


def report_error(error: Exception | str) -> None:
    """Print an error as one line on stderr."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)


def usage(program: ModuleType, kind: type | None = None) -> str:
    """Return what a program does, by its docstring, and its keys, the fields of ``kind``."""
    spec = program.__spec__  # of a program that is run, ``__name__`` is "__main__"
    name = spec.name if spec else program.__name__
    lines = [
        f"usage: python -m {name.removesuffix('.__main__')} [key=value ...]",
        "",
        inspect.cleandoc(program.__doc__ or ""),
    ]
    if kind is not None:
        found = class_fields(ClassPath(name if kind.__module__ == "__main__" else kind.__module__, kind.__name__))
        lines += ["", "keys:", *(f"  {key_shown(field):<28} {meaning(field)}".rstrip() for field in found.values())]
    return "\n".join(lines) + "\n"


def _own_arguments() -> list[str]:
    """Return the arguments of this process, whose outputs from now on neither end nor fail."""
    make_outputs_lasting()
    return sys.argv[1:]


def _run(execute: Callable[[list[str]], int | None], arguments: list[str]) -> int:
    configure_logging()
    try:
        return execute(arguments) or 0
    except (OSError, ValueError) as error:
        report_error(error)
        return 2
    except CommandFailed as error:
        report_error(error)
        return 1


def run_program(execute: Callable[[list[str]], int | None], arguments: list[str] | None = None) -> int:
    """Run a program with ``sys.argv`` or the given arguments; return its exit code (see above).

    ``-h`` or ``--help`` prints the docstring of the module of ``execute`` instead.
    """
    arguments = _own_arguments() if arguments is None else arguments
    if asks_for_usage(arguments):
        print(usage(sys.modules[execute.__module__]), end="")
        return 0
    return _run(execute, arguments)


def run_command(
    kind: type[Command], execute: Callable[[Command], int | None], arguments: list[str] | None = None
) -> int:
    """Run a program whose arguments are the fields of a dataclass; return its exit code (see above)."""
    arguments = _own_arguments() if arguments is None else arguments
    if asks_for_usage(arguments):
        print(usage(sys.modules[execute.__module__], kind), end="")
        return 0
    return _run(lambda given: execute(load_command(kind, given)), arguments)
