"""Drawing dialogues from captions, for instruction tuning (VARGPT, section 4.1 and stage 3 of section 4.2):

    python -m vargpt_rl.data.instruct captions=FILE out=FILE.jsonl method=template|llm [key=value ...]

``method=template`` joins captions and templates (see `templates`); ``method=llm`` has a language model behind an
OpenAI-compatible endpoint write the dialogues (see `llm`; needs the extra ``instruct``).

The same command goes on where an interrupted one stopped: captions that ``out`` has are passed over, all others are
done, those rejected before as well. Rejects are written to ``<out>.rejects.jsonl``, with the reason. Exit codes: 0
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

from tqdm import tqdm

from vargpt_rl.common.command import CommandFailed, run_command
from vargpt_rl.data.instruct.captions import Fields, drawn_at_random, read_captions
from vargpt_rl.data.instruct.dialogue import Caption, Dialogue, Reject, Unusable
from vargpt_rl.data.instruct.output import KEPT, WITHOUT_PICTURE, WRITTEN, continued, fresh, record, write
from vargpt_rl.data.instruct.templates import template_pair


class Method(enum.Enum):
    template = "template"
    llm = "llm"


@dataclass
class InstructCommand:
    """``captions`` is a .jsonl, .csv or .parquet file with the columns ``*_field``; the image's may be missing.

    ``sample`` takes so many captions at random, by ``seed`` and their ids; ``limit`` the first ones only. The keys from
    ``endpoint`` on are for ``method=llm``: the address and the model, the name of the environment variable that has the
    key (none is needed where the server wants none), how many requests run at once, how long one may take, and how
    often one is repeated.
    """

    captions: Path
    out: Path
    method: Method
    seed: int = 0
    sample: int | None = None
    limit: int | None = None
    id_field: str = "id"
    caption_field: str = "caption"
    image_field: str = "file"
    max_bad_fraction: float = 0.5
    endpoint: str = ""
    model: str = ""
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 4
    timeout_s: float = 60.0
    retries: int = 5

    def __post_init__(self):
        for key in ("sample", "limit"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: expected 1 or more")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction={self.max_bad_fraction}: expected 0 to 1")
        if self.out.exists() and self.captions.exists() and self.out.samefile(self.captions):
            raise ValueError(f"out={self.out}: expected another file than captions")
        if self.method is Method.template:
            return
        if not self.endpoint.startswith(("http://", "https://")):
            raise ValueError(f"endpoint={self.endpoint}: expected http://host:port/v1 or the like with method=llm")
        if not self.model:
            raise ValueError("model=: expected the name of a model of the endpoint with method=llm")
        for key, least in (("concurrency", 1), ("retries", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"{key}={getattr(self, key)}: expected {least} or more")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s={self.timeout_s}: expected more than 0")


def by_llm(command: InstructCommand) -> tuple[Callable[[Caption], Dialogue], Callable]:
    """A function that asks the model for one caption's dialogue, and a ``map`` that runs it for several at once."""
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
    """The record of a caption, or why there is none."""
    if isinstance(caption, Reject):
        return caption
    try:
        return record(caption, ask(caption), method)
    except Unusable as fault:
        return Reject(caption.id, caption.source, fault.reason, fault.detail)


def instruct(command: InstructCommand) -> Counter[str]:
    """Write the dialogues and rejects; how many records came to what."""
    fields = Fields(command.id_field, command.caption_field, command.image_field)
    read = partial(read_captions, command.captions, fields)
    captions = read() if command.sample is None else drawn_at_random(read, command.sample, command.seed)
    captions = islice(captions, command.limit)
    if command.method is Method.llm:
        ask, spread = by_llm(command)
    else:
        ask, spread = partial(template_pair, seed=command.seed), map
    counts: Counter[str] = Counter()
    with continued(command.out) as (file, ids), rejects_of(command.out).open("wb") as rejects:
        work = partial(attempt, ask=ask, method=command.method.value)
        results = spread(work, fresh(captions, ids, counts))
        write(tqdm(results, unit=" captions", disable=None), file, rejects, counts)
    if not counts:
        raise ValueError(f"captions={command.captions}: no record in it")
    return counts


def rejects_of(out: Path) -> Path:
    return Path(f"{out}.rejects.jsonl")


def execute(command: InstructCommand) -> None:
    """Write the dialogues and print the counts. Raises CommandFailed if too many records were rejected."""
    counts = instruct(command)
    for what in (WRITTEN, WITHOUT_PICTURE, KEPT, *sorted(reason for reason in counts if reason.startswith("rejected"))):
        print(f"{counts[what]:8d}  {what}")
    bad = sum(count for what, count in counts.items() if what.startswith("rejected"))
    total = counts[WRITTEN] + counts[KEPT] + bad
    print(f"{bad} of {total} records rejected" + (f", see {rejects_of(command.out)}" if bad else ""))
    if bad > command.max_bad_fraction * total:
        raise CommandFailed(f"more than max_bad_fraction={command.max_bad_fraction} of the records rejected")


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit code."""
    return run_command(InstructCommand, execute, arguments)


if __name__ == "__main__":
    sys.exit(main())
