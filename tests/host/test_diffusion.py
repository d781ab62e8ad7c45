"""The masked-diffusion decoder, against a plain forward in which dropped tokens are masked instead."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import vistok
from tests.host.families import FAMILIES, IMAGE, prompt
from vistok.host.diffusion import DiffusionDecoder, LayerSkip
from vistok.host.reducer import Reducer
from vistok.reduce.dmllm_redundancy import VTW, StepPrune

A, MASK = 5, 97
FAMILY = FAMILIES["llava-clip"]
DEPTH = 4


def decoder(steps=3, family=FAMILY, cache=False):
    return DiffusionDecoder(family.model, steps, answer_length=A, mask_token_id=MASK, cache=cache)


@pytest.fixture(scope="module")
def inputs():
    """Two rows of different length: one picture, and two."""
    return prompt(FAMILY, [[0], [0, 0]]).inputs


@dataclass
class Plain:
    """One row without padding, layer by layer, no token ever dropped: those that are gone are masked."""

    model: object
    inputs: dict
    row: int

    def __post_init__(self):
        real = self.inputs["attention_mask"][self.row].bool()
        self.ids = self.inputs["input_ids"][self.row][real]
        self.visual = torch.cat([self.ids == IMAGE, torch.zeros(A, dtype=torch.bool)])
        t, self.last = len(self.ids), int((self.ids == IMAGE).nonzero().max())
        self.block = torch.tensor([0 if c <= self.last else 1 if c < t else 2 for c in range(t + A)])
        before = sum(int((ids == IMAGE).sum()) for ids in self.inputs["input_ids"][: self.row])
        features = torch.cat(self.model.model.get_image_features(self.inputs["pixel_values"]).pooler_output)
        self.embeds = self.model.get_input_embeddings()(self.ids).clone()
        self.embeds[self.ids == IMAGE] = features[before : before + int((self.ids == IMAGE).sum())]

    def forward(self, answer, gone=lambda layer, attention: None, skip=(), on_layer=lambda *a: None):
        """Logits (A, V). ``gone(layer, attention)``: columns that are masked from this layer on, None for no change."""
        lm = self.model.model.language_model
        h = torch.cat([self.embeds, self.model.get_input_embeddings()(answer)])[None]
        rotary = lm.rotary_emb(h, torch.arange(h.shape[1])[None])
        sees, dead = self.block[None] <= self.block[:, None], torch.zeros(h.shape[1], dtype=torch.bool)
        for number, layer in enumerate(lm.layers):

            def weights(layer=layer, h=h, sees=sees, dead=dead):
                x, a = layer.input_layernorm(h), layer.self_attn
                q, k = (p(x).unflatten(-1, (-1, a.head_dim)).transpose(1, 2) for p in (a.q_proj, a.k_proj))
                q, k = apply_rotary_pos_emb(q, k, *rotary)
                k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
                logits = q @ k.transpose(2, 3) * a.scaling
                return logits.masked_fill(~(sees & ~dead[None]), -torch.inf).softmax(-1)[0].nan_to_num()

            new = gone(number, weights)
            dead = dead if new is None else dead | new
            hidden = dead | self.visual if number in skip else dead
            may = (sees & ~hidden[None]) | torch.eye(len(hidden), dtype=torch.bool)
            out = layer(h, attention_mask=may[None, None], position_embeddings=rotary)
            h = torch.where(self.visual[None, :, None], h, out) if number in skip else out
            on_layer(number, weights, h)
        return self.model.lm_head(lm.norm(h))[0, -A:]

    def decode(self, steps, begin=99, **how):
        answer = torch.full((A,), MASK)
        sure = torch.zeros(A)
        for step in range(steps):
            logits = self.forward(answer, **(how if step >= begin else {}))
            logits[:, MASK] = -torch.inf
            chance, token = logits.softmax(-1).max(-1)
            for _ in range(A // steps + (step < A % steps)):
                open_ = [i for i in range(A) if answer[i] == MASK]
                best = max(open_, key=lambda i: (float(chance[i]), -i))
                answer[best], sure[best] = token[best], chance[best]
        return answer, sure


def matches(found, row, expected):
    assert found.ids[row].tolist() == expected[0].tolist()
    torch.testing.assert_close(found.confidence[row], expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, A])
@torch.no_grad()
def test_most_confident_masks_first_and_none_left(inputs, steps):
    found = decoder(steps).run(inputs)
    assert not bool((found.ids == MASK).any()) and found.ids.shape == (2, A)
    counts = [int((found.taken[0] == step).sum()) for step in range(steps)]
    assert counts == decoder(steps).counts() and sum(counts) == A and max(counts) - min(counts) <= 1
    for row in range(2):
        matches(found, row, Plain(FAMILY.model, inputs, row).decode(steps))


@torch.no_grad()
def test_a_row_does_not_know_its_batch(inputs):
    batch = decoder().run(inputs)
    alone = {
        "input_ids": inputs["input_ids"][:1],
        "attention_mask": inputs["attention_mask"][:1],
        "pixel_values": inputs["pixel_values"][:1],
    }
    for row in (alone, {k: v[:, v.shape[1] - int(alone["attention_mask"].sum()) :] if v.ndim == 2 else v
                        for k, v in alone.items()}):  # fmt: skip
        matches(batch, 0, (decoder().run(row).ids[0], decoder().run(row).confidence[0]))


@pytest.mark.parametrize("method", ["divprune", "tome-merge", "fastv", "sparsevlm", "cdpruner", "random"])
@torch.no_grad()
def test_all_tokens_or_never_is_the_dense_run(inputs, method):
    """Token by token, and bit for bit."""
    dense = decoder().run(inputs, trace=True)
    for prune in (StepPrune(method, keep=1.0, start_frac=0.0), StepPrune(method, keep=0.25, start_frac=1.0)):
        same = decoder().run(inputs, prune, trace=True)
        assert torch.equal(same.ids, dense.ids) and torch.equal(same.taken, dense.taken)
        assert torch.equal(same.confidence, dense.confidence) and same.step_flops == dense.step_flops
        assert torch.equal(same.trace.attention, dense.trace.attention)


@pytest.mark.parametrize("begin", [0, 1, 2])
@pytest.mark.parametrize("method", ["divprune", "fastervlm", "uniform"])
@torch.no_grad()
def test_dropped_before_the_language_model(inputs, method, begin):
    """The tokens that ``apply`` keeps, from the step on; the same answer as with the others masked."""
    with vistok.apply(FAMILY.model, method, keep=0.25) as session:
        FAMILY.model(**inputs)
    found = decoder().run(inputs, StepPrune(method, 0.25, begin / 3))
    dense = decoder().run(inputs)
    for row in range(2):
        plain = Plain(FAMILY.model, inputs, row)
        kept = [p.keep + 16 * p.index for p in session.pictures if p.row == row]
        places = plain.visual.nonzero()[:, 0]
        gone = plain.visual.clone()
        gone[places[torch.cat(kept)]] = False
        once = lambda layer, _, gone=gone: gone if layer == 0 else None  # noqa: E731
        matches(found, row, plain.decode(3, begin, gone=once))
    assert [a < b for a, b in zip(found.step_flops, dense.step_flops, strict=True)] == [s >= begin for s in range(3)]
    assert found.step_tokens == tuple(6.0 if step >= begin else 24.0 for step in range(3))


@torch.no_grad()
def test_fastv_ranks_by_the_prompts_last_token(inputs):
    """At every step from the first pruned one on, at the layer of its schedule."""
    method = vistok.create("fastv")
    schedule = method.schedule(16, 8, DEPTH)
    ((stage, left),) = schedule.layers.items()
    found = decoder().run(inputs, StepPrune(method, 8, 1 / 3))
    plain = Plain(FAMILY.model, inputs, 0)

    def gone(layer, attention):
        if layer != stage:
            return None
        score = attention().mean(0)[len(plain.ids) - 1].masked_fill(~plain.visual, -1)
        dead = plain.visual.clone()
        dead[score.topk(left).indices] = False
        return dead

    matches(found, 0, plain.decode(3, 1, gone=gone))


@torch.no_grad()
def test_withdrawn_behind_a_layer(inputs):
    found = decoder().run(inputs, StepPrune(VTW(0.5), 1, 0.0), trace=True)
    for row in range(2):
        plain = Plain(FAMILY.model, inputs, row)
        matches(found, row, plain.decode(3, 0, gone=lambda layer, _, p=plain: p.visual if layer == 2 else None))
    image = found.trace.attention[..., 0]
    assert bool((image[:, :2] > 0).all()) and bool((image[:, 2:] == 0).all())
    assert found.step_tokens == (12.0,) * 3


@pytest.mark.parametrize("skipped", [(1,), (0, 2), (0, 1, 2, 3)])
@torch.no_grad()
def test_visual_tokens_bypass_layers(inputs, skipped):
    """The states that come out of the listed layers are those that went in; all listed: the embeddings."""
    lengths, hooks = [], []
    for layer in FAMILY.model.model.language_model.layers:
        hooks.append(layer.self_attn.register_forward_hook(lambda m, args, out: lengths.append(out[0].shape[1])))
    try:
        found = decoder().run(inputs, skip=LayerSkip(skipped), trace=True)
    finally:
        for hook in hooks:
            hook.remove()
    dense = decoder().run(inputs)
    width = inputs["input_ids"].shape[1]
    assert [length < width for length in lengths[:DEPTH]] == [number in skipped for number in range(DEPTH)]
    for row in range(2):
        plain = Plain(FAMILY.model, inputs, row)
        states = {}
        expected = plain.decode(3, 0, skip=skipped)
        matches(found, row, expected)
        plain.forward(found.ids[row], skip=skipped, on_layer=lambda n, _, h, s=states: s.update({n: h}))
        if len(skipped) == DEPTH:
            torch.testing.assert_close(states[DEPTH - 1][0, plain.visual], plain.embeds[plain.ids == IMAGE])
    assert bool((found.trace.attention[:, list(skipped), :, 0] == 0).all())
    assert all(a < b for a, b in zip(found.step_flops, dense.step_flops, strict=True))


@torch.no_grad()
def test_bypassed_everywhere_visual_states_are_their_embeddings(inputs):
    """What leaves the last layer, before the norm, at the places of the visual tokens."""
    states = []
    norm = FAMILY.model.model.language_model.norm
    hook = norm.register_forward_pre_hook(lambda m, args: states.append(args[0]))
    try:
        decoder(1).run(inputs, skip=LayerSkip(tuple(range(DEPTH))))
    finally:
        hook.remove()
    features = torch.cat(FAMILY.model.model.get_image_features(inputs["pixel_values"]).pooler_output)
    assert torch.equal(states[0][inputs["input_ids"] == IMAGE], features)


@pytest.mark.parametrize("skip", [None, LayerSkip((1, 2))])
@torch.no_grad()
def test_shares_of_attention(inputs, skip):
    found = decoder(2).run(inputs, StepPrune("uniform", 0.5, 0.5), skip, trace=True)
    assert found.trace.attention.shape == (2, DEPTH, 2, 3) and found.trace.confidence.shape == (2, 2, A)
    torch.testing.assert_close(found.trace.attention.sum(-1), torch.ones(2, DEPTH, 2))
    if skip is None:
        plain, shares = Plain(FAMILY.model, inputs, 1), []

        def see(number, weights, h):
            rows = weights()[:, -A:].mean((0, 1))
            shares.append([float(rows[plain.visual].sum()), float(rows[-A:].sum())])

        plain.forward(torch.full((A,), MASK), on_layer=see)
        torch.testing.assert_close(found.trace.attention[0, :, 1][:, [0, 2]], torch.tensor(shares))
    last = found.taken == 1
    torch.testing.assert_close(found.trace.confidence[1][last], found.confidence[last])


@pytest.mark.parametrize(("method", "skip"), [("uniform", None), (VTW(0.5), LayerSkip((0, 2)))])
@pytest.mark.parametrize("cache", [False, True])
def test_flops_are_those_that_torch_counts(inputs, method, skip, cache):
    """All of them but the angles of the rotary embedding, which torch computes as a product."""
    with FlopCounterMode(display=False, depth=9) as counter:
        found = decoder(cache=cache).run(inputs, StepPrune(method, 0.5, 1 / 3), skip)
    by_module = counter.get_flop_counts()
    rotary = sum(sum(n.values()) for name, n in by_module.items() if name.endswith("RotaryEmbedding"))
    rotary = rotary or sum(sum(n.values()) for name, n in by_module.items() if name.endswith("rotary_emb"))
    assert found.flops == counter.get_total_flops() - rotary


@pytest.mark.parametrize("prune", [None, StepPrune("uniform", 0.25, 1 / 3), StepPrune("fastv", 0.5, 2 / 3)])
@torch.no_grad()
def test_a_cache_only_saves(inputs, prune):
    """The same answers; the prompt is run at the first step, and where pruning begins."""
    skip = None if prune is None else LayerSkip((1,))
    again, once = (decoder(cache=cache).run(inputs, prune, skip, trace=True) for cache in (False, True))
    assert torch.equal(again.ids, once.ids) and torch.equal(again.confidence, once.confidence)
    assert torch.equal(again.trace.attention, once.trace.attention) and again.step_tokens == once.step_tokens
    runs = [a == b for a, b in zip(again.step_flops, once.step_flops, strict=True)]
    begin = 0 if prune is None else round(3 * prune.start_frac)
    assert runs == [step in (0, begin) for step in range(3)]


@pytest.mark.parametrize("name", ["qwen2.5-vl", "internvl", "llava-next"])
@torch.no_grad()
def test_other_families(name):
    family = FAMILIES[name]
    batch = prompt(family, [[0], [0, 0]]).inputs
    one = decoder(2, family)
    dense, same = one.run(batch), one.run(batch, StepPrune("divprune", 1.0, 0.0))
    few = one.run(batch, StepPrune("divprune", 0.25, 0.5), trace=True)
    assert torch.equal(dense.ids, same.ids) and not bool((few.ids == MASK).any())
    assert few.step_flops[0] == dense.step_flops[0] and few.step_flops[1] < dense.step_flops[1]
    torch.testing.assert_close(few.trace.attention.sum(-1), torch.ones_like(few.trace.attention[..., 0]))


def test_leaves_no_hook(inputs):
    def hooks():
        return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in FAMILY.model.modules()]

    decoder().run(inputs)  # transformers puts hooks of its own in at the first call
    before = hooks()
    with pytest.raises(ValueError, match="keep: got 17"):
        decoder().run(inputs, StepPrune("uniform", 17, 0.0))
    assert hooks() == before
    assert "forward" not in vars(FAMILY.model.model.language_model)


def test_what_is_wrong_is_named(inputs):
    for steps in (0, A + 1):
        with pytest.raises(ValueError, match=rf"^steps: got {steps}, must be between 1 and the {A} tokens"):
            decoder(steps)
    with pytest.raises(ValueError, match=r"^mask_token_id: not given"):
        DiffusionDecoder(FAMILY.model, 2, answer_length=A)
    with pytest.raises(ValueError, match=r"^skip: got layer 4, the model has layers 0\.\.3"):
        decoder().run(inputs, skip=LayerSkip((1, 4)))
    with pytest.raises(ValueError, match=r"^start_frac: got 1.5"):
        StepPrune("random", 0.5, 1.5)
    with pytest.raises(ValueError, match=r"^keep: got 0"):
        StepPrune("random", 0, 0.5)
    with pytest.raises(ValueError, match=r"^method: YOPO drops no token"):
        decoder().run(inputs, StepPrune("yopo"))
    with pytest.raises(ValueError, match=r"^method: LVLMCSP brings tokens back"):
        decoder().run(inputs, StepPrune("lvlm-csp", 0.5, 0.0))
    assert isinstance(StepPrune().reducer, Reducer)
