"""``python -m vargpt_rl`` is the command ``vargpt-rl``."""

import sys

from vargpt_rl.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
