"""SEED-LLaMA: the vector, what its loss reaches, and a picture among a language model's ids."""

from __future__ import annotations

import pytest
import torch

from tests.tokenize.test_contract import SIZE, built, pictures
from tests.tokenize.test_seed import SMALL as SEED
from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.parts.visual_vocabulary import small_llama
from vistok.tokenize._pairs import captions, memorised, shares
from vistok.tokenize.seed_llama import SeedLlama, claim

SMALL = {k: v for k, v in SEED.items() if k not in ("restore_depth", "conditions")} | dict(decode_depth=1, vector=10)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@torch.no_grad()
def test_one_vector_that_the_order_of_the_codes_changes():
    model = built("seed-llama")
    ids = model.encode(pictures()).ids
    vector = model.decode_condition(ids)
    assert vector.shape == (3, 10)
    assert not torch.allclose(model.decode_condition(torch.tensor([[0, 1, 2, 3, 4]])), model.decode_condition(
        torch.tensor([[1, 0, 2, 3, 4]])
    ))  # fmt: skip
    assert torch.equal(model.decode_ids(ids), model.decode_ids(ids))


def test_sizes_of_the_narrow_mlp_are_the_papers():
    from vistok.tokenize.seed_llama import VectorDecoder

    found = [layer.weight.shape for layer in VectorDecoder(32, 768, 32, 1, 12, 1024).narrow if hasattr(layer, "weight")]
    assert found == [(256, 768), (128, 256), (32, 128)]


def test_the_vectors_loss_reaches_the_queries_straight_through_and_the_table_not_at_all():
    model = built("seed-llama").train()
    _, _, z = model.quantized(pictures(seed=9))
    loss = (model.condition(z) - torch.randn(3, 10)).square().mean()
    table, queries = torch.autograd.grad(
        loss, [model.bottleneck.codebook, model.reader.queries], allow_unused=True, materialize_grads=True
    )
    assert not table.any() and (queries.abs().sum(1) > 0).all()


def test_a_teacher_is_one_term_more_and_is_not_saved():
    calls = []

    def teacher(images):
        calls.append(len(images))
        return torch.ones(len(images), 10)

    model = SeedLlama(**SMALL).build(teacher=teacher)
    torch.manual_seed(1)
    with_it = model.objective(pictures())
    away = (model.condition(model.quantized(pictures())[2]) - 1).square().mean()
    model.teacher = ()
    torch.manual_seed(1)
    torch.testing.assert_close(with_it, model.objective(pictures()) + away)
    assert calls == [3] and not any("teacher" in key for key in model.state_dict())


@pytest.mark.parametrize(("parity", "weight"), [("paper", 0.25), ("authors", 1.0)])
def test_what_beta_weights(parity, weight):
    assert SeedLlama(**SMALL | dict(parity=parity)).build().bottleneck.commitment == weight


def test_instruction_tuning_learns_the_answer_only():
    recipe = SeedLlama(**SMALL)
    vocabulary = recipe.vocabulary(20)
    assert (vocabulary.size, vocabulary.tokens) == (20 + 32 + 2, 5)
    packed = recipe.instruction(vocabulary, torch.randint(32, (2, 5)), torch.full((2, 3), 4), torch.full((2, 2), 6))
    assert packed.input_ids.shape == (2, 7 + 3 + 2)
    assert packed.labels.tolist() == [[-100] * 10 + [6, 6]] * 2


def test_a_picture_is_always_of_one_length():
    assert SeedLlama().vocabulary(32000).wrap(torch.randint(8192, (1, 32))).shape == (1, 34)


def test_a_small_llama_knows_eight_pairs_by_heart():
    vocabulary = SeedLlama(**SMALL).vocabulary(34)
    texts, codes = captions(torch.randint(18, (8,))), (torch.randint(32, (8, 5)),)
    llm = memorised(vocabulary, texts, codes, 120, 0)
    assert shares(llm, vocabulary, texts, codes) == (1.0, 1.0)


def test_old_rows_of_the_embedding_stay():
    llm = small_llama(34)
    before = llm.get_input_embeddings().weight.clone()
    SeedLlama(**SMALL).vocabulary(34).extend(llm)
    assert torch.equal(llm.get_input_embeddings().weight[:34], before)


def test_refusals():
    with pytest.raises(ValueError, match="reader: got a width of 36, must be a multiple of 24"):
        SeedLlama(**SMALL | dict(reader=(36, 2, 3))).build()


def test_claim_runs():
    outcome = claim(TokenizeTrial(pictures=12), steps=1, words=1)
    assert 0 <= outcome.value <= 1 and not outcome.holds and "by heart" in outcome.note and SIZE == 16
