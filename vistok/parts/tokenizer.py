"""What every visual tokenizer is to its user: pictures to codes, codes to pictures, and a folder on disk.

A tokenizer is a composition: encoder -> resampler (``latents``) -> bottleneck -> decoder (``render``), built by a
recipe, the dataclass of its system (``vistok.create(name, **hyper).build()``).
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vistok import catalogue
from vistok.core.codes import CodeFormat, Codes
from vistok.core.losses import pixel
from vistok.parts.quantize import Bottleneck

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class Tokenizer(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1], float of any precision, to ``Codes`` and back.

    A member implements ``latents`` and ``render`` and sets ``bottleneck``, ``image`` and, where its tokens are a map,
    ``grid``. Both are called with what the bottleneck's contract promises, so that ``decode(encode(x))``,
    ``decode_ids(encode(x).ids)`` and decoding codes that were stored give the same picture.
    """

    bottleneck: Bottleneck
    image: int | tuple[int, int]
    """Side of a picture in pixels, or height and width."""
    grid: tuple[int, int] | None = None
    flexible: bool = False
    """Whether fewer than all tokens decode."""
    recipe: Any = None
    """The system's dataclass that built it; ``save`` writes it."""

    # What a member writes -------------------------------------------------------------------------------------------

    def latents(self, images: Tensor) -> Tensor:
        """(B, N, D): the vectors to be quantised, of pictures (B, 3, H, W) in [0, 1]."""
        raise NotImplementedError

    def render(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, 3, H, W): pictures of codes ``z`` (B, M, D), not clamped. ``mask`` (B, M) bool: False is no token."""
        raise NotImplementedError

    # What a user calls ----------------------------------------------------------------------------------------------

    def encode(self, images: Tensor) -> Codes:
        """The codes of pictures (B, 3, H, W) in [0, 1]. Raises ValueError for another shape, dtype or range."""
        height, width = (self.image, self.image) if isinstance(self.image, int) else self.image
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, height, width):
            raise ValueError(f"images: got shape {tuple(images.shape)}, must be (B, 3, {height}, {width})")
        if not images.is_floating_point():
            raise ValueError(f"images: got {images.dtype}, must be float in [0, 1]: divide uint8 by 255")
        if not torch.compiler.is_compiling() and images.numel():
            least, most = (float(t) for t in images.detach().aminmax())
            if least < -1e-3 or most > 1 + 1e-3:
                raise ValueError(f"images: got values from {least:.3g} to {most:.3g}, must be in [0, 1]")
        return self.bottleneck(self.latents(images.to(self.dtype)), grid=self.grid)

    def decode(self, codes: Codes) -> Tensor:
        """(B, 3, H, W) in [0, 1]: the pictures of ``codes``, or of a beginning of them (``codes.prefix(k)``).

        Raises ValueError for a beginning where the tokenizer is not flexible.
        """
        z = codes.z
        if z is None:
            assert codes.ids is not None
            z = self.bottleneck.ids_to_z(codes.ids, self.grid)
        if not self.flexible and (z.shape[1] != self.tokens or codes.mask is not None):
            raise ValueError(
                f"codes: got {z.shape[1]} tokens, must be all {self.tokens}: {self.name} decodes no prefix"
            )
        if z.shape[1] > self.tokens:
            raise ValueError(f"codes: got {z.shape[1]} tokens, must be {self.tokens} at most")
        # Contiguous: convolutions round otherwise by the layout in memory, and stored ids would give another picture.
        return self.render(z.to(self.dtype).contiguous(), codes.mask).float().clamp(0, 1)

    def decode_ids(self, ids: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1]: the pictures of stored ids (B, N) or (B, N, C); -1 is no token, at the end only."""
        return self.decode(self.codes(ids))

    def codes(self, ids: Tensor) -> Codes:
        """Stored ids as ``Codes``, checked against the codebook; ``bits`` as they were."""
        z = self.bottleneck.ids_to_z(ids, self.grid)
        gone = (ids if ids.dim() == 2 else ids[..., 0]) < 0
        mask = ~gone if bool(gone.any()) else None
        if mask is not None and bool((mask[:, 1:] & gone[:, :-1]).any()):
            raise ValueError("ids: got a token after a missing one, -1 must stand at the end only")
        return Codes(ids, z, self.format, mask)

    def forward(self, images: Tensor) -> tuple[Tensor, Codes]:
        """The reconstruction (B, 3, H, W), not clamped, and the codes: what training needs."""
        codes = self.encode(images)
        return self.render_codes(codes), codes

    def objective(self, images: Tensor) -> Tensor:
        """What training minimises, a scalar: mean absolute and squared error of pixels, and the bottleneck's losses.

        A tokenizer whose decoder learns something else (a flow's velocity, a teacher's features) says so here.
        """
        made, codes = self(images)
        return pixel(made, images, "l1") + pixel(made, images) + codes.loss

    def render_codes(self, codes: Codes) -> Tensor:
        """``render`` of codes that carry ``z``, in the model's dtype."""
        assert codes.z is not None
        return self.render(codes.z.to(self.dtype), codes.mask)

    @property
    def tokens(self) -> int:
        """Vectors of a picture that the decoder takes."""
        raise NotImplementedError

    @property
    def format(self) -> CodeFormat:
        """What must be known of the ids to read them."""
        return self.bottleneck.format(self.grid)

    @property
    def dtype(self) -> torch.dtype:
        """That of the networks; the bottleneck stays float32."""
        inside = {id(p) for p in self.bottleneck.parameters()}
        return next((p.dtype for p in self.parameters() if id(p) not in inside), torch.float32)

    @property
    def name(self) -> str:
        """The system's name, or the class's."""
        return type(self).__name__ if self.recipe is None else type(self.recipe).__name__

    # Folders ----------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """Its system, hyper-parameters and the tokenizers inside it, as ``save`` writes them.

        Raises ValueError for a tokenizer that no recipe of a system built.
        """
        if self.recipe is None:
            raise ValueError("recipe: got None, must be the system's dataclass: build the tokenizer with it")
        system = type(self.recipe).__module__.rpartition(".")[2].replace("_", "-")
        inside = {name: part.config() for name, part in self.named_children() if isinstance(part, Tokenizer)}
        return {"tokenizer": system, "hyper": asdict(self.recipe), "parts": inside}

    def save(self, folder: str | Path, *, half: bool = False) -> Path:
        """Write ``config.json`` and ``model.safetensors`` to ``folder`` and return it; each file is whole or not there.

        ``load_tokenizer`` reads it. ``half``: float32 weights are stored as float16, codebooks too; ids that lie
        between two codes may change.
        """
        path = Path(folder)
        told = json.dumps(self.config(), indent=2) + "\n"
        path.mkdir(parents=True, exist_ok=True)
        weights, config = path / f".{WEIGHTS}", path / f".{CONFIG}"
        save_file({key: _stored(value, half) for key, value in self.state_dict().items()}, weights)
        config.write_text(told, "utf-8")
        os.replace(weights, path / WEIGHTS)
        os.replace(config, path / CONFIG)
        return path


def _stored(value: Tensor, half: bool) -> Tensor:
    kept = value.detach().contiguous().clone()
    return kept.half() if half and kept.dtype == torch.float32 else kept


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that ``save`` wrote to ``folder``, in evaluation mode.

    Reads safetensors only and runs no code of the folder. Raises ValueError for a folder without a tokenizer, or whose
    weights are not of its hyper-parameters.
    """
    path = Path(folder)
    try:
        made = _from_config(json.loads((path / CONFIG).read_text("utf-8")))
    except (OSError, KeyError, TypeError, ValueError, LookupError) as error:
        raise ValueError(f"folder: {folder} holds no tokenizer that {CONFIG} tells of: {error}") from error
    try:
        made.load_state_dict(load_file(path / WEIGHTS))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"folder: {folder}: the weights do not fit: {str(error).splitlines()[0]}") from error
    return made.eval()


def holds_tokenizer(folder: str | Path) -> bool:
    """Whether ``folder`` is one that ``save`` wrote."""
    try:
        told = json.loads((Path(folder) / CONFIG).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and "tokenizer" in told


def _from_config(told: dict[str, Any]) -> Tokenizer:
    hyper = {key: tuple(value) if isinstance(value, list) else value for key, value in told["hyper"].items()}
    inside = {name: _from_config(part) for name, part in told["parts"].items()}
    made: Tokenizer = catalogue.create(told["tokenizer"], **hyper).build(**inside)
    return made
