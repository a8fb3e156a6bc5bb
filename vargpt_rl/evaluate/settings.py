"""The keys of ``python -m vargpt_rl.evaluate``, and which of them each benchmark takes."""

import enum
from dataclasses import dataclass, field
from pathlib import Path

from vargpt_rl.inference.images import DrawingSettings
from vargpt_rl.model.hub import TINY


class Benchmark(enum.Enum):
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
"""The keys that a benchmark needs, and those that it takes beside them and the ones for all."""
SPECIFIC = tuple(dict.fromkeys(key for needed, taken in TAKES.values() for key in (*needed, *taken)))


@dataclass(kw_only=True)
class EvaluateConfig(DrawingSettings):
    """``checkpoint``, or several ``checkpoints`` side by side; everything goes to ``out``/benchmark.

    ``limit`` takes the first prompts or questions only. ``num_shards`` and ``shard`` (from 0) have a process draw or
    answer its part and score nothing: the command without them scores. The keys from ``prompts`` on are for some
    benchmarks only (`TAKES`):

    ``prompts``: geneval ``evaluation_metadata.jsonl``; geneval2 ``geneval2_data.jsonl``; dpg the folder with
    ``prompts/*.txt`` and ``dpg_bench.csv``; clip, hps and fid a .txt or .jsonl of prompts. ``rewrites``: JSON, what is
    drawn in place of a prompt. ``weights``: clip a CLIP model's directory or hub name, hps the published checkpoint,
    fid the Inception network in TorchScript. ``base``: the CLIP model that HPSv2 was trained from. ``reference``: a
    folder of images or an .npz with "mu" and "sigma". ``questions``: JSON lines, their images in ``images``,
    answered in ``max_tokens`` at most. ``tasks``, ``include`` and ``python``: names of lmms-eval's tasks, a
    folder of further ones, the interpreter that has lmms-eval.
    """

    benchmark: Benchmark
    checkpoints: list[str] = field(default_factory=list)
    out: str = "runs/evaluate"
    limit: int | None = None
    batch_size: int = 8
    num_shards: int = 1
    shard: int = 0
    max_bad_fraction: float = 0.01
    prompts: str | None = None
    rewrites: str | None = None
    weights: str | None = None
    base: str | None = None
    reference: str | None = None
    questions: str | None = None
    images: str | None = None
    max_tokens: int = 16
    tasks: list[str] = field(default_factory=list)
    include: str | None = None
    python: str | None = None

    def __post_init__(self):
        super().__post_init__()
        for key, least in (("limit", 1), ("batch_size", 1), ("num_shards", 1), ("shard", 0), ("max_tokens", 1)):
            if getattr(self, key) is not None and getattr(self, key) < least:
                raise ValueError(f"{key}={getattr(self, key)}: expected {least} or more")
        if self.shard >= self.num_shards:
            raise ValueError(f"shard={self.shard}: expected less than num_shards={self.num_shards}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction={self.max_bad_fraction}: expected 0 to 1")
        if self.checkpoints and self.checkpoint != TINY:
            raise ValueError("expected either checkpoint=... or checkpoints=[...]")
        self.checkpoints = self.checkpoints or [self.checkpoint]
        if len(set(self.checkpoints)) < len(self.checkpoints):
            raise ValueError(f"checkpoints={self.checkpoints}: one is there twice")
        self._check_keys()

    def _check_keys(self) -> None:
        name, (needed, taken) = self.benchmark.value, TAKES[self.benchmark]
        given = [key for key in SPECIFIC if getattr(self, key) not in (None, [], getattr(EvaluateConfig, key, None))]
        for key in needed:
            if key not in given:
                raise ValueError(f"{key} is not given: benchmark={name} needs {key}=...")
        for key in given:
            if key not in (*needed, *taken):
                raise ValueError(f"{key}={getattr(self, key)}: benchmark={name} has no use for it")

    @property
    def folder(self) -> Path:
        """Where everything of this benchmark is."""
        return Path(self.out, self.benchmark.value)

    @property
    def part(self) -> slice:
        """What this process draws or answers of the whole."""
        return slice(self.shard, None, self.num_shards)

    def own(self, name: str) -> str:
        """The name of a JSON lines file that only this process writes."""
        return f"{name}.jsonl" if self.num_shards == 1 else f"{name}-{self.shard}-of-{self.num_shards}.jsonl"
