"""Names of a run's steps and stages in words, for its page and its progress."""

import re

from vargpt_rl.evaluate.wording import MOMENTS

TITLES = {moment: f"evaluate {name}" for moment, name in MOMENTS.items()} | {
    "sft": "SFT",
    "after_sft": "evaluate",
    "encode": "encode pairs",
    "sample": "sample images",
    "judge": "judge images",
    "propose": "propose pairs",
    "pair": "pair images",
    "dpo": "DPO",
    "control": "control (SFT on winners)",
    "sft_on_winners": "control (SFT on winners)",
    "control_swap": "control swap",
    "after_control": "evaluate control",
    "grid": "sample grid",
    "grpo": "GRPO",
    "rft": "RFT",
    "online_dpo": "online DPO",
    "reward": "learn a reward",
    "rollout": "own images",
    "understands": "questions",
}
"""Words for parts of a step's name; other parts are words already."""


def step_title(step: str) -> str:
    """Return a name in words: ``iter-00/after_sft`` is "iteration 0: evaluate", ``iter-00`` "iteration 0"."""
    return ": ".join(_words(part) for part in step.split("/"))


def _words(part: str) -> str:
    if part in TITLES:
        return TITLES[part]
    if found := re.fullmatch(r"iter-(\d+)", part):
        return f"iteration {int(found[1])}"
    return f"{_words(part.removesuffix('_swap'))} swap" if part.endswith("_swap") else part.replace("_", " ")
