"""Pluggable rewards and preference builders.

Rewards run in processes of their own (`rewards.combined`); `rewards.testing` checks whether one keeps the contract.
"""

from collections.abc import Callable

from PIL import Image

Reward = Callable[[list[Image.Image], list[str]], list[float | None]]
"""Images and their prompts -> a number each, None where there is none."""
