"""Drawing dialogues from captions, for instruction tuning (VARGPT, section 4.1 and stage 3 of section 4.2):

    python -m vargpt_rl.data.instruct captions=FILE out=FILE.jsonl method=template|llm [key=value ...]

``method=template`` joins captions and templates (see `templates`); ``method=llm`` has a language model behind an
OpenAI-compatible endpoint write the dialogues (see `llm`; needs the extra ``instruct``).

The same command resumes an interrupted one: captions in ``out`` are skipped, all others are done, those rejected before
as well. Rejects are written to ``<out>.rejects.jsonl``, with the reason. Exit codes: 0
done, 1 more than ``max_bad_fraction`` of the records were rejected, 2 a setting or an input is wrong.
"""

import enum
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from vargpt_rl.common.bars import progress_bar
from vargpt_rl.common.command import CommandFailed, run_command
from vargpt_rl.common.settings import Count, CountOrNone, Seconds, Share
from vargpt_rl.data.instruct.captions import Fields, drawn_at_random, read_captions
from vargpt_rl.data.instruct.dialogue import Caption, Dialogue, Reject, Unusable
from vargpt_rl.data.instruct.output import KEPT, WITHOUT_PICTURE, WRITTEN, continued, fresh, record, write
from vargpt_rl.data.instruct.templates import template_pair
from vargpt_rl.data.quarantine import Quarantine


class Method(enum.Enum):
    """Writer of the dialogues: templates, or a language model behind a chat server."""

    template = "template"
    llm = "llm"


@dataclass
class InstructCommand:
    """Settings of the command. Those from ``endpoint`` on are for ``method=llm``."""

    captions: Path
    """A .jsonl, .csv or .parquet file with the columns ``*_field``."""
    out: Path
    method: Method
    seed: CountOrNone = 0
    sample: Count | None = None
    """Number of captions sampled at random, by ``seed`` and their ids."""
    limit: Count | None = None
    """Take only the first captions."""
    id_field: str = "id"
    caption_field: str = "caption"
    image_field: str = "file"
    """Column of the image's file; it may be missing."""
    max_bad_fraction: Share = 0.5
    """Fraction of the captions that may be rejected."""
    endpoint: str = ""
    """Address of an OpenAI-compatible server, such as http://host:port/v1."""
    model: str = ""
    """Name of a model of the endpoint."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the key, if the server needs one."""
    concurrency: Count = 4
    """Requests that run at once."""
    timeout_s: Seconds = 60.0
    """Seconds that a request may take."""
    retries: CountOrNone = 5
    """Repetitions of a failed request."""

    def __post_init__(self):
        if self.out.exists() and self.captions.exists() and self.out.samefile(self.captions):
            raise ValueError(f"out={self.out}: expected another file than captions")
        if self.method is Method.template:
            return
        if not self.endpoint.startswith(("http://", "https://")):
            raise ValueError(f"endpoint={self.endpoint}: expected http://host:port/v1 or the like with method=llm")
        if not self.model:
            raise ValueError("model=: expected the name of a model of the endpoint with method=llm")


def by_llm(command: InstructCommand) -> tuple[Callable[[Caption], Dialogue], Callable]:
    """Return a function that asks the model for a caption's dialogue, and a ``map`` that runs it concurrently."""
    try:
        from vargpt_rl.data.instruct import llm  # needs the extra, which the template way does not
    except ModuleNotFoundError as error:
        raise ValueError(f"method=llm needs {error.name}: pip install 'vargpt-rl[instruct]'") from error
    key = os.environ.get(command.api_key_env, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"api_key_env={command.api_key_env}: expected a variable with a key, which is plain ASCII")
    endpoint = llm.Endpoint(
        url=command.endpoint,
        model=command.model,
        key=key,
        key_name=command.api_key_env,
        timeout_s=command.timeout_s,
        retries=command.retries,
    )
    return llm.asker(endpoint, command.seed), partial(llm.in_order, workers=command.concurrency)


def attempt(caption: Caption | Reject, ask: Callable[[Caption], Dialogue], method: str) -> dict | Reject:
    """Return the record of a caption, or why there is none."""
    if isinstance(caption, Reject):
        return caption
    try:
        return record(caption, ask(caption), method)
    except Unusable as fault:
        return Reject(caption.id, caption.source, fault.reason, fault.detail)


def instruct(command: InstructCommand) -> tuple[Counter[str], Quarantine]:
    """Write the dialogues; return their counts and the rejects."""
    fields = Fields(command.id_field, command.caption_field, command.image_field)
    read = partial(read_captions, command.captions, fields)
    captions = read() if command.sample is None else drawn_at_random(read, command.sample, command.seed)
    captions = islice(captions, command.limit)
    if command.method is Method.llm:
        ask, spread = by_llm(command)
    else:
        ask, spread = partial(template_pair, seed=command.seed), map
    counts: Counter[str] = Counter()
    with continued(command.out) as (file, ids):
        path = Path(f"{command.out}.rejects.jsonl")
        path.unlink(missing_ok=True)  # rejects of an earlier run, which are tried again
        rejects = Quarantine(path)
        work = partial(attempt, ask=ask, method=command.method.value)
        results = spread(work, fresh(captions, ids, counts))
        write(progress_bar(results, name="captions", unit=" captions"), file, rejects, counts)
    if not (counts or rejects.counts):
        raise ValueError(f"captions={command.captions}: no record in it")
    return counts, rejects


def execute(command: InstructCommand) -> None:
    """Write the dialogues and print the counts. Raises CommandFailed if too many captions were rejected."""
    counts, rejects = instruct(command)
    for what in (WRITTEN, WITHOUT_PICTURE, KEPT):
        print(f"{counts[what]:8d}  {what}")
    for reason, count in sorted(rejects.counts.items()):
        print(f"{count:8d}  rejected: {reason}")
    total = counts[WRITTEN] + counts[KEPT] + rejects.lost
    print(f"{rejects.lost} of {total} records rejected" + (f", see {rejects.path}" if rejects.lost else ""))
    if rejects.lost > command.max_bad_fraction * total:
        raise CommandFailed(f"more than max_bad_fraction={command.max_bad_fraction} of the records rejected")


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit code."""
    return run_command(InstructCommand, execute, arguments)


if __name__ == "__main__":
    sys.exit(main())
