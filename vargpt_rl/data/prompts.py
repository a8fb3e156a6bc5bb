"""A file of prompts for the iterations, made of Midjourney's:

    python -m vargpt_rl.data.prompts files=[FILE,...] out=FILE.jsonl

Reads midjourney-prompts Parquet files row by row and writes a line ``{"id", "prompt", "commands"}`` for each prompt,
commands such as ``--ar 16:9`` split off, as `preference.prompts` and ``vargpt_rl.generate`` read them. An id follows
from the whole prompt, so that the stronger system's images can be named after it. Rows that cannot be used are in
``<out>.quarantine``. Exit codes: 0 done, 2 an argument or input is wrong, or more than ``max_bad_fraction`` is bad.
"""

import json
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from vargpt_rl.common.command import run_command
from vargpt_rl.common.settings import Count, Share
from vargpt_rl.data.records.formats import FORMATS
from vargpt_rl.data.records.layouts import midjourney
from vargpt_rl.data.records.reader import ReadOptions, Records, file_parts
from vargpt_rl.data.records.sources import RecordSource
from vargpt_rl.storage.files import atomic_file


@dataclass
class PromptsCommand:
    """Settings of the command."""

    files: list[str]
    """Parquet files, paths or globs."""
    out: Path
    limit: Count | None = None
    """Maximum number of different prompts."""
    max_bad_fraction: Share = 0.01
    """Fraction of the rows that may be unusable."""


def execute(command: PromptsCommand) -> None:
    """Write each prompt once. ``out`` appears when it is complete."""
    reading = ReadOptions(seed=None, max_bad_fraction=command.max_bad_fraction)
    quarantine = command.out.with_name(f"{command.out.name}.quarantine")
    paths = RecordSource(command.files, "parquet").paths()
    written: set[str] = set()
    with atomic_file(command.out) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        found = Records(file_parts(paths, FORMATS["parquet"]), [midjourney], quarantine, reading)
        for request in chain.from_iterable(found):
            if len(written) == command.limit:
                break
            if request.prompt.id not in written:
                written.add(request.prompt.id)
                line = {"id": request.prompt.id, "prompt": request.prompt.text, "commands": request.commands}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(f"{len(written)} prompts in {command.out}")


def main(arguments: list[str] | None = None) -> int:
    """Run the program; the exit code."""
    return run_command(PromptsCommand, execute, arguments)


if __name__ == "__main__":
    sys.exit(main())
