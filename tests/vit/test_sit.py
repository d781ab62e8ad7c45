"""SiT: what its sheet says must hold, the student, the loss and the claim."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.vit.made_trial import MadeTrial, tiny_vit
from vistok.vit.sit import FRDLoss, ReverseSlimming, SiT, SlimViT, TokenSlimming, claim, slim_counts, teach


def test_convex_combinations():
    slim = TokenSlimming(8, 5)
    x = torch.randn(2, 11, 8)
    torch.testing.assert_close(slim.weights(x).sum(2), torch.ones(2, 5))
    assert slim(x).shape == (2, 5, 8)
    same = torch.randn(2, 1, 8).expand(2, 11, 8)
    torch.testing.assert_close(slim(same), same[:, :5])
    assert (slim(x) <= x.max(1, keepdim=True).values).all() and (slim(x) >= x.min(1, keepdim=True).values).all()


def test_order_of_the_tokens_does_not_matter_but_to_the_recovery():
    slim, back = TokenSlimming(8, 5), ReverseSlimming(8, 5, 11)
    x, turn = torch.randn(1, 11, 8), torch.randperm(11)
    torch.testing.assert_close(slim(x), slim(x[:, turn]))
    tokens = torch.randn(1, 5, 8)
    assert not torch.allclose(back(tokens), back(tokens[:, [1, 0, 2, 3, 4]]), atol=1e-3)


def test_sharp_weights_choose_one_token():
    slim = TokenSlimming(8, 5)
    with torch.no_grad():
        slim.scale.fill_(1e6)
    x = torch.randn(1, 11, 8)
    weights = slim.weights(x)
    torch.testing.assert_close(weights.max(2).values, torch.ones(1, 5))
    torch.testing.assert_close(slim(x), x[:, weights[0].argmax(1)])


@pytest.mark.parametrize(("tokens", "keep", "counts"), [(196, 0.5, [196, 98, 49, 24]), (2, 0.3, [2, 1, 1, 1])])
def test_counts(tokens, keep, counts):
    assert slim_counts(tokens, keep) == counts


def test_tokens_are_really_gone():
    student = SiT(stage_blocks=(1, 2)).build(tiny_vit())
    seen = []
    for block in student.vit.blocks:
        block.register_forward_hook(lambda _, __, out: seen.append(out.shape[1]))
    assert student(torch.randn(2, 3, 24, 24)).shape == (2, 5)
    assert seen == [1 + 36, 1 + 18, 1 + 18, 1 + 9] == [1 + count for count in student.counts]


def test_evaluation_never_recovers():
    student = SiT().build(tiny_vit())
    for module in student.recover.values():
        module.register_forward_hook(lambda *_: pytest.fail("the recovery ran"))
    student(torch.randn(1, 3, 24, 24))


def test_student_starts_from_the_teacher_and_is_its_own():
    vit = tiny_vit()
    student = SiT(stage_blocks=(2,), keep=1.0).build(vit)
    assert not student.slim and not student.recover
    x = torch.randn(2, 3, 24, 24)
    assert torch.equal(student(x), vit(x))  # nothing is slimmed: the same network
    logits, tokens = student.learn(x)
    theirs, rows = teach(vit, x)
    assert torch.equal(logits, theirs) and all(map(torch.equal, tokens, rows))
    assert not {id(p) for p in student.parameters()} & {id(p) for p in vit.parameters()}


def test_learning_gives_whole_maps_and_the_same_logits():
    vit = tiny_vit(num_classes=3, reg_tokens=2)
    student = SlimViT(vit, (1, 1, 1)).eval()
    x = torch.randn(2, 3, 24, 24)
    logits, tokens = student.learn(x)
    torch.testing.assert_close(logits, student(x))
    assert [tuple(t.shape) for t in tokens] == [(2, 36, 16)] * 4


def test_loss_by_hand_and_no_gradient_for_the_teacher():
    torch.manual_seed(0)
    student = [torch.randn(2, 4, 3, requires_grad=True) for _ in range(2)]
    teacher = [torch.randn(2, 4, 3, requires_grad=True) for _ in range(2)]
    logits, theirs = (torch.randn(2, 5, requires_grad=True) for _ in range(2))
    labels, hard = torch.tensor([1, 4]), (torch.randn(2, 5), torch.tensor([0, 0]))
    parts = FRDLoss(3.0, 5.0, 2.0)(logits, labels, student, theirs, teacher, hard)
    p, q = (theirs / 2).softmax(1), (logits / 2).softmax(1)
    tokens = sum((s - t).square().mean() for s, t in zip(student, teacher, strict=True)) / 2
    torch.testing.assert_close(parts.labels, cross_entropy(logits, labels))
    torch.testing.assert_close(parts.tokens, 3 * tokens)
    torch.testing.assert_close(parts.logits, 5 * 4 * (p * (p / q).log()).sum() / 2)
    torch.testing.assert_close(parts.hard, cross_entropy(*hard))
    torch.testing.assert_close(parts.total, parts.labels + parts.tokens + parts.logits + parts.hard)
    parts.total.backward()
    assert theirs.grad is None and all(t.grad is None for t in teacher)
    assert logits.grad is not None and all(s.grad is not None for s in student)


def test_teacher_gets_no_gradient_in_training():
    vit = tiny_vit()
    student, x = SiT().build(vit).train(), torch.randn(2, 3, 24, 24)
    logits, tokens = student.learn(x)
    SiT().loss()(logits, torch.tensor([0, 1]), tokens, *teach(vit, x)).total.backward()
    assert all(p.grad is None for p in vit.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"stage_blocks: got \(2, 2\)"):
        SlimViT(tiny_vit(), (2, 2))
    with pytest.raises(ValueError, match="keep: got 0"):
        slim_counts(10, 0)
    with pytest.raises(ValueError, match="n_out: got 0"):
        TokenSlimming(8, 0)
    with pytest.raises(ValueError, match="tau: got 0"):
        FRDLoss(tau=0)
    with pytest.raises(ValueError, match="tokens: got 1 layers, must be the teacher's 0"):
        FRDLoss()(torch.zeros(1, 2), torch.tensor([0]), [torch.zeros(1, 1, 1)], torch.zeros(1, 2), [])


def test_claim():
    trial = MadeTrial(0.4, 0.6)
    outcome = claim(trial, steps=2)
    assert (outcome.baseline, outcome.value, outcome.holds) == (0.4, 0.6, True)
    (plain, first), (distilled, second) = trial.trained
    assert isinstance(plain, SlimViT) and isinstance(distilled, SlimViT) and second[0] > first[0]
    assert "4 of 36 tokens" in outcome.note
    assert not claim(MadeTrial(0.6, 0.6), steps=1).holds
