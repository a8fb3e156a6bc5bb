"""Settings of the rollout workers and of their place in the cluster."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated

from vargpt_rl.common.settings import Between, Count, CountOrNone, Either, NotNegative, OneOf, Seconds, at_least

AUTO = "auto"
"""Value of ``rollout.batch_size`` that has the driver find it."""


@dataclass
class RolloutConfig:
    """The pool of rollout workers, which sample and score images."""

    workers: Count = 2
    """Worker processes, each with the whole model."""

    gpus_per_worker: Annotated[float, Between(0, 1, includes_low=False)] = 1.0
    """GPUs of one worker, above 0 and at most 1: 0.5 puts two workers on a GPU. Ignored without GPUs."""

    batch_size: Annotated[int | str, Either(at_least(1), OneOf(AUTO))] = 16
    """Images that a worker computes at once, or auto.

    auto tries growing batches when the workers have started, as far as the memory plan allows, and takes the smallest
    that is nearly as fast as any. It is recorded with the run, since an image depends on its batch through rounding.
    """

    cuda_graphs: bool = False
    """On GPUs, record the sampling of each shape of batch as a CUDA graph and replay it (`vargpt_rl.model.graphs`).

    Batches of few images are several times faster. A graph keeps the memory of its batch. Ignored without GPUs.
    """

    max_restarts: CountOrNone = 3
    """Workers replaced before the run fails: of the whole pool, in one start of a run."""

    keep_every: Count | None = None
    """Images after which what was sampled, judged or scored so far is kept, for a run that is interrupted and resumed.
    null: 16 batches of each worker, at least 1024. Rounded up to whole batches."""

    call_timeout_s: Seconds = 1800.0
    """Seconds for one batch, after which its worker counts as lost."""

    transport: Annotated[str, OneOf("auto", "shared_fs", "object_store", "broadcast")] = "auto"
    """Transport of new weights to the workers (``actors.transport``).

    ``shared_fs``, ``object_store``, ``broadcast``, or ``auto``: shared_fs if the worker sees the run
    directory, else object_store.
    """

    reply: Annotated[str, OneOf("template", "generate")] = "template"
    """The words before an image: ``template`` (fixed) or ``generate`` (written by the model itself)."""

    reply_tokens: Count = 64
    """Most tokens of a generated reply."""

    text_engine: Annotated[str, OneOf("auto", "vllm", "transformers")] = "auto"
    """Engine that writes replies and answers.

    ``transformers`` in the workers, ``vllm`` in a process of its own, or ``auto``: vllm for generated replies
    if it is installed, else transformers.
    """

    text_gpus: NotNegative = 1.0
    """GPUs of the vLLM process."""

    @property
    def images_at_once(self) -> int:
        """``batch_size`` as a number; 1 for auto, which the driver replaces once the workers have started."""
        return 1 if isinstance(self.batch_size, str) else self.batch_size

    @property
    def uses_vllm(self) -> bool:
        """Tell whether vLLM writes text. ValueError if it is required but not installed."""
        installed = find_spec("vllm") is not None
        if self.text_engine == "vllm" and not installed:
            raise ValueError("rollout.text_engine=vllm: vLLM is not installed here; make setup-vllm installs it")
        return installed and (self.text_engine == "vllm" or (self.text_engine, self.reply) == ("auto", "generate"))


@dataclass
class PlacementConfig:
    """The layout of workers and learner ranks on the cluster (``actors.resources``)."""

    kind: Annotated[str, OneOf("split", "colocated")] = "split"
    """``split``: ranks and workers have separate GPUs. ``colocated``: each GPU holds a rank and workers."""

    strategy: Annotated[str, OneOf("PACK", "SPREAD")] = "PACK"
    """``PACK`` uses as few nodes as possible, ``SPREAD`` as many."""

    @property
    def is_colocated(self) -> bool:
        return self.kind == "colocated"
