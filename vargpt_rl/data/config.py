"""Settings of the training data."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from vargpt_rl.common.settings import Between, Count, CountOrNone, Line, OneOf, Share, at_least, check_names, parse
from vargpt_rl.data.records.sources import RecordSource


@dataclass
class DataConfig:
    """Settings of the training data: images, captions and conversations."""

    kind: Annotated[str, OneOf("shapes", "captioned", "records", "pairs")] = "shapes"
    """shapes (drawn on demand), captioned (a folder of images), records (streams of conversations) or pairs (those of
    ``preference.pairs`` alone)."""
    captions: Line | None = None
    """Captioned: file of captions. JSON lines or an array, CSV or Parquet, by its ending."""
    images: Line | None = None
    """Captioned: folder of the captions' images."""
    image_field: Line = "file"
    """Captioned: key or column of the image's name (``file_name`` in the metadata of Hugging Face image folders)."""
    caption_field: Line = "caption"
    """Captioned: key or column of the caption."""
    id_field: Line = "id"
    """Captioned: key or column of the identifier, a text or a whole number; without one it is the image's name."""
    max_bad_fraction: Share = 0.01
    """Captioned, records and pairs: fraction of the records that may be unusable."""
    held_out_fraction: Annotated[float, Between(0, 1, includes_high=False)] = 0.1
    """Captioned, records and pairs: fraction that is held out for evaluation, chosen by a hash of the ids (of
    records only those with an image to draw, of pairs whole prompts)."""
    seen_side: Annotated[int, at_least(28)] = 224
    """Pixels a side at which images of shapes and captions are shown to the understanding path."""
    sources: dict[str, Any] = field(default_factory=dict)
    """Records: sources by name, with the keys of `vargpt_rl.data.records.sources.RecordSource`. All records of a source
    have the task of the first: images to draw (edits count as such) or understanding."""
    block: Count = 1000
    """Records: rows that are shuffled together in each worker."""
    workers: CountOrNone = 2
    """Records: data-loader processes of each rank."""
    max_tokens: Count = 4096
    """Records: longer rows are quarantined."""
    seen_pixels: Count = 401_408
    """Records: shown images keep their shape and are resized to at most this many pixels."""
    pack: bool = True
    """Records: short texts share a row."""
    encoded: Line | None = None
    """Records: folder with the features of images to draw, made by ``vargpt_rl.data.encode``, with a sub-folder for
    each resolution (``DIR/256``). Without it the learner runs the image tokenizer."""

    def __post_init__(self):
        if (self.sources or self.encoded) and self.kind != "records":
            raise ValueError(f"data.sources and data.encoded are for data=records, not for data.kind={self.kind}")

    def records(self) -> dict[str, RecordSource]:
        """Return the sources. ValueError for an unknown key or a bad value in one, and if there are none."""
        check_names(self.sources, "data.sources")
        found = {name: parse(RecordSource, keys, f"data.sources.{name}") for name, keys in self.sources.items()}
        if not found:
            raise ValueError("data.sources: none given, expected +data.sources.NAME.files=[FILE,...]")
        return found
