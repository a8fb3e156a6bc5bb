"""Multi-turn conversation with the model: the user may show images in any turn, and replies mix words and images.

One key-value cache serves the whole conversation. A reply is sampled token by token; ``image_gen_start`` makes the
model draw, and after ``image_gen_end`` the words continue (VARGPT-v1.1, section 3.1). Drawn images stay in the context
as their L image tokens, so the context equals that of one teacher-forced pass. To edit an image, show it in a turn with
an instruction. This applies to drawn images too: only shown images pass through the vision tower, as in training.

Deviations from the published code, which stops after the first image of a reply: any number of images in any turn;
each drawn image is followed by ``image_gen_end``, as in training.

Shape legend: B rows, T positions, V vocabulary, L image tokens, d bits or s symbols a token, h w latent grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from vargpt_rl.common.bars import hide_library_bars
from vargpt_rl.common.dtypes import chosen_dtype
from vargpt_rl.common.errors import first_line
from vargpt_rl.common.settings import Count, CountOrNone, NotNegative, check_ranges
from vargpt_rl.model.families import family_of
from vargpt_rl.model.generate import GenerationState, SamplingConfig, draw_next, to_images
from vargpt_rl.model.hub import model_folder
from vargpt_rl.model.prompt import REPLY, ChatTemplate, VisionInputs
from vargpt_rl.model.scales import token_count
from vargpt_rl.model.unified import Unified
from vargpt_rl.model.whole import check_whole
from vargpt_rl.storage.adapter import adapter_base, apply_adapter, is_adapter_folder


@dataclass
class ReplyConfig:
    """Sampling of replies."""

    temperature: NotNegative = 0.0
    """Temperature of the words; 0 is greedy."""
    max_tokens: Count = 256
    """Limit on the tokens of words in a reply."""
    max_images: CountOrNone = 4
    """Limit on the images in a reply."""

    def __post_init__(self):
        check_ranges(ReplyConfig, self)


class DrawnImage(NamedTuple):
    """A drawn image of a reply."""

    image: Image.Image
    bits_Ld: torch.Tensor
    """Image tokens: bits [L, d], in v1 indices [L, 1]."""
    seed: int
    """Seed that the tokens were sampled with."""


Reply = list[str | DrawnImage]
"""Words and images in order, without empty strings."""


def choose_word(logits_V: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    """Sample a token id from fp32 logits on the CPU."""
    if temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial((logits_V / temperature).softmax(0), 1, generator=generator))


class Conversation:
    """Turns of one user and the model. ``ids`` is the whole conversation so far, image tokens as ``image_gen_pad``.

    Drawn images have ``size`` (height, width) in pixels; the k-th of the conversation is drawn with seed ``seed + k``.
    """

    def __init__(
        self,
        model: Unified,
        chat: ChatTemplate,
        size: tuple[int, int] = (512, 512),
        sampling: SamplingConfig | None = None,
        replies: ReplyConfig | None = None,
        seed: int = 0,
    ):
        self.model = model
        self.chat = chat
        self.sampling = sampling or SamplingConfig()
        self.replies = replies or ReplyConfig()
        self.resize(size)
        self.limit = model.config.text_config.max_position_embeddings
        self.reading = GenerationState(model, 1)
        self.ids: list[int] = []
        self.next_seed = seed
        self.generator = torch.Generator().manual_seed(seed)
        # The only special tokens allowed in a reply are the end and image_gen_start.
        self._allowed_V = torch.arange(model.config.text_config.vocab_size) < len(chat.tokenizer)
        self._allowed_V[list(chat.tokenizer.get_added_vocab().values())] = False
        self._allowed_V[chat.end] = True

    def resize(self, size: tuple[int, int]) -> None:
        """Draw images of this (height, width) from now on. ValueError for a size that the model does not draw."""
        self.tokens = token_count(self.model.image_tokenizer.schedule_for(*size))
        self.size = size

    @torch.inference_mode()
    def say(self, text: str, images: Sequence[Image.Image] = (), draw: bool = False) -> Reply:
        """Reply to a user's turn that shows ``images``. With ``draw``, the reply is the usual words and one image.

        Raises ValueError, leaving the conversation as it was, if an image cannot be shown or the turn does not fit into
        ``limit`` tokens.
        """
        seen = self.chat.vision_inputs(list(images)) if images else None
        turn = [] if self.ids else self.chat.system()
        turn += self.chat.user(text, seen.image_grid_thw if seen else None)
        if draw:
            turn += [*self.chat.text(REPLY), self.model.config.image_gen_start_token_id]
        needed = len(turn) + (self.tokens + 1 if draw else 1)
        if needed > self.room:
            raise ValueError(f"the conversation is too long: {len(self.ids)} + {needed} of {self.limit} tokens")
        self._read(turn, seen)
        reply: Reply = [REPLY, self._draw()] if draw else self._reply()
        self._read(self.chat.closing)
        return reply

    @property
    def room(self) -> int:
        """Tokens left before the current turn must be closed."""
        return self.limit - len(self.ids) - len(self.chat.closing)

    def _reply(self) -> Reply:
        """Sample words until the model ends its turn, drawing the images it begins."""
        start = self.model.config.image_gen_start_token_id
        reply: Reply = []
        words: list[int] = []
        images = 0
        for _ in range(min(self.replies.max_tokens, self.room)):
            may_draw = images < self.replies.max_images and self.room >= self.tokens + 2
            token = self._next_token(may_draw)
            if token == self.chat.end or not self.room:
                break
            self._read([token])
            if token == start:
                reply += [self._words(words), self._draw()]
                words = []
                images += 1
            else:
                words.append(token)
        return [part for part in (*reply, self._words(words)) if part]

    def _next_token(self, may_draw: bool) -> int:
        logits_V = self.model.lm_head(self.reading.states[-1][0, -1]).float().cpu()
        allowed_V = self._allowed_V.clone()
        allowed_V[self.model.config.image_gen_start_token_id] = may_draw
        return choose_word(logits_V.masked_fill(~allowed_V, -torch.inf), self.replies.temperature, self.generator)

    def _words(self, ids: list[int]) -> str:
        return self.chat.tokenizer.decode(ids).strip()

    def _draw(self) -> DrawnImage:
        """Draw an image after its ``image_gen_start``, which was read last, and close it."""
        seed = self.next_seed
        self.next_seed += 1
        drawn = draw_next(self.reading, [seed], self.size, self.sampling)
        self.ids += [self.model.config.image_gen_pad_token_id] * self.tokens
        self._read([self.model.config.image_gen_end_token_id])
        return DrawnImage(to_images(self.model, drawn.summed_Bdhw)[0], drawn.labels_BLs[0].cpu(), seed)

    def _read(self, ids: list[int], seen: VisionInputs | None = None) -> None:
        ids_BT = torch.tensor([ids], device=self.model.device)
        vision = [tensor.to(self.model.device) for tensor in seen or ()]
        self.reading.read(ids_BT, torch.ones_like(ids_BT), *vision)
        self.ids += ids


def load(checkpoint: str | Path, device: str = "auto", dtype: str = "auto") -> tuple[Unified, ChatTemplate]:
    """Load the model of a directory or hub name (`model_folder`) for inference, and its chat template.

    An adapter's folder is merged into its base.

    ``device`` auto is a GPU if there is one; ``dtype`` auto is bf16 there and fp32 on a CPU, where an image then hardly
    ever depends on its batch. Raises ValueError if the directory does not have a complete model of either family.
    """
    place, kind = device_and_dtype(device, dtype)
    hide_library_bars()  # of seconds, even on the tiny model
    folder = model_folder(checkpoint)
    try:
        base = adapter_base(folder) if is_adapter_folder(folder) else folder
        family = family_of(check_whole(base))
        model = family.model.from_pretrained(base, dtype=kind)
        if base != folder:
            apply_adapter(model, folder, base)
        chat = family.markup(str(folder), model.config)
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint={checkpoint}: {first_line(error)}") from error
    return model.to(place).eval(), chat


def device_and_dtype(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Resolve names and ``auto`` on this machine. Raises ValueError for a device that it does not have."""
    chosen_dtype(dtype, False)  # raises for an unknown one
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # no such name, no such device, or a torch built without it
        raise ValueError(f"device={device}: {first_line(error)}") from error
    return place, chosen_dtype("fp32" if dtype == "auto" and place.type == "cpu" else dtype, place.type == "cuda")
