"""A world of drawn pictures with exact truth: scenes, words, charts and forms, their questions and the evidence.

>>> from vistok.world import make
>>> picture = make("scenes", seed=1, size=112)
>>> picture.image.shape, len(picture.questions)
((112, 112, 3), 8)
"""

from .files import decode_mask, encode_mask, write_samples
from .labels import LAST_INDEX, patch_labels
from .photographs import Photo, photos
from .sampling import LARGEST, SMALLEST, derive_seed, make, sample
from .turns import dialogue
from .types import Picture, Question, Thing
from .vocabulary import (
    CHARACTER_LABELS,
    CHARACTERS,
    COLOUR_LABELS,
    COLOUR_NAMES,
    COLOURS,
    FAMILIES,
    KEYS,
    SHAPE_LABELS,
    SHAPES,
    TASKS,
    VOCABULARY,
    tokens,
)

__all__ = [
    "CHARACTERS",
    "CHARACTER_LABELS",
    "COLOURS",
    "COLOUR_LABELS",
    "COLOUR_NAMES",
    "FAMILIES",
    "KEYS",
    "LARGEST",
    "LAST_INDEX",
    "SHAPES",
    "SHAPE_LABELS",
    "SMALLEST",
    "TASKS",
    "VOCABULARY",
    "Photo",
    "Picture",
    "Question",
    "Thing",
    "decode_mask",
    "derive_seed",
    "dialogue",
    "encode_mask",
    "make",
    "patch_labels",
    "photos",
    "sample",
    "tokens",
    "write_samples",
]
