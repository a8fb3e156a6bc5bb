"""Settings of the training data."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vargpt_rl.data.records.sources import RecordSource


@dataclass
class DataConfig:
    """Where images and captions come from. ``kind``: shapes (drawn on demand), captioned (a folder of images) or
    records (streams of conversations).

    ``seen_side``: pixels a side at which images are shown to the understanding path.

    For captions and for records: ``max_bad_fraction`` of them may be unusable; ``held_out_fraction`` of them, chosen by
    a hash of their ids, is never trained on but measured on (of records, those with an image to draw).

    For records: ``sources`` by name, each with the keys of ``vargpt_rl.data.records.sources.RecordSource``. All records
    of a source are drawings (edits count as such) or all are understanding, as the first. ``block`` rows are shuffled
    together, in each of ``workers`` processes of each rank. Rows of more than ``max_tokens`` are set aside. Shown
    images keep their shape and have at most ``seen_pixels``. ``pack``: short texts share a row. ``encoded``: a folder
    with the features of images to draw, for each resolution a sub-folder named after it (``DIR/256``) that
    ``vargpt_rl.data.encode`` made; without it the learner runs the image tokenizer.
    """

    kind: str = "shapes"
    captions: str | None = None
    images: str | None = None
    max_bad_fraction: float = 0.01
    held_out_fraction: float = 0.1
    seen_side: int = 224
    sources: dict[str, Any] = field(default_factory=dict)
    block: int = 1000
    workers: int = 2
    max_tokens: int = 4096
    seen_pixels: int = 401_408
    pack: bool = True
    encoded: str | None = None

    def __post_init__(self):
        if self.kind not in ("shapes", "captioned", "records"):
            raise ValueError(f"data.kind={self.kind}: expected shapes, captioned or records")
        if not 0 <= self.held_out_fraction < 1:
            raise ValueError(f"data.held_out_fraction={self.held_out_fraction}: expected 0 or more and less than 1")
        for key, least in (("block", 1), ("workers", 0), ("max_tokens", 1), ("seen_pixels", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"data.{key}={getattr(self, key)}: expected {least} or more")
        if (self.sources or self.encoded) and self.kind != "records":
            raise ValueError(f"data.sources and data.encoded are for data=records, not for data.kind={self.kind}")

    def records(self) -> dict[str, RecordSource]:
        """The sources. ValueError for an unknown key or a bad value in one, and where there are none."""
        found = {}
        for name, keys in self.sources.items():
            try:
                found[name] = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RecordSource), keys))
            except (OmegaConfBaseException, ValueError) as error:
                raise ValueError(f"data.sources.{name}: {str(error).splitlines()[0]}") from error
        if not found:
            raise ValueError("data.sources: none given, expected +data.sources.NAME.files=[FILE,...]")
        return found
