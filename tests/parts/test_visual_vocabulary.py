"""A language model's ids for pictures: layout, packing, what may come next, and the mixed loss, held to loops."""

from __future__ import annotations

import pytest
import torch

from vistok.parts.visual_vocabulary import Piece, VisualVocabulary, learn, mixed_loss, small_llama

WORDS = VisualVocabulary(10, ((7, 3), (4, 2)))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def codes(b=2):
    return torch.randint(7, (b, 3)), torch.randint(4, (b, 2))


def test_layout():
    assert (WORDS.starts, WORDS.boi, WORDS.eoi, WORDS.size, WORDS.tokens) == ((10, 17, 21), 21, 22, 23, 5)
    one, two = codes()
    ids = WORDS.wrap(one, two)
    assert ids.shape == (2, 7) and ids[0].tolist() == [21, *(one[0] + 10), *(two[0] + 17), 22]
    for found, put in zip(WORDS.unwrap(ids), (one, two), strict=True):
        assert torch.equal(found, put)


def test_old_rows_stay():
    llm = small_llama(10, 16, 1, 2)
    before = llm.get_input_embeddings().weight.clone(), llm.lm_head.weight.clone()
    WORDS.extend(llm)
    after = llm.get_input_embeddings().weight, llm.lm_head.weight
    assert all(b.shape[0] == 23 and torch.equal(a, b[:10]) for a, b in zip(before, after, strict=True))
    assert len(after[0][10:].unique(dim=0)) == 13
    with pytest.raises(ValueError, match="llm: got one of 23 ids, must have the 10 of text"):
        WORDS.extend(llm)


def test_what_may_come_next():
    """Against a loop that walks through each row."""
    rows = torch.tensor(
        [[1, 2, 21, 10, 11, 12], [21, 10, 11, 12, 17, 20], [10, 12, 17, 18, 22, 3], [0, 0, 0, 1, 2, 21]]
    )
    for t in range(1, 7):
        found = WORDS.allowed(rows[:, :t])
        for row, allowed in zip(rows[:, :t].tolist(), found, strict=True):
            left: list[range] = []
            for i in row:
                left = [*[range(10, 17)] * 3, *[range(17, 21)] * 2, range(22, 23)] if i == 21 else left[1:]
            expected = set(left[0]) if left else {*range(10), 21}
            assert set(allowed.nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize("sampled", [False, True])
def test_a_model_writes_whole_pictures_only(sampled):
    llm = small_llama(10, 16, 1, 2).eval()
    WORDS.extend(llm)
    prompt = torch.randint(10, (3, 4))
    one, two = WORDS.draw(llm, prompt, do_sample=sampled)
    assert one.shape == (3, 3) and two.shape == (3, 2)
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.int64), prompt], 1)
    mask = torch.tensor([0, 0, 1, 1, 1, 1]).expand(3, 6)
    if not sampled:
        again = WORDS.draw(llm, padded, mask)
        assert torch.equal(again[0], one) and torch.equal(again[1], two)
        # By hand: the largest allowed logit, one id after another, without a cache.
        ids = torch.cat([prompt, torch.full((3, 1), 21)], 1)
        for _ in range(6):
            logits = llm(ids).logits[:, -1]
            ids = torch.cat([ids, WORDS(ids, logits).argmax(1, keepdim=True)], 1)
        assert torch.equal(torch.cat(WORDS.unwrap(ids[:, 4:]), 1), torch.cat([one, two], 1))


def test_packing():
    picture = WORDS.wrap(*codes(1))[0]
    text = torch.arange(4)
    packed = WORDS.pack([[Piece(text, False), Piece(picture)], [Piece(text)], [Piece(picture, False), Piece(text[:2])]])
    assert packed.input_ids.shape == (3, 11)
    assert packed.attention_mask.sum(1).tolist() == [11, 4, 9]
    assert packed.labels[0].tolist() == [-100] * 4 + picture.tolist()
    assert packed.labels[1].tolist() == text.tolist() + [-100] * 7
    assert packed.labels[2].tolist() == [-100] * 7 + [0, 1, -100, -100]
    assert torch.equal(packed.input_ids[2, :9], torch.cat([picture, text[:2]]))


def test_padding_changes_no_loss():
    llm = small_llama(23, 16, 1, 2).eval()
    row = [Piece(torch.arange(4), False), Piece(WORDS.wrap(*codes(1))[0])]
    alone = WORDS.pack([row])
    beside = WORDS.pack([row, [Piece(torch.arange(10).repeat(2), False)]])
    assert beside.input_ids.shape[1] == 20
    torch.testing.assert_close(llm(**beside._asdict()).loss, llm(**alone._asdict()).loss)


def test_mixed_loss_against_a_loop():
    b, t = 2, 6
    logits, predicted, targets = torch.randn(b, t, 5), torch.randn(b, t, 3), torch.randn(b, t, 3, requires_grad=True)
    labels = torch.tensor([[1, 2, -100, -100, 3, -100], [-100, -100, 4, 0, 1, 2]])
    continuous = torch.tensor([[0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    found = mixed_loss(logits, labels, predicted, targets, continuous, 0.5)
    text, image = [], []
    for i in range(b):
        for j in range(1, t):
            if labels[i, j] >= 0:
                text.append(-logits[i, j - 1].log_softmax(0)[labels[i, j]])
            elif continuous[i, j]:
                image.append((predicted[i, j - 1] - targets[i, j]).square().mean())
    assert (len(text), len(image)) == (6, 3)
    torch.testing.assert_close(found.text, torch.stack(text).mean())
    torch.testing.assert_close(found.image, torch.stack(image).mean())
    torch.testing.assert_close(found.loss, found.text + 0.5 * found.image)
    assert not found.loss.requires_grad
    none = torch.zeros_like(continuous)
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(mixed_loss(logits, labels, predicted, targets, none).loss, plain)
    with pytest.raises(ValueError, match="labels: got ids at continuous positions"):
        mixed_loss(logits, labels, predicted, targets, ~none)


def test_learning_goes_down():
    model = torch.nn.Linear(3, 1)
    x = torch.randn(8, 3)
    losses = learn(model, lambda: (model(x) - 1).square().mean(), 20, 0.1)
    assert len(losses) == 20 and losses[-1] < 0.2 * losses[0]


def test_refusals():
    one, two = codes()
    for call, message in (
        (lambda: VisualVocabulary(10, ()), "must be 1 or more each"),
        (lambda: WORDS.wrap(one), "codes: got 1 segments, must be 2"),
        (lambda: WORDS.wrap(one[:, :2], two), r"codes: got shape \(2, 2\), must be \(B, 3\)"),
        (lambda: WORDS.wrap(one + 7, two), "codes: got 7 to|codes: got .* must be 0 to 6"),
        (lambda: WORDS.unwrap(WORDS.wrap(one, two)[:, :-1]), r"ids: got shape \(2, 6\), must be \(B, 7\)"),
        (lambda: WORDS.unwrap(WORDS.wrap(one, two).flip(1)), "must be BOI, the codes of each segment"),
        (lambda: WORDS.pack([]), "rows: must be one or more"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
