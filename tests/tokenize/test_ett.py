"""ETT: what the captions' loss reaches, the stages, and IBQ's look-up and gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.tokenize.test_contract import built, pictures
from vistok.bench.tokenize_trial import TokenizeTrial
from vistok.parts.visual_vocabulary import small_llama
from vistok.tokenize.ett import ETT, claim

SMALL = dict(image=16, width=8, mults=(1, 1, 2), blocks=1, codes=32, dim=8, entropy=0.05, restart_after=3)
TEXT = 12


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tuned(reads="vectors", **how):
    return ETT(**SMALL, reads=reads).tune(built("ett"), small_llama(TEXT, 16, 1, 2), **how)


def text(rows=3, length=5):
    return torch.randint(TEXT, (rows, length), generator=torch.Generator().manual_seed(7))


def reached(model, value):
    model.zero_grad()
    value.backward()
    names = {key for key, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    return {"codebook" if "codebook" in name else ".".join(name.split(".")[:2]) for name in names}


def test_the_first_stage_teaches_the_projector_alone():
    model = tuned()
    model.set_stage(1)
    loss = model.loss(pictures(), text(), text())
    assert reached(model, loss.loss) == {"projector.0", "projector.2"}
    assert loss.loss == loss.caption and loss.tokenizer == 0


def test_captions_alone_reach_encoder_and_every_code():
    model = tuned()
    model.set_stage(2)
    found = reached(model, model.loss(pictures(), text(), text(), alpha=0.0).loss)
    assert found >= {"tokenizer.encoder", "tokenizer.down", "codebook", "llm.model", "projector.0"}
    assert not found & {"tokenizer.decoder", "tokenizer.up", "head.weight"}
    assert model.tokenizer.bottleneck.codebook.grad.ne(0).any(1).all()


def test_ids_send_the_tokenizer_nothing():
    model = tuned("ids")
    model.set_stage(2)
    assert reached(model, model.loss(pictures(), text(), text(), alpha=0.0).loss) <= {
        "projector.weight",
        "llm.model",
        "llm.lm_head",
    }


def test_a_large_alpha_is_the_tokenizers_own_training():
    model = tuned().eval()
    model.set_stage(2)
    weight = model.tokenizer.encoder.first.weight
    (own,) = torch.autograd.grad(model.tokenizer.objective(pictures()), weight)
    (found,) = torch.autograd.grad(model.loss(pictures(), text(), text(), alpha=1e4).loss / 1e4, weight)
    torch.testing.assert_close(found, own, atol=1e-3 * float(own.abs().max()), rtol=1e-2)
    parts = model.loss(pictures(), text(), text())
    torch.testing.assert_close(parts.loss, parts.caption + 0.25 * parts.tokenizer)
    torch.testing.assert_close(parts.tokenizer, model.tokenizer.objective(pictures()))


def test_the_caption_is_what_the_language_model_itself_loses():
    model, words = tuned().eval(), text()
    labels = words.clone()
    labels[0, 3:] = -100
    codes = model.tokenizer.encode(pictures())
    x = torch.cat([model.projector(codes.z), model.llm.get_input_embeddings()(words)], 1)
    all_labels = torch.cat([torch.full((3, model.tokenizer.tokens), -100), labels], 1)
    torch.testing.assert_close(
        model.loss(pictures(), words, labels).caption, model.llm(inputs_embeds=x, labels=all_labels).loss
    )


@torch.no_grad()
def test_padding_at_the_right_changes_nothing():
    model, words = tuned().eval(), text()
    mask, labels = torch.ones_like(words), words.clone()
    mask[:, 3:], labels[:, 3:] = 0, -100
    found = model.loss(pictures(), words, labels, mask=mask).caption
    torch.testing.assert_close(found, model.loss(pictures(), words[:, :3], words[:, :3]).caption)


def test_a_tokenizer_that_does_not_learn_does_not_change():
    model = tuned()
    for stage in (1, 3):
        model.set_stage(stage)
        model.train()
        assert model.llm.training and not model.tokenizer.training
        before = {key: value.clone() for key, value in model.tokenizer.state_dict().items()}
        for seed in range(5):
            model.loss(pictures(3, seed), text(), text())
        assert all(torch.equal(value, before[key]) for key, value in model.tokenizer.state_dict().items())
    model.set_stage(2)
    assert model.tokenizer.training
    model.eval()
    assert not model.tokenizer.training


def test_the_longest_code_wins_and_not_the_nearest():
    table = built("ett").bottleneck.eval()
    with torch.no_grad():
        table.codebook.copy_(torch.nn.functional.normalize(torch.randn(32, 8), dim=1))
        table.codebook[5] = 3 * table.codebook[4]
    z = table.codebook[4].detach()[None, None]
    codes = table(z)
    assert codes.ids.item() == 5 and torch.cdist(z[0], table.codebook.detach()).argmin() == 4
    assert torch.equal(codes.z, table.codebook[5].detach()[None, None])


def test_the_gradient_is_that_of_the_softmax():
    table = built("ett").bottleneck.eval()
    z = torch.randn(1, 6, 8, requires_grad=True)
    probe = torch.randn(1, 6, 8)
    (found,) = torch.autograd.grad((table(z).z * probe).sum(), z)
    c = table.codebook.detach()
    p, g = (z.detach() @ c.T).softmax(-1), probe @ c.T
    torch.testing.assert_close(found, (p * (g - (p * g).sum(-1, keepdim=True))) @ c)


def test_drawing_learns_by_teacher_forcing_what_it_draws():
    model = tuned().eval()
    model.set_stage(3)
    prompt = text(3, 2)
    assert reached(model, model.drawing_loss(pictures(), prompt)) >= {"head.weight", "projector.0", "llm.model"}
    made = model.draw(prompt)
    assert made.shape == (3, model.tokenizer.tokens)
    z = model.tokenizer.bottleneck.ids_to_z(made)
    x = torch.cat([model.embed(prompt), model.projector(z)[:, :-1]], 1)
    hidden = model.llm(inputs_embeds=x, output_hidden_states=True).hidden_states[-1][:, 1:]
    assert torch.equal(model.head(hidden).argmax(-1), made)
    assert model.tokenizer.decode_ids(made).shape == (3, 3, 16, 16)


def test_what_cannot_be():
    with pytest.raises(ValueError, match="stage: got 4, must be 1, 2 or 3"):
        tuned().set_stage(4)
    with pytest.raises(ValueError, match="reads: got 'words'"):
        tuned("words")
    with pytest.raises(ValueError, match="image: got 18, must be a multiple of 4"):
        replace(ETT(**SMALL), image=18).build()


def test_the_claim_runs():
    outcome = claim(TokenizeTrial(pictures=4, size=32), first=1, steps=4)
    assert outcome.baseline > 0 and outcome.value > 0 and "PSNR" in outcome.note
