"""Who gets what of the cluster: decided once, before anything starts, from the resources that Ray reports.

With GPUs, rollout workers and learner ranks each hold their own. Without, they share the CPUs: the loop alternates
sampling and learning, so each reserves a share that lets all of them exist at once, and computes on all it can get.
"""

from dataclasses import dataclass

TRANSPORTS = ("auto", "shared_fs", "object_store", "broadcast")


@dataclass
class RolloutConfig:
    """How pictures are sampled and scored: the pool of rollout workers. ``call_timeout_s`` is for one batch.

    ``transport``: how new weights reach the workers (``actors.transport``): shared_fs, object_store, broadcast, or
    auto, the first where a worker sees the run directory and else the second.
    """

    workers: int = 2
    gpus_per_worker: float = 1.0
    batch_size: int = 16
    max_restarts: int = 3  # of the whole pool, in one run
    call_timeout_s: float = 1800.0
    transport: str = "auto"

    def __post_init__(self):
        if self.workers < 1:
            raise ValueError(f"rollout.workers={self.workers}: expected 1 or more")
        if self.batch_size < 1:
            raise ValueError(f"rollout.batch_size={self.batch_size}: expected 1 or more")
        if self.transport not in TRANSPORTS:
            raise ValueError(f"rollout.transport={self.transport}: expected one of {', '.join(TRANSPORTS)}")


@dataclass(frozen=True)
class Plan:
    """Processes and their Ray resources: actor options of a worker, placement-group bundle of a learner rank."""

    workers: int
    worker_options: dict[str, float]
    ranks: int
    rank_bundle: dict[str, float]
    threads_per_worker: int
    use_gpu: bool
    bf16: bool


def _share(cpus: float, processes: int) -> float:
    """CPUs to reserve for each of so many processes. Ray counts in units of 1e-4, and above 1 in whole CPUs only."""
    share = cpus / processes
    return float(int(share)) if share >= 1 else int(share * 1e4) / 1e4


def plan(
    resources: dict[str, float], rollout: RolloutConfig, ranks: int, gpus_per_rank: float = 1.0, bf16: bool = False
) -> Plan:
    """Fit the workers and the learner ranks into ``resources`` (those of ``ray.cluster_resources()``).

    ``bf16`` is the learners': workers score references in the same dtype, or step 0 of DPO would not be the identity.

    Raises ValueError, with both sums, when they ask for more GPUs than there are.
    """
    workers, cpus, gpus = rollout.workers, resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    share = _share(cpus, workers + ranks)
    worker_options, rank_bundle = {"num_cpus": share}, {"CPU": share}
    if gpus:
        asked = workers * rollout.gpus_per_worker + ranks * gpus_per_rank
        if asked > gpus:
            raise ValueError(
                f"{workers} rollout workers of {rollout.gpus_per_worker:g} GPUs and {ranks} learner ranks of "
                f"{gpus_per_rank:g} need {asked:g} GPUs, but the cluster has {gpus:g}; lower rollout.workers, "
                "rollout.gpus_per_worker (a fraction shares a GPU) or the learners' ranks"
            )
        worker_options["num_gpus"], rank_bundle["GPU"] = rollout.gpus_per_worker, gpus_per_rank
    return Plan(workers, worker_options, ranks, rank_bundle, max(1, int(cpus // workers)), bool(gpus), bf16)
