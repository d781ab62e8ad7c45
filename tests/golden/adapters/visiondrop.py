"""VisionDrop: released order of the slots. The encoder cases keep the class token, which is put in front here; the
cases of a stage inside the language model give hidden states and weights, from which the evidence is computed."""

from __future__ import annotations

import torch

from vistok.core.attention import attention_marginals
from vistok.host.reducer import Evidence
from vistok.reduce.visiondrop import VisionDrop


def run(case):
    hyper = case.hyper
    keep = hyper["dominant"] + hyper["contextual"]
    system = VisionDrop(contextual=hyper["contextual"] / keep, parity="authors")
    if "metric" in case.inputs:
        return _encoder(system, case.inputs, keep, hyper["dominant"])
    hidden, span = case.inputs["hidden_states"], slice(hyper["start"], hyper["start"] + hyper["N"])
    q, k = _queries_and_keys(hidden, case.inputs["w_q"], case.inputs["w_k"], hyper["H"])
    places = torch.arange(span.start, span.stop).expand(len(hidden), -1)
    received = attention_marginals(q[:, :, span], k, places=places)[0]
    evidence = Evidence(features=hidden[:, span], llm_received=received[:, span], llm_keys=k.mean(1)[:, span])
    tokens = system.at_layer(evidence, keep, 0).tokens
    return {"hidden_states": torch.cat([hidden[:, : span.start], tokens, hidden[:, span.stop :]], 1)}


def _encoder(system, inputs, keep, dominant):
    rows, metric, hidden = inputs["attention_rows"], inputs["metric"], inputs["hidden_states"]
    evidence = Evidence(
        features=hidden[:, 1:],
        encoder_features=hidden[:, 1:],
        cls_attention=rows[..., 1:],
        encoder_keys=metric[:, 1:].repeat(1, 1, rows.shape[1]),  # whose mean over heads is the metric
    )
    reduction = system.reduce(evidence, keep)
    first = (reduction.source.unsqueeze(2) == torch.arange(dominant)).int().argmax(1)
    positions = torch.cat([torch.zeros(len(first), 1, dtype=torch.int64), first + 1], 1)
    return {"tokens": torch.cat([hidden[:, :1], reduction.tokens], 1), "dominant": positions}


def _queries_and_keys(hidden, w_q, w_k, heads):
    """Rotated (B, H, T, d) of a layer with an RMS norm of unit weight, as the cases' note describes it."""
    normed = hidden * torch.rsqrt(hidden.square().mean(2, keepdim=True) + 1e-6)
    width = w_q.shape[1] // heads
    angle = torch.arange(hidden.shape[1])[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
    cos, sin = (f(angle).repeat(1, 2) for f in (torch.cos, torch.sin))

    def rotated(weight):
        x = (normed @ weight).unflatten(2, (heads, width)).transpose(1, 2)
        turned = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], 3)
        return x * cos + turned * sin

    return rotated(w_q), rotated(w_k)
