"""TokenFlow: shared ids of two tables, scales, what learns from what, and the vision model that tunes or not."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from tests.tokenize.test_contract import SIZE, built, pictures
from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.core.codes import Codes
from vistok.parts.quantize import MultiScale, VectorQuantizer
from vistok.parts.tokenizer import load_tokenizer
from vistok.parts.vision import FrozenVision
from vistok.tokenize._dual import hidden
from vistok.tokenize.tokenflow import TokenFlow, claim

VISION = dict(img_size=SIZE, patch_size=4, embed_dim=24, depth=3, num_heads=3)
SMALL = dict(
    image=SIZE,
    codes=64,
    semantic_dim=6,
    pixel_dim=4,
    scales=(1, 2, 4),
    drop=0.0,
    vision="vit_tiny_patch16_224",
    vision_arguments=VISION,
    feature_depth=1,
    width=8,
    mults=(1, 1, 2),
    blocks=1,
    latent=8,
    decoder=(8, 1),
    restart_after=3,
)
RECIPE = TokenFlow(**SMALL)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def vision():
    return FrozenVision.of("vit_tiny_patch16_224", **VISION)


def halves(weight):
    table = VectorQuantizer(32, 10, norm="both", parts=(6, 4), weights=(1.0, weight), restart_after=None).eval()
    z = torch.randn(2, 9, 10)
    rows = [normalize(x, dim=-1) for x in (z[..., :6], z[..., 6:])]
    tables = [normalize(x, dim=-1) for x in table.codebook.split([6, 4], 1)]
    return table, z, [(r[:, :, None] - t).square().sum(-1) for r, t in zip(rows, tables, strict=True)]


@torch.no_grad()
def test_the_weight_decides_between_the_halves():
    for weight, wanted in (
        (0.0, lambda s, p: s),
        (1e6, lambda s, p: p),
        (1.0, lambda s, p: s + p),
        (0.3, lambda s, p: s + 0.3 * p),
    ):
        table, z, distances = halves(weight)
        assert torch.equal(table(z).ids, wanted(*distances).argmin(-1))


@torch.no_grad()
def test_a_slow_plain_version_gives_the_same_codes():
    """The loop over scales, place by place."""
    model = built("tokenflow")
    x = pictures(2)
    whole = model.latents(x).transpose(1, 2).unflatten(2, (4, 4))
    rest, total, ids = whole.clone(), torch.zeros_like(whole), []
    table = model.bottleneck.inner.codebook
    rows = torch.cat([normalize(table[:, :6], dim=1), normalize(table[:, 6:], dim=1)], 1)
    for side in (1, 2, 4):
        step = 4 // side
        chosen = torch.zeros(2, 10, side, side)
        for b in range(2):
            for i in range(side):
                for j in range(side):
                    v = rest[b, :, i * step : (i + 1) * step, j * step : (j + 1) * step].mean((1, 2))
                    v = torch.cat([normalize(v[:6], dim=0), normalize(v[6:], dim=0)])
                    k = int((v - rows).square().sum(1).argmin())
                    ids.append((b, k))
                    chosen[b, :, i, j] = rows[k]
        added = torch.nn.functional.interpolate(chosen, (4, 4), mode="bicubic") if side < 4 else chosen
        total, rest = total + added, rest - added
    codes = model.encode(x)
    assert codes.ids.tolist() == [[k for at, k in ids if at == b] for b in range(2)]
    torch.testing.assert_close(codes.z.transpose(1, 2).unflatten(2, (4, 4)), total, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_beginning_decodes_at_the_end_of_a_scale_only():
    model = built("tokenflow")
    codes = model.encode(pictures())
    assert codes.ids.shape == (3, 21) and codes.bits.tolist() == [6 * 21] * 3
    seen = [model.decode(codes.prefix(k)) for k in (1, 5, 21)]
    assert torch.equal(seen[-1], model.decode(codes)) and not torch.allclose(seen[0], seen[1])
    with pytest.raises(ValueError, match="k: got 4, must end on a scale: 1, 5, 21"):
        codes.prefix(4)
    with pytest.raises(ValueError, match="ids: got 7 tokens, must end on a scale"):
        model.decode(Codes(codes.ids[:, :7], None, codes.format))


@torch.no_grad()
def test_what_is_left_over_shrinks_with_plain_codes():
    table = VectorQuantizer(64, 10, restart_after=None)
    table.codebook[0] = 0  # a code that changes nothing is there
    scales, z = MultiScale(table, (1, 2, 4), gradient="each").eval(), torch.randn(4, 16, 10)
    codes = scales(z)
    left = [float((z - scales.ids_to_z(codes.ids[:, :k])).square().sum()) for k in (1, 5, 21)]
    assert left == sorted(left, reverse=True)


def test_each_decoder_reads_its_half():
    model = built("tokenflow")
    z = model.encode(pictures()).z.detach().requires_grad_()
    for value, own in ((model.render(z), slice(6, 10)), (model.features(z), slice(0, 6))):
        (grad,) = torch.autograd.grad(value.square().sum(), z)
        seen = grad.abs().sum((0, 1)) > 0
        assert seen.nonzero().flatten().tolist() == list(range(10))[own]


def test_the_gradient_has_no_part_along_the_raw_halves():
    table = VectorQuantizer(32, 10, norm="both", parts=(6, 4), restart_after=None)
    z = torch.randn(1, 5, 10, requires_grad=True)
    cotangent = torch.randn(1, 5, 10)
    (grad,) = torch.autograd.grad((table(z).z * cotangent).sum(), z)
    for raw, got, told in zip(*(t.split([6, 4], -1) for t in (z, grad, cotangent)), strict=True):
        unit = normalize(raw, dim=-1)
        wanted = (told - unit * (told * unit).sum(-1, keepdim=True)) / raw.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(got, wanted)


def test_a_dropped_scale_is_never_the_first():
    model = replace(RECIPE, drop=1.0).build().train()
    gone = set()
    for _ in range(12):
        ids = model.encode(pictures(2)).ids
        missing = [bool((part < 0).all()) for part in ids.split([1, 4, 16], 1)]
        assert sum(missing) == 1 and not missing[0]
        gone.add(missing.index(True))
    assert gone == {1, 2}
    assert (model.eval().encode(pictures()).ids >= 0).all()


def test_with_a_teacher_all_but_the_last_block_learns(tmp_path):
    seen = vision()
    teacher = copy.deepcopy(seen)
    model, x = RECIPE.build(seen, teacher), pictures(4)
    model.objective(x).backward()
    learns = {
        name.split(".")[1]
        for name, p in model.vision.model.named_parameters()
        if p.grad is not None and "blocks" in name
    }
    assert learns == {"0", "1"} and all(p.grad is None for p in teacher.parameters())
    assert all(not p.requires_grad for p in seen.parameters())
    frozen = RECIPE.build(seen)
    frozen.objective(x).backward()
    assert all(p.grad is None for p in frozen.vision.parameters())
    other = load_tokenizer(model.eval().save(tmp_path))
    assert torch.equal(other.encode(x).ids, model.encode(x).ids)


@torch.no_grad()
def test_layers_of_the_vision_model_by_hand():
    seen, x = vision(), pictures(2)
    kept = []
    for block in seen.model.blocks:
        block.register_forward_hook(lambda _, given, out: kept.append(out[:, 1:]))
    seen(x)
    for n, found in zip((3, 1, 2), hidden(seen, x, [3, 1, 2]), strict=True):
        torch.testing.assert_close(found, kept[n - 1])
    with pytest.raises(ValueError, match=r"layers: got \(4,\), must be between 1 and the 3 blocks"):
        hidden(seen, x, [4])


@torch.no_grad()
def test_the_pixel_branch_is_brought_to_the_vision_models_grid():
    """As with SigLIP: a grid of 5 x 5 of 4 px is 20 px, for pictures of 16."""
    model = replace(RECIPE, scales=(1, 5), vision_arguments=VISION | dict(img_size=20)).build().eval()
    codes = model.encode(pictures())
    assert codes.ids.shape == (3, 26) and model.decode(codes).shape == (3, 3, SIZE, SIZE)


def test_refusals():
    with pytest.raises(ValueError, match=r"scales: got \(1, 2\), must end with the grid of the vision model, \(4, 4\)"):
        replace(RECIPE, scales=(1, 2)).build()
    with pytest.raises(ValueError, match="images: got shape"):
        RECIPE.build().encode(torch.rand(1, 3, 8, 8))


def test_claim():
    outcome = claim(TokenizeTrial(pictures=2, size=16), steps=1, codes=32)
    assert outcome.metric == "objects read out of semantic codes" and outcome.note.count("dB") == 1
