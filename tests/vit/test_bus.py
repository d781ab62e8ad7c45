"""BUS: what its sheet says must hold, the selector in a model, labels of patches against brute force, the claim."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import binary_cross_entropy

import vistok
from tests.vit.made_trial import tiny_vit
from tests.vit.test_contract import case
from tests.vit.towers import DEPTH, KINDS, PATCHES, built, pixels
from vistok.vit import bus
from vistok.vit.bus import BUS, PatchAbstractionDecoder, TextPatchSelector, boxes_to_patch_labels, claim, ptm_loss


def selector(dim=8, keep=7, layer=1, text=6):
    torch.manual_seed(0)
    made = TextPatchSelector(dim, text, keep, layer)
    with torch.no_grad():
        for p in made.score.parameters():
            p.normal_()
    return made


def text(batch=3, seed=0, width=6):
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(seed))


def values(n=20):
    return torch.randn(3, n, 8, generator=torch.Generator().manual_seed(1))


def test_score_is_an_mlp_on_patch_and_text():
    tsps, v, t = selector(), values(), text()
    logits = tsps.logits(v, t)
    for b in range(3):
        for j in range(20):
            torch.testing.assert_close(logits[b, j], tsps.score(torch.cat([tsps.norm(v[b, j]), t[b]]))[0])


def test_best_patches_stay_and_the_others_become_a_convex_combination():
    tsps, v = selector(), values()
    with torch.no_grad():
        kept, index, logits = tsps(v, text(), 7)
    assert kept.shape == (3, 8, 8)
    for b in range(3):
        ranked = sorted(range(20), key=lambda j: -float(logits[b, j]))
        assert index[b].tolist() == sorted(ranked[:7]) and torch.equal(kept[b, :7], v[b, index[b]])
        score = logits[b].sigmoid()
        weights = [float(score[j]) for j in ranked[7:]]
        fused = sum(w / sum(weights) * v[b, j] for w, j in zip(weights, ranked[7:], strict=True))
        torch.testing.assert_close(kept[b, 7], fused)
        assert min(weights) >= 0
    same = torch.full_like(v, 2.5)
    torch.testing.assert_close(tsps(same, text(), 7)[0], same[:, :8])


def test_weights_stand_scores_of_zero():
    """All scores are 0 in float32, and the mean is still one."""
    tsps = selector()
    with torch.no_grad():
        tsps.score[2].bias.fill_(-300.0)
    with torch.no_grad():
        kept, _, logits = tsps(torch.ones(3, 20, 8), text(), 7)
    assert float(logits.sigmoid().max()) == 0 and torch.equal(kept, torch.ones(3, 8, 8))


def test_keeping_all_is_the_same_tokens():
    v = values()
    kept, index, _ = selector()(v, text(), 20)
    assert torch.equal(kept, v) and index[0].tolist() == list(range(20))
    model, x = built("timm-vit"), pixels()
    tsps = selector(32, 1.0)
    with torch.no_grad(), tsps.given(text(2)) as given, vistok.apply(model, tsps) as session:
        found = model(x)
    assert torch.equal(found, model(x)) and session.tokens == [PATCHES] * DEPTH and given.logits is None


@pytest.mark.parametrize("kind", ["timm-vit", "timm-dinov3", "timm-no-class", "vit", "siglip"])
def test_in_a_model_tokens_are_gone_and_the_text_decides_which(kind):
    model, x, tsps = built(kind), pixels(3), selector(32, 0.3, 2)
    kept = []
    for seed in (0, 1, 0):
        with torch.no_grad(), tsps.given(text(3, seed)) as given, vistok.apply(model, tsps) as session:
            model(x)
        kept.append(given.index)
        assert session.tokens == [PATCHES] * 2 + [math.ceil(0.3 * PATCHES) + 1] * (DEPTH - 2)
        assert torch.equal(session.states[-1].anchor[:, :-1], given.index) and given.logits.shape == (3, PATCHES)
        assert torch.equal(given.index, given.logits.topk(20).indices.sort(1).values)
    assert torch.equal(kept[0], kept[2])
    assert all(set(a.tolist()) != set(b.tolist()) for a, b in zip(kept[0], kept[1], strict=True))


def test_reduce_is_forward():
    tsps = selector()
    state, evidence = case()
    with tsps.given(text()) as given:
        after = tsps.reduce(state, evidence, 7)
    slots, index, logits = tsps(state.slots, text(), 7)
    assert torch.equal(after.slots, slots) and torch.equal(given.index, index) and torch.equal(given.logits, logits)
    assert torch.equal(after.x[:, :1], state.x[:, :1])
    for b in range(3):
        gone = [j for j in range(20) if j not in index[b].tolist()]
        assert after.source[b, gone].tolist() == [7] * 13 and after.size[b].tolist() == [1.0] * 7 + [13.0]
        assert int(after.anchor[b, 7]) == max(gone, key=lambda j: float(logits[b, j]))


def test_without_a_text_the_class_token_chooses():
    state, evidence = case()
    after = selector().reduce(state, evidence, 7)
    score = evidence.class_row.mean(1)
    assert torch.equal(after.anchor[:, :7], score.topk(7).indices.sort(1).values)
    others = torch.ones_like(score, dtype=torch.bool).scatter(1, after.anchor[:, :7], False)
    weights = (score * others) / (score * others).sum(1, keepdim=True)
    torch.testing.assert_close(after.slots[:, 7], (weights[:, :, None] * state.slots).sum(1))


def test_scorer_learns_from_the_weights_and_from_the_labels():
    tsps, v = selector(), values()
    kept, _, logits = tsps(v, text(), 7)
    through = torch.autograd.grad(kept[:, :7].sum() + 0 * logits.sum(), tsps.score[0].weight, retain_graph=True)[0]
    assert not through.any()
    assert torch.autograd.grad(kept[:, 7].square().sum(), tsps.score[0].weight)[0].any()
    labels = torch.zeros(3, 20, dtype=torch.bool)
    labels[:, 3] = True
    ptm_loss(tsps.logits(v, text()), labels).backward()
    assert all(bool(p.grad.any()) for p in tsps.score.parameters())


def test_trains_with_the_model_it_is_in():
    model, tsps = copy.deepcopy(built("timm-vit")).train(), selector(32, 0.3, 2)
    given_text = text(2).requires_grad_()
    with tsps.given(given_text) as given, vistok.apply(model, tsps):
        model(pixels()).square().mean().backward()
    grads = [p.grad for p in (*tsps.parameters(), *model.parameters()) if p.grad is not None]
    assert tsps.score[0].weight.grad.any() and given_text.grad.any() and all(bool(g.isfinite().all()) for g in grads)
    assert given.logits.requires_grad
    assert not {id(p) for p in model.parameters()} & {id(p) for p in tsps.parameters()}


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 7)])
def test_labels_against_brute_force(grid):
    h, w = grid
    corner, side = torch.rand(6, 3, 4, generator=torch.Generator().manual_seed(0)).split(2, 2)
    boxes = torch.cat([corner, corner + 0.4 * side], 2)
    boxes[0] = 0  # no box
    boxes[1, 0] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    boxes[2] = torch.tensor([1 / w, 0.0, 2 / w, 1 / h]) if w > 1 else boxes[2]  # exactly a patch
    found = boxes_to_patch_labels(boxes, grid)
    assert found.shape == (6, h * w) and found.dtype == torch.bool
    assert not found[0].any() and found[1].all() and found[2].nonzero()[:, 0].tolist() == [1]
    for b in (3, 4, 5):
        for row in range(h):
            for column in range(w):
                wanted = any(
                    min(x1, (column + 1) / w) > max(x0, column / w) and min(y1, (row + 1) / h) > max(y0, row / h)
                    for x0, y0, x1, y1 in boxes[b].tolist()
                )
                assert bool(found[b, row * w + column]) == wanted


def test_loss_by_hand_and_without_boxes():
    torch.manual_seed(0)
    logits = torch.randn(3, 8, requires_grad=True)
    labels = torch.rand(3, 8) > 0.5
    labels[1] = False  # no box
    rows = [binary_cross_entropy(logits[b].sigmoid(), labels[b].float()) for b in range(3)]
    torch.testing.assert_close(ptm_loss(logits, labels), (rows[0] + rows[2]) / 2)
    torch.testing.assert_close(ptm_loss(logits, labels, torch.tensor([False, True, True])), (rows[1] + rows[2]) / 2)
    (grad,) = torch.autograd.grad(ptm_loss(logits, labels), logits)
    assert not grad[1].any() and grad[0].all()
    none = ptm_loss(logits, torch.zeros_like(labels))
    assert float(none.detach()) == 0 and not torch.autograd.grad(none, logits)[0].any()
    assert ptm_loss(logits.half(), labels).dtype == torch.float32


def test_summary_has_its_length_for_any_input():
    pad = PatchAbstractionDecoder(8, 2, 5, 2)
    for length in (1, 4, 5, 30):
        tokens = torch.randn(2, length, 8)
        assert pad(tokens).shape == pad(tokens, torch.randn(2, length)).shape == (2, 5, 8)


def test_best_tokens_are_the_first_queries():
    pad, tokens = PatchAbstractionDecoder(8, 1, 3, 2), torch.randn(1, 6, 8)
    seen = []
    pad.layers[0].register_forward_pre_hook(lambda m, a: seen.append(a))
    scores = torch.tensor([[0.1, -torch.inf, 0.3, 0.2, -torch.inf, 0.0]])
    pad(tokens, scores)
    assert torch.equal(seen[0][0], pad.queries + tokens[:, [2, 3, 0]]) and seen[0][1] is tokens
    pad(tokens[:, :2], scores[:, :2])
    wanted = pad.queries + torch.stack([tokens[0, 0], torch.zeros(8), torch.zeros(8)])
    torch.testing.assert_close(seen[1][0][0], wanted)
    pad(tokens)
    assert torch.equal(seen[2][0][0], pad.queries)


def test_summarizer():
    model = BUS(keep=0.25, layer=1, summary=5, decoder_layers=1).build(tiny_vit(), 6)
    x, seen = torch.randn(2, 3, 24, 24), []
    model.decoder.register_forward_pre_hook(lambda m, a: seen.append(a))
    summary, given = model(x, text(2))
    assert summary.shape == (2, 5, 16) and given.index.shape == (2, 9) and seen[0][0].shape == (2, 1 + 9 + 1, 16)
    scores = seen[0][1]
    assert scores[:, [0, -1]].isinf().all() and torch.equal(scores[:, 1:-1], given.logits.gather(1, given.index))
    summary.square().mean().backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"vit", "selector", "decoder"}
    alone, nothing = model(x)
    assert alone.shape == (2, 5, 16) and nothing is None and len(seen[1]) == 1
    assert BUS(keep=1.0, layer=1, summary=5).build(tiny_vit(), 6)(x, text(2))[0].shape == (2, 5, 16)


def test_a_text_at_a_time():
    tsps = selector()
    second = tsps.given(text())
    with tsps.given(text()), pytest.raises(RuntimeError, match="given: this selector has a text already"):
        second.__enter__()
    with pytest.raises(KeyError), tsps.given(text()):
        raise KeyError
    with tsps.given(text()):  # gone after an exception
        pass


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="text: got 2 rows for 3 pictures"):
        selector().logits(values(), text(2))
    with pytest.raises(ValueError, match="keep: got 0"):
        TextPatchSelector(8, 6, 0)
    with pytest.raises(ValueError, match="layers: got"):
        TextPatchSelector(8, 6, 0.5, -1)
    with pytest.raises(ValueError, match=r"boxes: got shape \(2, 4\)"):
        boxes_to_patch_labels(torch.zeros(2, 4), (2, 2))
    with pytest.raises(ValueError, match="layers: got 9, but the model has"):
        vistok.apply(KINDS["timm-vit"].build(), selector(32, 7, 9)).__enter__()


# The trial ------------------------------------------------------------------------------------------------------------


def test_scenes_name_a_thing_that_is_alone_of_its_name():
    task = bus._NamedThings()
    batch, again = task.draw(4, 12, seed=2), task.draw(10, 6, seed=2)
    assert torch.equal(batch.images[6:], again.images) and torch.equal(batch.words[6:], again.words)
    assert batch.images.shape == (12, 96, 96, 3) and batch.words.shape == (12, 3) and batch.boxes.shape == (12, 1, 4)
    labels = boxes_to_patch_labels(batch.boxes, (12, 12))
    assert bool((labels.sum(1) >= bus.KEPT).all())
    for i in range(12):
        _, thing = bus._scene(4 + i, 2, "train", 96)
        names = [bus.VOCABULARY[j] for j in batch.words[i]]
        assert names == ["the", thing.attributes["colour"], thing.attributes["shape"]]
        inside = torch.nn.functional.max_pool2d(torch.from_numpy(thing.mask.copy()).float()[None], 8).flatten() > 0
        assert bool(labels[i][inside].all())


class MadeTrial:
    """Trains nothing; the model then finds the named thing, or a far corner in ``missed`` of six pictures."""

    seed, size, pictures = 3, 96, 6

    def __init__(self, missed=0):
        self.classifier = self.segmenter = tiny_vit(img_size=96, patch_size=8, depth=2)
        self.missed, self.fitted = missed, []

    def fit(self, model, steps, *, task, loss, batch_size, peak_lr, seed):
        value, right = loss(model, task.draw(0, 2, seed=seed, size=self.size))
        value.backward()
        self.fitted.append((steps, seed, float(value.detach()), float(right)))
        assert model.words.weight.grad.any() and model.selector.score[0].weight.grad.any()
        forward = model.forward

        def made(batch, blind=False):
            index, _ = forward(batch, blind)
            best = model.labels(batch).float().topk(bus.KEPT).indices
            worst = model.labels(batch).float().topk(bus.KEPT, largest=False).indices
            return torch.where(torch.arange(len(index))[:, None] < self.missed, worst, best), None

        model.forward = made


def test_claim():
    trial = MadeTrial()
    outcome = claim(trial, steps=5)
    assert outcome.value == 1.0 and outcome.holds and 0 <= outcome.baseline <= 0.5 and "5 steps" in outcome.note
    assert trial.fitted[0][:2] == (5, 3) and math.isfinite(trial.fitted[0][2])
    outcome = claim(MadeTrial(missed=6), steps=1)
    assert outcome.value == 0 and outcome.holds == (outcome.baseline == 0)


def test_choosers():
    trial = MadeTrial()
    model = bus._Pointer(trial.classifier)
    named = bus._NamedThings().draw(0, 6, seed=1, split="test")
    chance = model.labels(named).float().mean().item()
    assert bus.precision(trial, "chance") == pytest.approx(chance)
    with torch.no_grad():
        for chooser, words in (("caption", named.words), ("another caption", named.words.roll(1, 0))):
            index, logits = model(SimpleNamespace(images=named.images, words=words))
            assert torch.equal(index, logits.topk(4).indices.sort(1).values)
            wanted = model.labels(named).gather(1, index).float().mean().item()
            assert bus.precision(trial, chooser, model) == pytest.approx(wanted)
        assert model(named, blind=True)[1] is None
