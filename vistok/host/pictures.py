"""Pictures in a prompt: which columns they take, in which batches they are reduced, what became of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vistok.host.keep import Keep
from vistok.host.layout import Layout
from vistok.host.reducer import Evidence, Schedule


@dataclass
class Picture:
    """What a session knows of one picture, or video, of the last prompt with any."""

    row: int
    """Its row of the batch, before beams or samples multiplied the rows."""
    index: int
    """Which picture of that row it is, from 0."""
    layout: Layout
    tokens_in: int
    tokens_kept: int
    """Tokens that the language model was given."""
    keep: Tensor
    """(tokens_kept,) int64 ascending: which of the tokens_in stayed; a picture in crops is counted crop by crop, a
    video frame by frame."""
    source: Tensor
    """(tokens_in,) int64: the slot (0..tokens_kept-1) each token ended in, -1 where it was dropped."""
    layers: dict[int, int] = field(default_factory=dict)
    """Tokens left from decoder layer r on, for each stage inside the language model."""
    layer_keep: dict[int, Tensor] = field(default_factory=dict)
    """The same as positions 0..tokens_in-1, ascending."""

    @property
    def grid(self) -> tuple[int, int] | None:
        return self.layout.grid

    @property
    def crops(self) -> tuple[tuple[int, int], ...]:
        return self.layout.crops

    @property
    def frames(self) -> int | None:
        """Of a video, as its encoder saw them (Qwen: two of the film in one); None for a picture."""
        return self.layout.frames

    def mean_tokens(self, num_layers: int) -> float:
        """Tokens averaged over the decoder's layers."""
        counts, now = [], self.tokens_kept
        for layer in range(num_layers):
            now = self.layers.get(layer, now)
            counts.append(now)
        return sum(counts) / num_layers

    def report(self) -> dict[str, Any]:
        return {
            "row": self.row,
            "index": self.index,
            "tokens_in": self.tokens_in,
            "tokens_kept": self.tokens_kept,
            "grid": self.grid,
            "crops": [list(c) for c in self.crops],
            "frames": self.frames,
            "layers": self.layers,
            "keep": self.keep.tolist(),
            "source": self.source.tolist(),
        }


@dataclass
class Place:
    """A picture in the prompt."""

    row: int
    prompt: int
    """The same before beams or samples made several rows of one prompt."""
    index: int
    layout: Layout
    first_patch: int
    columns: Tensor
    """(length,) its placeholders' columns."""
    copy: bool
    """True for the second and later rows of one prompt."""


@dataclass
class Aside:
    """All N tokens of the pictures of a group, as they were when some of them were set aside."""

    columns: Tensor
    """(G, N)"""
    positions: Tensor
    """(G, N)"""
    source: Tensor
    """(G, N)"""
    evidence_of: list[Evidence]
    values: Tensor
    """(G, N, D) the hidden state of each token when it last took part."""


@dataclass
class Group:
    """Pictures of one layout that are reduced as one batch."""

    layout: Layout
    rows: Tensor
    """(G,) int64 row of the batch."""
    first_patch: Tensor
    """(G,) int64"""
    columns: Tensor
    """(G, N) int64: the column of the prompt of each token that is left, in the order of the evidence."""
    end: Tensor
    """(G,) int64: the picture's last column."""
    places: list[Place]
    keep: Keep | tuple[Keep, ...]
    """What is to stay of each picture; a tuple: after each method."""
    evidence: Evidence
    standing: int | None
    """Tokens of each that a method inside the encoder left, None without one."""
    positions: Tensor
    """(G, N) int64: which of the picture's tokens are left."""
    source: Tensor
    """(G, tokens_in)"""
    schedules: list[Schedule] = field(default_factory=list)
    """One a method."""
    evidence_of: list[Evidence] = field(default_factory=list)
    """What each method knows of the tokens that are left."""
    aside: Aside | None = None
    """All of its tokens, where some wait for a layer that brings them back."""

    @property
    def count(self) -> int:
        return self.columns.shape[1]


def locate(visual: Tensor, layouts: list[Layout]) -> list[Place]:
    """Find each picture among the placeholders ``visual`` (B, T) bool. ValueError if they do not fit together."""
    columns = [row.nonzero()[:, 0] for row in visual]
    total, given = sum(len(c) for c in columns), sum(layout.length for layout in layouts)
    copies = total // given if given else 0
    if not copies or copies * given != total or len(columns) % copies:
        raise ValueError(
            f"input_ids: hold {total} image placeholders, but the vision encoder made {given} tokens inside this "
            "`with`; mm_encoder_outputs made outside of it and prefill_chunk_size are not supported"
        )
    queue: Iterator[Layout] = iter(layouts)
    places, patch = [], 0
    for start in range(0, len(columns), copies):
        need, column, index = len(columns[start]), 0, 0
        while column < need:
            layout = next(queue, None)
            if layout is None or column + layout.length > need:
                raise ValueError(f"input_ids: row {start} has {need} image placeholders, which is no whole pictures")
            for row in range(start, start + copies):
                span = columns[row][column : column + layout.length]
                places.append(Place(row, start // copies, index, layout, patch, span, row > start))
            patch, column, index = patch + layout.num_patches, column + layout.length, index + 1
    return places


def ordered(kinds: Sequence[list[Place]]) -> list[Place]:
    """Pictures and videos of one prompt by row and column, numbered in each row."""
    if len(kinds) == 1:
        return kinds[0]
    places = sorted((p for places in kinds for p in places), key=lambda p: (p.row, int(p.columns[0])))
    count: dict[int, int] = {}
    for place in places:
        place.index = count.get(place.row, 0)
        count[place.row] = place.index + 1
    return places


def group(
    places: Sequence[Place],
    keeps: Sequence[Keep | tuple[Keep, ...]],
    embeds: Tensor,
    one_at_a_time: bool,
    standing: Sequence[int | None] = (),
) -> list[Group]:
    """Batch the pictures of equal layout of which as much is to stay (``keeps``, one a place) and as much has left the
    encoder (``standing``, () where no method acts in it); ``embeds`` (B, T, D) gives their features."""
    device = embeds.device
    batches: dict[Any, list[Place]] = {}
    for number, (place, keep, left) in enumerate(zip(places, keeps, standing or [None] * len(places), strict=True)):
        batches.setdefault((number if one_at_a_time else id(place.layout), keep, left), []).append(place)
    groups = []
    for (_, keep, left), members in batches.items():
        layout = members[0].layout
        rows = torch.tensor([p.row for p in members], device=device)
        spans = torch.stack([p.columns for p in members]).to(device)
        columns = spans[:, layout.on(device)[0]]
        features = embeds[rows[:, None], columns]
        positions = torch.arange(layout.num_tokens, device=device).expand(len(members), -1)
        groups.append(
            Group(
                layout=layout,
                rows=rows,
                first_patch=torch.tensor([p.first_patch for p in members], device=device),
                columns=columns,
                end=spans[:, -1],
                places=members,
                keep=keep,
                standing=left,
                evidence=Evidence(
                    features=features,
                    grid=layout.grid,
                    crops=layout.crops,
                    boxes=layout.boxes,
                    frames=layout.frames,
                    index=positions,
                ),
                positions=positions,
                source=positions,
            )
        )
    return groups
