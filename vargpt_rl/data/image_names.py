"""Names of image files, found although they are written in another Unicode normal form, letter case or ending."""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from PIL import Image


class ImageNames:
    """The image files below a folder by their names, relative to it."""

    def __init__(self, folder: Path):
        self.files = image_files(folder)
        self._by_name = _grouped((_normal(file), file) for file in self.files)
        self._by_stem = _grouped((_normal(_stem(file)), file) for file in self.files)

    def named(self, name: str) -> list[str]:
        """Return the file ``name``, or those that differ in normal form or letter case only."""
        return [name] if name in self.files else self._by_name.get(_normal(name), [])

    def stemmed(self, stem: str) -> list[str]:
        """Return the files whose name without its ending is ``stem``, literally written ones first."""
        found = self._by_stem.get(_normal(stem), [])
        return sorted(found, key=lambda file: (_stem(file) != stem, file))

    def like(self, name: str) -> list[str]:
        """Return the files named ``name``, or else those that have another ending."""
        return self.named(name) or self.stemmed(_stem(name))


def image_files(folder: Path) -> set[str]:
    """Return the names of the image files below ``folder``, relative to it."""
    suffixes = Image.registered_extensions()
    files = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    return {path.relative_to(folder).as_posix() for path in files}


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _stem(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.name else name


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found = defaultdict(list)
    for key, file in pairs:
        found[key].append(file)
    return {key: sorted(files) for key, files in found.items()}
