"""Write the page of a run: ``python -m vargpt_rl.page RUN [RUN] [out=FILE]``; two runs stand side by side.

Exit codes: 0 done, 2 a folder is no run directory.
"""

import sys
from pathlib import Path

from vargpt_rl.common.streams import make_outputs_lasting
from vargpt_rl.common.usage import print_usage_if_asked
from vargpt_rl.page.render import write_page

USAGE = """\
usage: python -m vargpt_rl.page RUN [RUN] [out=FILE]

Writes RUN/report.html, one self-contained file. Two runs stand side by side.
"""


def main(arguments: list[str] | None = None) -> int:
    """Write the page; return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    print_usage_if_asked(USAGE, arguments)
    out = next((Path(each.removeprefix("out=")) for each in arguments if each.startswith("out=")), None)
    folders = [Path(each) for each in arguments if not each.startswith("out=")]
    if len(folders) not in (1, 2):
        print("error: expected one run directory, or two", file=sys.stderr)
        return 2
    try:
        print(write_page(folders, out))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    make_outputs_lasting()
    sys.exit(main())
