"""Pictures from files of any kind, opened and converted the same way in every stage."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

Image.MAX_IMAGE_PIXELS = 100_000_000  # a larger one is refused before it is decoded (above twice this, Pillow raises)
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
ImageFile.LOAD_TRUNCATED_IMAGES = False


def open_image(source) -> Image.Image:
    """Decode a picture (a path or a binary file) as it is stored, except that 16-bit grey becomes 8-bit grey.

    Raises ValueError saying why it cannot be decoded.
    """
    try:
        image = Image.open(source)
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too many")
        image.load()
    except FileNotFoundError:
        raise ValueError("no such file") from None
    except UnidentifiedImageError:  # its own words hold the file's place in memory, another one in each run
        raise ValueError("not a readable picture: in no known format") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError, MemoryError) as error:
        name = f" {source}" if isinstance(source, (str, Path)) else ""
        raise ValueError(f"not a readable picture: {str(error).replace(name, '')}") from None
    return eight_bit(image)


def eight_bit(image: Image.Image) -> Image.Image:
    """Turn 16-bit grey into 8-bit grey, and leave everything else as it is."""
    # Pillow clips 16-bit grey at 255 on conversion: all but the darkest tones would become white.
    if image.mode.startswith("I;16") or (image.mode == "I" and np.asarray(image).max(initial=0) > 255):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to RGB, upright, with whatever is transparent on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
