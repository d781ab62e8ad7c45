"""Analytic operation counts against those that torch counts in running models."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vistok.core import flops


def counted(call) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_vision_tower(attn):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=8
    )
    model = transformers.CLIPVisionModel(config).eval()
    model.set_attn_implementation(attn)
    expected = flops.vision_tower(49, 32, 80, 4, 3, patch=8)
    for b in (1, 2):
        assert counted(lambda b=b: model(torch.randn(b, 3, 56, 56))) == b * expected


def test_vision_tower_without_class_token():
    transformers = pytest.importorskip("transformers")
    config = transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=56,
        patch_size=8,
        vision_use_head=False,
    )
    model = transformers.SiglipVisionModel(config).eval()
    assert counted(lambda: model(torch.randn(1, 3, 56, 56))) == flops.vision_tower(
        49, 32, 80, 4, 2, patch=8, class_token=False
    )


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 8), (4, 2, 8), (4, 1, 16)])
def test_decoder_prefill_and_step(heads, kv_heads, head_dim):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=88,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=50,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 50, (1, 20))
    shape = dict(head_dim=head_dim, kv_heads=kv_heads, vocabulary=50)
    # Rotary angles are a product of one frequency with one position: the counter sees it, we do not count it.
    rotary = 2 * (head_dim // 2) * 20
    prefill = flops.decoder([20] * 3, 32, 88, heads, **shape)
    assert counted(lambda: model(ids, logits_to_keep=1)) - prefill in (0, rotary)

    cache = model(ids, use_cache=True).past_key_values
    step = flops.decoder([1] * 3, 32, 88, heads, keys=[21] * 3, **shape)
    assert counted(lambda: model(ids[:, :1], past_key_values=cache)) - step in (0, rotary // 20)


def test_projector_and_layers_of_different_length():
    projector = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.GELU(), torch.nn.Linear(24, 32))
    assert counted(lambda: projector(torch.randn(7, 16))) == flops.linear(7, 16, 24, 32)
    layer = flops.transformer_layer(10, 32, 64, 4, gated=True)
    assert flops.decoder([20, 10], 32, 64, 4) == flops.transformer_layer(20, 32, 64, 4, gated=True) + layer
    assert flops.attention(3, 5, 2, 4) == 2 * 2 * 3 * 5 * 2 * 4
    with pytest.raises(ValueError, match="keys"):
        flops.decoder([1, 1], 32, 64, 4, keys=[3])
