"""vLLM as a run's text engine: a pool of one worker that writes answers and replies.

It holds only the language half of the model, and of each published weight set it is sent only that half.
"""

from dataclasses import replace

import torch

from actors.cluster import Note, unnoted
from actors.config import RolloutConfig
from actors.pool import Progress, RolloutPool
from actors.resources import Placement
from actors.transport import WeightTransfer
from actors.weights import WeightLayout, checksum_of_set
from actors.worker import BaseWorker
from vargpt_rl.data.images import ImageSource
from vargpt_rl.model.adapter import AdapterConfig
from vargpt_rl.text.adapted import MergedLayers
from vargpt_rl.text.layout import check_set, is_text
from vargpt_rl.text.vllm_engine import VllmEngine

BATCH = 256
"""Requests sent at once: vLLM batches them itself, and better the more it has."""


class VllmWorker(BaseWorker):
    """vLLM with the language half of ``checkpoint`` (a directory), in fp32 or bf16.

    The matrices of an ``adapter`` are merged into the checkpoint's weights, whatever the workers do with them.
    """

    engine: VllmEngine

    def __init__(
        self,
        checkpoint: str,
        source: ImageSource,
        threads: int,
        use_gpu: bool = False,
        bf16: bool = False,
        cuda_graphs: bool = False,  # of images; vLLM has its own
        version_required: int = 0,
        adapter: AdapterConfig | None = None,
    ):
        torch.set_num_threads(threads)
        engine = VllmEngine(checkpoint, torch.bfloat16 if bf16 else torch.float32)
        self._layers = None if adapter is None else MergedLayers(checkpoint, adapter)
        super().__init__(engine, source, "cuda" if use_gpu else "cpu", version_required)

    def check_layout(self, layout: WeightLayout) -> None:
        if self._layers is not None:
            self._layers.check(layout.shapes)
        else:
            check_set(layout.shapes, self.engine.shapes)

    def load_weights(self, version: int, transfer: WeightTransfer) -> str:
        """Swap into vLLM. It fuses its own tensors, so the checksum is of the received ones, once they are loaded."""
        tensors = {name: tensor for chunk in transfer.chunks() for name, tensor in chunk.items()}
        for part in [tensors] if self._layers is None else self._layers.chunks(tensors):
            self.engine.swap(version, part)
        return checksum_of_set(tensors)


def start_text_engine(
    config: RolloutConfig,
    plan: Placement,
    checkpoint: str,
    source: ImageSource,
    progress: Progress | None = None,
    note: Note = unnoted,
    adapter: AdapterConfig | None = None,
) -> RolloutPool | None:
    """Start vLLM's pool, for the sets of an ``adapter`` if there is one; None if the workers write text themselves."""
    if plan.text is None:
        return None
    settings = replace(config, batch_size=BATCH)
    return RolloutPool(
        settings,
        plan.text,
        checkpoint,
        source,
        progress=progress,
        kind=VllmWorker,
        takes=is_text,
        adapter=adapter,
        note=note,
    )
