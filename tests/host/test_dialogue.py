"""reselect=True: a later turn chooses again from the whole pictures; and budgets shared by the pictures of a prompt."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from tests.host.families import FAMILIES, IMAGE, prompt
from tests.host.reducers import Spread, Staged
from vistok.host import Evidence, Reducer, apply
from vistok.host.keep import share_out

LLAVA = FAMILIES["llava-clip"]
GREEDY = {"do_sample": False, "suppress_tokens": [IMAGE]}  # a random model may well say <image>
TURN = torch.tensor([[30, 31, 33, 34]])


@dataclass(frozen=True)
class Hears(Reducer):
    """Keeps a run of tokens that begins where the question says, and the questions it was shown."""

    seen: list = field(default_factory=list, compare=False)
    whole_picture = True

    @property
    def needs(self):
        return {"text_ids": None, "cls_attention": -1}

    def select(self, evidence: Evidence, keep: int) -> torch.Tensor:
        ids = torch.where(evidence.text_mask, evidence.text_ids, 0)
        self.seen.append([row[row > 0].tolist() for row in ids])
        start = ids.sum(1) % evidence.num_tokens
        return (start[:, None] + torch.arange(keep)) % evidence.num_tokens


def talk(family, method, rows=([0],), **how):
    """Two turns on one cache: (inputs of the first turn, ids after it, mask of the second, answer to it, session)."""
    model, batch = family.model, prompt(family, [list(r) for r in rows])
    cache = DynamicCache()
    with apply(model, method, keep=0.25, **how) as session:
        first = model.generate(**batch.inputs, max_new_tokens=4, past_key_values=cache, **GREEDY)
        ids = torch.cat([first, TURN.repeat(len(rows), 1)], 1)
        ones = torch.ones_like(ids[:, batch.inputs["input_ids"].shape[1] :])
        mask = torch.cat([batch.inputs["attention_mask"], ones], 1)
        second = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5, **GREEDY)
    return batch, ids, mask, second[:, ids.shape[1] :], session


@pytest.mark.parametrize("rows", [([0],), ([0, 0], [0])], ids=["one", "padded"])
@pytest.mark.parametrize("name", ["llava-clip", "qwen2.5-vl", "qwen3-vl", "internvl"])
@pytest.mark.parametrize("method", [Spread(), Staged(0.5, {2: 0.125})], ids=["input", "staged"])
def test_a_second_turn_equals_the_whole_conversation_as_one_prompt(name, rows, method):
    family = FAMILIES[name]
    batch, ids, mask, got, session = talk(family, method, rows, reselect=True)
    whole = {**batch.inputs, "input_ids": ids, "attention_mask": mask}
    if "mm_token_type_ids" in whole:
        whole["mm_token_type_ids"] = (ids == IMAGE).int()
    with apply(family.model, method, keep=0.25) as once:
        want = family.model.generate(**whole, max_new_tokens=5, **GREEDY)[:, ids.shape[1] :]
    assert torch.equal(got, want)
    assert [p.keep.tolist() for p in session.pictures] == [p.keep.tolist() for p in once.pictures]
    assert session.kv_bytes == once.kv_bytes


def test_the_choice_is_made_for_the_new_question():
    method = Hears()
    _, ids, _, _, session = talk(LLAVA, method, reselect=True)
    asked, again = method.seen
    assert again == [[*ids[0, -len(TURN[0]) - 1 :].tolist()]]  # the end of the answer comes with the turn
    start = sum(again[0]) % 16
    assert session.pictures[0].keep.tolist() == sorted((start + i) % 16 for i in range(4))
    assert asked != again


def test_without_it_the_first_choice_stays():
    method = Hears()
    *_, session = talk(LLAVA, method)
    assert len(method.seen) == 1
    start = sum(method.seen[0][0]) % 16
    assert session.pictures[0].keep.tolist() == sorted((start + i) % 16 for i in range(4))


def test_the_vision_encoder_runs_once():
    runs = []
    handle = LLAVA.model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    try:
        talk(LLAVA, Hears(), reselect=True)
    finally:
        handle.remove()
    assert len(runs) == 1


def test_what_does_not_go_with_it_is_said():
    model, batch = LLAVA.model, prompt(LLAVA, [[0]])
    cache = DynamicCache()
    with apply(model, Spread(), keep=0.25, reselect=True):
        first = model.generate(**batch.inputs, max_new_tokens=4, past_key_values=cache, **GREEDY)
        ids = torch.cat([first, TURN, batch.inputs["input_ids"]], 1)
        with pytest.raises(ValueError, match="pixel_values: with reselect=True"):
            model.generate(input_ids=ids, pixel_values=batch.inputs["pixel_values"], past_key_values=cache)
        cache.reorder_cache(torch.tensor([0]))
        with pytest.raises(RuntimeError, match="reselect: the cache no longer holds"):
            model.generate(input_ids=torch.cat([first, TURN], 1), past_key_values=cache, max_new_tokens=2)
    gemma = FAMILIES["gemma3"].model
    with pytest.raises(ValueError, match="reselect: got True"):
        apply(gemma, Spread(), reselect=True)


# Budgets --------------------------------------------------------------------------------------------------------------


def test_a_shared_budget_is_split_by_size():
    family = FAMILIES["qwen2.5-vl"]
    batch = prompt(family, [[0, 1], [1]])
    with apply(family.model, Spread(), keep=6, budget="shared") as session, torch.no_grad():
        family.model(**batch.inputs)
    first, second, alone = session.pictures
    assert first.tokens_kept + second.tokens_kept == 6
    assert alone.tokens_kept == 6
    small, large = sorted([first, second], key=lambda p: p.tokens_in)
    assert small.tokens_in < large.tokens_in and small.tokens_kept < large.tokens_kept
    with apply(family.model, Spread(), keep=6) as session, torch.no_grad():
        family.model(**batch.inputs)
    assert [p.tokens_kept for p in session.pictures] == [6, 6, 6]


def test_a_shared_budget_of_several_methods():
    batch = prompt(LLAVA, [[0, 0]])
    with apply(LLAVA.model, [Spread(), Spread()], keep=[12, 5], budget="shared") as session, torch.no_grad():
        LLAVA.model(**batch.inputs)
    assert [p.tokens_kept for p in session.pictures] == [3, 2]


def test_wrong_budgets():
    with pytest.raises(ValueError, match="budget: got 'all'"):
        apply(LLAVA.model, Spread(), budget="all")
    batch = prompt(LLAVA, [[0, 0]])
    with (
        apply(LLAVA.model, Spread(), keep=1, budget="shared"),
        pytest.raises(ValueError, match="keep: got 1 for all pictures of a prompt, must be between 1 for each of"),
    ):
        LLAVA.model(**batch.inputs)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=6), st.floats(0.001, 1))
def test_shares_add_up_and_fit(sizes, share):
    total = sum(sizes)
    keep = max(len(sizes), round(share * total))
    parts = share_out(keep, sizes)
    assert sum(parts) == keep
    assert all(1 <= part <= size for part, size in zip(parts, sizes, strict=True))
    assert all(abs(part - keep * size / total) <= len(sizes) + 1 for part, size in zip(parts, sizes, strict=True))
    assert sum(share_out(share, sizes)) == max(len(sizes), max(1, int(share * total + 0.5)))
