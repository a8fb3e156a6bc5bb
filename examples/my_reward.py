"""A reward of one's own: ``reward.path=examples/my_reward.py:colourful``; check it with ``vargpt-rl reward test``."""

import numpy as np


def colourful(images, prompts):
    """Mean saturation, 0 to 1; prompts about grey things are not scored."""
    scores = []
    for image, prompt in zip(images, prompts, strict=True):
        saturation = np.asarray(image.convert("HSV"))[..., 1]
        scores.append(None if "grey" in prompt else float(saturation.mean()) / 255)
    return scores
