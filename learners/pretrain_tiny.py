"""Train the tiny pretrained model that the first run starts from:

    python -m torch.distributed.run --nproc-per-node 2 -m learners.pretrain_tiny OUT

It replaces the papers' starting points (a trained Qwen2-VL, a trained Infinity decoder, a trained image tokenizer) by
a model of the shapes world: first the image tokenizer is trained, then everything else, on drawings, edits, questions
and conversations with several of these. Seeds are fixed. ``--image-tokenizer DIR`` reuses the image tokenizer of an
existing model and saves the first hour; ``--base DIR``, which may be repeated for the mean of several models, continues
from all of its weights, with its text tokenizer, at learning rates that decay from the start. Matrices are trained with
Muon, which needs less than half the steps of AdamW here.

The embedded weights come from four trainings by two ranks on two cores, each from the one before:

1. from scratch, before this script had edits and conversations, with 24, 6 and 2 drawings a step at 128, 256 and 512
   px, and another text tokenizer (two and a half hours);
2. ``--base 1 --base-steps 3600``, the first 1000 on one rank, with 5, 2 and 1 drawings and 14 questions a step on each
   rank, and the text tokenizer that is built here; the script has the base's since (two hours);
3. ``--base 2 --base-steps 1500 --shares 0.52 0.45 0.03 --seed 1`` (50 minutes);
4. ``--base 3 --base-steps 600 --rate 0.25 --shares 0.8 0.19 0.01 --seed 2``, on fewer examples (17 minutes);

and are the mean of the last three: ``--base 2 --base 3 --base 4 --base-steps 0``. docs/results.md, "Conversations", has
the scores of all.
"""

import argparse
import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from learners.image_tokenizer import TokenizerTraining, learning_rate
from vargpt_rl.common.streams import make_outputs_lasting
from vargpt_rl.data.batches import DrawExample, Example, Row, SftCollator, TextExample
from vargpt_rl.data.samples import Prompt
from vargpt_rl.data.shapes import Scene, render, sample_scene
from vargpt_rl.data.shapes_dialogues import ShapesDialogue, ask, dialogue, varied_scene
from vargpt_rl.data.shapes_tasks import edit
from vargpt_rl.losses.supervised import sft_loss
from vargpt_rl.model.configuration import VargptConfig
from vargpt_rl.model.drawing_defaults import FILE, DrawingDefaults, with_defaults
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.prompt import REPLY, SYSTEM, ChatFormat, ImageToDraw, Part
from vargpt_rl.model.scales import token_count
from vargpt_rl.model.whole import check_config, weight_files
from vargpt_rl.release.tiny_v1 import shapes_bpe
from vargpt_rl.stages import STAGES, freeze
from vargpt_rl.storage.files import write_atomically
from vargpt_rl.storage.sharded import read_json

SPECIAL = [
    "endoftext",
    "im_start",
    "im_end",
    "vision_start",
    "vision_end",
    "vision_pad",
    "image_pad",
    "video_pad",
    "image_gen_start",
    "image_gen_end",
    "image_gen_pad",
]
TEXT_TOKENIZER = "tokenizer.json"
SEEN_SIDE = 112  # side of understood images: 8 x 8 patches of 14 pixels


def build_text_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE tokenizer of the shapes world with the release's special tokens."""
    special = [f"<|{name}|>" for name in SPECIAL]
    bpe = shapes_bpe(special, [SYSTEM, REPLY, "system", "user", "assistant", "yes", "no"])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|endoftext|>", eos_token="<|im_end|>", additional_special_tokens=special
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> VargptConfig:
    """All parts of the release's architecture, about 4.5 million parameters in total."""
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in SPECIAL}
    return VargptConfig(
        text_config=dict(
            hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=384,
            vocab_size=512, rms_norm_eps=1e-6, max_position_embeddings=32768, initializer_range=0.05,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 6, 6]),
            bos_token_id=ids["endoftext"], pad_token_id=ids["endoftext"], eos_token_id=ids["im_end"],
        ),
        vision_config=dict(depth=3, embed_dim=96, hidden_size=128, num_heads=3, patch_size=14, initializer_range=0.05),
        decoder_config=dict(width=128, depth=4, heads=4),
        image_tokenizer_config=dict(
            bits=32, base_channels=8, channel_multipliers=[1, 2, 4, 8, 12], blocks_per_level=1, norm_groups=8
        ),
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"],
        image_gen_start_token_id=ids["image_gen_start"], image_gen_end_token_id=ids["image_gen_end"],
        image_gen_pad_token_id=ids["image_gen_pad"], initializer_range=0.05,
    )  # fmt: skip


def build_image_processor() -> Qwen2VLImageProcessorPil:
    """Return an image processor that shows every image with the same number of pixels."""
    pixels = SEEN_SIDE**2
    return Qwen2VLImageProcessorPil(size={"shortest_edge": pixels, "longest_edge": pixels})


def image_tensor(scene: Scene, side: int, style: str, rng: np.random.Generator) -> torch.Tensor:
    """Render a scene: uint8 [3, side, side]."""
    return torch.from_numpy(np.asarray(render(scene, side, style, rng)).copy()).permute(2, 0, 1)


def tokenizer_batches(seed: int) -> Iterator[torch.Tensor]:
    """Endless batches for the image tokenizer: sixteen images at 128 px, every fifth batch four at 256 px."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    styles, shares = ["corpus", "commercial", "clean"], [0.45, 0.45, 0.1]

    def pool(count: int, side: int) -> torch.Tensor:
        return torch.stack(
            [image_tensor(sample_scene(rng), side, str(rng.choice(styles, p=shares)), rng) for _ in range(count)]
        )

    small, large = pool(8000, 128), pool(1200, 256)
    for step in itertools.count():
        images, size = (large, 4) if step % 5 == 4 else (small, 16)
        batch = images[torch.randint(len(images), (size,), generator=generator)]
        for axis in (2, 3):
            if torch.rand(1, generator=generator) < 0.5:
                batch = batch.flip(axis)
        yield batch.float() / 127.5 - 1


@torch.inference_mode()
def encode_corpus(model: Vargpt, count: int, side: int, seed: int) -> list[DrawExample]:
    """Corpus images, half of them in the noisy style, as image-tokenizer features."""
    rng, examples = np.random.default_rng(seed), []
    for _ in range(count // 8):
        scenes = [sample_scene(rng) for _ in range(8)]
        styles = rng.choice(["corpus", "clean"], 8, p=[0.5, 0.5])
        drawn = [image_tensor(s, side, str(style), rng) for s, style in zip(scenes, styles, strict=True)]
        images = torch.stack(drawn)
        features = model.image_tokenizer.features(images.float() / 127.5 - 1).half().numpy()
        prompts = [Prompt("", scene.caption, REPLY) for scene in scenes]
        examples += [DrawExample(prompt, f) for prompt, f in zip(prompts, features, strict=True)]
    return examples


class Edit(NamedTuple):
    """An instruction, the image before the edit, and the features of the image after it."""

    instruction: str
    before: Image.Image
    features: np.ndarray

    def example(self, chat: ChatFormat) -> DrawExample:
        return DrawExample(Prompt("", self.instruction, REPLY), self.features, chat.vision_inputs([self.before]))


@torch.inference_mode()
def encode_edits(model: Vargpt, count: int, side: int, seed: int) -> list[Edit]:
    """Edits of images in the commercial style, as in the edit stage."""
    rng, edits = np.random.default_rng(seed), []
    for _ in range(count // 8):
        before = [sample_scene(rng) for _ in range(8)]
        instructions, after = zip(*(edit(scene, rng) for scene in before), strict=True)
        images = torch.stack([image_tensor(scene, side, "commercial", rng) for scene in after])
        features = model.image_tokenizer.features(images.float() / 127.5 - 1).half().numpy()
        shown = [render(scene, SEEN_SIDE, "commercial", rng) for scene in before]
        edits += map(Edit, instructions, shown, features)
    return edits


def question_examples(chat: ChatFormat, rng: np.random.Generator, count: int) -> list[TextExample]:
    """Questions about images in the clean and commercial styles; half of them ask for all that is there."""
    examples = []
    for _ in range(count):
        scene = varied_scene(rng)
        image = render(scene, SEEN_SIDE, str(rng.choice(["clean", "commercial"])), rng)
        examples.append(TextExample(*ask(scene, rng), chat.vision_inputs([image])))
    return examples


class EncodedDialogue(NamedTuple):
    """A dialogue, with the features of the images that the assistant draws in it."""

    dialogue: ShapesDialogue
    features: tuple[np.ndarray, ...]

    def row(self, chat: ChatFormat, side: int, rng: np.random.Generator) -> Row:
        """Encode the whole conversation; ``side`` is that of its drawings in pixels."""
        turns = self.dialogue.turns
        images = [render(turn.shown, SEEN_SIDE, self.dialogue.style, rng) for turn in turns if turn.shown]
        vision = chat.vision_inputs(images) if images else None
        shown = iter(chat.shown(vision.image_grid_thw if vision else None))
        tokens = token_count(chat.config.image_tokenizer_config.schedule_for(side))
        said: list[tuple[str, list[Part]]] = []
        for turn in turns:
            said.append(("user", [*([next(shown)] if turn.shown else []), turn.text]))
            said.append(("assistant", [turn.reply, *([ImageToDraw(tokens)] if turn.drawn else [])]))
        return Row(chat.encode(said), vision, self.features)


@torch.inference_mode()
def encode_conversations(model: Vargpt, count: int, side: int, seed: int) -> list[EncodedDialogue]:
    """Conversations of two to four turns that draw at least once."""
    rng, conversations = np.random.default_rng(seed), []
    while len(conversations) < count:
        talk = dialogue(rng, int(rng.integers(2, MOST_TURNS + 1)))
        drawn = [image_tensor(turn.drawn, side, talk.style, rng) for turn in talk.turns if turn.drawn]
        if drawn:
            features = model.image_tokenizer.features(torch.stack(drawn).float() / 127.5 - 1).half().numpy()
            conversations.append(EncodedDialogue(talk, tuple(features)))
    return conversations


MOST_TURNS = 4
"""Turns of the longest conversations."""
DEFAULTS = DrawingDefaults(resolution=128, cfg=1.0, tau=0.5, top_k=900, top_p=0.97, turns=MOST_TURNS, edits=True)
"""What the model is drawn with, and what it was trained on."""
CORPORA = {128: 8000, 256: 2400, 512: 128}
"""Numbers of drawings by resolution, split over the ranks."""
EDITS = {128: 6000, 256: 800, 512: 64}
"""Numbers of edits."""
CONVERSATIONS = {128: 3000, 256: 320, 512: 16}
"""Numbers of conversations."""
DRAWINGS_PER_STEP = {128: 6, 256: 3, 512: 1}
"""Drawings per step on each rank, by resolution."""
EDITS_PER_STEP = {128: 4, 256: 1, 512: 1}
"""Edits per step on each rank."""
CONVERSATIONS_PER_STEP = {128: 3, 256: 1, 512: 1}
"""Conversations per step on each rank."""
QUESTIONS_PER_STEP = 10
PEAK_LR = 2e-3
"""Peak learning rate of AdamW."""
MUON_LR = 6e-3
"""Peak learning rate of Muon."""


class TrainingSchedule(NamedTuple):
    """Learning rates and resolutions of a training."""

    rate: float
    """Peak of the learning rates, as a share of ``PEAK_LR`` and ``MUON_LR``."""
    decay: float
    """Share of the steps in which they fall to zero."""
    phases: tuple[tuple[float, dict[int, float]], ...]
    """Share of the steps at which a phase ends, and the probability of each resolution in it."""

    def shares(self, progress: float) -> dict[int, float]:
        """Return the probability of each resolution after a share of the steps."""
        return next(shares for until, shares in self.phases if progress < until)


FROM_SCRATCH = TrainingSchedule(1.0, 0.4, ((0.6, {128: 1.0}), (1.0, {128: 0.47, 256: 0.48, 512: 0.05})))
"""Progressive resolution."""


class Corpora(NamedTuple):
    """Drawings, edits and conversations to train on, by resolution."""

    drawings: dict[int, list[DrawExample]]
    edits: dict[int, list[Edit]]
    conversations: dict[int, list[EncodedDialogue]]

    def batches(self, side: int, chat: ChatFormat, rng: np.random.Generator) -> dict[str, list[Example]]:
        """Sample a step's examples of each kind, questions included."""
        drawn = rng.integers(len(self.drawings[side]), size=DRAWINGS_PER_STEP[side])
        edited = rng.integers(len(self.edits[side]), size=EDITS_PER_STEP[side])
        held = rng.integers(len(self.conversations[side]), size=CONVERSATIONS_PER_STEP[side])
        return {
            "drawings": [self.drawings[side][i] for i in drawn],
            "edits": [self.edits[side][i].example(chat) for i in edited],
            "questions": list(question_examples(chat, rng, QUESTIONS_PER_STEP)),
            "conversations": [self.conversations[side][i].row(chat, side, rng) for i in held],
        }


def encode_corpora(model: Vargpt, rank: int, ranks: int, seed: int) -> Corpora:
    """Encode a rank's share of all drawings, edits and conversations."""
    first = 1000 * rank + 10 * seed
    return Corpora(
        {side: encode_corpus(model, n // ranks, side, side + first) for side, n in CORPORA.items()},
        {side: encode_edits(model, n // ranks, side, side + first + 1) for side, n in EDITS.items()},
        {side: encode_conversations(model, n // ranks, side, side + first + 2) for side, n in CONVERSATIONS.items()},
    )


def build_optimizers(model: Vargpt, peak_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for matrices inside blocks and projectors, AdamW for embeddings, heads and vectors."""
    inside = re.compile(r"\.(layers|blocks)\.|^projector_")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in trained.items() if p.ndim == 2 and inside.search(name)}
    rest = [p for name, p in trained.items() if name not in matrices]
    return [
        torch.optim.Muon(matrices.values(), lr=MUON_LR, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Average gradients over ranks, if there are several; a missing gradient counts as zero."""
    if not dist.is_initialized():
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.nn.utils.parameters_to_vector(gradients)
    dist.all_reduce(flat)
    torch.nn.utils.vector_to_parameters(flat / dist.get_world_size(), gradients)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def train_base(
    model: Vargpt, chat: ChatFormat, steps: int, on_step, schedule: TrainingSchedule = FROM_SCRATCH, seed: int = 0
) -> None:
    """Train all but the image tokenizer on drawings, edits and conversations at several resolutions, and on questions.

    ``seed`` chooses the examples and the order of resolutions.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    stage = STAGES["base"]
    seed_of_rank = 11 + rank + 10 * seed
    rng = np.random.default_rng(seed_of_rank)
    side_rng = np.random.default_rng(5 + seed)
    torch.manual_seed(seed_of_rank)
    corpora = encode_corpora(model, rank, dist.get_world_size() if dist.is_initialized() else 1, seed)
    freeze(model, stage)
    collate, model = SftCollator(chat), model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizers = build_optimizers(model, PEAK_LR)
    peaks = [schedule.rate * optimizer.defaults["lr"] for optimizer in optimizers]
    for step in range(steps):
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak, decay=schedule.decay)
        shares = schedule.shares(step / steps)
        side = int(side_rng.choice(list(shares), p=list(shares.values())))  # the same on every rank
        batches = corpora.batches(side, chat, rng)
        metrics = {}
        for kind, examples in batches.items():
            loss, measured = sft_loss(model, collate(examples), stage.noise, stage.text_weight, reweight=True)
            loss.backward()
            metrics |= {f"{kind}/{key}": value for key, value in measured.items()}
        average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        on_step(step, side, metrics)
    model.eval()


def train_tokenizer(model: Vargpt, steps: int) -> None:
    """Train the image tokenizer on the main rank and broadcast it to the others."""
    main = not dist.is_initialized() or dist.get_rank() == 0

    def report(step: int, loss: float) -> None:
        if step % 100 == 0:
            print(f"image tokenizer: step {step} of {steps}, loss {loss:.4f}", flush=True)

    if main:
        TokenizerTraining(model.image_tokenizer, tokenizer_batches(seed=7), steps, PEAK_LR).run(report)
    if dist.is_initialized():
        for tensor in model.image_tokenizer.state_dict().values():
            dist.broadcast(tensor, 0)


OF_SAVING = ("dtype", "transformers_version", "_name_or_path")
"""Keys of a configuration that say how a model was saved, not what it is."""


def trouble_with(bases: list[Path]) -> str:
    """Say why training cannot continue from models or their mean: empty if it can."""
    known: tuple[dict, dict] | None = None
    for base in bases:
        try:
            config = check_config(base)
            words = read_json(base / TEXT_TOKENIZER)
            weight_files(base)
        except (OSError, ValueError) as error:
            return f"--base: {error}"
        if not isinstance(config, VargptConfig):
            return f"--base {base}: expected a model of type {VargptConfig.model_type}, got {config.model_type}"
        sizes = _without(OF_SAVING, config.to_dict())
        known = known or (sizes, words)
        if sizes != known[0]:
            return f"--base {base}: expected the settings of {bases[0]} in config.json"
        if words != known[1]:
            return f"--base {base}: expected the text tokenizer of {bases[0]}"
    return ""


def _without(keys: tuple[str, ...], settings: dict) -> dict:
    """Return settings without some keys, also in the dictionaries among their values."""
    kept = {key: value for key, value in settings.items() if key not in keys}
    return {key: _without(keys, value) if isinstance(value, dict) else value for key, value in kept.items()}


def load_mean(models: list[Path]) -> Vargpt:
    """Load a model in fp32, or the mean of the weights of several."""
    loaded = [Vargpt.from_pretrained(folder, dtype=torch.float32) for folder in models]
    states = [model.state_dict() for model in loaded]
    loaded[0].load_state_dict({name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]})
    return loaded[0]


def parse_options() -> argparse.Namespace:
    """Read the command line; exits with 2 if an option is bad."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--image-tokenizer", type=Path, help="model whose image tokenizer is reused")
    parser.add_argument("--base", type=Path, action="append", help="model to continue from; repeat it for a mean")
    parser.add_argument("--tokenizer-steps", type=int, default=3600)
    parser.add_argument("--base-steps", type=int, default=3600)
    parser.add_argument("--rate", type=float, default=0.5, help="of --base: peak of the learning rates, as a share")
    sides = f"of --base: shares of the steps at {', '.join(map(str, CORPORA))} px"
    parser.add_argument("--shares", type=float, nargs=len(CORPORA), default=[0.7, 0.27, 0.03], help=sides)
    parser.add_argument("--seed", type=int, default=0, help="of the examples; another one for each continuation")
    options = parser.parse_args()
    if min(options.shares) < 0 or not abs(sum(options.shares) - 1) < 1e-9:
        parser.error(f"--shares {' '.join(map(str, options.shares))}: expected shares of 0 or more with a sum of 1")
    if not 0 < options.rate < math.inf:
        parser.error(f"--rate {options.rate}: expected a number above 0")
    for name in ("tokenizer_steps", "base_steps", "seed"):
        if getattr(options, name) < 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: expected 0 or more")
    if options.base and options.image_tokenizer:
        parser.error("--image-tokenizer: a --base has an image tokenizer already, expected one of the two")
    if trouble := trouble_with(options.base or []):
        parser.error(trouble)
    return options


def main() -> None:
    """Train from scratch or a base and save in half precision, ready for ``checkpoint=OUT``."""
    options = parse_options()
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(hours=12))  # other ranks wait for the image tokenizer
    main_rank = not dist.is_initialized() or dist.get_rank() == 0
    text_tokenizer = (
        PreTrainedTokenizerFast.from_pretrained(options.base[0]) if options.base else build_text_tokenizer()
    )
    config = build_config(text_tokenizer)
    for part in (text_tokenizer, build_image_processor(), config):
        part.save_pretrained(options.out)
    torch.manual_seed(0)
    model = Vargpt(config)
    if options.base:
        model = load_mean(options.base)
    elif options.image_tokenizer:
        trained = Vargpt.from_pretrained(options.image_tokenizer, dtype=torch.float32).image_tokenizer
        model.image_tokenizer.load_state_dict(trained.state_dict())
    else:
        train_tokenizer(model, options.tokenizer_steps)

    def report(step: int, side: int, metrics: dict[str, float]) -> None:
        if not main_rank:
            return
        if step % 100 == 99:
            measured = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items() if "scale" not in key)
            print(f"base: step {step + 1} of {options.base_steps}, {side} px, {measured}", flush=True)
        if step % 500 == 499:
            model.save_pretrained(options.out)  # for inspection while training runs

    chat = ChatFormat(str(options.out), config)
    shares = dict(zip(CORPORA, options.shares, strict=True))
    schedule = TrainingSchedule(options.rate, 1.0, ((1.0, shares),)) if options.base else FROM_SCRATCH
    if options.base_steps:
        train_base(model, chat, options.base_steps, report, schedule, options.seed)
    if main_rank:
        model.half().save_pretrained(options.out)
        content = with_defaults(options.out, DEFAULTS)
        write_atomically(options.out / FILE, json.dumps(content, indent=2).encode())


if __name__ == "__main__":
    make_outputs_lasting()
    main()
