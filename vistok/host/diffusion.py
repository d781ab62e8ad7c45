"""A generation loop for masked-diffusion language heads: an answer region of one length, unmasked in a few steps.

Every step fills the region's most confident masks, as many as every other step. Attention is that of a prefix model:
everything up to the last picture sees itself, the question sees both, the answer sees all of it, each in both
directions. So a prompt need not be run again in every step, but it is unless ``cache`` is asked for: models whose
prompt sees the answer have to, and what they can save is the question. From some step on a reducer may drop visual
tokens, and visual tokens may bypass some of the layers; both really shorten the sequence. Source of the loop: LLaDA
(arXiv 2502.09992); of the prefix model: LaViDa.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from vistok.host.effort import Effort
from vistok.host.flow import PICTURE, QUESTION, Columns, Flow, Pruning
from vistok.host.hooks import Hooks
from vistok.host.hosts import UnsupportedModel, host_of
from vistok.host.keep import Keep, check_keep
from vistok.host.pictures import group, locate
from vistok.host.prompt import read_prompt
from vistok.host.reducer import Reducer
from vistok.host.rows import pack
from vistok.host.steps import Steps, needs_of
from vistok.host.text import outside, question_tokens, special_ids
from vistok.host.vision import Probe

KINDS = ("image", "prompt", "answer")
"""What an answer's attention goes to; ``Trace.attention`` has them in this order."""


class Prune(Protocol):
    """Which visual tokens go, how many, and when (``StepPrune`` of vistok.reduce.dmllm_redundancy)."""

    @property
    def reducer(self) -> Reducer:
        """Any reducer; one with stages inside the language model carries them out in every step."""
        ...

    @property
    def keep(self) -> Keep:
        """What is left of each picture, as in ``vistok.apply``."""
        ...

    @property
    def start_frac(self) -> float:
        """From which share of the steps on, in [0, 1]; 1: never."""
        ...


@dataclass(frozen=True)
class LayerSkip:
    """Visual tokens bypass these decoder layers: there they are neither computed nor seen, and leave as they came."""

    layers: tuple[int, ...]


@dataclass(frozen=True)
class Trace:
    """What a run did inside; S steps, L layers, B rows, A tokens of the answer."""

    attention: Tensor
    """(S, L, B, 3) float32 on the CPU: the share of the answer tokens' attention that goes to each of ``KINDS``, mean
    over heads and tokens; sums to 1."""
    confidence: Tensor
    """(S, B, A) float32 on the CPU: the probability that a step gives to the token that ends up at each place."""


@dataclass(frozen=True)
class Denoised:
    """What a run made of B prompts."""

    ids: Tensor
    """(B, A) int64 token ids, no mask among them; after the first end token they are filling."""
    taken: Tensor
    """(B, A) int64: the step at which each place was filled."""
    confidence: Tensor
    """(B, A) float32: the probability with which it was."""
    vision_flops: int
    """Floating-point operations of the encoder and projector, once for all steps and rows (``vistok.core.flops``)."""
    step_flops: tuple[int, ...]
    """Those of the language model and its head by step, all rows; a method's own are not counted."""
    step_tokens: tuple[float, ...]
    """Visual tokens by step, mean over rows and layers (0 in layers that they bypass)."""
    trace: Trace | None = None

    @property
    def flops(self) -> int:
        return self.vision_flops + sum(self.step_flops)


class DiffusionDecoder:
    """Answers prompts with a masked-diffusion vision-language model in ``steps`` steps.

    ``answer_length`` A and ``mask_token_id``: by default those that the model's configuration names. ``cache``: run the
    prompt once, and again where pruning begins, instead of in every step; the answers are the same. The model is not
    changed; hooks are in it only while ``run`` runs. Raises ``UnsupportedModel`` for models it does not know, and
    ValueError for a model that names no mask, and for ``steps`` that are not in 1..A: each step fills a token at least.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int,
        *,
        answer_length: int | None = None,
        mask_token_id: int | None = None,
        cache: bool = False,
    ) -> None:
        self.cache = cache
        self.host = host_of(model)
        if self.host.own_masks:
            raise UnsupportedModel(
                f"{self.host.name}: its masks are more than causal, no diffusion decoding for it yet"
            )
        self.answer_length = self._number("answer_length", answer_length)
        self.mask_token_id = self._number("mask_token_id", mask_token_id)
        if not 1 <= steps <= self.answer_length:
            raise ValueError(f"steps: got {steps}, must be between 1 and the {self.answer_length} tokens of an answer")
        self.steps = steps

    def _number(self, name: str, given: int | None) -> int:
        found = getattr(self.host.model.config, name, None) if given is None else given
        if found is None:
            raise ValueError(
                f"{name}: not given, and the configuration of {self.host.name} names none; it must be that of a "
                "masked-diffusion model, such as vistok-tiny-diffusion"
            )
        return int(found)

    def counts(self) -> list[int]:
        """Tokens filled in each step: as many, the first steps one more where they do not divide."""
        each, more = divmod(self.answer_length, self.steps)
        return [each + (step < more) for step in range(self.steps)]

    @torch.no_grad()
    def run(
        self,
        inputs: Mapping[str, Any],
        prune: Prune | None = None,
        skip: LayerSkip | None = None,
        *,
        trace: bool = False,
    ) -> Denoised:
        """The answers to a batch of prompts, padded on the left if at all.

        ``inputs``: the model's, as its processor makes them. ``trace``: also measure attention and confidence, by the
        side (memory: logits of all steps, and one layer's attention rows of the answer). Raises ValueError for wrong
        arguments; methods that bring tokens back or that only spend less on them cannot be used here.
        """
        depth = len(self.host.layers)
        skipped = frozenset(() if skip is None else skip.layers)
        if wrong := [layer for layer in skipped if not 0 <= layer < depth]:
            raise ValueError(f"skip: got layer {wrong[0]}, the model has layers 0..{depth - 1}")
        method = None if prune is None else prune.reducer
        if isinstance(method, Effort):
            raise ValueError(f"method: {type(method).__name__} drops no token, it cannot prune in a diffusion decoder")
        begin = self.steps if prune is None else math.ceil(prune.start_frac * self.steps - 1e-9)
        probe = Probe([] if method is None else [needs_of(method)], len(self.host.blocks))
        prompt, words, ids = self._read(inputs, probe)
        vision = 0 if probe.run is None else self.host.vision_flops(probe.run)
        table = self.host.model.get_input_embeddings()
        shape = (len(prompt.embeds), self.answer_length)
        answer = torch.full(shape, self.mask_token_id, device=prompt.embeds.device)
        taken, sure = torch.full_like(answer, -1), torch.zeros(shape, device=answer.device)
        spent, tokens, shares, said = [], [], [], []
        after = prompt.positions.masked_fill(~prompt.real, -1)
        after = (after.amax(0) if after.ndim == 3 else after).amax(1, keepdim=True) + 1
        later = (after + torch.arange(self.answer_length, device=answer.device)).expand(
            *prompt.positions.shape[:-1], -1
        )
        flow = Flow(self.host, prompt, later, skipped, cache=self.cache, trace=trace)
        for step, count in enumerate(self.counts()):
            if step == begin and prune is not None and method is not None:
                pruning = self._pruning(method, prune.keep, probe, prompt, words, ids)
                flow = Flow(self.host, prompt, later, skipped, cache=self.cache, trace=trace, pruning=pruning)
            logits = flow.forward(table(answer).to(prompt.embeds.dtype))
            logits[..., self.mask_token_id] = -torch.inf
            chance, token = logits.float().softmax(-1).max(-1)
            open_ = answer == self.mask_token_id
            first = torch.where(open_, chance, -1.0).sort(dim=1, descending=True, stable=True).indices[:, :count]
            answer = answer.scatter(1, first, token.gather(1, first))
            taken = taken.scatter(1, first, step)
            sure = sure.scatter(1, first, chance.gather(1, first))
            spent.append(flow.flops)
            tokens.append(flow.visual)
            if trace:
                shares.append(torch.stack(flow.shares).cpu())
                said.append(logits.float().log_softmax(-1).cpu())
        traced = None
        if trace:
            final = answer.cpu()[None, :, :, None].expand(len(said), -1, -1, -1)
            traced = Trace(torch.stack(shares), torch.stack(said).gather(3, final)[..., 0].exp())
        return Denoised(answer, taken, sure, vision, tuple(spent), tuple(tokens), traced)

    def _read(self, inputs: Mapping[str, Any], probe: Probe) -> tuple[Columns, Tensor, Tensor | None]:
        """What the outer model gives to the language model, which is not run; where the prompt is words; its ids."""
        given: dict[str, Any] = {}

        def see(**kwargs: Any) -> BaseModelOutputWithPast:
            given.update(kwargs)
            return BaseModelOutputWithPast(last_hidden_state=kwargs["inputs_embeds"])

        hooks = Hooks()
        try:
            self.host.watch(hooks, probe)
            probe.install(hooks, self.host)
            hooks.shadow(self.host.language_model, "forward", see)
            self.host.base(**inputs, use_cache=False)
        finally:
            hooks.remove()
        if given.get("deepstack_visual_embeds") is not None:
            raise UnsupportedModel(
                f"{self.host.name}: several of its layers are given pictures; no diffusion decoding yet"
            )
        embeds: Tensor = given["inputs_embeds"]
        mask, positions = self.host.padding(given), given.get("position_ids")
        valid = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device) if mask is None else mask.bool()
        if positions is None:
            positions = (valid.cumsum(1) - 1).clamp(min=0)
        elif positions.ndim == 3 and positions.shape[0] == 4:
            positions = positions[1:]  # Qwen's first axis only serves packed sequences
        positions = positions.expand(*positions.shape[:-2], *embeds.shape[:2])
        seen = read_prompt(self.host, (), dict(inputs))
        if seen is not None and seen.videos is not None:
            raise ValueError("pixel_values_videos: video is not supported yet by the diffusion decoder")
        visual, ids = (torch.zeros_like(valid), None) if seen is None else (seen.visual, seen.ids)
        columns = torch.arange(embeds.shape[1], device=embeds.device)
        last = torch.where(visual, columns, -1).amax(1, keepdim=True)
        block = torch.where(columns > last, QUESTION, PICTURE).masked_fill(~valid, -1)
        words = question_tokens(valid, visual, ids, special_ids(self.host.model))
        return Columns(embeds, positions, block, visual, columns.expand_as(block)), words, ids

    def _pruning(
        self, method: Reducer, keep: Keep, probe: Probe, prompt: Columns, words: Tensor, ids: Tensor | None
    ) -> Pruning:
        """The method's reduction before the language model, and what it is to do inside."""
        host = self.host
        host.check_needs(method)
        steps = Steps(host, [method], [needs_of(method)], check_keep(keep), "per_image", probe)
        found = locate(prompt.visual, [] if probe.run is None else host.layouts(probe.run, prompt.visual))
        words = outside(words, found) if steps.wants_text else words
        groups = group(found, steps.keeps(found), prompt.embeds, method.one_at_a_time)
        alive, embeds = torch.ones_like(prompt.visual), prompt.embeds.clone()
        for one in groups:
            steps.plan(one)
            if one.schedules[0].returns:
                raise ValueError(f"method: {type(method).__name__} brings tokens back, a diffusion decoder does not")
            before, rows = one.columns, one.rows[:, None]
            values = steps.at_input(one, prompt.embeds, words if steps.wants_text else None, ids)
            if values is not None:
                alive[rows, before] = False
                alive[rows, one.columns] = True
                embeds[rows, one.columns] = values
        left = prompt if bool(alive.all()) else prompt.take(pack(alive, prompt.real), embeds)
        return Pruning(steps, method, groups, left, words, prompt.embeds.shape[1])
