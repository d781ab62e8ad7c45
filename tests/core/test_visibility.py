"""Which tokens see which, by brute force."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from vistok.core.visibility import (
    Segment,
    block_visibility,
    carriers_first,
    causal,
    message_causal,
    prefix_causal,
    scale_causal,
    shifted_readout,
    visibility,
    with_padding,
)


def test_blocks_and_segments() -> None:
    block = torch.tensor([[-1, 0, 0, 1, 2, 1, 2], [0, 0, 1, 1, 2, -1, -1]])
    segment = torch.tensor([[-1, 0, 0, 1, 1, 2, 2], [0, 0, 1, 2, 2, -1, -1]])
    plain, packed = block_visibility(block), block_visibility(block, segment)
    for row in range(2):
        for query in range(7):
            for key in range(7):
                q, k = block[row, query], block[row, key]
                sees = q == k or 0 <= k <= q
                mine = segment[row, key] in (0, segment[row, query])
                assert plain[row, query, key] == sees
                assert packed[row, query, key] == (sees and mine)
    assert bool(packed.any(2).all()), "a row of a softmax must not be empty"


def by_rule(n, rule):
    return torch.tensor([[bool(rule(q, k)) for k in range(n)] for q in range(n)])


@pytest.mark.parametrize(("a", "b"), [(3, 5), (1, 1), (0, 4), (4, 0)])
def test_masks_of_tokenizers_by_brute_force(a, b):
    n = a + b
    after = lambda i: i >= a  # noqa: E731
    assert torch.equal(causal(n), by_rule(n, lambda q, k: k <= q))
    # Patches see patches; register i sees patches and registers <= i.
    registers = by_rule(n, lambda q, k: (not after(k)) or (after(q) and k <= q))
    assert torch.equal(prefix_causal(a, b), registers)
    # Everybody sees what is read; only the message written sees the message written, causally.
    message = by_rule(n, lambda q, k: k < a or (q >= a and a <= k <= q))
    assert torch.equal(message_causal(a, b), message)
    # Carriers see earlier carriers; patches all carriers and earlier patches: a triangle.
    assert torch.equal(carriers_first(a, b), by_rule(n, lambda q, k: k <= q))
    # Mask tokens see all carriers and each other; carriers are blind to them.
    blind = by_rule(n, lambda q, k: k <= q if not after(q) else True)
    assert torch.equal(carriers_first(a, b, "full"), blind)


@pytest.mark.parametrize("sides", [(1, 2, 4), (3,), (1, 2, 4, 8)])
def test_scales_by_brute_force(sides):
    scale = [s for s, side in enumerate(sides) for _ in range(side**2)]
    expected = by_rule(len(scale), lambda q, k: scale[q] >= scale[k])
    assert torch.equal(scale_causal([side**2 for side in sides]), expected)
    assert torch.equal(block_visibility(torch.tensor([scale]))[0], expected)


def test_segments():
    found = visibility([Segment("a", 2, sees=("c",)), Segment("b", 1, "causal", ("a",)), Segment("c", 2, "causal")])
    assert found.int().tolist() == [[1, 1, 0, 1, 1], [1, 1, 0, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert found.dtype == torch.bool
    with pytest.raises(ValueError, match="segments: b sees d, must be one of"):
        visibility([Segment("b", 1, sees=("d",))])
    with pytest.raises(ValueError, match="must differ"):
        visibility([Segment("b", 1), Segment("b", 2)])


def test_a_float_mask_of_zeros_and_ones_masks_nothing():
    """COMiT's released code: why all masks here are bool."""
    q, k, v = torch.randn(3, 1, 1, 5, 4).unbind(0)
    changed = v.clone()
    changed[..., 4, :] = 100.0
    mask = causal(5)
    attend = lambda values, m: scaled_dot_product_attention(q, k, values, m)[..., :4, :]  # noqa: E731
    assert torch.equal(attend(v, mask), attend(changed, mask))
    assert not torch.allclose(attend(v, mask.float()), attend(changed, mask.float()), atol=1)


@pytest.mark.parametrize("shift", [0, 1, 4])
def test_shifted_readout_depends_on_patches_up_to_shift_before(shift):
    carriers, patches = 5, 7
    x = torch.randn(2, carriers + patches, 8)
    mask = carriers_first(carriers, patches)
    run = lambda x: shifted_readout(scaled_dot_product_attention(x, x, x, mask), carriers, shift)  # noqa: E731
    before = run(x)
    assert before.shape == (2, patches, 8)
    for p in range(patches):
        changed = x.clone()
        changed[:, carriers + p] += torch.randn(2, 8)
        moved = (run(changed) != before).any(-1).any(0)
        assert moved.tolist() == [slot >= p + shift for slot in range(patches)]
    with pytest.raises(ValueError, match="shift: got 6"):
        shifted_readout(x, carriers, 6)


def test_padding_is_seen_by_nobody_and_no_row_is_empty():
    visible, mask = prefix_causal(3, 4), torch.rand(5, 7) < 0.5
    found = with_padding(visible, mask)[:, 0]
    for b in range(5):
        for q in range(7):
            for k in range(7):
                expected = (visible[q, k] and mask[b, k]) or (q == k and not mask[b, q])
                assert found[b, q, k] == expected
    assert bool(with_padding(causal(4), torch.zeros(1, 4, dtype=torch.bool)).any(-1).all())
