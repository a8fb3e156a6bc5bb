"""Settings of the rollout workers and of their place in the cluster."""

from dataclasses import dataclass
from importlib.util import find_spec

from vargpt_rl.common.settings import require


def _require_choice(settings: object, prefix: str, /, **choices: tuple[str, ...]) -> None:
    """Raise ValueError, naming the key, unless each named field is one of its choices."""
    for key, allowed in choices.items():
        value = getattr(settings, key)
        if value not in allowed:
            raise ValueError(f"{prefix}{key}={value}: expected one of {', '.join(allowed)}")


@dataclass
class RolloutConfig:
    """The pool of rollout workers, which sample and score images."""

    workers: int = 2
    """Worker processes, each with the whole model."""

    gpus_per_worker: float = 1.0
    """GPUs of one worker, above 0 and at most 1: 0.5 puts two workers on a GPU. Ignored without GPUs."""

    batch_size: int = 16
    """Images that a worker computes at once."""

    max_restarts: int = 3
    """Workers replaced before the run fails: of the whole pool, in one start of a run."""

    call_timeout_s: float = 1800.0
    """Seconds for one batch, after which its worker counts as lost."""

    transport: str = "auto"
    """Transport of new weights to the workers (``actors.transport``).

    ``shared_fs``, ``object_store``, ``broadcast``, or ``auto``: shared_fs if the worker sees the run
    directory, else object_store.
    """

    reply: str = "template"
    """The words before an image: ``template`` (fixed) or ``generate`` (written by the model itself)."""

    reply_tokens: int = 64
    """Most tokens of a generated reply."""

    text_engine: str = "auto"
    """Engine that writes replies and answers.

    ``transformers`` in the workers, ``vllm`` in a process of its own, or ``auto``: vllm for generated replies
    if it is installed, else transformers.
    """

    text_gpus: float = 1.0
    """GPUs of the vLLM process."""

    def __post_init__(self):
        require(self, "rollout.", workers=1, batch_size=1, reply_tokens=1)
        if not 0 < self.gpus_per_worker <= 1:
            raise ValueError(
                f"rollout.gpus_per_worker={self.gpus_per_worker:g}: expected a share of one GPU, above 0 and at most 1"
            )
        _require_choice(
            self,
            "rollout.",
            transport=("auto", "shared_fs", "object_store", "broadcast"),
            reply=("template", "generate"),
            text_engine=("auto", "vllm", "transformers"),
        )

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

    kind: str = "split"
    """``split``: ranks and workers have separate GPUs. ``colocated``: each GPU holds a rank and workers."""

    strategy: str = "PACK"
    """``PACK`` uses as few nodes as possible, ``SPREAD`` as many."""

    def __post_init__(self):
        _require_choice(self, "placement.", kind=("split", "colocated"), strategy=("PACK", "SPREAD"))

    @property
    def is_colocated(self) -> bool:
        return self.kind == "colocated"
