"""Settings of ``python -m vargpt_rl.evaluate``, and which of them each benchmark uses."""

import enum
from dataclasses import dataclass, field
from pathlib import Path

from vargpt_rl.common.settings import Count, CountOrNone, Share
from vargpt_rl.inference.images import DrawingSettings
from vargpt_rl.model.hub import TINY


class Benchmark(enum.Enum):
    """Benchmarks by name; ``BENCHMARKS`` in `vargpt_rl.evaluate.__main__` says which class measures each."""

    shapes = "shapes"
    geneval = "geneval"
    geneval2 = "geneval2"
    dpg = "dpg"
    clip = "clip"
    hps = "hps"
    fid = "fid"
    questions = "questions"
    lmms = "lmms"


TAKES = {
    Benchmark.shapes: ((), ()),
    Benchmark.geneval: (("prompts",), ("rewrites",)),
    Benchmark.geneval2: (("prompts",), ()),
    Benchmark.dpg: (("prompts",), ()),
    Benchmark.clip: (("prompts",), ("weights",)),
    Benchmark.hps: (("prompts", "weights"), ("base",)),
    Benchmark.fid: (("prompts", "weights", "reference"), ()),
    Benchmark.questions: (("questions", "images"), ("max_tokens",)),
    Benchmark.lmms: ((), ("tasks", "include", "python")),
}
"""Keys that each benchmark requires and keys that it accepts, besides the keys for all benchmarks."""
SPECIFIC = tuple(dict.fromkeys(key for required, optional in TAKES.values() for key in (*required, *optional)))


@dataclass(kw_only=True)
class EvaluateConfig(DrawingSettings):
    """Settings of an evaluation. The keys from ``prompts`` on belong to single benchmarks (`TAKES`)."""

    benchmark: Benchmark
    checkpoints: list[str] = field(default_factory=list)
    """Checkpoints to measure side by side; instead of ``checkpoint``."""
    out: str = "runs/evaluate"
    """Folder of the results; each benchmark has a subfolder."""
    limit: Count | None = None
    """Use only the first prompts or questions; null uses all."""
    batch_size: Count = 8
    """Images or answers generated at once."""
    num_shards: Count = 1
    """Number of processes that share the work. With more than 1, this process generates its part and scores nothing."""
    shard: CountOrNone = 0
    """This process's part, from 0."""
    max_bad_fraction: Share = 0.01
    """Largest share of bad input lines or missing results."""
    prompts: str | None = None
    """geneval: ``evaluation_metadata.jsonl``. geneval2: ``geneval2_data.jsonl``. dpg: the folder with ``prompts/*.txt``
    and ``dpg_bench.csv``. clip, hps and fid: a .txt or .jsonl of prompts."""
    rewrites: str | None = None
    """geneval: JSON object that maps prompts to the text used instead."""
    weights: str | None = None
    """clip: directory or hub name of a CLIP model. hps: the published checkpoint. fid: the Inception network in
    TorchScript."""
    base: str | None = None
    """hps: the CLIP model that HPSv2 was trained from."""
    reference: str | None = None
    """fid: a folder of images, or an .npz with "mu" and "sigma"."""
    questions: str | None = None
    """questions: the JSON lines file."""
    images: str | None = None
    """questions: the folder with their images."""
    max_tokens: Count = 16
    """questions: longest answer."""
    tasks: list[str] = field(default_factory=list)
    """lmms: names of lmms-eval's tasks; empty runs those of the papers."""
    include: str | None = None
    """lmms: a folder of further tasks."""
    python: str | None = None
    """lmms: interpreter of the environment with lmms-eval; null is this one."""

    def __post_init__(self):
        if self.shard >= self.num_shards:
            raise ValueError(f"shard={self.shard}: expected less than num_shards={self.num_shards}")
        if self.checkpoints and self.checkpoint != TINY:
            raise ValueError("expected either checkpoint=... or checkpoints=[...], got both")
        self.checkpoints = self.checkpoints or [self.checkpoint]
        if len(set(self.checkpoints)) < len(self.checkpoints):
            raise ValueError(f"checkpoints={self.checkpoints}: expected different checkpoints")
        self._check_keys()
        super().__post_init__()

    @property
    def drawing_checkpoint(self) -> str:
        """The first checkpoint: all of them draw alike."""
        return self.checkpoints[0] if self.checkpoints else self.checkpoint

    def _check_keys(self) -> None:
        name = self.benchmark.value
        required, optional = TAKES[self.benchmark]
        given = [key for key in SPECIFIC if getattr(self, key) not in (None, [], getattr(EvaluateConfig, key, None))]
        for key in required:
            if key not in given:
                raise ValueError(f"{key} is not given: benchmark={name} needs {key}=...")
        for key in given:
            if key not in (*required, *optional):
                raise ValueError(f"{key}={getattr(self, key)}: benchmark={name} does not use it")

    @property
    def folder(self) -> Path:
        """Folder of this benchmark."""
        return Path(self.out, self.benchmark.value)

    @property
    def part(self) -> slice:
        """Slice of the requests that this process handles."""
        return slice(self.shard, None, self.num_shards)

    def own(self, name: str) -> str:
        """Name a JSON lines file that only this process writes."""
        return f"{name}.jsonl" if self.num_shards == 1 else f"{name}-{self.shard}-of-{self.num_shards}.jsonl"
