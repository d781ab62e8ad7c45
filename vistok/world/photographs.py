"""Real pictures: the photographs that scikit-image and scikit-learn carry in their packages, and handwritten digits."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from .sampling import check_size
from .types import Picture

# name: (package, file). Only files inside the installed packages: nothing is ever downloaded.
_PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "coins": ("skimage", "data/coins.png"),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg"),
    "moon": ("skimage", "data/moon.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "page": ("skimage", "data/page.png"),
    "photographer": ("skimage", "data/camera.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "text": ("skimage", "data/text.png"),
    "temple": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}
_DIGITS = ("sklearn", "datasets/data/digits.csv.gz")


@dataclass(frozen=True, eq=False)
class Photo(Picture):
    """A picture without questions, with a name."""

    name: str = ""


def _file(package: str, path: str) -> Path:
    """A file of an installed package, found without importing it (that would cost seconds)."""
    missing = f"photos() needs {path} of the package {package}: pip install 'vistok[bench]'"
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(missing, name=package)
    found = Path(spec.origin).parent / path
    if not found.is_file():
        raise FileNotFoundError(missing)
    return found


def _square(image: Image.Image, size: int) -> np.ndarray:
    """The centre square, resized: (size, size, 3) uint8."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    cut = image.convert("RGB").crop((left, top, left + side, top + side))
    return np.asarray(cut.resize((size, size), Image.Resampling.LANCZOS))


def photos(size: int = 224) -> list[Photo]:
    """The named photographs, each cut to its centre square, then the first handwritten 0, 1, .. 9.

    size: side in pixels, 64 .. 672 (ValueError elsewhere). Reproducible: no seed, no network; the captions are the
    names. Raises ModuleNotFoundError or FileNotFoundError where scikit-image or scikit-learn is absent (extra ``bench``
    installs them).
    """
    size = check_size(size)
    result = []
    for name, source in _PHOTOGRAPHS.items():
        with Image.open(_file(*source)) as image:
            result.append(Photo(_square(image, size), (), (), name, "photos", 0, name))
    with gzip.open(_file(*_DIGITS), "rt") as lines:
        table = np.loadtxt(lines, delimiter=",")
    for digit in range(10):
        row = table[np.flatnonzero(table[:, 64] == digit)[0], :64].reshape(8, 8)
        drawn = Image.fromarray(np.clip(row * (255 / 16), 0, 255).astype(np.uint8))
        result.append(Photo(_square(drawn, size), (), (), str(digit), "photos", 0, f"digit-{digit}"))
    return result
