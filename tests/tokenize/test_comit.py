"""COMiT: its mask and the released one, its crops, the recurrence by hand, and the message that has seen nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.tokenize.test_contract import SIZE, pictures
from tests.tokenize.test_flextok import teacher
from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.tokenize._message import crop_at
from vistok.tokenize.comit import COMiT, claim

SMALL = dict(
    size="T",
    tokens=4,
    image=SIZE,
    patch=2,
    crop=6,
    stride=5,
    levels=(5, 5, 4),
    crops=3,
    steps=2,
    guidance=2.0,
    teacher_dim=0,
    zero_init=False,
)
RECIPE = COMiT(**SMALL)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def network(**how):
    return replace(RECIPE, **how).build().eval()


@torch.no_grad()
@pytest.mark.parametrize("parity", ["paper", "authors"])
def test_who_sees_the_message_written(parity):
    """Message tokens see those before them and nobody else sees them; with the released mask everybody does."""
    model, x, t = network(parity=parity), torch.randn(2, 3, 6, 6), torch.rand(2)
    message, offset = torch.randn(2, 4, 3), torch.randn(2, 2)
    v, raw, _ = model.step(x, t, message, offset)
    model.step.written[2] += torch.randn(96)  # no constant: a norm would hide it
    v2, raw2, _ = model.step(x, t, message, offset)
    changed = ((raw2 - raw).abs().amax((0, 2)) > 1e-6).tolist()
    assert changed == ([False, False, True, True] if parity == "paper" else [True] * 4)
    assert torch.equal(v, v2) == (parity == "paper")


@torch.no_grad()
def test_everything_reads_offset_patches_and_message():
    model, x, t = network(), torch.randn(2, 3, 6, 6), torch.rand(2)
    message, offset = torch.randn(2, 4, 3), torch.randn(2, 2)
    before = model.step(x, t, message, offset)[:2]
    for other in ((x.flip(2), t, message, offset), (x, t, message.flip(0), offset), (x, t, message, -offset)):
        for a, b in zip(before, model.step(*other)[:2], strict=True):
            assert (a - b).abs().flatten(2).amax(2).min() > 1e-5


def test_crops_and_their_places():
    images = torch.rand(9, 3, 256, 256)
    found, place = crop_at(images, torch.arange(9), 96, 80)
    for i in range(9):
        top, left = i // 3 * 80, i % 3 * 80
        assert torch.equal(found[i], images[i, :, top : top + 96, left : left + 96])
        assert place[i].tolist() == [(left + 48) / 128 - 1, (top + 48) / 128 - 1]
    assert float(place.min()) == -0.625 and float(place.max()) == 0.625


@torch.no_grad()
def test_reading_by_hand():
    model, x = network(), pictures()
    cells = torch.tensor([[4, 0, 8], [1, 1, 2], [8, 7, 6]])
    found = model.read(x, cells)
    for b in range(3):
        message, last = model.unread(1).message, None
        for cell in cells[b].tolist():
            top, left = cell // 3 * 5, cell % 3 * 5
            place = torch.tensor([[left + 3, top + 3]]) / 8 - 1
            crop = 2 * x[b : b + 1, :, top : top + 6, left : left + 6] - 1
            step = torch.zeros(1, 2) if last is None else place - last
            raw = model.step(crop, torch.ones(1), message, step)[1]
            message, last = model.bottleneck(raw).z, place
        torch.testing.assert_close(found.raw[b : b + 1], raw, atol=1e-5, rtol=1e-4)
        assert torch.equal(found.offset[b : b + 1], -last)


@torch.no_grad()
def test_nothing_seen_is_the_unconditional_message():
    model = network(crops=0)
    codes = model.encode(pictures())
    assert torch.equal(codes.z, model.unread(3).message) and bool((codes.ids == 50).all())
    made = model.decode(codes)
    model.recipe = replace(model.recipe, guidance=1.0)
    torch.testing.assert_close(model.decode(codes), made)
    assert torch.equal(made[0], made[1])


@torch.no_grad()
def test_orders():
    model, x = network(order="random", seed=3), pictures()
    assert torch.equal(model.encode(x).ids, network_like(model, seed=3).encode(x).ids)
    orders = {tuple(model.cells("random", 9).tolist()) for model.seed in range(4)}
    assert len(orders) == 4 and all(sorted(order) == list(range(9)) for order in orders)
    assert model.cells("raster", 3).tolist() == [0, 1, 2] and model.cells((4, 2), 9).tolist() == [4, 2]
    glance = network_like(model, glance=True, order=(), crops=0)
    one = model.look(x, model.unread(3), None)
    assert torch.equal(glance.encode(x).z, one.message) and not one.offset.any()


def network_like(model, **how):
    other = replace(model.recipe, **how).build().eval()
    other.load_state_dict(model.state_dict())
    return other


@torch.no_grad()
def test_adaptive_order_goes_where_the_error_is_and_to_no_cell_twice():
    model, x, seen = network(), pictures(), []
    plain = model.look
    model.look = lambda images, reading, cell: seen.append((reading, cell)) or plain(images, reading, cell)
    codes, offset = model.tokenize(x, "adaptive", 9)
    cells = torch.stack([cell for _, cell in seen], 1)
    assert cells[:, 0].tolist() == [4, 4, 4]
    assert all(sorted(row) == list(range(9)) for row in cells.tolist())
    reading, cell = seen[1]
    for b in range(3):
        v = model.step(model.noise(3), torch.zeros(3), reading.message, reading.offset)[0]
        error = ((model.noise(3) + v + 1) / 2 - x)[b].square()
        each = [float(error[:, i // 3 * 5 :, i % 3 * 5 :][:, :6, :6].mean()) for i in range(9)]
        each[4] = -1
        assert int(cell[b]) == max(range(9), key=each.__getitem__)
    del model.look
    again, step = model.tokenize(x, cells)
    assert torch.equal(again.ids, codes.ids) and torch.equal(step, offset)
    assert model.detokenize(codes, offset).shape == x.shape
    alone, _ = model.tokenize(x[1:2], "adaptive", 9)
    assert torch.equal(alone.ids, codes.ids[1:2])


@torch.no_grad()
def test_the_released_adaptive_order_forbids_cells_to_the_batch():
    model, x, seen = network(parity="authors"), pictures(), []
    plain = model.look
    model.look = lambda images, reading, cell: seen.append(cell.tolist()) or plain(images, reading, cell)
    model.tokenize(x, "adaptive", 3)
    assert not set(seen[1]) & set(seen[2])


@torch.no_grad()
def test_own_order_is_tokenize_with_that_order():
    model, x = network(), pictures()
    codes, offset = model.tokenize(x, "raster", 3)
    assert torch.equal(codes.ids, model.encode(x).ids)
    torch.testing.assert_close(model.detokenize(codes, offset), model.decode(codes))


def test_gradients_go_through_the_whole_recurrence():
    model, x = network(), pictures(2).requires_grad_()
    model.read(x, torch.tensor([[0, 8], [0, 8]])).raw.sum().backward()
    corner = x.grad[:, :, :5, :5]
    assert corner.abs().sum() > 0 and not x.grad[:, :, :5, 11:].any()


def test_a_step_of_training_by_hand():
    model, x = replace(RECIPE, unconditional=0.5, unrounded=0.5).build().train(), pictures(4)
    torch.manual_seed(6)
    found = model.objective(x)
    torch.manual_seed(6)
    order = torch.rand(4, 9).argsort(1)[:, : int(torch.randint(1, 10, ()))]
    soft, lost = torch.rand(4, 1, 1) < 0.5, torch.rand(4, 1, 1) < 0.5
    t, noise, each = torch.randn(4).sigmoid(), torch.randn(4, 3, SIZE, SIZE), []
    assert len(set(zip(soft.flatten().tolist(), lost.flatten().tolist(), strict=True))) > 1
    for i in range(4):
        reading = model.read(x[i : i + 1], order[i : i + 1])
        message = model.bottleneck.bounded(reading.raw) if soft[i] else reading.message
        message = model.unread(1).message if lost[i] else message
        data = 2 * x[i] - 1
        noisy = t[i] * data + (1 - t[i]) * noise[i]
        v = model.step(noisy[None], t[i : i + 1], message, reading.offset)[0]
        each.append((v[0] - (data - noise[i])).square().mean())
    torch.testing.assert_close(found, torch.stack(each).mean())


def test_a_teacher_aligns_patches_and_message():
    model, x = replace(RECIPE, teacher_dim=12, align_at=2).build(teacher=teacher()).train(), pictures(4)
    torch.manual_seed(1)
    with_it = model.objective(x)
    with_it.backward()
    assert all(p.grad is not None for p in model.alignment.parameters())
    model._teacher = ()
    torch.manual_seed(1)
    assert 0 < float((with_it - model.objective(x)).detach()) <= 4


def test_refusals():
    for how, message in (
        (dict(size="S"), "size: got 'S', must be one of T, B, L, XL"),
        (dict(crop=8), "crop, stride: got 8 and 5; crop \\+ 2 stride must be image, 16"),
        (dict(patch=4), "crop, stride: got 6 and 5; .* multiple of patch, 4"),
        (dict(order="adaptive"), "order: got 'adaptive', must be 'raster', 'random' or cells"),
        (dict(order=(9,)), r"order: got \(9,\), must be cells between 0 and 8"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(RECIPE, **how).build()


def test_claim():
    outcome = claim(TokenizeTrial(pictures=2, size=32), steps=1, seeds=1)
    assert outcome.metric == "PSNR after 9 crops, dB" and outcome.note.count("crops") == 4
