"""Print the run directory of the loop's settings: ``python -m slurm.where [key=value ...]``."""

import sys

from configs.load import load_config
from vargpt_rl.common.streams import make_outputs_lasting


def main() -> int:
    """Print the directory; return the exit code, 2 for a bad setting."""
    try:
        print(load_config(sys.argv[1:]).directory.resolve())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    make_outputs_lasting()
    sys.exit(main())
