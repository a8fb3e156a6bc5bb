"""Usage texts of commands, and commands to type."""

import shlex
import sys


def asks_for_usage(arguments: list[str]) -> bool:
    """Return whether ``-h`` or ``--help`` is among the arguments."""
    return bool({"-h", "--help"} & set(arguments))


def print_usage_if_asked(usage: str, arguments: list[str] | None = None) -> None:
    """Print ``usage`` and exit with 0 if ``-h`` or ``--help`` is among the arguments (``sys.argv`` by default)."""
    if asks_for_usage(sys.argv[1:] if arguments is None else arguments):
        print(usage, end="")
        sys.exit(0)


def command_line(*words: object) -> str:
    """Return the command ``vargpt-rl`` with these arguments as a shell takes it: folders may have blanks."""
    return shlex.join(["vargpt-rl", *map(str, words)])
