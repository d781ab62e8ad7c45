"""The tab Layers without a browser: attention and tokens by layer, as the model computed them."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from tests.studio.serving import tiny_studio
from vistok.studio import drawing, looking, samples
from vistok.studio.sessions import Stop
from vistok.zoo.asking import encode

METHODS = ["fastervlm", "pyramiddrop", "visionzip", "yopo"]


@pytest.fixture(scope="module")
def tiny():
    return tiny_studio().models["vistok-tiny"]


@pytest.fixture(scope="module")
def run(tiny):
    case = samples.case("world:words:57", None, samples.samples()["world:words:57"].question)
    return list(looking.look(tiny, "vistok-tiny", case, METHODS, 0.25, 0, Stop()))[-1]


def told(shown):
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: found.extend(value for name, value in attrs if name == "data-told")
    parser.feed(shown)
    return json.loads(found[0])


def test_the_dense_models_attention_is_that_of_its_eager_maps(tiny, run):
    inputs = encode(tiny.processor, [run.case.picture], [run.case.question])
    visual = inputs["input_ids"][0] == tiny.model.config.image_token_id
    with tiny.lock, torch.inference_mode():
        tiny.model.set_attn_implementation("eager")
        try:
            made = tiny.model.generate(**inputs, max_new_tokens=looking.ANSWER_TOKENS, do_sample=False)[:, :-1]
            whole = {**inputs, "input_ids": made, "attention_mask": torch.ones_like(made)}
            maps = tiny.model(**whole, output_attentions=True).attentions
        finally:
            tiny.model.set_attn_implementation("sdpa")
    start = len(visual) - 1
    expected = torch.stack([layer[0].mean(0)[start:, : len(visual)][:, visual].mean(0) for layer in maps])
    np.testing.assert_allclose(run.seen[0].attention, expected.numpy(), atol=1e-5)


def test_tokens_that_are_gone_get_no_attention_and_the_others_some(run):
    for sight in run.seen[:-1]:
        at_place = sight.places == np.arange(196)
        assert (np.isnan(sight.attention) == ~at_place).all(), sight.method
        assert (np.nansum(sight.attention, 1) < 1).all()


def test_the_page_tells_the_same_figures(run):
    shown = told(drawing.layers_page(run))
    assert shown["depth"] == 6 and [method["name"] for method in shown["methods"]] == ["dense", *METHODS]
    for method, sight in zip(shown["methods"], run.seen, strict=True):
        assert method["left"] == [len(np.unique(row[row >= 0])) for row in sight.places]
        assert np.array_equal(method["places"], sight.places)
        if sight.attention is not None:
            np.testing.assert_allclose(method["mass"], np.nansum(sight.attention, 1), atol=1e-4)
    assert shown["methods"][2]["left"] == [196, *sorted(shown["methods"][2]["left"][1:], reverse=True)]  # pyramiddrop


def test_of_a_method_that_changes_the_attention_none_is_shown(run):
    assert run.seen[-1].method == "yopo" and run.seen[-1].attention is None
    assert told(drawing.layers_page(run))["methods"][-1]["cells"] is None
    assert drawing.layers_page(run).count("cannot be read") == 1


def test_a_frame_is_brightest_at_the_most_attended_patch_and_black_where_tokens_are_gone(run):
    for sight in run.seen[:-1]:
        data = base64.b64decode(drawing.frames(sight, (14, 14)).partition(",")[2])
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")).astype(int).reshape(6, 196, 4)
        for layer in range(6):
            gone = sight.places[layer] < 0
            assert (pixels[layer, gone, :3].max(initial=0) < 20) and (pixels[layer, gone, 3] > 230).all()
            light = np.where(gone, -1, pixels[layer, :, :3].sum(1))
            most = np.nanargmax(np.where(np.isnan(sight.attention[layer]), -1, sight.attention[layer]))
            assert light[most] == light.max()


def test_before_the_first_look_it_says_what_to_do():
    assert "Ask something on the tab Look first" in drawing.layers_page(None)
