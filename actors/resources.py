"""Placement: assign the cluster's resources to workers and learner ranks, once, before anything starts.

Processes are placed in bundles of one GPU each or, without GPUs, of equal shares of the CPUs. Split: a bundle holds one
learner rank, or as many rollout workers as fit. Colocated: it holds a rank and workers, which compute in turns because
the loop alternates sampling and learning. Two ranks never share a GPU, since NCCL refuses that. vLLM, if used, has GPUs
of its own or, without GPUs, shares the CPUs.
"""

from collections import Counter
from dataclasses import dataclass, field
from math import ceil

import torch

from actors.config import PlacementConfig, RolloutConfig
from vargpt_rl.common.dtypes import chosen_dtype

Resources = dict[str, float]
"""Resources of a node as Ray reports them: ``CPU``, ``GPU``, ..."""

ROUNDING = 1e-9
"""Added before a quotient of floats is cut to an integer."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The processes of a run and their Ray resources."""

    workers: int

    worker_options: Resources
    """Actor options of a worker: ``num_cpus``, ``num_gpus``."""

    ranks: int = 0

    rank_bundle: Resources = field(default_factory=dict)
    """The part of a bundle that a learner rank takes."""

    threads_per_worker: int = 1

    use_gpu: bool = False

    bf16: bool = False

    strategy: str = "PACK"

    bundles: list[Resources] = field(default_factory=list)
    """The resources of each bundle."""

    rank_bundles: list[int] = field(default_factory=list)
    """Index of each rank's bundle."""

    worker_bundles: list[int] = field(default_factory=list)
    """Index of each worker's bundle."""

    text: "Placement | None" = None
    """The placement of the vLLM process, if any, as that of a pool of one worker."""


def per_gpu(rollout: RolloutConfig, gpus_per_rank: float, placement: PlacementConfig) -> list[tuple[int, int]]:
    """The ways to fill one GPU, each as (workers, ranks): one way if colocated, two if split.

    ValueError for shares that do not fit into one GPU.
    """
    share = rollout.gpus_per_worker
    if placement.is_colocated:
        fit = int((1 - gpus_per_rank) / share + ROUNDING)
        if fit < 1 or gpus_per_rank <= 0:
            raise ValueError(
                f"learner.gpus_per_rank={gpus_per_rank:g} beside rollout.gpus_per_worker={share:g}: expected shares "
                "above 0 that add up to at most 1, because placement=colocated puts both on each GPU"
            )
        return [(fit, 1)]
    if gpus_per_rank != 1:
        raise ValueError(
            f"learner.gpus_per_rank={gpus_per_rank:g}: expected 1 in placement=split, because NCCL refuses ranks that "
            "share a GPU; placement=colocated shares each between one rank and workers"
        )
    return [(int(1 / share + ROUNDING), 0), (0, 1)]


def plan(
    nodes: list[Resources],
    rollout: RolloutConfig,
    ranks: int,
    dtype: str,
    gpus_per_rank: float = 1.0,
    placement: PlacementConfig | None = None,
) -> Placement:
    """Fit the workers and the learner ranks into the nodes.

    ``dtype`` (`vargpt_rl.common.dtypes`) is that of workers and learners, or step 0 of DPO would not be the identity.
    ValueError if they need more GPUs than there are.
    """
    placement = placement or PlacementConfig()
    workers = rollout.workers
    cpus = [node.get("CPU", 0.0) for node in nodes if node.get("CPU")]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    bf16 = chosen_dtype(dtype, bool(gpus)) == torch.bfloat16
    text_gpus = ceil(rollout.text_gpus) if gpus and rollout.uses_vllm else 0
    workers_per_bundle = per_gpu(rollout, gpus_per_rank, placement)[0][0] if gpus else 1
    if placement.is_colocated:
        needed = max(ranks, ceil(workers / workers_per_bundle))
        count = max(needed, min(workers, gpus - text_gpus if gpus else workers))
        worker_bundles = [i % count for i in range(workers)]
    else:
        needed = count = ranks + ceil(workers / workers_per_bundle)
        worker_bundles = [ranks + i // workers_per_bundle for i in range(workers)]
    if gpus and needed + text_gpus > gpus:
        fitting = gpus - text_gpus
        hint = f"; placement=colocated rollout.workers={fitting} learner.ranks={fitting} fits" if fitting > 0 else ""
        text, key = (f" and vLLM of {rollout.text_gpus:g}", "rollout.text_gpus, ") if text_gpus else ("", "")
        raise ValueError(
            f"{workers} rollout workers of {rollout.gpus_per_worker:g} GPUs and {ranks} learner ranks of "
            f"{gpus_per_rank:g}{text} need {needed + text_gpus} GPUs in placement={placement.kind}, but the cluster "
            f"has {gpus}; lower {key}rollout.workers, rollout.gpus_per_worker (a fraction shares a GPU) or "
            f"learner.ranks{hint}"
        )

    held = Counter([*range(ranks), *worker_bundles])
    bundle_cpus = min(node["CPU"] / node["GPU"] for node in nodes if node.get("GPU")) if gpus else _largest(cpus, count)
    share = _share(bundle_cpus, max(held.values()))
    one_gpu = {"GPU": 1.0} if gpus else {}
    return Placement(
        workers=workers,
        worker_options={"num_cpus": share} | ({"num_gpus": rollout.gpus_per_worker} if gpus else {}),
        ranks=ranks,
        rank_bundle={"CPU": share} | ({"GPU": gpus_per_rank} if gpus else {}),
        threads_per_worker=max(1, int(min(*cpus, sum(cpus) // workers))),
        use_gpu=bool(gpus),
        bf16=bf16,
        strategy=placement.strategy,
        bundles=[{"CPU": round(held[i] * share, 4)} | one_gpu for i in range(count)],
        rank_bundles=list(range(ranks)),
        worker_bundles=worker_bundles,
        text=_text_placement(rollout, cpus, bool(gpus), bf16) if rollout.uses_vllm else None,
    )


def _text_placement(rollout: RolloutConfig, cpus: list[float], use_gpu: bool, bf16: bool) -> Placement:
    return Placement(
        workers=1,
        worker_options={"num_cpus": 0.0} | ({"num_gpus": rollout.text_gpus} if use_gpu else {}),
        threads_per_worker=max(1, int(min(cpus))),
        use_gpu=use_gpu,
        bf16=bf16,
    )


def _share(cpus: float, processes: int) -> float:
    """CPUs to reserve for each process. Ray counts in units of 1e-4, and above 1 in whole CPUs only."""
    share = cpus / processes
    return float(int(share)) if share >= 1 else int(share * 1e4) / 1e4


def _largest(cpus: list[float], bundles: int) -> float:
    """The most CPUs that each of ``bundles`` equal bundles can have on nodes with these CPUs."""
    sizes = {node / count for node in cpus for count in range(1, bundles + 1)}
    return max(size for size in sizes if sum(int(node / size + ROUNDING) for node in cpus) >= bundles)
