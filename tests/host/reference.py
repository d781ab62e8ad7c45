"""What the host must equal: the language model run by hand, row by row, unpadded and without a cache, on the tokens
that are left, at their original positions."""

from __future__ import annotations

from typing import Any

import torch

from tests.host.families import language_model
from vistok.core.position import recompact_positions


@torch.no_grad()
def language_inputs(model, **inputs) -> dict[str, Any]:
    """What the plain model hands its language model for ``inputs``."""
    seen: dict[str, Any] = {}

    def hook(module, args, kwargs):
        seen.update(kwargs)

    handle = language_model(model).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        model(**inputs)
    finally:
        handle.remove()
    return seen


@torch.no_grad()
def generation_inputs(model, **inputs) -> dict[str, Any]:
    """The same in the prefill of ``generate``, which makes position ids of the padding mask."""
    seen: dict[str, Any] = {}

    def hook(module, args, kwargs):
        if not seen:
            seen.update(kwargs)

    handle = language_model(model).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    finally:
        handle.remove()
    return seen


def one_row(given: dict[str, Any], row: int, mask: torch.Tensor) -> dict[str, Any]:
    """Row ``row`` of a batch without its padding: embeds (1, L, D), positions (..., 1, L), its visual planes."""
    real = mask[row].bool().nonzero()[:, 0]
    embeds = given["inputs_embeds"]
    positions = given.get("position_ids")
    if positions is None:
        positions = torch.arange(embeds.shape[1])[None]
    positions = positions.expand(*positions.shape[:-2], embeds.shape[0], -1)
    if positions.ndim == 3 and positions.shape[0] == 4:
        positions = positions[1:]
    out = {
        "embeds": embeds[row : row + 1, real],
        "positions": positions[..., row : row + 1, :][..., real],
        "real": real,
    }
    masks = given.get("attention_mask")
    if isinstance(masks, dict) or (masks is not None and masks.ndim == 4):  # what the plain model's layers may see
        masks = masks if isinstance(masks, dict) else {None: masks}
        causal = torch.ones(embeds.shape[1], embeds.shape[1]).tril().bool()
        masks = {kind: causal if m is None else m[row if len(m) > 1 else 0, 0] for kind, m in masks.items()}
        out["masks"] = {kind: m[real][:, real] for kind, m in masks.items()}
    if given.get("per_layer_inputs") is not None:
        out["own"] = given["per_layer_inputs"][row : row + 1, real]
    if given.get("deepstack_visual_embeds") is not None:
        visual = given["visual_pos_masks"]
        before = int(visual[:row].sum())
        count = int(visual[row].sum())
        out["visual"] = visual[row, real]
        out["planes"] = [plane[before : before + count] for plane in given["deepstack_visual_embeds"]]
    return out


@torch.no_grad()
def run(
    model,
    row: dict[str, Any],
    left: torch.Tensor,
    stages: dict[int, torch.Tensor] | None = None,
    recompact: bool = False,
) -> torch.Tensor:
    """Logits (L', V) of the places ``left`` (sorted) of a row; before layer r only those of ``stages[r]`` (places of
    the same row, sorted) go on."""
    lm, stages = language_model(model), stages or {}
    hidden, positions, places = row["embeds"][:, left], row["positions"][..., left], left
    planes, shared, own, turns = [], {}, None, {}
    if "own" in row:
        own = lm.project_per_layer_inputs(hidden, row["own"][:, left])
    if "planes" in row:
        numbers = torch.cumsum(row["visual"], 0) - 1
        planes = row["planes"]
    for number, layer in enumerate(lm.layers):
        if number in stages:
            stay = torch.isin(places, stages[number])
            hidden, positions, places = hidden[:, stay], positions[..., stay], places[stay]
            own = None if own is None else own[:, stay]
            shared = {kind: tuple(t[:, :, stay] for t in states) for kind, states in shared.items()}
            turns = {kind: tuple(t[:, stay] for t in rotary) for kind, rotary in turns.items()}
        if recompact:
            positions = recompact_positions(positions, torch.arange(len(places))[None])
        kinds = getattr(lm.config, "layer_types", None) if "masks" in row else None
        kind = None if kinds is None else kinds[number]
        rotary = lm.rotary_emb(hidden, positions, *([] if kind is None else [kind]))
        mask = row["masks"][kind][places][:, places][None, None] if "masks" in row else None
        if lm.config._attn_implementation == "eager":
            length = hidden.shape[1]
            mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        more = {}
        if hasattr(getattr(layer, "self_attn", None), "is_kv_shared_layer"):
            more = {"per_layer_input": None if own is None else own[:, :, number], "shared_kv_states": shared}
            if layer.self_attn.is_kv_shared_layer:  # the keys were turned by the positions of the layer that made them
                rotary = turns[kind]
            turns[kind] = rotary
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=None, **more)
        if number < len(planes):
            visual = row["visual"][places]
            hidden = hidden.clone()
            hidden[0, visual] += planes[number][numbers[places[visual]]]
    return model.lm_head(lm.norm(hidden))[0]


def longer(mask: torch.Tensor, kind: str | None, columns: torch.Tensor, model) -> torch.Tensor:
    """A mask (L, L) for one more token of text, the last of ``columns`` (L + 1,) of the batch."""
    window = language_model(model).config.sliding_window if kind == "sliding_attention" else None
    seen = torch.ones_like(columns, dtype=torch.bool) if window is None else columns > columns[-1] - window
    out = torch.zeros(len(columns), len(columns), dtype=torch.bool)
    out[:-1, :-1], out[-1] = mask, seen
    return out


@torch.no_grad()
def greedy(model, row, left, steps: int, stages=None, recompact: bool = False, logits=None) -> list[int]:
    """Greedy continuation, everything computed anew for each token. ``logits``: a list that takes those of each."""
    stages = dict(stages or {})
    row, out = dict(row), []
    for _ in range(steps):
        last = run(model, row, left, stages, recompact)[-1]
        if logits is not None:
            logits.append(last)
        token = int(last.argmax())
        out.append(token)
        embed = model.get_input_embeddings()(torch.tensor([[token]]))
        row["embeds"] = torch.cat([row["embeds"], embed], 1)
        if "masks" in row:
            row["real"] = torch.cat([row["real"], row["real"][-1:] + 1])
            row["masks"] = {kind: longer(mask, kind, row["real"], model) for kind, mask in row["masks"].items()}
        if "own" in row:
            row["own"] = torch.cat([row["own"], language_model(model).get_per_layer_inputs(torch.tensor([[token]]))], 1)
        after = row["positions"][..., -1:] + 1
        row["positions"] = torch.cat([row["positions"], after], -1)
        if "visual" in row:
            row["visual"] = torch.cat([row["visual"], torch.zeros(1, dtype=torch.bool)])
        new = torch.tensor([row["embeds"].shape[1] - 1])
        left = torch.cat([left, new])
        stages = {layer: torch.cat([stay, new]) for layer, stay in stages.items()}
    return out
