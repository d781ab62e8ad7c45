"""Opening pictures of others: any file, however wrong, gives an RGB picture or one clear line."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from vistok.world import TASKS, derive_seed, make
from vistok.world import Picture as Drawn

if TYPE_CHECKING:
    from PIL import Image

LARGEST_PIXELS = 50_000_000
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What is tried. Pillow reads more, some of it by starting other programs (EPS), which a picture must not do."""


class Unusable(ValueError):
    """Something of the user's own that cannot be used: what was ``got``, and what would be ``right``.

    >>> str(Unusable("street.png", "must be a picture"))
    'street.png: must be a picture'
    """

    def __init__(self, got: object, right: str) -> None:
        super().__init__(got, right)
        self.got, self.right = got, right

    def __str__(self) -> str:
        return f"{self.got}: {self.right}"


_WORLD = re.compile(r"world:([^:]*)(?::(.*))?")


def world_picture(name: str) -> Drawn | None:
    """The held-out picture that ``world:TASK:NUMBER`` names (``world:scenes:3``), or None for a name of other form.

    Raises Unusable for an unknown task or number.
    """
    found = _WORLD.fullmatch(name)
    if found is None:
        return None
    task, number = found[1], found[2] or "0"
    if task not in TASKS or not number.isascii() or not number.isdigit() or int(number) >= 2**32:
        raise Unusable(name, f"must be world:TASK:NUMBER, TASK one of {', '.join(TASKS)}")
    return make(task, derive_seed(0, int(number), "test"))


def open_picture(path: Path, largest: int = LARGEST_PIXELS) -> Image.Image:
    """The picture in a file, see ``decode_picture``. Raises Unusable."""
    check_file(path)
    return decode_picture(path, path, largest)


def decode_picture(file: Path | BinaryIO, name: object, largest: int = LARGEST_PIXELS) -> Image.Image:
    """A picture as upright RGB: first frame, EXIF orientation applied, transparency over white.

    Raises Unusable, calling the picture ``name``, for whatever is not a whole picture of at most ``largest`` pixels.
    """
    from PIL import Image, UnidentifiedImageError

    too_large = f"must have at most {largest / 1e6:.0f} megapixels"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks about odd files; what matters is raised
        try:
            # Reads the header only: nothing is decoded before its size is known.
            with Image.open(file, formats=_readable()) as image:
                if image.width * image.height > largest:
                    raise Unusable(name, f"{too_large}, it has {image.width} x {image.height}")
                image.load()
                return _rgb(_upright(image))
        except Unusable:
            raise
        except Image.DecompressionBombError as error:
            raise Unusable(name, too_large) from error
        except UnidentifiedImageError as error:
            raise Unusable(name, f"must be a picture ({', '.join(FORMATS[:6])}, ...)") from error
        except Exception as error:  # a broken file can raise nearly anything in a decoder
            raise Unusable(name, f"must be a whole picture, it is cut off or corrupt ({error})") from error


def check_file(path: Path) -> None:
    """Raises Unusable for what cannot be a picture whatever is in it: no file, no regular file, an empty one."""
    try:
        if not path.exists():
            raise Unusable(path, "there is no such file")
        if path.is_dir():
            raise Unusable(path, "must be a file, it is a folder")
        if not path.is_file():  # a device or a pipe could be endless
            raise Unusable(path, "must be a regular file")
        if path.stat().st_size == 0:
            raise Unusable(path, "must be a picture, the file is empty")
    except Unusable:
        raise
    except (OSError, ValueError) as error:  # a name too long, a null byte, a folder that may not be entered
        raise Unusable(path, f"cannot be read ({error})") from error


def _readable() -> list[str]:
    from PIL import Image

    Image.init()
    return [kind for kind in FORMATS if kind in Image.OPEN]


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; as it is where only the EXIF block is broken."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        return _from_numbers(image)
    if image.has_transparency_data or image.mode in ("LA", "PA", "RGBa", "La"):
        layered = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")


def _from_numbers(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and floating-point greys: white is the smallest of 1 (floats), 255 and 65535 that is not exceeded.

    Beyond 65535 white is the largest number there is. Pillow alone would cut all at 255.
    """
    import numpy as np
    from PIL import Image

    numbers = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    largest = float(numbers.max())
    if image.mode.startswith("I;16"):
        white = 65535.0
    else:
        scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        white = next((scale for scale in scales if largest <= scale), largest)
    grey = np.clip(numbers / white * 255, 0, 255).round().astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
