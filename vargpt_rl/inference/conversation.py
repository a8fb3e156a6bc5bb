"""A conversation with the model: images shown to it in any turn, replies in words, images drawn inside them.

One key-value cache serves the whole conversation. A reply is words, token by token; ``image_gen_start`` among them
makes the model draw, and after ``image_gen_end`` the words go on (VARGPT-v1.1, section 3.1). Drawn images stay in the
context as the L image tokens they were drawn with, so that all of it is what one teacher-forced pass sees. To edit a
image, show it in a turn with an instruction; that goes for drawn ones too, for only shown images go through the
vision tower, as in training.

Deviations from the published code, which stops after the first image of a reply: any number of images, in any
turn; after a drawn image stands ``image_gen_end``, as in training.

Shape legend: V vocabulary, L image tokens, d bits a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from vargpt_rl.model.families import family_of, load_config
from vargpt_rl.model.generate import GenerationState, SamplingConfig, draw_next, to_images
from vargpt_rl.model.hub import model_folder
from vargpt_rl.model.prompt import REPLY, ChatTemplate, VisionInputs
from vargpt_rl.model.scales import token_count
from vargpt_rl.model.unified import Unified

DTYPES = ("auto", "float32", "bfloat16")


@dataclass
class ReplyConfig:
    """How replies are made: ``temperature`` 0 takes the likeliest word; ``max_tokens`` of words, ``max_images``."""

    temperature: float = 0.0
    max_tokens: int = 256
    max_images: int = 4

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: expected 0 or more")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: expected 1 or more")
        if self.max_images < 0:
            raise ValueError(f"max_images={self.max_images}: expected 0 or more")


class DrawnImage(NamedTuple):
    """A drawn image of a reply: pixels, its tokens [L, s] (bits [L, d]), and the seed they were drawn with."""

    image: Image.Image
    bits_Ld: torch.Tensor
    seed: int


Reply = list[str | DrawnImage]
"""Words and images in the order in which they were made; no empty words."""


def choose_word(logits_V: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    """A token id from fp32 logits on the CPU."""
    if temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial((logits_V / temperature).softmax(0), 1, generator=generator))


class Conversation:
    """Turns of one user and the model. ``ids`` is all that was said so far, with image tokens as ``image_gen_pad``.

    Images have ``size`` (height, width) in pixels; the k-th of the conversation is drawn with seed ``seed + k``.
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
        self.model, self.chat, self.size = model, chat, size
        self.sampling, self.replies = sampling or SamplingConfig(), replies or ReplyConfig()
        self.tokens = token_count(model.image_tokenizer.schedule_for(*size))
        self.limit = model.config.text_config.max_position_embeddings
        self.reading = GenerationState(model, 1)
        self.ids: list[int] = []
        self.next_seed = seed
        self.generator = torch.Generator().manual_seed(seed)
        # Of the special tokens a reply may have the end and image_gen_start only.
        self._allowed_V = torch.arange(model.config.text_config.vocab_size) < len(chat.tokenizer)
        self._allowed_V[list(chat.tokenizer.get_added_vocab().values())] = False
        self._allowed_V[chat.end] = True

    @torch.inference_mode()
    def say(self, text: str, images: Sequence[Image.Image] = (), draw: bool = False) -> Reply:
        """The reply to a user's turn that shows ``images``. With ``draw`` it is the customary words and one image.

        ValueError, and nothing is said, when an image cannot be shown or the turn does not fit in ``limit`` tokens.
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
        reply = [REPLY, self._draw()] if draw else self._reply()
        self._read(self.chat.closing)
        return reply

    @property
    def room(self) -> int:
        """How many more tokens may be said before the current turn is closed."""
        return self.limit - len(self.ids) - len(self.chat.closing)

    def _reply(self) -> Reply:
        """Words until the model ends its turn, with the images it begins among them."""
        start = self.model.config.image_gen_start_token_id
        reply, words, vision = [], [], 0
        for _ in range(min(self.replies.max_tokens, self.room)):
            may_draw = vision < self.replies.max_images and self.room >= self.tokens + 2
            token = self._next_token(may_draw)
            if token == self.chat.end or not self.room:
                break
            self._read([token])
            if token == start:
                reply += [self._words(words), self._draw()]
                words, vision = [], vision + 1
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
        """Draw the image whose ``image_gen_start`` was read last, and close it."""
        seed, self.next_seed = self.next_seed, self.next_seed + 1
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
    """The model of a directory or a hub name (`model_folder`), ready to draw and to answer, and its chat format.

    ``device`` auto is a GPU if there is one; ``dtype`` auto is bfloat16 there and float32 on a CPU. ValueError for a
    directory that has no whole model of this architecture.
    """
    place, kind = device_and_dtype(device, dtype)
    folder = model_folder(checkpoint)
    try:
        family = family_of(load_config(folder))
        model, report = family.model.from_pretrained(folder, dtype=kind, output_loading_info=True)
        if report["missing_keys"]:
            raise ValueError(f"{len(report['missing_keys'])} tensors are missing, {min(report['missing_keys'])} is one")
        chat = family.markup(str(folder), model.config)
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint={checkpoint}: {str(error).splitlines()[0]}") from error
    return model.to(place).eval(), chat


def device_and_dtype(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """What ``auto`` and the names stand for on this machine. ValueError for what it does not have."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: expected one of {', '.join(DTYPES)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # no such name, no such device, or a torch built without it
        raise ValueError(f"device={device}: {str(error).splitlines()[0]}") from error
    if dtype == "auto":
        dtype = "bfloat16" if place.type == "cuda" else "float32"
    return place, getattr(torch, dtype)
