"""Pluggable rewards and preference builders.

Rewards run in separate processes (`rewards.combined`); `rewards.testing` checks a reward against the contract.
"""

from collections.abc import Callable, Sequence

from PIL import Image

Reward = Callable[[list[Image.Image], list[str]], Sequence[float | None]]
"""Images and their prompts -> one number each, None for an image without a score."""
