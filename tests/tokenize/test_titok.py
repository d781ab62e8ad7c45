"""TiTok: what its paper states, its two stages, and the released encoder's defect."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.tokenize.test_contract import SIZE, built, pictures
from vistok.parts.tokenizer import load_tokenizer
from vistok.tokenize.titok import TiTok
from vistok.tokenize.vq_grid import VQGrid

SMALL = dict(size="T", tokens=6, image=SIZE, patch=4, codes=32, dim=4, restart_after=3)
RECIPE = TiTok("T", 6, SIZE, 4, 32, 4, None)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def proxy():
    model = VQGrid("T", SIZE, 4, 32, 4, None).build()
    model(pictures())
    return model


def test_as_many_tokens_as_asked_whatever_the_picture():
    for image, patch, tokens in ((16, 4, 3), (16, 8, 5), (32, 8, 7)):
        model = TiTok("T", tokens, image, patch, 32, 4).build().eval()
        codes = model.encode(torch.rand(2, 3, image, image))
        assert codes.ids.shape == (2, tokens) and codes.bits.tolist() == [5 * tokens] * 2


def test_codes_are_unit_vectors():
    z = built("titok").encode(pictures()).z
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(3, 6))


@torch.no_grad()
def test_a_slot_is_a_token_and_in_the_released_encoder_it_is_not():
    """Of the right encoder a token comes from its slot alone; the released one mixes slices of all slots."""
    for parity, expected in (("paper", [False, False, True, False, False, False]), ("authors", [True] * 6)):
        encoder = replace(RECIPE, parity=parity).build().encoder
        put = _Put(torch.randn(1, 6, 96))
        encoder.norm_in = encoder.norm_out = torch.nn.Identity()
        encoder.blocks = torch.nn.ModuleList([put])
        before = encoder(pictures(1))
        put.slots[:, 2] += 1
        assert (encoder(pictures(1)) != before).any(-1)[0].tolist() == expected


class _Put(torch.nn.Module):
    """A block that gives fixed slots at the end."""

    def __init__(self, slots):
        super().__init__()
        self.slots = slots

    def forward(self, x):
        return torch.cat([x[:, : -self.slots.shape[1]], self.slots], 1)


def test_first_stage_learns_the_ids_of_the_proxy(proxy):
    model = RECIPE.build(proxy).train()
    x = pictures(4)
    target = model.proxy.encode(x).ids
    held = {key: value.clone() for key, value in model.proxy.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model.proxy_loss(x)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(torch.equal(held[key], value) for key, value in model.proxy.state_dict().items())
    logits = model.eval().logits(model.encode(x).z)
    assert logits.shape == (4, 32, 4, 4)
    assert torch.equal(model.proxy.encode(x).ids, target)


def test_second_stage_leaves_encoder_latents_and_codebook_alone(proxy):
    model = RECIPE.build(proxy)
    model.begin_second_stage()
    model.train()
    frozen = {k: v.clone() for k, v in model.state_dict().items() if k.startswith(("encoder.", "bottleneck."))}
    made, codes = model(pictures(4))
    ((made - pictures(4)).square().mean() + codes.loss).backward()
    for key, p in model.named_parameters():
        still = key.startswith(("encoder.", "bottleneck.", "proxy.bottleneck."))
        assert p.requires_grad != still
        assert (p.grad is None) or not still
    assert model.decoder.mask_token.grad.abs().sum() > 0 and model.head[2].weight.grad.abs().sum() > 0
    assert model.proxy.head.smooth.weight.grad.abs().sum() > 0
    assert all(torch.equal(frozen[k], v) for k, v in model.state_dict().items() if k in frozen)


@torch.no_grad()
def test_sure_logits_are_the_proxy_itself(proxy):
    model = RECIPE.build(proxy).eval()
    ids = model.proxy.encode(pictures()).ids
    sure = torch.where(torch.nn.functional.one_hot(ids, 32).bool(), 0.0, -torch.inf)
    model.logits = lambda z, mask=None: sure.transpose(1, 2).unflatten(2, (4, 4))
    assert torch.equal(model.decode(model.encode(pictures())), model.proxy.decode_ids(ids))


@torch.no_grad()
def test_a_tokenizer_with_a_proxy_goes_through_a_folder(proxy, tmp_path):
    model = RECIPE.build(proxy).eval()
    other = load_tokenizer(model.save(tmp_path))
    assert torch.equal(other.decode(other.encode(pictures())), model.decode(model.encode(pictures())))


def test_refusals(proxy):
    with pytest.raises(ValueError, match="size: got 'XL', must be one of T, S, B, L"):
        TiTok("XL").build()
    with pytest.raises(ValueError, match=r"proxy: must have one table and a grid of 2 x 2 tokens"):
        TiTok("T", 6, SIZE, 8, 32, 4).build(proxy)
    with pytest.raises(ValueError, match="proxy: got None"):
        RECIPE.build().proxy_loss(pictures())
    with pytest.raises(ValueError, match="state: lacks"):
        RECIPE.build().load_published({"latent_tokens": torch.zeros(6, 96)})


def test_published_names_load():
    """A random state with the names and shapes of 1d-tokenizer: every weight lands somewhere."""
    model = TiTok("T", 6, SIZE, 4, 32, 4, 100, "authors").build()
    state = {}
    for tower, first in (("encoder", "patch_embed"), ("decoder", "decoder_embed")):
        state[f"{tower}.class_embedding"] = torch.randn(1, 96)
        state[f"{tower}.positional_embedding"] = torch.randn(17, 96)
        state[f"{tower}.latent_token_positional_embedding"] = torch.randn(6, 96)
        for norm in ("ln_pre", "ln_post"):
            state[f"{tower}.{norm}.weight"], state[f"{tower}.{norm}.bias"] = torch.randn(96), torch.randn(96)
        shape = (96, 3, 4, 4) if tower == "encoder" else (96, 4)
        state[f"{tower}.{first}.weight"], state[f"{tower}.{first}.bias"] = torch.randn(shape), torch.randn(96)
        for i in range(4):
            block = f"{tower}.transformer.{i}."
            for name, out, width in (("attn.in_proj_", 288, 96), ("attn.out_proj.", 96, 96), ("mlp.c_fc.", 384, 96)):
                state[f"{block}{name}weight"], state[f"{block}{name}bias"] = torch.randn(out, width), torch.randn(out)
            state[f"{block}mlp.c_proj.weight"], state[f"{block}mlp.c_proj.bias"] = torch.randn(96, 384), torch.randn(96)
            for norm in ("ln_1", "ln_2"):
                state[f"{block}{norm}.weight"], state[f"{block}{norm}.bias"] = torch.randn(96), torch.randn(96)
    state["decoder.mask_token"], state["latent_tokens"] = torch.randn(1, 1, 96), torch.randn(6, 96)
    state["encoder.conv_out.weight"], state["encoder.conv_out.bias"] = torch.randn(4, 96, 1, 1), torch.randn(4)
    state["decoder.ffn.0.weight"], state["decoder.ffn.0.bias"] = torch.randn(48, 96, 1, 1), torch.randn(48)
    state["decoder.conv_out.weight"], state["decoder.conv_out.bias"] = torch.randn(3, 3, 3, 3), torch.randn(3)
    state["quantize.embedding.weight"] = torch.randn(32, 4)
    model.load_published(state)
    assert torch.equal(model.bottleneck.codebook, state["quantize.embedding.weight"])
    assert torch.equal(model.encoder.blocks[3].attn.qkv.weight, state["encoder.transformer.3.attn.in_proj_weight"])
    assert torch.equal(model.head.smooth.bias, state["decoder.conv_out.bias"])
    model.train()(pictures())
    assert torch.equal(model.bottleneck.codebook, state["quantize.embedding.weight"])  # going on does not begin anew
    assert sum(v.numel() for v in state.values()) == sum(p.numel() for p in model.parameters())
