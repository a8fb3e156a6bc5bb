"""The same records in every format, and a loader of each.

As a script, ``python records.py FOLDER``, it resumes the loaders whose states another process saved in
FOLDER/states.pt, and writes the names of their remaining records to FOLDER/rest.json.
"""

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from PIL import Image
from torchdata.stateful_dataloader import StatefulDataLoader

from vargpt_rl.data.mixture import Mixture, MixtureSource
from vargpt_rl.data.records.formats import FORMATS, Fault, LeftOut
from vargpt_rl.data.records.layouts import Import, native
from vargpt_rl.data.records.reader import ReadOptions, Records, file_parts
from vargpt_rl.data.records.schema import RecordConversation

COUNT = 60
KINDS = ("json", "jsonl", "parquet", "saved", "webdataset")
SETUPS = [(kind, rank, workers) for kind in (*KINDS, "mixture") for rank in (0, 1) for workers in (0, 2)]


def png(seed: int = 0, size: tuple[int, int] = (6, 4)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def row(number: int, images: list) -> dict:
    turns = [("user", f"<image>\nwhat is {number}?"), ("assistant", f"it is {number}")]
    messages = [{"role": role, "content": text} for role, text in turns]
    return {"id": f"r{number}", "task": "understanding", "messages": messages, "images": images}


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def rows(kind: str, path: Path, start: int = 0, step: int = 1) -> list:
    """The rows of all parts, or the reasons of faults."""
    form = FORMATS[kind]
    found = [found for part in range(form.parts(path)) for found in form.read(path, part, start, step)]
    return [(number, row.reason if isinstance(row, Fault | LeftOut) else row) for number, row in found]


def write_tar(path: Path, numbers: range) -> None:
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            add(archive, f"{number:04d}.json", json.dumps(row(number, [])).encode())
            add(archive, f"{number:04d}.png", png(number))


def write(folder: Path) -> None:
    """The same records in every format; the images of JSON and JSON lines lie in the folder "images"."""
    (folder / "images").mkdir(parents=True)
    for number in range(COUNT):
        (folder / "images" / f"{number}.png").write_bytes(png(number))
    named = [row(number, [f"{number}.png"]) for number in range(COUNT)]
    (folder / "all.json").write_text(json.dumps(named))
    for half in (0, 1):  # fewer files than shards
        lines = [json.dumps(item) for item in named[half * COUNT // 2 : (half + 1) * COUNT // 2]]
        (folder / f"{half}.jsonl").write_text("\n".join(lines) + "\n")
    held = [row(number, [{"bytes": png(number), "path": f"{number}.png"}]) for number in range(COUNT)]
    pq.write_table(pa.Table.from_pylist(held), folder / "all.parquet", row_group_size=7)
    Dataset.from_list(held).save_to_disk(str(folder / "saved"))
    for fifth in range(5):  # more files than shards
        write_tar(folder / f"{fifth}.tar", range(fifth * COUNT // 5, (fifth + 1) * COUNT // 5))


def records(folder: Path, kind: str, reading: ReadOptions) -> Records:
    files = {
        "json": [folder / "all.json"],
        "jsonl": [folder / "0.jsonl", folder / "1.jsonl"],
        "parquet": [folder / "all.parquet"],
        "saved": [folder / "saved"],
        "webdataset": sorted(folder.glob("*.tar")),
    }[kind]
    step = Import(native, kind, folder / "images")
    return Records(file_parts(files, FORMATS[kind]), [step], folder / "quarantine" / kind, reading)


def loader(folder: Path, kind: str, rank: int, workers: int) -> StatefulDataLoader:
    if kind == "mixture":
        endless = ReadOptions(rank=rank, world=2, seed=5, block=5, epochs=None)
        drawn, asked = records(folder, "webdataset", endless), records(folder, "jsonl", endless)
        sources = {"drawn": MixtureSource(drawn, "generation"), "asked": MixtureSource(asked, "understanding")}
        data = Mixture(sources, batch=4, drawing_share=0.25, seed=1, rank=rank)
    else:
        data = records(folder, kind, ReadOptions(rank=rank, world=2, seed=5, block=5))
    return StatefulDataLoader(data, batch_size=None, num_workers=workers)


def names(item: RecordConversation | list[RecordConversation]) -> list[str]:
    return [f"{one.source}/{one.id}" for one in (item if isinstance(item, list) else [item])]


def main(folder: Path) -> None:
    """Write the remaining records of each loader, up to ``COUNT`` items."""
    states = torch.load(folder / "states.pt", weights_only=True)
    rest = []
    for setup, state in zip(SETUPS, states, strict=True):
        stream = loader(folder, *setup)
        stream.load_state_dict(state)
        rest.append([names(item) for item, _ in zip(stream, range(COUNT), strict=False)])
    (folder / "rest.json").write_text(json.dumps(rest))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
