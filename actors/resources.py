"""Who gets what of the cluster: decided once, before anything starts, from the resources that Ray reports.

With GPUs, rollout workers and learner ranks each hold their own, and so does vLLM. Without, they share the CPUs: the
loop alternates sampling and learning, so each reserves a share that lets all of them exist at once, and computes on all
it can get.
"""

from dataclasses import dataclass
from importlib.util import find_spec


@dataclass
class RolloutConfig:
    """How pictures are sampled and scored: the pool of rollout workers. ``call_timeout_s`` is for one batch.

    ``reply``: what stands before a picture, ``template`` (customary words) or ``generate`` (what the model itself says,
    at most ``reply_tokens``). ``text_engine`` writes replies and answers: ``transformers`` in the workers, or ``vllm``
    in a process of its own with ``text_gpus``; ``auto`` is vllm for generated replies where it is installed.
    """

    workers: int = 2
    gpus_per_worker: float = 1.0
    batch_size: int = 16
    max_restarts: int = 3  # of the whole pool, in one run
    call_timeout_s: float = 1800.0
    reply: str = "template"
    reply_tokens: int = 64
    text_engine: str = "auto"
    text_gpus: float = 1.0

    def __post_init__(self):
        if self.workers < 1:
            raise ValueError(f"rollout.workers={self.workers}: expected 1 or more")
        if self.batch_size < 1:
            raise ValueError(f"rollout.batch_size={self.batch_size}: expected 1 or more")
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


@dataclass(frozen=True)
class Plan:
    """Processes and their Ray resources: actor options of a worker, placement-group bundle of a learner rank.

    ``text`` is the plan of vLLM's process where there is one, as of a pool of a single worker.
    """

    workers: int
    worker_options: dict[str, float]
    ranks: int
    rank_bundle: dict[str, float]
    threads_per_worker: int
    use_gpu: bool
    bf16: bool
    text: "Plan | None" = None


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
    text = Plan(1, {"num_cpus": 0.0}, 0, {}, max(1, int(cpus)), bool(gpus), bf16) if rollout.uses_vllm else None
    if gpus:
        asked = workers * rollout.gpus_per_worker + ranks * gpus_per_rank + (rollout.text_gpus if text else 0)
        if asked > gpus:
            others, lower = (f" and vLLM of {rollout.text_gpus:g}", ", rollout.text_gpus") if text else ("", "")
            raise ValueError(
                f"{workers} rollout workers of {rollout.gpus_per_worker:g} GPUs and {ranks} learner ranks of "
                f"{gpus_per_rank:g}{others} need {asked:g} GPUs, but the cluster has {gpus:g}; lower rollout.workers, "
                f"rollout.gpus_per_worker (a fraction shares a GPU){lower} or the learners' ranks"
            )
        if text:
            text.worker_options["num_gpus"] = rollout.text_gpus
        worker_options["num_gpus"], rank_bundle["GPU"] = rollout.gpus_per_worker, gpus_per_rank
    return Plan(workers, worker_options, ranks, rank_bundle, max(1, int(cpus // workers)), bool(gpus), bf16, text)
