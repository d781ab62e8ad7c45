"""What the methods do to the pictures of one prompt: their evidence, their reductions, and the record of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vistok.host.effort import Effort
from vistok.host.hosts import Host
from vistok.host.keep import Budget, Keep, counts, share_out
from vistok.host.pictures import Aside, Group, Picture, Place
from vistok.host.reducer import LayerSpec, Reducer, Reduction, Schedule
from vistok.host.rows import places
from vistok.host.text import question_fields
from vistok.host.vision import Probe

TEXT_FIELDS = ("text", "text_mask", "text_ids")


class Steps:
    """The methods of a session, in order; each sees what the ones before it left."""

    def __init__(
        self,
        host: Host,
        methods: Sequence[Reducer],
        needs: Sequence[Mapping[str, LayerSpec]],
        keep: Keep | Sequence[Keep],
        budget: Budget,
        probe: Probe,
    ) -> None:
        self.host, self.methods, self.needs, self.keep, self.probe = host, methods, needs, keep, probe
        self.budget = budget
        asked = {name for need in self.needs for name in need}
        self.wants_text = not asked.isdisjoint(TEXT_FIELDS) or any("text" in m.layer_needs.values() for m in methods)

    def keeps(self, places: Sequence[Place]) -> list[Keep | tuple[Keep, ...]]:
        """What is to stay of each picture: ``keep``, or its part of what ``keep`` leaves of all pictures of its row."""
        if self.budget == "per_image":
            whole = self.keep if isinstance(self.keep, (int, float)) else tuple(self.keep)
            return [whole] * len(places)
        sizes: dict[int, list[int]] = {}
        for place in places:
            sizes.setdefault(place.row, []).append(place.layout.num_tokens)
        each = self.keep if isinstance(self.keep, Sequence) else [self.keep]
        parts = {row: list(zip(*(share_out(keep, mine) for keep in each), strict=True)) for row, mine in sizes.items()}
        mine = [parts[place.row][place.index] for place in places]
        return [part if isinstance(self.keep, Sequence) else part[0] for part in mine]

    def plan(self, group: Group) -> None:
        """Fix how many tokens stay where, for each method."""
        depth, left = len(self.host.layers), group.count
        for method, keep in zip(self.methods, self._keeps(group), strict=True):
            schedule = method.schedule(left, min(keep, left), depth)
            _check_schedule(method, schedule, left, depth, len(self.methods))
            aside: int | None = None
            for layer, count in sorted(schedule.layers.items()):
                if count < schedule.input:
                    self.host.check_stage(method, layer)
                    aside = layer if aside is None else aside
                elif aside is not None:
                    self.host.check_return(method, aside, layer)
                    aside = None
            group.schedules.append(schedule)
            left = schedule.input

    def _keeps(self, group: Group) -> list[int]:
        """Tokens left after each method; of a single ``keep`` those that drop by themselves (Effort) take no share, nor
        what carries on a method inside the encoder."""
        keep, num_tokens = group.keep, group.count
        before = [] if group.standing is None else [group.standing]
        drops = [not isinstance(method, Effort) for method in self.methods[len(before) :]]
        if not drops:
            return before
        if isinstance(keep, Sequence) or all(drops):
            return before + counts(keep, num_tokens, len(drops))
        left = iter(counts(keep, num_tokens, max(1, sum(drops))))
        return before + [next(left) if drop else num_tokens for drop in drops]

    def stages(self, groups: list[Group]) -> set[int]:
        """The decoder layers before which something is dropped or comes back."""
        return {
            layer
            for group in groups
            for schedule in group.schedules
            for layer, left in schedule.layers.items()
            if left < schedule.input or layer in schedule.returns
        }

    # Before the language model -------------------------------------------------------------------------------------

    def at_input(self, group: Group, embeds: Tensor, words: Tensor | None, ids: Tensor | None) -> Tensor | None:
        """Reduce the pictures of ``group`` before the language model. The new values (G, K, D) of ``group.columns``, or
        None where nothing was dropped."""
        text = {} if words is None else question_fields(group, words, embeds, ids)
        evidence = [
            replace(
                group.evidence,
                project=self.host.project_exactly if "project" in needs else None,
                **text,
                **self.probe.evidence(needs, group.layout, group.first_patch),
            )
            for needs in self.needs
        ]
        values = None
        staged = any(schedule.layers for schedule in group.schedules)
        for number, (method, schedule) in enumerate(zip(self.methods, group.schedules, strict=True)):
            if schedule.input >= group.count:
                continue
            reduction = method.reduce(evidence[number], schedule.input)
            _check_reduction(method, reduction, evidence[number].num_tokens, len(group.rows))
            encoded = reduction.tokens if method.space == "encoder" else None
            values = reduction.tokens if encoded is None else self.host.project(encoded)
            values = values.to(embeds.dtype)
            _follow(group, reduction)
            for other in range(len(self.methods)):
                if staged or other > number:
                    left = evidence[other].take(reduction.keep)
                    if encoded is not None and left.encoder_features is not None:
                        left = replace(left, encoder_features=encoded)
                    evidence[other] = replace(left, features=values)
            evidence[number] = replace(evidence[number], carry=reduction.carry)
        group.evidence_of = evidence
        return values

    def records(self, group: Group) -> list[Picture]:
        """One record for each picture of the group (rows that beams made of one prompt count once)."""
        return [
            Picture(
                row=place.prompt,
                index=place.index,
                layout=group.layout,
                tokens_in=group.layout.num_tokens,
                tokens_kept=group.count,
                keep=group.positions[i],
                source=group.source[i],
            )
            for i, place in enumerate(group.places)
            if not place.copy
        ]

    # Inside the language model -----------------------------------------------------------------------------------

    def at_layer(
        self, number: int, layer: int, group: Group, hidden: Tensor, index: Tensor, width: int, fields: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Let method ``number`` reduce ``group`` before decoder layer ``layer``.

        ``hidden`` (B, T', D) are the columns ``index`` (B, T') of a prompt of ``width`` columns. Returns the current
        columns (G, N) that the pictures held, those (G, K) that stay, and their values (G, K, D); None where nothing is
        to do.
        """
        method, schedule = self.methods[number], group.schedules[number]
        keep = min(schedule.layers[layer], group.count)
        if keep == group.count:
            return None
        now = places(index, width)[group.rows].gather(1, group.columns)
        evidence = replace(group.evidence_of[number], features=hidden[group.rows[:, None], now], **fields)
        reduction = method.at_layer(evidence, keep, layer)
        _check_reduction(method, reduction, group.count, len(group.rows))
        if reduction.keep.shape[1] == group.count:
            return None
        if any(later > layer for later in schedule.returns):
            if group.aside is None:
                group.aside = Aside(
                    group.columns, group.positions, group.source, group.evidence_of, evidence.features.clone()
                )
            else:
                group.aside.values[torch.arange(len(now))[:, None], group.positions] = evidence.features
        group.evidence_of = [e.take(reduction.keep) for e in group.evidence_of]
        if reduction.carry is not None:
            group.evidence_of[number] = replace(group.evidence_of[number], carry=reduction.carry)
        _follow(group, reduction)
        return now, now.gather(1, reduction.keep), reduction.tokens.to(hidden.dtype)

    def bring_back(self, group: Group, hidden: Tensor, index: Tensor, width: int) -> Tensor:
        """All tokens of ``group`` take part again: their hidden states (G, N, D). Arguments as in ``at_layer``."""
        aside = group.aside
        if aside is None:
            raise RuntimeError("vistok: no token of the group was set aside")
        now = places(index, width)[group.rows].gather(1, group.columns)
        states = hidden[group.rows[:, None], now]
        values = self.methods[0].come_back(aside.values, group.positions, states).to(hidden.dtype)
        group.columns, group.positions, group.source = aside.columns, aside.positions, aside.source
        group.evidence_of, group.aside = aside.evidence_of, None
        return values


def needs_of(method: Reducer) -> dict[str, LayerSpec]:
    """``method.needs``, and the encoder features where it writes encoder-space tokens."""
    needs: Mapping[str, LayerSpec] = method.needs
    return {**({"encoder_features": None} if method.space == "encoder" else {}), **needs}


def _follow(group: Group, reduction: Reduction) -> None:
    keep = reduction.keep
    group.columns = group.columns.gather(1, keep)
    group.positions = group.positions.gather(1, keep)
    if keep.shape[1]:
        ended = reduction.source.gather(1, group.source.clamp(min=0))
        group.source = torch.where(group.source < 0, -1, ended)
    else:
        group.source = torch.full_like(group.source, -1)


def _check_schedule(method: Reducer, schedule: Schedule, given: int, depth: int, methods: int) -> None:
    name = type(method).__name__
    if not 1 <= schedule.input <= given:
        raise ValueError(f"{name}.schedule: input is {schedule.input}, must be between 1 and the {given} tokens given")
    for layer, left in schedule.layers.items():
        if not 0 <= layer < depth:
            raise ValueError(f"{name}.schedule: has a stage before layer {layer}, the model has layers 0..{depth - 1}")
        if not 0 <= left <= schedule.input:
            raise ValueError(f"{name}.schedule: {left} tokens from layer {layer} on, must be 0..{schedule.input}")
    for layer in schedule.returns:
        if not schedule.layers[layer] == schedule.input == given:
            raise ValueError(
                f"{name}.schedule: {schedule.layers[layer]} tokens from layer {layer} on, more than before it; where "
                f"tokens come back, all {given} must, and none may be dropped before the language model"
            )
        if methods > 1:
            raise ValueError(f"method: {name} brings tokens back inside the language model; it must be the only method")


def _check_reduction(method: Reducer, reduction: Reduction, given: int, batch: int) -> None:
    keep, tokens, source = reduction.keep, reduction.tokens, reduction.source
    if keep.ndim != 2 or len(keep) != batch or tokens.shape[:2] != keep.shape or source.shape != (batch, given):
        raise ValueError(
            f"{type(method).__name__}: returned keep {tuple(keep.shape)}, tokens {tuple(tokens.shape)}, source "
            f"{tuple(source.shape)} for {batch} pictures of {given} tokens; must be (B, K), (B, K, D), (B, N)"
        )
