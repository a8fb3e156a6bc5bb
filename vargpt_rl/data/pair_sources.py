"""Data sources of runs on preference pairs of one's own: the pairs alone, or beside another source."""

from PIL import Image

from vargpt_rl.data.own_pairs import PREFIX, OwnPair, OwnPairs, PairImages, shuffled
from vargpt_rl.data.samples import ImageEdit, ImageQuestion, Prompt, Record
from vargpt_rl.data.sources import SPLITS, ImageCheck, Source


class PairsSource(Source):
    """The pairs as the only data: the chosen images are the training images and the winners of their prompts.

    ValueError if no prompt is held out.
    """

    def __init__(self, pairs: OwnPairs, images: PairImages):
        self.images = images
        self.lines = pairs.lines
        self._splits = {name: [_slim(pair) for pair in pairs.split(name)] for name in SPLITS}
        self._chosen = {prompt.id: key for name in SPLITS for prompt, key in reversed(self._splits[name])}
        if not self._splits["held_out"]:
            raise ValueError(
                "preference.pairs: no prompt is held out, but the iterations are measured on such: expected pairs of "
                "at least two prompts and data.held_out_fraction above 0"
            )

    def load(self, key: str, side: int) -> Image.Image:
        return self.images.load(key, side)

    def records(self, count: int, seed: int) -> list[Record]:
        found = shuffled(list(dict.fromkeys(self._splits["train"])), seed)
        return [Record(prompt.id, prompt, key) for prompt, key in (found[i % len(found)] for i in range(count))]

    def prompts(self, split: str, count: int, seed: int) -> list[Prompt]:
        return shuffled(list(dict.fromkeys(prompt for prompt, _ in self._splits[split])), seed)[:count]

    def winner_key(self, prompt: Prompt) -> str | None:
        return self._chosen.get(prompt.id)


def _slim(pair: OwnPair) -> tuple[Prompt, str]:
    """Return what travels to the workers of a pair."""
    return pair.prompt, pair.chosen


class SourceWithPairs(Source):
    """Another source, which also loads the images of pairs."""

    def __init__(self, base: Source, lines: int, images: PairImages):
        self.base = base
        self.images = images
        self.lines = base.lines + lines

    def load(self, key: str, side: int) -> Image.Image:
        return (self.images if key.startswith(f"{PREFIX}/") else self.base).load(key, side)

    def records(self, count: int, seed: int) -> list[Record]:
        return self.base.records(count, seed)

    def prompts(self, split: str, count: int, seed: int) -> list[Prompt]:
        return self.base.prompts(split, count, seed)

    def winner_key(self, prompt: Prompt) -> str | None:
        return self.base.winner_key(prompt)

    def questions(self, count: int, seed: int, split: str) -> list[ImageQuestion]:
        return self.base.questions(count, seed, split)

    def edits(self, count: int, seed: int, split: str = "train") -> list[ImageEdit]:
        return self.base.edits(count, seed, split)

    def image_check(self) -> ImageCheck | None:
        return self.base.image_check()

    def edit_check(self) -> ImageCheck | None:
        return self.base.edit_check()
