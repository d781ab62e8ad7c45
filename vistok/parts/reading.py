"""Readers of text in pictures: crops of words, a small one that is trained on rendered numbers, and Tesseract.

A reader is any callable that takes crops of words (B, 3, h, w) in [0, 1] and gives B texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import ctc_loss, interpolate

from vistok.world.draw import Canvas, Dice, ground
from vistok.world.glyph import STYLES, width_of, write

Reader: TypeAlias = Callable[[Tensor], Sequence[str]]
CROP = (32, 128)
"""Height and width of a word's crop."""


def word_crops(images: Tensor, boxes: Tensor, size: tuple[int, int] = CROP) -> Tensor:
    """(N, 3, h, w): the words of ``boxes`` (N, 5), picture and x0, y0, x1, y1 in pixels, scaled to fit, grey around.

    ``images`` (B, 3, H, W) in [0, 1]. Proportions are kept; the padding is the crop's own mean. Raises ValueError for a
    box that is empty or outside of its picture.
    """
    found = []
    height, width = images.shape[2:]
    for picture, x0, y0, x1, y1 in boxes.tolist():
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height and 0 <= picture < len(images)):
            raise ValueError(f"boxes: got {[picture, x0, y0, x1, y1]}, must be in pictures of {width} x {height}")
        word = images[int(picture), :, int(y0) : max(int(y0) + 1, round(y1)), int(x0) : max(int(x0) + 1, round(x1))]
        share = min(size[0] / word.shape[1], size[1] / word.shape[2])
        h, w = (max(1, min(most, round(side * share))) for most, side in zip(size, word.shape[1:], strict=True))
        small = interpolate(word[None], (h, w), mode="bilinear", antialias=True, align_corners=False)[0]
        whole = small.mean((1, 2), keepdim=True).expand(3, *size).clone()
        top, left = (size[0] - h) // 2, (size[1] - w) // 2
        whole[:, top : top + h, left : left + w] = small
        found.append(whole)
    return torch.stack(found) if found else images.new_zeros(0, 3, *size)


@dataclass(frozen=True)
class TextPictures:
    """Pictures with one word each."""

    images: Tensor
    """(B, 3, S, S) float32 in [0, 1]"""
    boxes: Tensor
    """(B, 5) int64, as ``word_crops`` takes them"""
    words: tuple[str, ...]
    ratios: Tensor
    """(B,): height of a character over that of the picture"""


def numbers(count: int, size: int, heights: tuple[int, int], seed: int, digits: int = 3) -> TextPictures:
    """Numbers of ``digits`` digits, light on a dark ground, of a height drawn from ``heights`` (both included), px.

    Equal seeds draw equal pictures. Raises ValueError where a number does not fit.
    """
    images, boxes, words, ratios = [], [], [], []
    for i in range(count):
        dice = Dice(seed, i)
        height, style = dice.between(*heights), dice.pick([s for s in STYLES if s != "pixel"])
        word = "".join(str(dice.below(10)) for _ in range(digits))
        width = width_of(word, style, height)
        if width + 2 > size or height + 2 > size:
            raise ValueError(f"heights: got {height}, must let {digits} digits fit in {size} px")
        canvas = Canvas(ground(dice, size, 30, 60, strength=10, noise=6))
        top, left = dice.between(1, size - height - 1), dice.between(1, size - width - 1)
        level = dice.between(190, 255)
        write(canvas, word, top, left, height, (level, level, level), style)
        images.append(torch.from_numpy(canvas.image))
        boxes.append([i, left - 1, top - 1, left + width + 1, top + height + 1])
        words.append(word)
        ratios.append(height / size)
    pixels = torch.stack(images).permute(0, 3, 1, 2).float() / 255
    return TextPictures(pixels, torch.tensor(boxes), tuple(words), torch.tensor(ratios, dtype=torch.float64))


class SmallReader(nn.Module):
    """A small convolutional network that spells a crop from left to right (CTC): a reader, once it was trained.

    One letter for each 4 px of width at most. Lower resolution than what it was trained on it reads badly, as all do.
    """

    def __init__(self, alphabet: str = "0123456789", width: int = 32) -> None:
        super().__init__()
        self.alphabet = alphabet
        layers: list[nn.Module] = []
        before = 1
        for channels, pool in ((width, 2), (width * 2, 2), (width * 2, (2, 1)), (width * 4, (4, 1))):
            layers += [
                nn.Conv2d(before, channels, 3, padding=1),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
                nn.MaxPool2d(pool),
            ]
            before = channels
        self.features = nn.Sequential(*layers)
        self.context = nn.Conv1d(before, before, 3, padding=1)
        self.letters = nn.Conv1d(before, len(alphabet) + 1, 1)

    def forward(self, crops: Tensor) -> Tensor:
        """(B, T, 1 + letters) logarithms of probabilities, the first of no letter, of crops (B, 3, 32, w) in [0, 1]."""
        grey = crops.mean(1, keepdim=True)
        grey = (grey - grey.mean((2, 3), keepdim=True)) / grey.std((2, 3), keepdim=True).clamp_min(1e-3)
        x = self.features(grey).mean(2)
        x = self.letters(self.context(x).relu())
        return x.transpose(1, 2).log_softmax(2)

    def loss(self, crops: Tensor, words: Sequence[str]) -> Tensor:
        """Mean nats of the words under all ways to spell them."""
        log = self(crops).transpose(0, 1)
        targets = torch.tensor([1 + self.alphabet.index(c) for word in words for c in word])
        lengths = torch.tensor([len(word) for word in words])
        spelt = torch.full((len(words),), len(log))
        return ctc_loss(log, targets, spelt, lengths, zero_infinity=True)

    @torch.no_grad()
    def read(self, crops: Tensor) -> list[str]:
        """What stands in each of (B, 3, 32, w): the best letter of each place, repeats and empty places left out."""
        before = self.training
        best = self.eval()(crops).argmax(2)
        self.train(before)
        changed = torch.ones_like(best, dtype=torch.bool)
        changed[:, 1:] = best[:, 1:] != best[:, :-1]
        kept = changed & (best > 0)
        return ["".join(self.alphabet[i - 1] for i in row[keep].tolist()) for row, keep in zip(best, kept, strict=True)]


def trained_reader(
    size: int,
    heights: tuple[int, int],
    steps: int = 300,
    batch_size: int = 32,
    seed: int = 0,
    *,
    digits: int = 3,
    lr: float = 2e-3,
) -> SmallReader:
    """A reader of ``numbers`` of these sizes, trained here on pictures that no other seed draws."""
    torch.manual_seed(seed)
    reader = SmallReader()
    optimizer = torch.optim.AdamW(reader.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step in range(steps):
        drawn = numbers(batch_size, size, heights, (seed + 1) * 1_000_003 + step, digits)
        loss = reader.loss(word_crops(drawn.images, drawn.boxes), drawn.words)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    return reader.eval()


def tesseract(language: str = "eng", line: bool = True) -> Reader:
    """Tesseract as a reader, of single lines or of whole blocks of text; crops are enlarged threefold for it.

    Raises ImportError without pytesseract, and OSError without the program that it calls.
    """
    try:
        import pytesseract  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError("reading with Tesseract needs pytesseract: pip install pytesseract") from error
    try:
        pytesseract.get_tesseract_version()
    except Exception as error:
        raise OSError("reading with Tesseract needs the program tesseract, which is not installed") from error
    mode = "--psm 7" if line else "--psm 6"

    def read(crops: Tensor) -> list[str]:
        from PIL import Image

        large = interpolate(crops, scale_factor=3, mode="bicubic", align_corners=False).clamp(0, 1)
        pixels = (large * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        texts: list[Any] = [pytesseract.image_to_string(Image.fromarray(p), lang=language, config=mode) for p in pixels]
        return [" ".join(text.split()) for text in texts]

    return read
