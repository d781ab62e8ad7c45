"""AdaToken-3D: what its sheet says must hold, its profile of a model, and the map from profile to schedule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vistok
from tests.host.families import FAMILIES, prompt
from tests.reduce.synthetic import Trial, evidence
from vistok.reduce import adatoken_3d
from vistok.reduce.adatoken_3d import AdaToken3D, contribution_profile, idle_share, schedule_from_profile


@pytest.mark.parametrize("keep", [0, 1, 9, 24])
def test_kept_set_is_the_last_row_s_best(keep):
    given_ = evidence(AdaToken3D(), (4, 6))
    reduction = AdaToken3D().at_layer(given_, keep, 8)
    for i, kept in enumerate(reduction.keep.tolist()):
        score = [sum(float(head[0, j]) for head in given_.llm_attention[i]) for j in range(24)]
        assert kept == sorted(sorted(range(24), key=lambda j: -score[j])[:keep])
        assert torch.equal(reduction.tokens[i], given_.features[i, kept])


@pytest.mark.parametrize(
    ("depths", "ratios", "mean"),
    [
        ((8, 16, 24), (0.8, 0.6, 0.4), 700),
        ((8, 16, 24), (0.8, 0.5, 0.25), 637.5),
        ((4, 8, 12, 16, 18, 20), (0.75, 0.5, 0.4, 0.3, 0.25, 0.15), 421.875),
    ],
    ids=["ScanQA", "run script", "demo"],
)
def test_released_schedules_are_those_of_their_mean(depths, ratios, mean):
    """Ratios are of the tokens that came in, and the counts are theirs up to the rounding of the mean."""
    system = AdaToken3D(ratios=ratios, depths=tuple(depth / 32 for depth in depths))
    schedule = system.schedule(1000, round(mean), 32)
    assert schedule.input == 1000 and tuple(schedule.layers) == depths
    wanted = [1000 * ratio for ratio in ratios]
    assert list(schedule.layers.values()) == pytest.approx(wanted, abs=2)


@torch.no_grad()
def test_ratios_of_one_leave_the_logits_unchanged():
    family = FAMILIES["llava-clip"]
    inputs = prompt(family, [[0], [0, 0]]).inputs
    dense = family.model(**inputs).logits
    with vistok.apply(family.model, AdaToken3D(ratios=(1.0, 1.0, 1.0)), keep=1.0):
        assert torch.equal(family.model(**inputs).logits, dense)


@torch.no_grad()
def test_text_stays_in_order_and_all_of_it():
    """Every layer runs on the text and the tokens left: hidden states shrink by what was dropped."""
    family = FAMILIES["llava-clip"]
    batch, widths = prompt(family, [[0]]), []
    layers = family.model.model.language_model.layers
    hooks = [layer.register_forward_hook(lambda m, args, out: widths.append(args[0].shape[1])) for layer in layers]
    try:
        with vistok.apply(family.model, "adatoken-3d", keep=11) as session:
            output = family.model(**batch.inputs).logits
    finally:
        for hook in hooks:
            hook.remove()
    (picture,) = session.pictures
    text = batch.inputs["input_ids"].shape[1] - 16
    assert widths == [text + 16, *(text + picture.layers[layer] for layer in (1, 2, 3))]
    assert output.shape[1] == widths[-1]


# Mining -----------------------------------------------------------------------------------------------------------


def made_maps(layers=3, b=2, heads=2, t=12):
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(layers, b, heads, t, t, generator=g)
    return list(logits.masked_fill(torch.ones(t, t).triu(1).bool(), -torch.inf).softmax(-1))


def test_profile_rows_are_probability_shares():
    maps = made_maps()
    spans = {"system": slice(0, 2), "spatial": slice(2, 9), "text": slice(9, 12)}
    profile = contribution_profile(maps, spans)
    assert list(profile) == list(spans)
    torch.testing.assert_close(sum(profile.values()), torch.ones(3))
    for layer, found in enumerate(profile["spatial"].tolist()):
        plain = sum(float(maps[layer][b, h, -1, i]) for b in range(2) for h in range(2) for i in range(2, 9)) / 4
        assert found == pytest.approx(plain, abs=1e-6)


def test_idle_share_is_the_most_that_get_next_to_nothing():
    attention = torch.tensor([[0.5, 0.01, 0.46, 0.03, 0.0], [0.2, 0.2, 0.2, 0.2, 0.2]])
    assert idle_share(attention).tolist() == [0.6, 0.0]
    assert idle_share(attention, mass=1.0).tolist() == [0.8, 0.8]
    assert idle_share(10 * attention).tolist() == [0.6, 0.0]


def test_schedule_follows_the_profile():
    profile = torch.tensor([0.3, 0.3, 0.4, 0.1, 0.2, 0.1, 0.05, 0.04])
    ratios = schedule_from_profile(profile, 0.5)
    assert ratios[0] / ratios[1] == pytest.approx(2) and ratios[1] / ratios[2] == pytest.approx(4)
    assert (2 + 2 * sum(ratios)) / 8 == pytest.approx(0.5)
    assert AdaToken3D(ratios=ratios).schedule(800, 400, 8).mean(8) == 400
    assert schedule_from_profile(torch.zeros(8), 0.5) == pytest.approx((1 / 3,) * 3)


@given(st.lists(st.floats(0, 1), min_size=8, max_size=40), st.floats(0.3, 1))
def test_ratios_do_not_rise_and_meet_the_target(profile, target):
    layers = len(profile)
    start = -(-layers // 4)
    if target <= start / layers + 1e-6:
        return
    ratios = schedule_from_profile(torch.tensor(profile), target)
    assert list(ratios) == sorted(ratios, reverse=True) and all(0 < r <= 1 for r in ratios)
    starts = [start, -(-layers // 2), -(-3 * layers // 4), layers]
    spent = start + sum(r * (b - a) for r, a, b in zip(ratios, starts, starts[1:], strict=False))
    assert spent / layers == pytest.approx(target, abs=1e-6)
    AdaToken3D(ratios=ratios)


@torch.no_grad()
def test_profile_of_a_model():
    family = FAMILIES["llava-clip"]
    batch = prompt(family, [[0]])
    language = family.model.model.language_model
    fused = language.config._attn_implementation
    language.set_attn_implementation("eager")
    try:
        maps = family.model(**batch.inputs, output_attentions=True).attentions
    finally:
        language.set_attn_implementation(fused)
    columns = batch.columns[0][0]
    spans = {"before": slice(0, columns[0]), "spatial": slice(columns[0], columns[-1] + 1)}
    profile = contribution_profile(maps, spans | {"after": slice(columns[-1] + 1, None)})
    torch.testing.assert_close(sum(profile.values()), torch.ones(4))
    assert len(schedule_from_profile(profile["spatial"], 0.6)) == 3


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("ratios", (0.4, 0.6, 0.8)),
        ("ratios", (1.2, 0.6, 0.4)),
        ("ratios", (0.5,)),
        ("depths", (0.5, 0.25, 0.75)),
        ("depths", ()),
    ],
)
def test_wrong_hyper_parameters_are_named(name, wrong):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        AdaToken3D(**{name: wrong})


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: schedule_from_profile(torch.ones(8), 0.2), "target"),
        (lambda: schedule_from_profile(torch.ones(8), 1.1), "target"),
        (lambda: schedule_from_profile(torch.ones(8), 0.5, (0.5, 0.45)), "depths"),
        (lambda: idle_share(torch.ones(1, 4), 0.0), "mass"),
    ],
)
def test_wrong_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=f"^{named}: got"):
        call()


def test_claim():
    class Timed(Trial):
        def ttft_ms(self, method, keep=1.0):
            return 60.0 if method is None else self.ms

    for pruned, ms, holds in ((0.795, 40.0, True), (0.78, 40.0, False), (0.795, 55.0, False)):
        trial = Timed(dense=0.8, AdaToken3D=pruned)
        trial.ms = ms
        outcome = adatoken_3d.claim(trial)
        assert (outcome.baseline, outcome.value, outcome.holds) == (0.8, pruned, holds)
