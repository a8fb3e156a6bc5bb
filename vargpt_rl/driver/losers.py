"""An iteration's pairs in the making: losers are drawn from the SFT checkpoints and paired, round by round.

Each round takes the next prompts and writes a part of the preference table; a single round writes the table itself. The
earlier checkpoints draw first, for all rounds, so that from the first pairs on the workers keep the final SFT weights,
which are the reference. Parts that are there when a run goes on are not made again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vargpt_rl.data.preferences import count_rows, join_parts, part_path
from vargpt_rl.data.samples import Prompt, Sample
from vargpt_rl.driver.rollout import Rollouts


@dataclass
class Losers:
    """``prompts[i]`` is drawn with ``seeds[i]`` by the last of the weight sets ``sources[whose[i]]``; the last of these
    is the final policy. ``size`` of them make a round.
    """

    rollouts: Rollouts
    table: Path
    prompts: list[Prompt]
    seeds: list[int]
    sources: list[tuple[Path, ...]]
    whose: np.ndarray
    resolution: int
    size: int
    seconds: float = 0.0
    drawn: int = 0
    counts: dict = field(default_factory=dict)

    @property
    def rounds(self) -> list[range]:
        """The drawings of each round."""
        count = len(self.prompts)
        return [range(at, min(at + self.size, count)) for at in range(0, count, self.size)]

    def make(self, builder: Callable, reward: Callable | None, micro_batch: int) -> Iterator[int]:
        """Make them; after each round, how many pairs there are. ValueError if in the end there are none.

        Then ``counts`` says what became of all drawings (rewards: of those of this start of the run), ``seconds`` and
        ``drawn`` what the drawing took.
        """
        rounds, many = self.rounds, len(self.rounds) > 1
        parts = [part_path(self.table, number) if many else self.table for number in range(len(rounds))]
        done = sum(part.exists() for part in parts) if many else 0
        samples, built = {}, 0
        for source in range(len(self.sources) - 1):
            samples |= self._draw(source, [i for left in rounds[done:] for i in left])
        self.rollouts.serve(self.sources[-1])
        with self.rollouts.judging(reward) as judge:
            for number, (part, mine) in enumerate(zip(parts, rounds, strict=True)):
                if number >= done:
                    samples |= self._draw(len(self.sources) - 1, mine)
                    ordered = [samples.pop(i) for i in sorted(mine, key=lambda i: (self.whose[i], i))]
                    self.counts = self.rollouts.write_pairs(part, ordered, builder, judge, micro_batch, many)
                built += count_rows(part)
                yield built
        if many:
            origin = join_parts(self.table, parts)
            self.counts |= {"built": built, "dropped": sum(origin["dropped_by_reason"].values()), **origin}
        if self.counts["samples"] != len(self.prompts):
            raise RuntimeError(f"{len(self.prompts)} drawings were asked for, {self.counts['samples']} came back")

    def _draw(self, source: int, indices: list[int] | range) -> dict[int, Sample]:
        """Those that are of this source, by number."""
        share = [i for i in indices if self.whose[i] == source]
        if not share:
            return {}
        weights, texts, seeds = self.sources[source], [self.prompts[i] for i in share], [self.seeds[i] for i in share]
        self.rollouts.serve(weights)
        drawn, seconds = self.rollouts.draw(texts, seeds, self.resolution, "/".join(weights[-1].parts[-2:]))
        self.seconds, self.drawn = self.seconds + seconds, self.drawn + len(drawn)
        return dict(zip(share, drawn, strict=True))
