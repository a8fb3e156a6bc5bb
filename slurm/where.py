"""The run directory that the loop's settings name: ``python -m slurm.where [key=value ...]``."""

import sys

from configs.load import load_config


def main() -> int:
    """Print it; the exit code: 2 if a setting is wrong."""
    try:
        print(load_config(sys.argv[1:]).directory.resolve())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
