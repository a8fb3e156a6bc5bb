"""Usage texts of commands."""

import sys


def print_usage_if_asked(usage: str, arguments: list[str] | None = None) -> None:
    """Print ``usage`` and exit with 0 if ``-h`` or ``--help`` is among the arguments (``sys.argv`` by default)."""
    if {"-h", "--help"} & set(sys.argv[1:] if arguments is None else arguments):
        print(usage, end="")
        sys.exit(0)
