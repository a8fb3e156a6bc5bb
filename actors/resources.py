"""Who gets what of the cluster: decided once, before anything starts, from the resources that Ray reports by node.

The processes lie in bundles of one GPU each, or without GPUs of equal shares of the CPUs. Split: a bundle holds one
learner rank, or as many rollout workers as fit. Colocated: it holds a rank and workers, which compute in turns because
the loop alternates sampling and learning. In no placement do two ranks share a GPU: NCCL refuses that. vLLM, where it
is used, has GPUs of its own, or without them shares the CPUs.
"""

from collections import Counter
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import ceil

Resources = dict[str, float]
"""What Ray reports of a node, by resource: ``CPU``, ``GPU``, ..."""

TRANSPORTS = ("auto", "shared_fs", "object_store", "broadcast")


@dataclass
class RolloutConfig:
    """How images are sampled and scored: the pool of rollout workers. ``call_timeout_s`` is for one batch.

    ``transport``: how new weights reach the workers (``actors.transport``): shared_fs, object_store, broadcast, or
    auto, the first where a worker sees the run directory and else the second.
    ``reply``: what stands before an image, ``template`` (customary words) or ``generate`` (what the model itself says,
    at most ``reply_tokens``). ``text_engine`` writes replies and answers: ``transformers`` in the workers, or ``vllm``
    in a process of its own with ``text_gpus``; ``auto`` is vllm for generated replies where it is installed.
    """

    workers: int = 2
    gpus_per_worker: float = 1.0
    batch_size: int = 16
    max_restarts: int = 3  # of the whole pool, in one start of a run
    call_timeout_s: float = 1800.0
    transport: str = "auto"
    reply: str = "template"
    reply_tokens: int = 64
    text_engine: str = "auto"
    text_gpus: float = 1.0

    def __post_init__(self):
        if self.workers < 1:
            raise ValueError(f"rollout.workers={self.workers}: expected 1 or more")
        if self.batch_size < 1:
            raise ValueError(f"rollout.batch_size={self.batch_size}: expected 1 or more")
        if self.transport not in TRANSPORTS:
            raise ValueError(f"rollout.transport={self.transport}: expected one of {', '.join(TRANSPORTS)}")
        if not 0 < self.gpus_per_worker <= 1:
            raise ValueError(
                f"rollout.gpus_per_worker={self.gpus_per_worker:g}: expected a share of one GPU, above 0 and at most 1"
            )
        if self.reply not in ("template", "generate"):
            raise ValueError(f"rollout.reply={self.reply}: expected template or generate")
        if self.reply_tokens < 1:
            raise ValueError(f"rollout.reply_tokens={self.reply_tokens}: expected 1 or more")
        if self.text_engine not in ("auto", "vllm", "transformers"):
            raise ValueError(f"rollout.text_engine={self.text_engine}: expected auto, vllm or transformers")

    @property
    def uses_vllm(self) -> bool:
        """Whether text is vLLM's. ValueError where it is asked for and not installed."""
        installed = find_spec("vllm") is not None
        if self.text_engine == "vllm" and not installed:
            raise ValueError("rollout.text_engine=vllm: vLLM is not installed here; make setup-vllm installs it")
        return installed and (self.text_engine == "vllm" or (self.text_engine, self.reply) == ("auto", "generate"))


@dataclass
class PlacementConfig:
    """``kind``: split or colocated, see above. ``strategy``: PACK takes as few nodes as will do, SPREAD as many."""

    kind: str = "split"
    strategy: str = "PACK"

    def __post_init__(self):
        if self.kind not in ("split", "colocated"):
            raise ValueError(f"placement.kind={self.kind}: expected split or colocated")
        if self.strategy not in ("PACK", "SPREAD"):
            raise ValueError(f"placement.strategy={self.strategy}: expected PACK or SPREAD")

    @property
    def is_colocated(self) -> bool:
        return self.kind == "colocated"


@dataclass(frozen=True)
class Placement:
    """Processes and their Ray resources: actor options of a worker, the part of a bundle that a learner rank takes.

    ``bundles`` are the resources of each; ``rank_bundles`` and ``worker_bundles`` say which one each process is in.
    ``text`` is the plan of vLLM's process where there is one, as of a pool of a single worker.
    """

    workers: int
    worker_options: Resources
    ranks: int
    rank_bundle: Resources
    threads_per_worker: int
    use_gpu: bool
    bf16: bool
    strategy: str = "PACK"
    bundles: list[Resources] = field(default_factory=list)
    rank_bundles: list[int] = field(default_factory=list)
    worker_bundles: list[int] = field(default_factory=list)
    text: "Placement | None" = None


def per_gpu(rollout: RolloutConfig, gpus_per_rank: float, placement: PlacementConfig) -> list[tuple[int, int]]:
    """The (workers, ranks) that one GPU may hold: one way to fill it in colocated, two in split.

    Raises ValueError for shares that do not go into one GPU.
    """
    share = rollout.gpus_per_worker
    if placement.is_colocated:
        fit = int((1 - gpus_per_rank) / share + 1e-9)
        if fit < 1 or gpus_per_rank <= 0:
            raise ValueError(
                f"learner.gpus_per_rank={gpus_per_rank:g} beside rollout.gpus_per_worker={share:g}: "
                "expected shares above 0 that make at most 1, for placement=colocated puts both on each GPU"
            )
        return [(fit, 1)]
    if gpus_per_rank != 1:
        raise ValueError(
            f"learner.gpus_per_rank={gpus_per_rank:g}: expected 1 in placement=split, for NCCL refuses ranks that "
            "share a GPU; placement=colocated shares each between one rank and workers"
        )
    return [(int(1 / share + 1e-9), 0), (0, 1)]


def _share(cpus: float, processes: int) -> float:
    """CPUs to reserve for each of so many processes. Ray counts in units of 1e-4, and above 1 in whole CPUs only."""
    share = cpus / processes
    return float(int(share)) if share >= 1 else int(share * 1e4) / 1e4


def _largest(cpus: list[float], bundles: int) -> float:
    """The most CPUs that so many equal bundles can have each, on nodes of so many CPUs."""
    sizes = {node / count for node in cpus for count in range(1, bundles + 1)}
    return max(size for size in sizes if sum(int(node / size + 1e-9) for node in cpus) >= bundles)


def plan(
    nodes: list[Resources],
    rollout: RolloutConfig,
    ranks: int,
    gpus_per_rank: float = 1.0,
    bf16: bool = False,
    placement: PlacementConfig | None = None,
) -> Placement:
    """Fit the workers and the learner ranks into the nodes.

    ``bf16`` is the learners': workers score references in the same dtype, or step 0 of DPO would not be the identity.

    Raises ValueError, with the sum, when they ask for more GPUs than there are.
    """
    placement, workers = placement or PlacementConfig(), rollout.workers
    cpus = [node.get("CPU", 0.0) for node in nodes if node.get("CPU")]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    taken = ceil(rollout.text_gpus) if gpus and rollout.uses_vllm else 0
    fit = per_gpu(rollout, gpus_per_rank, placement)[0][0] if gpus else 1
    if placement.is_colocated:
        needed = max(ranks, ceil(workers / fit))
        count = max(needed, min(workers, gpus - taken if gpus else workers))
        worker_bundles = [i % count for i in range(workers)]
    else:
        needed = count = ranks + ceil(workers / fit)
        worker_bundles = [ranks + i // fit for i in range(workers)]
    if gpus and needed + taken > gpus:
        others, lower = (f" and vLLM of {rollout.text_gpus:g}", "rollout.text_gpus, ") if taken else ("", "")
        raise ValueError(
            f"{workers} rollout workers of {rollout.gpus_per_worker:g} GPUs and {ranks} learner ranks of "
            f"{gpus_per_rank:g}{others} need {needed + taken} GPUs in placement={placement.kind}, but the cluster has "
            f"{gpus}; lower {lower}rollout.workers, rollout.gpus_per_worker (a fraction shares a GPU) or learner.ranks"
        )
    held = Counter([*range(ranks), *worker_bundles])
    each = min(node["CPU"] / node["GPU"] for node in nodes if node.get("GPU")) if gpus else _largest(cpus, count)
    share = _share(each, max(held.values()))
    worker_options, rank_bundle = {"num_cpus": share}, {"CPU": share}
    bundles = [{"CPU": round(held[i] * share, 4)} for i in range(count)]
    threads = max(1, int(min(*cpus, sum(cpus) // workers)))
    text = (
        Placement(1, {"num_cpus": 0.0}, 0, {}, max(1, int(min(cpus))), bool(gpus), bf16) if rollout.uses_vllm else None
    )
    if gpus:
        worker_options["num_gpus"], rank_bundle["GPU"] = rollout.gpus_per_worker, gpus_per_rank
        bundles = [bundle | {"GPU": 1.0} for bundle in bundles]
        if text:
            text.worker_options["num_gpus"] = rollout.text_gpus
    return Placement(
        workers,
        worker_options,
        ranks,
        rank_bundle,
        threads,
        bool(gpus),
        bf16,
        placement.strategy,
        bundles,
        list(range(ranks)),
        worker_bundles,
        text,
    )
