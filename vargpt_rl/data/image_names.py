"""Names of image files, found although they are written in another Unicode normal form, letter case or ending."""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePath, PurePosixPath

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
    """Return the names of the image files below ``folder``, relative to it, without those of the operating system."""
    suffixes = Image.registered_extensions()
    files = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    names = (path.relative_to(folder) for path in files)
    return {name.as_posix() for name in names if not is_system_file(name)}


def is_system_file(name: PurePath) -> bool:
    """Return whether an operating system has put a file there (``._x``, ``.DS_Store``, ``__MACOSX/x``)."""
    return not name.name or name.name.startswith(".") or "__MACOSX" in name.parts


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
