"""Pictures that a command is given by name: a user's file, or one of the world."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vistok.bench import pictures
from vistok.bench.pictures import LARGEST_PIXELS, Unusable
from vistok.cli.console import UserError

if TYPE_CHECKING:
    from PIL import Image

    from vistok.world import Picture


def open_picture(name: str, argument: str = "PICTURE") -> Image.Image:
    """The picture in file ``name`` as upright RGB: first frame, EXIF orientation applied, transparency over white.

    Raises UserError, naming ``argument``, for whatever is not a whole picture of at most 50 megapixels.
    """
    try:
        return pictures.open_picture(Path(name).expanduser(), LARGEST_PIXELS)
    except Unusable as error:
        raise UserError(argument, name, error.right) from error


def world_picture(name: str, argument: str = "PICTURE") -> Picture | None:
    """The held-out picture that ``world:TASK:NUMBER`` names (``world:scenes:3``), or None for any other name.

    Raises UserError for an unknown task or number.
    """
    if Path(name).exists():
        return None
    try:
        return pictures.world_picture(name)
    except Unusable as error:
        raise UserError(argument, name, error.right.replace("must be", "must be a file or", 1)) from error
