"""A world of drawn pictures with exact truth: scenes, words, charts and forms, their questions and the evidence.

>>> from vistok.world import make
>>> picture = make("scenes", seed=1, size=112)
>>> picture.image.shape, len(picture.questions)
((112, 112, 3), 8)
"""

from .files import decode_mask, encode_mask, write_samples
from .labels import LAST_INDEX, patch_labels
from .maps import MAP_CLASSES, class_map
from .objects import OBJECTS, make_object, sample_objects
from .photographs import Photo, photos
from .places import make_view
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
    "MAP_CLASSES",
    "OBJECTS",
    "SHAPES",
    "SHAPE_LABELS",
    "SMALLEST",
    "TASKS",
    "VOCABULARY",
    "Photo",
    "Picture",
    "Question",
    "Thing",
    "class_map",
    "decode_mask",
    "derive_seed",
    "dialogue",
    "encode_mask",
    "make",
    "make_object",
    "make_view",
    "patch_labels",
    "photos",
    "sample",
    "sample_objects",
    "tokens",
    "write_samples",
]
