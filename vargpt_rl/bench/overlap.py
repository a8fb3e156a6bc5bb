"""Measure overlapping DPO with the making of its pairs: ``python -m vargpt_rl.bench.overlap [steps=...]``.

The loop's own steps on the embedded model, with one worker and one learner rank of one thread each, so that each has
its own core, as it would have its own GPU. For each case, pairs and DPO run one after the other, then overlapped, on
the same samples. The time with overlap is compared with the longer of the two parts, its lower bound. The two cases:
the final policy samples everything, or an earlier checkpoint samples half of it before DPO can start.
"""

import sys
import tempfile
import time
from dataclasses import dataclass, replace

import ray
from omegaconf import OmegaConf
from rich.box import SIMPLE_HEAD
from rich.table import Table

from vargpt_rl.bench.tiny_loop import start
from vargpt_rl.common.command import run_command
from vargpt_rl.common.console import print_table
from vargpt_rl.common.settings import Count
from vargpt_rl.data.preferences import read_table
from vargpt_rl.driver.judging import judge
from vargpt_rl.driver.pairs import pair, sample_while_training
from vargpt_rl.driver.sampling import sample
from vargpt_rl.driver.session import Session
from vargpt_rl.driver.training import train_dpo
from vargpt_rl.storage.checkpoint import Policy

CASES = {
    "the final policy draws all": "sft.checkpoints=[]",
    "an earlier checkpoint draws half": "sft.checkpoints=[0.5]",
}


@dataclass
class OverlapSettings:
    """Settings of the benchmark."""

    prompts: Count = 96
    """Prompts, sampled once each."""
    min_pairs: Count = 16
    """Pairs per round of sampling."""
    steps: Count = 18
    """Steps of DPO, on 16 pairs each."""
    resolution: Count = 128


def iterate(session: Session, policy: Policy, name: str, changes: list[str]) -> tuple[float, float, dict]:
    """Make pairs and train DPO with changed settings; return seconds of the first, of both, and DPO's result."""
    settings = OmegaConf.merge(OmegaConf.structured(session.config), OmegaConf.from_dotlist(changes))
    config = OmegaConf.to_object(settings)
    context = replace(session.iteration(0), name=name, config=config)
    began = time.perf_counter()
    if config.dpo.min_pairs:
        _, _, result = sample_while_training(context, policy)
        return 0.0, time.perf_counter() - began, result
    sample(context, policy)
    pair(context, policy, judge(context))
    made = time.perf_counter() - began
    result = train_dpo(context, policy)
    return made, time.perf_counter() - began, result


def bench(settings: OverlapSettings) -> None:
    """Print a row a case."""
    table = Table(title="an iteration's pairs and DPO, seconds", title_justify="left", box=SIMPLE_HEAD)
    for column in ("", "pairs", "DPO", "one after the other", "with overlap", "of the larger", "of the sum", "waited"):
        table.add_column(column, justify="right" if column else "left")
    with tempfile.TemporaryDirectory() as folder:
        sizes = f"preference.count={settings.prompts}", f"dpo.recipe.steps={settings.steps}"
        session, policy = start(folder, settings.resolution, *sizes)
        iterate(session, policy, "warm-up", ["preference.count=16", "dpo.recipe.steps=2"])
        for number, (case, checkpoints) in enumerate(CASES.items()):
            names = f"case-{number}-apart", f"case-{number}-beside"
            made, both, _ = iterate(session, policy, names[0], [checkpoints])
            _, beside, result = iterate(session, policy, names[1], [checkpoints, f"dpo.min_pairs={settings.min_pairs}"])
            ids = [set(read_table(session.run.directory / f"preferences/{name}.parquet").pair_id) for name in names]
            if ids[0] != ids[1]:
                raise RuntimeError(f"{case}: the pairs are not the same with overlap and without")
            parts = made, both - made
            ratios = f"{beside / max(parts):.2f}", f"{beside / both:.2f}"
            table.add_row(case, *(f"{s:.1f}" for s in (*parts, both, beside)), *ratios, f"{result['waited']:.1f}")
        ray.shutdown()
    print_table(table)


if __name__ == "__main__":
    sys.exit(run_command(OverlapSettings, bench))
