"""Evidence of pictures that were never drawn: all fields, consistent with one another, from random queries and keys."""

from __future__ import annotations

from dataclasses import replace

import torch

from vistok.core.score import pagerank
from vistok.host.reducer import Evidence
from vistok.host.vision import layers_of

DEPTH, HEADS, WIDTH, ENCODER_WIDTH, QUESTION, PIXELS = 6, 4, 12, 24, 5, 16


def evidence(reducer, grid=(8, 8), batch=3, *, seed=0, scale=1.0, crops=(), dtype=torch.float32):
    """What ``reducer`` needs (at the projector and inside the language model), as the host would give it.

    ``scale`` 0 makes all tokens alike: zero features and keys, uniform attention. ``crops``: grids of a picture that
    was cut, instead of ``grid``. Fields agree: those of an encoder layer come from one set of queries and keys, the
    states after the last layer but one are the encoder features, and where ``project`` is asked for, ``features`` are
    its rows.
    """
    generator = torch.Generator().manual_seed(seed)
    later = torch.Generator().manual_seed(seed + 1)  # for fields whose draws must not change those of the others

    def normal(*shape, by=generator):
        return scale * torch.randn(*shape, generator=by)

    n = sum(h * w for h, w in crops) if crops else grid[0] * grid[1]
    layers = [encoder_layer(normal(2, batch, HEADS, 1 + n, 8)) for _ in range(DEPTH)]
    fields = {
        "features": normal(batch, n, WIDTH),
        "encoder_features": normal(batch, n, ENCODER_WIDTH),
        "text": normal(batch, QUESTION, WIDTH),
        "text_mask": torch.arange(QUESTION) < torch.tensor([QUESTION, 2, 3])[torch.arange(batch) % 3, None],
        "text_ids": torch.randint(100, (batch, QUESTION), generator=generator),
        "index": torch.arange(n).expand(batch, n),
    }
    for number, layer in enumerate(layers):
        states = normal(batch, n, ENCODER_WIDTH, by=later)
        layer["encoder_states"] = fields["encoder_features"] if number == DEPTH - 2 else states
    fields["patch_pixels"] = normal(batch, n, PIXELS, by=later)
    for name, spec in reducer.needs.items():
        if name in layers[0]:
            values = tuple(layers[layer][name] for layer in layers_of(spec, DEPTH))
            fields[name] = values if isinstance(spec, (slice, tuple)) else values[0]
        elif name == "project":
            fields[name] = project
            fields["features"] = project(fields["encoder_features"])
    queries = {"last": 1, "text": QUESTION, "visual": n}
    for name, rows in reducer.layer_needs.items():
        if name == "llm_attention":
            logits = 3 * normal(batch, HEADS, queries[rows], n + QUESTION)
            fields[name] = logits.softmax(-1)[..., :n]
        elif name == "llm_received":
            fields[name] = normal(batch, n).softmax(1)
        elif name == "llm_keys":
            fields[name] = normal(batch, n, 8)
        elif name == "llm_importance":
            temperature, iterations = rows
            logits = normal(batch, HEADS, n + QUESTION, n + QUESTION, by=later) / temperature
            future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
            fields[name] = pagerank(logits.masked_fill(future, -torch.inf).softmax(-1), iterations)[..., :n]
    wanted = {"features", "text_mask", "index", *reducer.needs, *reducer.layer_needs}
    fields = {name: value for name, value in fields.items() if name in wanted}
    return cast(Evidence(**fields, grid=None if crops else grid, crops=crops), dtype)


def encoder_layer(queries_and_keys):
    """Every attention field of a layer whose queries and keys are (2, B, H, 1 + N, d), class token first."""
    q, k = queries_and_keys
    logits = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    full = logits.softmax(-1)
    wide_q, wide_k = (x.transpose(1, 2).flatten(2) for x in (q, k))
    wide = (wide_q[:, :1] @ wide_k.transpose(1, 2) / wide_q.shape[-1] ** 0.5).softmax(-1)
    return {
        "cls_attention": full[:, :, 0, 1:],
        "cls_logits": logits[:, :, 0, 1:],
        "wide_cls_attention": wide[:, 0, 1:],
        "received_attention": full.mean((1, 2))[:, 1:],
        "given_attention": full[:, :, 1:, 1:].mean((1, 3)),
        "encoder_attention": full[:, :, 1:, 1:],
        "encoder_keys": wide_k[:, 1:],
        "encoder_mean_keys": k[:, :, 1:].mean(1),
    }


def project(tokens):
    """A projector, the same one always: rows (..., ENCODER_WIDTH) to (..., WIDTH), not linear, 0 to 0."""
    weight = torch.randn(ENCODER_WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)) / ENCODER_WIDTH**0.5
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    return torch.nn.functional.gelu(wide @ weight.to(wide)).to(tokens.dtype)


def mapped(given, change):
    """``given`` with ``change(tensor)`` in place of each of its tensors."""

    def on(value):
        return tuple(on(v) for v in value) if isinstance(value, tuple) else change(value)

    names = [
        n
        for n, v in vars(given).items()
        if isinstance(v, (torch.Tensor, tuple)) and n not in ("grid", "crops", "boxes")
    ]
    return replace(given, **{name: on(getattr(given, name)) for name in names})


def cast(given, dtype):
    """All its real numbers in ``dtype``."""
    return mapped(given, lambda x: x.to(dtype) if x.is_floating_point() else x)


def rows(given, index):
    """The pictures ``index`` of a batch."""
    return mapped(given, lambda x: x[index])


def permuted(given, order):
    """The tokens in another order: place i holds what place ``order[i]`` held."""
    given_order = order.expand(len(given.features), -1)
    return replace(given.take(given_order), grid=given.grid, crops=given.crops)


class Trial:
    """A claim's trial whose figures are made up: ``figures[name of the method's class, or "dense"]``."""

    def __init__(self, default=0.5, **figures):
        self.default, self.figures, self.calls = default, figures, []

    def _figure(self, what, method, keep, tasks):
        self.calls.append((what, method, keep, tasks))
        return self.figures.get("dense" if method is None else type(method).__name__, self.default)

    def accuracy(self, method, keep=1.0, tasks=()):
        return self._figure("accuracy", method, keep, tasks)

    def evidence_recall(self, method, keep, tasks=()):
        return self._figure("evidence_recall", method, keep, tasks)

    def ttft_ms(self, method, keep=1.0):
        return self._figure("ttft_ms", method, keep, ())
