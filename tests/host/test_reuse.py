"""Pictures that were encoded before: the same tokens, evidence and logits; the encoder runs on the others only."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from transformers import DynamicCache

from tests.host.families import FAMILIES, VIDEOS, blocks, prompt
from tests.host.reducers import Asks, EncoderSpread, Staged
from vistok.host import apply
from vistok.host.hooks import Hooks
from vistok.host.reuse import reuse
from vistok.host.vision import LAYER_FIELDS

FIELDS = {"encoder_features": None, "patch_pixels": None, **dict.fromkeys({*LAYER_FIELDS} - {"cls_logits"}, -2)}


class Kept(dict):
    """A store without bounds."""

    def get(self, key, fields):
        found = super().get(key)
        return found if found is not None and found.fields.keys() >= set(fields) else None

    def put(self, key, encoded):
        self[key] = encoded

    def drop(self, digest):
        del self[next(key for key in self if key[0] == digest)]


class Run:
    """Two tokens after a prompt: their ``logits``, the ``session``, the ``evidence`` that its method was shown, and how
    many places the first layer of the encoder ``ran`` on, each time it did."""

    def __init__(self, family, rows, store=None, method=None, keep=0.5, digests=None, **change):
        model = family.model
        inputs = prompt(family, rows).inputs | change
        names = iter("abcdefgh")
        digests = digests or [[next(names) for _ in row] for row in rows]
        self.ran = []
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            hooks = Hooks()
            stack.callback(hooks.remove)
            enters = lambda m, a, k: self.ran.append((*a, *k.values())[0].shape[:-1].numel())  # noqa: E731
            hooks.before(blocks(model)[0], enters)
            self.session = None if method is None else stack.enter_context(apply(model, method, keep=keep))
            if store is not None:
                stack.enter_context(reuse(model, digests, inputs["input_ids"], store))
            made = model.generate(
                **inputs, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        self.logits = torch.stack(made.logits)
        self.evidence = method.seen if isinstance(method, Asks) else []

    def same(self, other, exactly=True):
        pairs = [(self.logits, other.logits)]
        for mine, others in zip(self.evidence, other.evidence, strict=True):
            names = [name for name in ("features", *FIELDS) if getattr(others, name) is not None]
            pairs += [(getattr(mine, name), getattr(others, name)) for name in names]
        if exactly:
            return all(torch.equal(a, b) for a, b in pairs)
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        return True


def pictures(run):
    return [picture.report() for picture in run.session.pictures]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_what_was_encoded_together_is_the_same_bit_for_bit(family):
    rows, store = [[0, family.sizes - 1], [0]], Kept()
    for wants in (None, {}, FIELDS):
        asks = lambda wants=wants: None if wants is None else Asks(wants)  # noqa: E731
        plain, first, again = (Run(family, rows, kept, asks()) for kept in (None, store, store))
        assert len(plain.ran) == 1 and again.ran == []
        assert first.ran == ([] if wants == {} else plain.ran)  # no evidence: what the plain model left is enough
        assert first.same(plain) and again.same(plain)
        if wants is not None:
            assert pictures(first) == pictures(again) == pictures(plain)
            assert again.session.report()["flops_by_stage"] == plain.session.report()["flops_by_stage"] | {"vision": 0}
    assert len(store) == 3


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("gone", ["a", "b", "c"])
def test_pictures_that_are_known_and_others_in_one_batch(family, gone):
    rows, store = [[0, family.sizes - 1], [0]], Kept()
    plain = Run(family, rows, store, Asks(FIELDS))
    store.drop(gone)
    known = dict(store)
    some = Run(family, rows, store, Asks(FIELDS))
    assert some.same(plain, exactly=False) and pictures(some) == pictures(plain)
    assert len(some.ran) == 1 and len(store) == 3
    assert all(store[key] is one for key, one in known.items())
    spent = [family.spent[size] for row in rows for size in row]
    mine = spent["abc".index(gone)]
    whole = plain.session.report()["flops_by_stage"]["vision"]
    if family.units:
        assert some.ran[0] * sum(spent) == plain.ran[0] * mine
        assert some.session.report()["flops_by_stage"]["vision"] * sum(spent) == whole * mine
    else:
        assert some.ran[0] < plain.ran[0] and 0 < some.session.report()["flops_by_stage"]["vision"] < whole


@pytest.mark.parametrize("name", ["llava-clip", "qwen3-vl", "internvl", "gemma4"])
def test_tensors_are_their_own_and_all_are_counted(name):
    """A view would keep the whole batch alive; beams and methods must not write into what is kept."""
    store = Kept()
    Run(FAMILIES[name], [[0], [0]], store, Asks(FIELDS))
    for one in store.values():
        blocks_ = [part for value in one.fields.values() for part in (value if isinstance(value, list) else [(value,)])]
        tensors = [one.features, *one.deepstack, *(tensor for block in blocks_ for tensor in block)]
        assert one.nbytes == sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)
    assert bool(next(iter(store.values())).deepstack) == (name == "qwen3-vl")


@pytest.mark.parametrize("name", ["llava-clip", "qwen2.5-vl", "qwen3-vl", "gemma4"])
def test_methods_of_all_kinds_find_what_the_plain_model_left(name):
    family, store = FAMILIES[name], Kept()
    rows = [[0], [family.sizes - 1]]
    Run(family, rows, store)
    staged = Run(family, rows, store, Staged())
    assert staged.ran == [] and staged.same(Run(family, rows, None, Staged()))
    # It projects the tokens that stay itself: what they were made of has to be encoded once.
    for known in (False, True):
        encoder_space = Run(family, rows, store, EncoderSpread())
        assert (encoder_space.ran == []) == known
        assert encoder_space.same(Run(family, rows, None, EncoderSpread()))


def test_a_picture_that_comes_twice_is_encoded_once():
    family, store = FAMILIES["llava-clip"], Kept()
    pixels = prompt(family, [[0]]).inputs["pixel_values"].repeat(3, 1, 1, 1)
    pixels[1] *= -1
    plain = Run(family, [[0], [0, 0]], None, pixel_values=pixels)
    twice = Run(family, [[0], [0, 0]], store, digests=[["a"], ["b", "a"]], pixel_values=pixels)
    assert twice.ran[0] * 3 == plain.ran[0] * 2 and twice.same(plain, exactly=False)


def test_onevision_cuts_a_picture_only_where_it_is_alone():
    family, store = FAMILIES["onevision"], Kept()
    alone = Run(family, [[0]], store, batch_num_images=torch.tensor([1]))
    ids = torch.tensor([[1, 10, *[98] * 17, 20, *[98] * 17, 21, 5, 6]])
    two = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "batch_num_images": torch.tensor([2])}
    plain, first, again = (Run(family, [[0, 0]], kept, Asks({}), **two) for kept in (None, store, store))
    assert alone.ran == [51 - 3] and first.ran == plain.ran == [2 * 16] and again.ran == []
    assert first.same(plain) and again.same(plain) and len(store) == 3
    store.drop("b")
    one = Run(family, [[0, 0]], store, Asks({}), **two)
    assert one.ran == plain.ran and one.same(plain)  # pictures of one row are encoded together


@pytest.mark.parametrize(("gone", "tiles"), [("a", 4), ("b", 4), ("c", 1)])
def test_pictures_of_one_row_of_pixels_are_encoded_together(gone, tiles):
    """Idefics: its processor gives pixels by row of the prompt, where rows with fewer tiles end in black ones."""
    family, store = FAMILIES["idefics3"], Kept()
    rows = [[0, 1], [0]]
    pixels = prompt(family, rows).inputs["pixel_values"]
    by_row = pixels.new_zeros(2, 4, *pixels.shape[2:])
    by_row[0, 0], by_row[0, 1:], by_row[1, 0] = pixels[0, 0], pixels[1], pixels[2, 0]
    plain, first, again = (Run(family, rows, kept, Asks(FIELDS), pixel_values=by_row) for kept in (None, store, store))
    assert plain.same(Run(family, rows, None, Asks(FIELDS)))  # by picture is the same to the model
    assert first.same(plain) and again.same(plain) and again.ran == []
    store.drop(gone)
    some = Run(family, rows, store, Asks(FIELDS), pixel_values=by_row)
    assert some.ran == [64 * tiles] and some.same(plain, exactly=False)


def test_beams():
    family, store = FAMILIES["qwen3-vl"], Kept()
    inputs = prompt(family, [[0], [1]]).inputs
    how = dict(max_new_tokens=4, num_beams=3, do_sample=False)
    made = []
    for kept in (None, store, store):
        with ExitStack() as stack:
            stack.enter_context(apply(family.model, Asks(FIELDS), keep=0.5))
            if kept is not None:
                stack.enter_context(reuse(family.model, [["a"], ["b"]], inputs["input_ids"], kept))
            made.append(family.model.generate(**inputs, **how).tolist())
    assert made[0] == made[1] == made[2]


def test_a_forward_and_a_later_turn():
    """Without ``generate`` the outer model encodes the pictures itself; a turn without pictures encodes nothing."""
    family, store = FAMILIES["llava-clip"], Kept()
    inputs, model = prompt(family, [[0]]).inputs, family.model
    later = torch.tensor([[30, 31, 32]])
    made = []
    for kept in (None, store, store):
        cache = DynamicCache()
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(apply(model, Asks({"cls_attention": -2}), keep=0.5))
            if kept is not None:
                stack.enter_context(reuse(model, [["a"]], inputs["input_ids"], kept))
            model(**inputs, past_key_values=cache)
            made.append(model(input_ids=later, past_key_values=cache).logits)
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_inside_the_encoder_nothing_is_reused_or_kept():
    family, store = FAMILIES["llava-clip"], Kept()
    Run(family, [[0]], store)
    known = dict(store)
    method = ["pitome@encoder", Asks({"cls_attention": -2})]
    plain, inside = (Run(family, [[0]], kept, method, keep=[0.75, 4]) for kept in (None, store))
    assert len(inside.ran) == 1 and inside.same(plain) and store == known


def test_an_error_leaves_model_and_store_as_they_were():
    family, store = FAMILIES["llava-clip"], Kept()

    def breaks(module, args, output):
        raise RuntimeError("in the middle")

    for part in (blocks(family.model)[2], family.model.model.language_model.layers[1]):
        hooks = Hooks()
        hooks.after(part, breaks)
        with pytest.raises(RuntimeError, match="in the middle"):
            Run(family, [[0], [0]], store)
        hooks.remove()
        assert "get_image_features" not in vars(family.model.model)
        assert "forward" not in vars(family.model.model.vision_tower)
        assert len(store) == (0 if part is blocks(family.model)[2] else 2)
    again = Run(family, [[0], [0]], store)
    assert again.ran == [] and again.same(Run(family, [[0], [0]]))


def test_other_pictures_than_those_announced_are_encoded():
    family, store = FAMILIES["llava-clip"], Kept()
    plain = Run(family, [[0, 0]])
    wrong = Run(family, [[0, 0]], store, digests=[["a"]])
    assert wrong.ran == plain.ran and wrong.same(plain) and not store
    with pytest.raises(ValueError, match="digests: got none for row 1"):
        Run(family, [[0], []], store)


def test_a_model_with_an_encoder_for_videos_too():
    family, store = VIDEOS["video-llava"], Kept()
    plain, first, again = (Run(family, [[0, 0], [0]], kept, Asks(FIELDS)) for kept in (None, store, store))
    assert first.ran == plain.ran and again.ran == [] and len(store) == 3
    assert first.same(plain) and again.same(plain)


@pytest.mark.parametrize("name", ["qwen2-vl", "llava-next-video"])
def test_videos_are_encoded_every_time(name):
    family, store = VIDEOS[name], Kept()
    rows = [[2], [2]]
    plain = Run(family, rows, None, Asks({"cls_attention": -2}))
    for _ in range(2):
        run = Run(family, rows, store, Asks({"cls_attention": -2}), digests=[["a"], ["b"]])
        assert run.ran == plain.ran and run.same(plain) and not store
