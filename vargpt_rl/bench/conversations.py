"""Measure conversations about shapes: ``python -m vargpt_rl.bench.conversations [checkpoints=[tiny,DIR] count=120]``.

Each conversation has four turns on held-out captions: a drawing, a question about it, a change of it, and a drawing of
something else. The model decides itself whether it draws, and no image is shown again. Questions and changes are judged
by what the drawing shows, and only after a right one. Beside them, images with two kinds of things are shown, each in a
conversation of its own: a question, a request to list all that is there, and a change.

Prints a Markdown table: shares of right replies with 95 % intervals. Exit codes: 0 done, 2 an argument is wrong.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from vargpt_rl.common.averages import with_interval
from vargpt_rl.common.command import run_command
from vargpt_rl.common.settings import Count, CountOrNone
from vargpt_rl.data.shapes import Scene, render, sample_scene
from vargpt_rl.data.shapes_check import check, find_things
from vargpt_rl.data.shapes_dialogues import DESCRIBE, describe
from vargpt_rl.data.shapes_edit_check import check_edit
from vargpt_rl.data.shapes_tasks import edit, question
from vargpt_rl.inference.conversation import Conversation, DrawnImage, Reply, load
from vargpt_rl.inference.images import DrawingSettings
from vargpt_rl.model.hub import check_model

TWO_KINDS = ("two_objects", "position", "colour_attribution")
"""Tasks some of whose captions have two kinds of things."""
SHOWN_SIDE = 128

Results = dict[str, list[tuple[str, bool]]]
"""Of each reply of a kind, the caption that it depends on, and whether it was right."""


@dataclass
class ConversationBench:
    """Settings of the benchmark."""

    checkpoints: list[str] = field(default_factory=lambda: ["tiny"])
    """Models to compare."""
    count: Count = 120
    """Conversations, and shown images."""
    resolution: Count = 128
    """Side of the drawings in pixels."""
    seed: CountOrNone = 0
    """Seed of captions, questions, changes and drawings."""


def drawn_alone(reply: Reply) -> Image.Image | None:
    """Return the image of a reply that has exactly one."""
    images = [part.image for part in reply if isinstance(part, DrawnImage)]
    return images[0] if len(images) == 1 else None


def said(reply: Reply) -> str:
    """Return the words of a reply."""
    return " ".join(part for part in reply if isinstance(part, str)).strip()


def converse(talk: Conversation, rng: np.random.Generator, results: Results) -> None:
    """Hold one conversation of four turns and add what was right."""
    caption, other = (sample_scene(rng, split="held_out").caption for _ in range(2))
    image = drawn_alone(talk.say(caption))
    right = image is not None and check(image, caption).correct
    results["drawing, turn 1"].append((caption, right))
    if image is None or not right:
        return
    before = Scene(caption, "", tuple(find_things(image)))
    asked, answer = question(before, rng)
    results["question about it, turn 2"].append((caption, said(talk.say(asked)) == answer))
    instruction, after = edit(before, rng)
    changed = drawn_alone(talk.say(instruction))
    right = changed is not None and check_edit(before, after, changed).correct
    results["change of it, turn 3"].append((caption, right))
    last = drawn_alone(talk.say(other))
    results["another drawing, turn 4"].append((other, last is not None and check(last, other).correct))


def two_kinds(rng: np.random.Generator) -> Scene:
    """Sample a held-out scene with two kinds of things."""
    while True:
        scene = sample_scene(rng, str(rng.choice(TWO_KINDS)), "held_out")
        if len({thing.shape for thing in scene.things}) == 2:
            return scene


def measure(checkpoint: str, config: ConversationBench) -> Results:
    """Return whether each reply of a model was right, by kind."""
    settings = DrawingSettings(checkpoint=checkpoint, resolution=config.resolution)
    model, chat = load(check_model(checkpoint))
    results: Results = defaultdict(list)

    def begin(number: int) -> Conversation:
        return Conversation(model, chat, settings.size, settings.sampling, seed=config.seed + 10 * number)

    for number in range(config.count):
        converse(begin(number), np.random.default_rng([config.seed, number]), results)
    for number in range(config.count):
        rng = np.random.default_rng([config.seed, config.count + number])
        scene = two_kinds(rng)
        image = render(scene, SHOWN_SIDE, "clean", rng)
        asked, answer = question(scene, rng)
        instruction, after = edit(scene, rng)
        changed = drawn_alone(begin(number).say(instruction, [image]))
        for kind, right in {
            "question, two kinds shown": said(begin(number).say(asked, [image])) == answer,
            "list of two kinds shown": said(begin(number).say(DESCRIBE, [image])) == describe(scene),
            "change, two kinds shown": changed is not None and check_edit(scene, after, changed).correct,
        }.items():
            results[kind].append((scene.caption, right))
    return results


def table(measured: dict[str, Results]) -> str:
    """Format a Markdown row for each kind of reply, with a column for each model."""
    kinds = dict.fromkeys(kind for results in measured.values() for kind in results)
    lines = [f"| reply | {' | '.join(measured)} |", f"| --- |{' --- |' * len(measured)}"]
    for kind in kinds:
        cells = [_cell(results.get(kind, [])) for results in measured.values()]
        lines += [f"| {kind} | {' | '.join(cells)} |"]
    return "\n".join(lines)


def _cell(replies: list[tuple[str, bool]]) -> str:
    """Format a share with its interval, clustered by caption, and the number of replies."""
    if not replies:
        return "-"
    share = with_interval("right", [float(right) for _, right in replies], [caption for caption, _ in replies])
    return f"{share['right']:.3f} ({share['right_low']:.2f} to {share['right_high']:.2f}) of {len(replies)}"


def run(config: ConversationBench) -> None:
    """Measure all models and print the table."""
    print(table({checkpoint: measure(checkpoint, config) for checkpoint in config.checkpoints}))


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return its exit code."""
    return run_command(ConversationBench, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
