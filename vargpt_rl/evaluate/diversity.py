"""Diversity of images over the seeds of one prompt, measured on their bits: no model and no decoding needed.

Shape legend: G groups, N images of a group, L image tokens, d bits of a packed token, b bits of an image.
"""

from collections.abc import Sequence

import numpy as np

from vargpt_rl.model.scales import Schedule, scale_slices


def diversity(groups: Sequence[Sequence[bytes]], schedule: Schedule) -> dict[str, float]:
    """Return the mean share of bits in which two images differ, within groups and between them.

    Each group holds the packed tokens of at least two images of one prompt, as many in each. Every scale counts alike:
    half of all bits are in the last scale, which says little about what is drawn. Independent fair bits have 0.5, equal
    images 0. ``diversity`` is that within groups; ``diversity/prompts`` that between images of different groups, which
    also falls if all prompts are answered by one image; it is missing for a single group.
    """
    tokens = sum(height * width for height, width in schedule)
    packed = np.frombuffer(b"".join(image for group in groups for image in group), np.uint8)
    images = len(groups[0])
    bits_GNb = np.unpackbits(packed.reshape(len(groups), images, -1), axis=-1)
    width = bits_GNb.shape[-1] // tokens  # the last byte may be padded
    bits_GNLd = bits_GNb[..., : tokens * width].reshape(len(groups), images, tokens, width)
    share_GLd = bits_GNLd.mean(1, dtype=np.float64)
    within_GLd = 2 * share_GLd * (1 - share_GLd) * images / (images - 1)
    found = {"diversity": _over_scales(within_GLd.mean(0), schedule)}
    if (count := len(groups)) > 1:
        total_Ld, squares_Ld = share_GLd.sum(0), (share_GLd**2).sum(0)
        between_Ld = 2 * total_Ld / count - 2 * (total_Ld**2 - squares_Ld) / (count * (count - 1))
        found["diversity/prompts"] = _over_scales(between_Ld, schedule)
    return found


def _over_scales(values_Ld: np.ndarray, schedule: Schedule) -> float:
    return float(np.mean([values_Ld[at].mean() for at in scale_slices(schedule)]))
