"""The contract of the tokenizers: every one in the registry, each as a small network."""

from __future__ import annotations

import importlib

import pytest
import torch

import vistok
from vistok.catalogue import systems
from vistok.core.codes import Codes
from vistok.parts.tokenizer import load_tokenizer

SIZE = 16


def small(name):
    """Hyper-parameters of a small network for pictures of ``SIZE``: ``SMALL`` of the system's own test."""
    return importlib.import_module(f"tests.tokenize.test_{name.replace('-', '_')}").SMALL


NAMES = [card.slug for card in systems("tokenize") if hasattr(vistok.create(card.slug), "build")]
every = pytest.mark.parametrize("name", NAMES)


def built(name, seed=0, steps=1, **hyper):
    """The system's tokenizer, in evaluation mode, after ``steps`` training forwards (which fill its table)."""
    torch.manual_seed(seed)
    model = vistok.create(name, **{**small(name), **hyper}).build()
    for step in range(steps):
        model(pictures(4, step))
    return model.eval()


def pictures(count=3, seed=0):
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


@every
@torch.no_grad()
def test_the_round_trip_closes(name):
    """Codes, stored ids and the vectors themselves decode to one picture, bit for bit."""
    model, x = built(name), pictures()
    codes = model.encode(x)
    picture = model.decode(codes)
    assert picture.shape == x.shape and picture.dtype == torch.float32
    assert float(picture.min()) >= 0 and float(picture.max()) <= 1
    assert torch.equal(model.decode(codes), picture) and torch.equal(model.encode(x).z, codes.z)
    if codes.ids is None:
        assert codes.format.sizes == () and codes.bits.tolist() == [32 * codes.z[0].numel()] * len(x)
        return
    assert torch.equal(model.bottleneck.ids_to_z(codes.ids, model.grid), codes.z)
    assert torch.equal(model.decode_ids(codes.ids), picture)
    assert torch.equal(model.decode(Codes(codes.ids, None, codes.format)), picture)
    assert codes.bits.tolist() == model.codes(codes.ids).bits.tolist()


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_model_in_half_precision_keeps_the_round_trip(name, dtype):
    model = built(name).to(dtype)
    codes = model.encode(pictures().to(dtype))
    assert codes.z.dtype == torch.float32
    assert model.decode(codes).dtype == torch.float32
    if codes.ids is None:
        return
    assert torch.equal(model.bottleneck.ids_to_z(codes.ids, model.grid), codes.z)
    assert torch.equal(model.decode_ids(codes.ids), model.decode(codes))
    back = model.float()
    again = vistok.create(name, **small(name)).build()
    again.load_state_dict(back.state_dict())
    assert torch.equal(again.eval().bottleneck.ids_to_z(codes.ids, model.grid), codes.z)


@every
@torch.no_grad()
def test_pictures_do_not_see_one_another(name):
    model, x = built(name), pictures()
    together, alone = model.encode(x), model.encode(x[:1])
    torch.testing.assert_close(together.z[:1], alone.z, atol=1e-5, rtol=1e-5)
    assert together.ids is None or torch.equal(together.ids[:1], alone.ids)
    torch.testing.assert_close(model.decode(together)[:1], model.decode(alone), atol=1e-5, rtol=1e-5)


@every
@torch.no_grad()
def test_beginnings(name):
    """A flexible tokenizer decodes any, alike whether cut or hidden; another one says that it does not."""
    model = built(name)
    codes = model.encode(pictures())
    if not model.flexible:
        cut = Codes(None if codes.ids is None else codes.ids[:, :-1], codes.z[:, :-1], codes.format)
        with pytest.raises(ValueError, match="decodes no prefix"):
            model.decode(cut)
        return
    whole = model.decode(codes)
    assert torch.equal(model.decode(codes.prefix(model.tokens)), whole)
    lengths = torch.tensor([1, model.tokens, 3])
    each = model.decode(codes.prefix(lengths))
    for i, k in enumerate(lengths.tolist()):
        torch.testing.assert_close(each[i], model.decode(codes.prefix(k))[i], atol=1e-5, rtol=1e-5)
    stored = codes.prefix(lengths).ids
    if stored is None:
        return
    torch.testing.assert_close(model.decode_ids(stored), each)
    assert not torch.allclose(model.decode(codes.prefix(1)), whole, atol=1e-4)
    with pytest.raises(ValueError, match="-1 must stand at the end only"):
        model.decode_ids(torch.where(torch.arange(model.tokens) == 0, -1, codes.ids))


@every
def test_training_teaches_all_of_it(name):
    model = built(name).train()
    model.objective(pictures(4, seed=9)).backward()  # not the batch that filled the table: its codes are exact
    learned = {key for key, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {key for key, p in model.named_parameters() if p.requires_grad} - learned == set()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@every
def test_the_loss_falls(name):
    model, x = built(name, steps=0).train(), pictures(2)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    found = []
    for _ in range(15):
        torch.manual_seed(0)  # a flow draws the same noise each time
        error = model.objective(x)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        found.append(float(error.detach()))
    assert sum(found[-3:]) < 0.8 * sum(found[:3])


@every
@torch.no_grad()
def test_folders(name, tmp_path):
    model, x = built(name), pictures()
    folder = model.save(tmp_path / "made")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    other = load_tokenizer(folder)
    assert type(other) is type(model) and other.recipe == model.recipe and not other.training
    assert torch.equal(other.encode(x).z, model.encode(x).z)
    assert torch.equal(other.decode(other.encode(x)), model.decode(model.encode(x)))
    loaded = vistok.load(folder, device="cpu")
    assert type(loaded) is type(model) and torch.equal(loaded.encode(x).z, model.encode(x).z)


@every
def test_the_same_seed_builds_the_same_network(name):
    one, same, other = (dict(built(name, seed, 0).named_parameters()) for seed in (0, 0, 1))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


@every
def test_pictures_that_cannot_be(name):
    model = built(name)
    for x, message in (
        (torch.rand(2, 3, SIZE, SIZE + 1), r"images: got shape \(2, 3, 16, 17\), must be \(B, 3, 16, 16\)"),
        (torch.rand(3, SIZE, SIZE), "images: got shape"),
        (torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8), "images: got torch.uint8, must be float"),
        (2 * pictures() - 1, r"images: got values from -.*, must be in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model.encode(x)
    ids = model.encode(pictures()).ids
    if ids is not None:
        with pytest.raises(ValueError, match="ids: got 99999, must be below"):
            model.decode_ids(torch.full_like(ids, 99999))


def test_folders_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"tokenizer": "titok"}')
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"tokenizer": "no-such", "hyper": {}, "parts": {}}')
    with pytest.raises(ValueError, match=r"holds no tokenizer .*: unknown system"):
        load_tokenizer(tmp_path)
    folder = built("titok").save(tmp_path / "made")
    built("titok", tokens=5).save(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(ValueError, match="the weights do not fit"):
        load_tokenizer(folder)
