"""PNG encoding for sending images to rewards: lossless, and readable by any process and program."""

from io import BytesIO

from PIL import Image


def to_png(image: Image.Image) -> bytes:
    """Encode an image as a PNG file."""
    file = BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def from_png(data: bytes, max_pixels: int | None = None) -> Image.Image:
    """Decode a PNG file. ValueError if it is not one or has more than ``max_pixels``."""
    try:
        image = Image.open(BytesIO(data), formats=("PNG",))
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise ValueError(f"{image.width} x {image.height} pixels, expected at most {max_pixels}")
        image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a readable PNG file: {error}") from error
    return image
