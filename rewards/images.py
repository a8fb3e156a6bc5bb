"""How images travel to rewards: as PNG, which every process and program can read and which loses nothing."""

from io import BytesIO

from PIL import Image


def to_png(image: Image.Image) -> bytes:
    """An image as a PNG file."""
    file = BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def from_png(data: bytes, max_pixels: int | None = None) -> Image.Image:
    """The image of a PNG file. ValueError for what is none, or one of more than ``max_pixels``."""
    try:
        image = Image.open(BytesIO(data), formats=("PNG",))
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise ValueError(f"{image.width} x {image.height} pixels, permitted are {max_pixels}")
        image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a readable PNG file: {error}") from error
    return image
