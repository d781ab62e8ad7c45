"""Every reducer inside every host: so many tokens as were asked for, and for FasterVLM the very ones of its paper."""

from __future__ import annotations

import pytest
import torch

import vistok
from tests.host.families import FAMILIES, prompt
from vistok.catalogue import methods
from vistok.host import UnsupportedModel

KEEPS_ALL = {"yopo"}
"""Systems that drop no token by choice but spend less on each, see tests/host/test_effort.py."""
NAMES = [card.slug for card in methods("reduce") if card.slug not in KEEPS_ALL]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
@torch.no_grad()
def test_leaves_the_tokens_asked_for(family, name):
    """One picture and two in a batch; the count of a method with stages is the mean over the decoder's layers."""
    batch = prompt(family, [[0], [0, 0]])
    if family.name == "qwen3.5" and vistok.create(name).layer_needs:  # most of its layers have no attention to ask for
        refused = pytest.raises(UnsupportedModel, match="a linear-attention layer of Qwen3_5")
        with vistok.apply(family.model, name, keep=0.3), refused:
            family.model(**batch.inputs)
        return
    if family.name == "gemma4-shared" and name == "lvlm-csp":  # its tokens come back after the last layer with keys
        refused = pytest.raises(UnsupportedModel, match="layer 2 reads the keys that layer 0 makes; they must")
        with vistok.apply(family.model, name, keep=0.3), refused:
            family.model(**batch.inputs)
        return
    with vistok.apply(family.model, name, keep=0.3) as session:
        logits = family.model(**batch.inputs).logits
    assert bool(logits.isfinite().all()) and len(session.pictures) == 3
    depth = family.model.config.get_text_config().num_hidden_layers
    for picture in session.pictures:
        now, counts = picture.tokens_kept, []
        for layer in range(depth):
            now = picture.layers.get(layer, now)
            counts.append(now)
        assert sum(counts) / depth == pytest.approx(0.3 * picture.tokens_in, abs=0.5)
        assert len(picture.keep) == picture.tokens_kept


@torch.no_grad()
def test_fastervlm_keeps_what_the_attention_maps_of_the_model_say():
    """From the maps that the vision tower returns without fused attention; and projecting fewer rows gives the same."""
    family = FAMILIES["llava-clip"]
    inputs = prompt(family, [[0], [0, 0]]).inputs
    with vistok.apply(family.model, "fastervlm", keep=5) as session:
        family.model(**inputs)

    tower = family.model.model.vision_tower
    fused = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        seen = tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    finally:
        tower.set_attn_implementation(fused)
    score = seen.attentions[-2][:, :, 0, 1:].mean(1)
    expected = score.topk(5).indices.sort(1).values
    assert [picture.keep.tolist() for picture in session.pictures] == expected.tolist()

    project, features = family.model.model.multi_modal_projector, seen.hidden_states[-2][:, 1:]
    index = expected.unsqueeze(2)
    kept = features.gather(1, index.expand(-1, -1, features.shape[2]))
    after = project(features)
    torch.testing.assert_close(project(kept), after.gather(1, index.expand(-1, -1, after.shape[2])))
