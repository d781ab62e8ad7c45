"""Small visual tokenizers of the zoo: trained by recipe on objects over clutter and on crops of photographs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from vistok.catalogue import create
from vistok.core.fidelity import psnr, ssim, to_uint8
from vistok.core.quantize import count_ids, usage
from vistok.parts.tokenizer import Tokenizer
from vistok.parts.vision import FrozenVision
from vistok.world import derive_seed, make_object
from vistok.world.draw import Dice
from vistok.world.real import crop, is_test

from .optimizer import load_checkpoint, save_checkpoint
from .training import progress_bar
from .vit import load_vit
from .vit_tasks import ViTBatch, ViTTask
from .vit_training import Pace, Run

DRAWN = 64
"""Side at which objects are drawn, the smallest that the world draws; averaged down to smaller pictures."""
_STREAM = 0x70C7
MODEL_CARD = """\
---
library_name: vistok
license: apache-2.0
---
# {name}

A small {system} ({parameters:.1f} M parameters): pictures of {size} x {size} px to {tokens} tokens{grid} and back.
{about}
`vistok train {name}` makes it again, with seed {seed}. This file is generated.

## On held-out pictures

{pictures} pictures (split `test`, seed 1), half of them objects over clutter, half crops of photographs that training
never saw. JPEG: the quality of Pillow's encoder that comes closest to the bytes of all tokens from above, its header
of some 600 bytes counted.

| tokens | bytes a picture | PSNR, dB | SSIM |
|---|---:|---:|---:|
{rows}

Codes in use: {used}.

## Recipe

{steps} steps of {batch} pictures, peak learning rate {lr:g}, {seen} pictures in all.
"""


class Pictures(ViTTask):
    """Objects over clutter and crops of photographs in turn; only pixels count."""

    name: ClassVar[str] = "pictures"
    classes: ClassVar[tuple[str, ...]] = ()

    def draw(self, start: int, n: int, *, seed: int = 0, split: str = "train", size: int = DRAWN) -> ViTBatch:
        drawn = np.stack([_picture(number, seed, split, size) for number in range(start, start + n)])
        blank = torch.zeros(n, size, size, dtype=torch.uint8)
        return ViTBatch(torch.from_numpy(drawn), torch.zeros(n, dtype=torch.int64), blank)


def _picture(number: int, seed: int, split: str, size: int) -> Any:
    """(size, size, 3) uint8"""
    own = derive_seed(seed, number // 2, split)
    if number % 2:
        return crop(Dice(own, _STREAM), size, is_test(own))
    return make_object(own, size).image


@dataclass(frozen=True)
class TokenizerRecipe:
    """All that it takes to train one tokenizer again."""

    name: str
    system: str
    """The system's slug."""
    hyper: Mapping[str, Any]
    """Its hyper-parameters."""
    pace: Pace
    about: str
    """What it is, in a sentence for its model card."""
    seed: int = 0
    held_out: int = 512
    """Test pictures that the model card's figures are of."""
    given: Callable[[], dict[str, Any]] = dict
    """-> what ``build`` of the system is given: frozen networks."""

    @property
    def steps(self) -> int:
        return self.pace.steps

    def build(self) -> Tokenizer:
        """The tokenizer that training begins with."""
        made: Tokenizer = create(self.system, **self.hyper).build(**self.given())
        return made


def sight(prefix: bool = False) -> FrozenVision:
    """vistok-vit, frozen: what a recipe gives as encoder or teacher."""
    return FrozenVision(load_vit("vistok-vit", device="cpu"), prefix)


def train_tokenizer(
    recipe: TokenizerRecipe,
    out: Path,
    *,
    device: str = "cpu",
    checkpoint_every: int = 200,
    stop_at: int | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Train ``recipe`` and save it to ``out``; goes on from ``out/checkpoint`` if there is one.

    ``stop_at``: end (with a checkpoint) before that step. ``on_step`` gets {"step", "stage", "loss", "lr"}
    and more after each step. Returns the folder of the tokenizer.
    """
    torch.manual_seed(recipe.seed)
    model: Any = recipe.build()
    size = _side(model)

    def loss(model: Any, batch: ViTBatch) -> tuple[Tensor, Tensor]:
        # What a step draws at random depends on its number alone, so that a resumed run is the same run.
        torch.manual_seed(derive_seed(recipe.seed, next(numbers), "train"))
        found = model.objective(_pixels(batch, size))
        return found, found.detach()

    run = Run(model, Pictures(), recipe.pace, recipe.seed, max(size, DRAWN), loss, device=device)
    checkpoint = out / "checkpoint" / "state.safetensors"
    first = load_checkpoint(checkpoint, run.both, run.optimizer) if checkpoint.exists() else 0
    last = min(recipe.steps, recipe.steps if stop_at is None else stop_at)
    numbers = itertools.count(first)
    with progress_bar(recipe, first, None) as advance:
        for told in run.steps(first, last):
            advance(told)
            if on_step:
                on_step(told)
            if told["step"] % checkpoint_every == 0 or told["step"] == last:
                save_checkpoint(checkpoint, run.both, run.optimizer, told["step"])
    return model.eval().save(out, half=True)


@dataclass(frozen=True)
class Fidelity:
    """Figures of one way to store pictures, means over them."""

    bytes: float
    psnr: float
    ssim: float


@torch.no_grad()
def evaluate_tokenizer(model: Any, pictures: int, k: int | None = None, *, seed: int = 1) -> Fidelity:
    """Of ``pictures`` held-out pictures by all tokens, or by the first ``k``."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for real in held_out(pictures, _side(model), seed=seed):
        codes = model.encode(real)
        codes = codes if k is None else codes.prefix(k)
        made = model.decode(codes)
        found.append((codes.bits.double() / 8, psnr(made, real), ssim(made, real)))
    return Fidelity(*(float(torch.cat(column).double().mean()) for column in zip(*found, strict=True)))


def evaluate_file(pictures: int, size: int, kind: Literal["JPEG", "WebP"], quality: int, *, seed: int = 1) -> Fidelity:
    """Of the same pictures as Pillow's files of a ``quality``, 1 to 100, each with its header."""
    real = torch.cat(list(held_out(pictures, size, seed=seed)))
    files = []
    for picture in to_uint8(real).permute(0, 2, 3, 1).numpy():
        file = BytesIO()
        Image.fromarray(picture).save(file, kind, quality=quality)
        files.append(file)
    back = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    made = torch.from_numpy(back).permute(0, 3, 1, 2).float() / 255
    taken = sum(len(file.getvalue()) for file in files) / len(files)
    return Fidelity(taken, float(psnr(made, real).mean()), float(ssim(made, real).mean()))


def evaluate_jpeg(pictures: int, size: int, least: float, *, seed: int = 1) -> tuple[int, Fidelity]:
    """The lowest quality of Pillow's JPEG whose mean bytes reach ``least``, 95 at most, and its figures."""
    found = evaluate_file(pictures, size, "JPEG", 1, seed=seed)
    quality = 1
    while found.bytes < least and quality < 95:
        quality += 1
        found = evaluate_file(pictures, size, "JPEG", quality, seed=seed)
    return quality, found


def held_out(pictures: int, size: int, *, seed: int = 1) -> Iterator[Tensor]:
    """Batches (B, 3, size, size) float32 in [0, 1] of the first ``pictures`` of the test stream ``seed``."""
    for batch in Pictures().pieces(pictures, seed=seed, size=max(size, DRAWN)):
        yield _pixels(batch, size)


@torch.no_grad()
def code_usage(model: Any, pictures: int) -> list[float]:
    """Share of the codes in use on held-out pictures, for each column of ids; [] for continuous codes."""
    ids = [model.encode(real).ids for real in held_out(pictures, _side(model))]
    if ids[0] is None:
        return []
    columns = torch.cat([i if i.dim() == 3 else i[..., None] for i in ids]).unbind(-1)
    return [float(usage(count_ids(c, n))) for c, n in zip(columns, model.bottleneck.sizes, strict=True)]


def write_tokenizer_card(recipe: TokenizerRecipe, model: Any, folder: Path, *, pictures: int | None = None) -> Path:
    """Measure the tokenizer, whole and by beginnings, beside JPEG, and write ``folder/README.md``."""
    n = recipe.held_out if pictures is None else pictures
    whole = evaluate_tokenizer(model, n)
    counts = sorted({max(1, model.tokens >> i) for i in range(1, 5)}) if model.flexible else []
    found = {f"first {k}": evaluate_tokenizer(model, n, k) for k in counts}
    found["all"] = whole
    quality, jpeg = evaluate_jpeg(n, _side(model), whole.bytes)
    found[f"(JPEG, quality {quality})"] = jpeg
    rows = [f"| {row} | {got.bytes:.0f} | {got.psnr:.2f} | {got.ssim:.3f} |" for row, got in found.items()]
    used = ", ".join(f"{share:.0%}" for share in code_usage(model, n)) or "continuous"
    text = MODEL_CARD.format(
        name=recipe.name,
        system=recipe.system,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        size=_side(model),
        tokens=model.tokens,
        grid="" if model.grid is None else f" ({model.grid[0]} x {model.grid[1]})",
        about=recipe.about,
        seed=recipe.seed,
        pictures=n,
        rows="\n".join(rows),
        used=used,
        steps=recipe.steps,
        batch=recipe.pace.batch_size,
        lr=recipe.pace.peak_lr,
        seen=recipe.steps * recipe.pace.batch_size,
    )
    path = folder / "README.md"
    path.write_text(text, encoding="utf-8")
    return path


def _side(model: Any) -> int:
    side = model.image if isinstance(model.image, int) else model.image[0]
    return int(side)


def _pixels(batch: ViTBatch, size: int) -> Tensor:
    drawn = batch.images.permute(0, 3, 1, 2).float() / 255
    return drawn if drawn.shape[-1] == size else adaptive_avg_pool2d(drawn, (size, size))
