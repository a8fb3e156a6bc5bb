"""Sampling: generate images with a policy, and an iteration's samples with its SFT checkpoints.

Samples are the rejected side of DPO (VARGPT-v1.1, section 3.2.2): "different SFT checkpoints and the fully SFT-trained
model" draw each prompt, in the shares that ``sft.shares`` gives.
"""

import time
from dataclasses import asdict, dataclass, replace

import numpy as np

from actors.worker import BaseWorker, Failure, Worker
from vargpt_rl.data.rollouts import Rollouts, write_rollouts
from vargpt_rl.data.samples import Prompt, Sample, Winner
from vargpt_rl.driver.parts import in_parts, packed, sample_fields, sample_of, unpacked
from vargpt_rl.driver.seeds import Purpose, apportion, seeds_for
from vargpt_rl.driver.session import StageContext
from vargpt_rl.storage.checkpoint import Policy

SAMPLES = "samples.parquet"
"""File of an iteration's samples and winners in `StageContext.rollouts`."""


@dataclass(frozen=True)
class SamplePlan:
    """Samples of an iteration: ``prompts[i]`` drawn with ``seeds[i]`` by ``samplers[owner[i]]``.

    ``samplers`` are policies in the order in which they draw; the last one is the final policy.
    """

    prompts: list[Prompt]
    seeds: list[int]
    samplers: list[Policy]
    owner: np.ndarray

    def drawn_by(self, sampler: int, indices: range | list[int]) -> list[int]:
        """Return those of ``indices`` that this sampler draws."""
        return [i for i in indices if self.owner[i] == sampler]

    def ordered(self, indices: range) -> list[int]:
        """Return ``indices`` grouped by sampler, as the preference builder is given them."""
        return sorted(indices, key=lambda i: (self.owner[i], i))

    @property
    def checkpoints(self) -> list[str]:
        """Names of the policies that draw anything."""
        return sorted({checkpoint_name(self.samplers[i]) for i in self.owner})


def checkpoint_name(policy: Policy) -> str:
    """Name a policy in samples: the last two parts of its last weight set's path."""
    return "/".join(policy.weights[-1].parts[-2:])


def plan_samples(context: StageContext, policy: Policy) -> SamplePlan:
    """Plan an iteration's samples: ``preference.samples`` of each prompt, shared among the SFT checkpoints.

    ``policy`` is the final SFT policy.
    """
    settings = context.config.preference
    final = policy.weights[-1]
    earlier = replace(policy, weights=policy.weights[:-1])
    checkpoints = [final.with_name(f"step-{step:06d}") for step in context.config.sft.saved_steps()]
    prompts = context.inputs.prompts or context.source.prompts("train", settings.count, _seed(context, Purpose.PROMPTS))
    prompts = [prompt for prompt in prompts[: settings.count] for _ in range(settings.samples)]
    shares = list(context.config.sft.samplers().values())
    return SamplePlan(
        prompts=prompts,
        seeds=seeds_for(len(prompts), context.config.seed, context.index, Purpose.SAMPLES),
        samplers=[earlier.plus(weights) for weights in (*checkpoints, final)],
        owner=apportion(len(prompts), shares, _seed(context, Purpose.SOURCES)),
    )


def _seed(context: StageContext, purpose: Purpose) -> int:
    return seeds_for(1, context.config.seed, context.index, purpose)[0]


def sample(context: StageContext, policy: Policy) -> dict:
    """Generate an iteration's samples with its SFT checkpoints and encode the stronger system's images."""
    plan = plan_samples(context, policy)
    samples: dict[int, Sample] = {}
    seconds = 0.0
    for sampler in range(len(plan.samplers)):
        drawn, took = draw_share(context, plan, sampler, range(len(plan.prompts)))
        samples |= drawn
        seconds += took
    context.swap_to(policy)
    ordered = [samples[i] for i in plan.ordered(range(len(samples)))]
    rollouts = Rollouts(ordered, {})
    rollouts = replace(rollouts, winners=encode_winners(context, rollouts.prompts))
    context.inputs.check_quarantine()
    write_rollouts(context.rollouts / SAMPLES, rollouts)
    return report_speed(context, plan, len(samples), seconds)


def report_speed(context: StageContext, plan: SamplePlan, images: int, seconds: float) -> dict:
    """Log and return the speed of sampling: ``images`` generated in ``seconds``."""
    speed = {
        "images": images,
        "seconds": seconds,
        "images_per_second": images / seconds if images else None,
        "batch_size": context.config.rollout.images_at_once,
    }
    context.log("rollout", context.index, speed)
    return speed | {"checkpoints": plan.checkpoints}


def draw_share(
    context: StageContext, plan: SamplePlan, sampler: int, indices: range | list[int], keep: str = "all"
) -> tuple[dict[int, Sample], float]:
    """Generate those of ``indices`` that a sampler draws; return the samples by index, and seconds.

    Finished parts are kept under a name that ends in ``keep``.
    """
    share = plan.drawn_by(sampler, indices)
    if not share:
        return {}, 0.0
    policy = plan.samplers[sampler]
    context.swap_to(policy)
    name = checkpoint_name(policy)
    jobs = [(plan.prompts[i], plan.seeds[i]) for i in share]
    drawn, seconds = _generate_in_parts(context, jobs, name, f"sampler-{sampler}-{keep}")
    return dict(zip(share, drawn, strict=True)), seconds


def generate_kept(context: StageContext, prompts: list[Prompt], seeds: list[int], name: str) -> list[Sample]:
    """Do the same as `generate`; a resumed step generates only what is missing."""
    return _generate_in_parts(context, list(zip(prompts, seeds, strict=True)), name, "images")[0]


def _generate_in_parts(
    context: StageContext, jobs: list[tuple[Prompt, int]], name: str, keep: str
) -> tuple[list[Sample], float]:
    """Generate in parts, kept under ``keep``; return the samples and the seconds they took."""

    def draw(part: list[tuple[Prompt, int]]) -> dict:
        began = time.perf_counter()
        samples = generate(context, [prompt for prompt, _ in part], [seed for _, seed in part], name)
        return {"samples": [sample_fields(each) for each in samples], "seconds": time.perf_counter() - began}

    samples: list[Sample] = []
    seconds = 0.0
    for found in in_parts(context, keep, jobs, draw):
        samples += [sample_of(each) for each in found["samples"]]
        seconds += found["seconds"]
    return samples, seconds


def generate(context: StageContext, prompts: list[Prompt], seeds: list[int], name: str) -> list[Sample]:
    """Generate an image for each prompt and seed with the weights in the workers, called ``name`` in the samples.

    If ``rollout.reply`` is generate, the model first answers in its own words.
    """
    if context.config.rollout.reply == "generate":
        prompts = _with_own_replies(context, prompts)
    jobs = list(zip(prompts, seeds, strict=True))
    return context.pool.run(Worker.generate_images, jobs, context.resolution, context.config.sampling, name)


def _with_own_replies(context: StageContext, prompts: list[Prompt]) -> list[Prompt]:
    """Replace replies by the model's own words; keep and count those for which it begins no image.

    Edits keep their replies too: an instruction without its image means little.
    """
    plain = [prompt for prompt in prompts if prompt.shown is None]
    if not plain:
        return prompts
    texts = list(dict.fromkeys(prompt.text for prompt in plain))
    replies = context.writer.run(BaseWorker.reply, texts, context.config.rollout.reply_tokens)
    said = dict(zip(texts, replies, strict=True))
    template = sum(said[prompt.text] is None for prompt in plain)
    context.log("reply", context.pool.version, {"generated": len(plain) - template, "template": template})
    return [
        prompt if prompt.shown is not None or (reply := said[prompt.text]) is None else replace(prompt, reply=reply)
        for prompt in prompts
    ]


def encode_winners(context: StageContext, prompts: list[Prompt], keep: str = "all") -> dict[str, Winner]:
    """Encode the stronger system's images as bits, by prompt id; missing and unreadable ones are left out.

    Finished parts are kept under a name that ends in ``keep``.
    """
    keys = {prompt.id: key for prompt in prompts if (key := context.source.winner_key(prompt)) is not None}
    with_winner = [prompt for prompt in prompts if prompt.id in keys]

    def encode(part: list[str]) -> dict:
        found = context.pool.run(Worker.encode, part, context.resolution)
        return {"images": [asdict(each) if isinstance(each, Failure) else packed(each.bits) for each in found]}

    parts = in_parts(context, f"winners-{keep}", [keys[prompt.id] for prompt in with_winner], encode)
    encoded = [image for part in parts for image in part["images"]]
    winners = {}
    for prompt, result in zip(with_winner, encoded, strict=True):
        if isinstance(result, dict):
            context.inputs.quarantine.add(result["key"], prompt.text, result["reason"])
        else:
            winners[prompt.id] = Winner(prompt, unpacked(result), context.resolution, keys[prompt.id])
    return winners
