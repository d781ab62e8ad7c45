"""DToP: what its sheet says must hold, against loops and the released outputs; the segmenter, the losses, the claim."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from tests.vit.made_trial import tiny_vit
from vistok.core.ragged import positions
from vistok.core.tensors import take
from vistok.vit.dtop import (
    ATMHead,
    DToP,
    DToPEncoder,
    DToPSegmenter,
    LinearHead,
    Reading,
    atm_loss,
    claim,
    cost,
    exit_mask,
    measure,
    write_canvas,
)
from vistok.zoo.vit_tasks import TASKS

GOLDEN = Path(os.environ.get("VISTOK_GOLDEN", Path(__file__).parents[2] / "../shared/golden")) / "vit"
SMALL = DToP(layers=(0, 1), p0=0.3, keep_per_class=1, dim=8, num_heads=2, decoder_layers=2)


def case(name):
    path = GOLDEN / f"dtop-{name}.safetensors"
    if not path.exists():
        pytest.skip(f"no golden vectors at {path}")
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["hyper"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def built(seed=0, **given):
    """A segmenter of five classes whose heads disagree, so that pictures lose different patches."""
    model = DToP(**(dict(layers=(0, 1), p0=0.3, keep_per_class=1, dim=8, num_heads=2, decoder_layers=2) | given))
    torch.manual_seed(seed)
    made = model.build(tiny_vit()).eval()
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() > 1:
                p.normal_(std=0.4)
    return made


def exits_by_hand(conf, label, active, p0, keep):
    """The rule, patch by patch."""
    after = active.clone()
    for b in range(len(conf)):
        sure = [i for i in range(conf.shape[1]) if active[b, i] and conf[b, i] > p0]
        for k in {int(label[b, i]) for i in sure}:
            ranked = sorted((i for i in sure if label[b, i] == k), key=lambda i: (-float(conf[b, i]), i))
            after[b, ranked[keep:]] = False
    return after


# The rule -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 5, 50])
@pytest.mark.parametrize("p0", [0.0, 0.5, 0.9, 1.0])
def test_exit_mask_against_loops(p0, keep):
    rng = torch.Generator().manual_seed(keep)
    conf = (torch.rand(4, 40, generator=rng) * 20).round() / 20  # with ties
    label = torch.randint(0, 3, (4, 40), generator=rng)
    active = torch.rand(4, 40, generator=rng) < 0.8
    after = exit_mask(conf, label, active, p0, keep)
    assert torch.equal(after, exits_by_hand(conf, label, active, p0, keep))
    assert not (after & ~active).any()  # the set shrinks
    for b in range(4):  # of each class at least so many candidates stay
        for k in range(3):
            sure = active[b] & (conf[b] > p0) & (label[b] == k)
            assert int((sure & after[b]).sum()) == min(keep, int(sure.sum()))


def test_the_threshold_is_strict_and_one_turns_it_off():
    conf, label = torch.tensor([[0.9, 0.91, 1.0]]), torch.zeros(1, 3, dtype=torch.int64)
    active = torch.ones(1, 3, dtype=torch.bool)
    assert exit_mask(conf, label, active, 0.9, 0).tolist() == [[True, False, False]]
    assert exit_mask(conf, label, active, 1.0, 0).all()


@pytest.mark.parametrize("name", ["exit-a", "exit-few"])
def test_released_exits(name):
    hyper, t = case(name)
    canvas = torch.zeros_like(t["in.mask_logits.0"])
    active = torch.ones(canvas.shape[0], canvas.shape[2], dtype=torch.bool)
    for i, p0 in enumerate(hyper["p0"]):
        places, real = positions(active)
        logits = take(t[f"in.mask_logits.{i}"].transpose(1, 2), places).transpose(1, 2)
        reading = Reading(logits, t[f"in.class_logits.{i}"])
        canvas = write_canvas(canvas, logits, places, real)
        conf, label = reading.probability().max(1)
        stays = exit_mask(conf, label, real, p0, hyper["keep_per_class"])
        active = torch.zeros_like(active).scatter(1, places, stays)
        torch.testing.assert_close(canvas, t[f"out.canvas.{i}"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(reading.scores(canvas), t[f"out.pred.{i}"], rtol=1e-4, atol=1e-5)
        assert torch.equal(~active, t[f"out.pruned.{i}"])


def test_released_head():
    hyper, t = case("head-a")
    head = ATMHead(hyper["in_channels"], hyper["classes"], hyper["dim"], hyper["num_heads"], hyper["layers"])
    head.load_state_dict({key.removeprefix("in.param."): value for key, value in t.items() if "param" in key})
    reading = head(t["in.x"])
    for name, found in (
        ("mask_logits", reading.logits),
        ("class_logits", reading.present),
        ("pred", reading.probability()),
    ):
        torch.testing.assert_close(found, t[f"out.{name}"], rtol=1e-4, atol=1e-5)


# In a network ---------------------------------------------------------------------------------------------------------


def test_nothing_leaves_at_one_and_the_map_is_the_model_s_own():
    vit, x = tiny_vit(), torch.randn(3, 3, 24, 24)
    exits = DToP(head="linear", layers=(0, 1), p0=1.0).build(vit).eval()(x)
    rows = vit.forward_features(x)
    assert torch.equal(exits.features, DToPSegmenter(vit, [], [3]).encoder(vit._pos_embed(vit.patch_embed(x))).features)
    assert torch.equal(exits.map.transpose(1, 2), vit.head(rows[:, 1:]))
    assert all(bool(a.all()) for a in exits.active) and (exits.tokens == 36).all()


@pytest.mark.parametrize("head", ["atm", "linear"])
@pytest.mark.parametrize("keep", [0, 1, 3])
def test_pictures_of_a_batch_are_as_if_alone_and_tokens_are_gone(head, keep):
    model = built(head=head, keep_per_class=keep, p0=0.3 if head == "atm" else 0.7)
    x, seen = torch.randn(4, 3, 24, 24), []
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda _, __, out: seen.append(out.shape[1]))
    exits = model(x)
    assert seen == [max(1, int(count)) + 1 for count in exits.tokens.amax(0)] and seen[3] < seen[0]
    assert exits.tokens[:, 3].unique().numel() > 1  # ragged
    for b in range(4):
        alone = model(x[b : b + 1])
        torch.testing.assert_close(alone.map[0], exits.map[b], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone.features[0], exits.features[b], rtol=1e-4, atol=1e-4)
        assert torch.equal(alone.active[-1][0], exits.active[-1][b])


def test_masked_run_of_all_tokens_is_the_same():
    """The other way to do it: all tokens computed by every block, those that have left masked as keys."""
    model, x = built(), torch.randn(3, 3, 24, 24)
    exits, tokens = model(x), model.stem.forward_features(x)
    active, canvas = torch.ones(3, 36, dtype=torch.bool), torch.zeros(3, 5, 36)
    heads = iter(model.encoder.heads)
    for layer, block in enumerate(model.encoder.blocks):
        tokens = block(tokens, attn_mask=torch.cat([active.new_ones(3, 1), active], 1)[:, None, None])
        if layer in (0, 1, 3):
            reading = next(heads)(tokens[:, 1:], active)
            canvas = torch.where(active[:, None], reading.logits, canvas)
            active = exits_by_hand(*reading.probability().detach().max(1), active, 0.3, 1)
    torch.testing.assert_close(exits.canvases[-1], canvas, rtol=1e-4, atol=1e-4)
    assert torch.equal(exits.active[-1], active)


def test_canvas_of_what_has_left_stays_and_features_there_are_zero():
    exits = built()(torch.randn(3, 3, 24, 24))
    for i in (1, 2):
        gone = ~exits.active[i - 1]
        assert gone.any() and not (exits.active[i] & gone).any()
        before, after = (exits.canvases[j].transpose(1, 2) for j in (i - 1, i))
        assert torch.equal(before[gone], after[gone]) and not torch.equal(before[~gone], after[~gone])
    assert (exits.features[:, 1:][~exits.active[1]] == 0).all()
    assert (exits.features[:, 1:][exits.active[1]] != 0).any(1).all() and (exits.features[:, 0] != 0).any()


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("head", ["atm", "linear"])
@pytest.mark.parametrize("keep", [0, 5])
def test_all_leaving_still_gives_a_full_map_and_gradients(head, keep, prefix):
    vit = tiny_vit() if prefix else tiny_vit(class_token=False, global_pool="avg")
    model = DToP((0, 1), -1.0, keep, head, 8, 2, 2).build(vit).train()
    exits = model(torch.randn(2, 3, 24, 24))
    assert exits.map.shape == (2, 5, 36) and exits.map.isfinite().all()
    assert (exits.canvases[0] != 0).any(1).all() and int(exits.tokens[:, 1:].max()) <= 5 * keep
    sum(model.loss(exits, torch.randint(0, 5, (2, 24, 24)))).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_fused_attention_and_no_mask_where_lengths_agree(monkeypatch):
    masks = []

    def attend(q, k, v, attn_mask=None, **given):
        masks.append(attn_mask)
        return scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **given)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", attend)
    model = built(head="linear")
    model(torch.randn(1, 3, 24, 24))
    assert len(masks) == 4 and all(mask is None for mask in masks)
    model(torch.randn(4, 3, 24, 24))
    assert masks[4] is None and masks[-1].shape[:3] == (4, 1, 1) and masks[-1].dtype == torch.bool


def test_gradients_reach_every_parameter_and_the_base_is_left_alone():
    vit = tiny_vit()
    model, before = SMALL.build(vit).train(), vit.state_dict()
    sum(model.loss(model(torch.randn(2, 3, 24, 24)), torch.randint(0, 5, (2, 24, 24)))).backward()
    assert all(p.grad is not None for p in model.encoder.parameters())
    assert all(p.grad is None for p in vit.parameters()) and vit.state_dict().keys() == before.keys()


def test_linear_heads_start_as_copies_of_the_model_s_own():
    vit = tiny_vit()
    first, second, last = DToP(head="linear", layers=(0, 2)).build(vit).encoder.heads
    x = torch.randn(1, 4, 16)
    assert torch.equal(first(x).logits, last(x).logits) and first.linear is not second.linear
    assert torch.equal(last(x).logits, vit.head(vit.norm(x)).transpose(1, 2))


def test_losses_by_hand():
    torch.manual_seed(0)
    masks, present, truth = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 2), torch.randint(0, 2, (2, 4, 4))
    truth[1] = 0  # the second picture has one class, the third class is nowhere
    there = [(0, 0), (0, 1), (1, 0)]
    classes = weights = 0.0
    for b in range(2):
        for k in range(3):
            weight = 1.0 if (b, k) in there else 0.1
            classes = classes - weight * present[b, k].log_softmax(0)[0 if (b, k) in there else 1]
            weights += weight
    focal = dice = 0.0
    for b, k in there:
        p, t = masks[b, k].sigmoid(), (truth[b] == k).float()
        right = torch.where(t > 0, p, 1 - p)
        focal = focal + (torch.where(t > 0, 0.25, 0.75) * (1 - right) ** 2 * -right.log()).mean() / 3
        dice = dice + (1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)) / 3
    torch.testing.assert_close(atm_loss(masks, present, truth), classes / weights + 20 * focal + dice)
    model, truth = built(head="linear"), torch.randint(0, 5, (2, 6, 6))
    exits = model(torch.randn(2, 3, 24, 24))
    expected = [cross_entropy(canvas.unflatten(2, (6, 6)), truth) for canvas in exits.canvases]
    torch.testing.assert_close(model.loss(exits, truth), expected)


def test_cost():
    model = built()
    assert cost(model, torch.full((2, 4), 36)) == 1
    less = cost(model, torch.tensor([[36, 36, 10, 10]]))
    assert 0.5 < less < 0.5 + 0.5 * 11 / 37


def test_errors_name_the_argument():
    blocks, head = tiny_vit().blocks, LinearHead(torch.nn.Identity(), torch.nn.Linear(16, 5))
    for locs in ([1], [3, 1], [-1, 3], []):
        with pytest.raises(ValueError, match="locs: got"):
            DToPEncoder(blocks, [head] * len(locs), locs)
    with pytest.raises(ValueError, match="keep_per_class: got -1"):
        DToPEncoder(blocks, [head], [3], keep_per_class=-1)
    with pytest.raises(ValueError, match="num_heads: got 3, must divide dim, 8"):
        ATMHead(4, 2, 8, 3)
    with pytest.raises(ValueError, match="head: got 'x'"):
        DToP(head="x").build(tiny_vit())


class MadeTrial:
    """Trains a step on the world's scenes; the mIoU is made up."""

    seed = 0

    def __init__(self, *figures):
        self.segmenter = tiny_vit(img_size=96, patch_size=16, num_classes=9)
        self.figures, self.models = list(figures), []

    def fit(self, model, steps, *, task, loss, peak_lr, seed):
        batch = TASKS[task].draw(0, 2, seed=seed).to("cpu")
        assert batch.truth.max() < 9 and batch.truth.max() > 0
        value, right = loss(model, batch)
        value.backward()
        assert 0 <= right <= 1 and steps == 3
        trained = {name for name, p in model.named_parameters() if p.grad is not None}
        assert trained and all(name.startswith(("encoder.heads.0.", "encoder.heads.1.")) for name in trained)

    def miou(self, *, model):
        with torch.no_grad():
            model.forward_features(torch.randn(2, 3, 96, 96))
        self.models.append((model.encoder.p0, model.encoder.keep_per_class))
        return self.figures.pop(0)


def test_claim():
    shares = []
    for figures in ((0.7, 0.695), (0.7, 0.6)):
        trial = MadeTrial(*figures)
        trial.segmenter.head.weight.data.normal_(std=2)  # sure of itself
        trial.segmenter.blocks = torch.nn.Sequential(*trial.segmenter.blocks, *tiny_vit().blocks, *tiny_vit().blocks)
        outcome = claim(trial, steps=3)
        assert (outcome.baseline, outcome.value) == figures and trial.models == [(1.0, 5), (0.9, 5)]
        assert "3 steps" in outcome.note
        shares.append(outcome.holds)
    assert shares[1] is False


def test_measure_tells_what_left():
    trial, model = MadeTrial(0.5, 0.5), DToP((0, 1), head="linear").build(tiny_vit(img_size=96, patch_size=16))
    assert measure(trial, model, 1.0) == (0.5, 0.0, 1.0)
    miou, gone, share = measure(trial, model, 0.0, 0)
    assert miou == 0.5 and gone == 1.0 and 0.25 < share < 0.5
