"""The pipeline task: the plain pipeline's text at keep = all, ``apply``'s below it, clear errors, nothing left."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers.pipelines import PIPELINE_REGISTRY

import vistok
from tests.small import save_small_model
from vistok.catalogue.registry import UnknownSystem
from vistok.host import Reducer
from vistok.host.pipelines import TASK, ReducedImageTextToTextPipeline, register_pipeline

NEW = {"max_new_tokens": 6, "return_full_text": False, "skip_special_tokens": False}


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 80, 3), dtype=np.uint8))


def chat(question, *pictures):
    parts = [{"type": "image", "image": shown} for shown in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


CHATS = [chat("what is left of the red circle ?", picture(0)), chat("how many ?", picture(1), picture(2))]


@pytest.fixture(scope="module", autouse=True)
def registered():
    register_pipeline()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The small model with layers so loud that its words hang on the pictures, though it is untrained."""
    place = str(save_small_model(tmp_path_factory.mktemp("small")))
    model = AutoModelForImageTextToText.from_pretrained(place)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.model.language_model.layers.parameters():
            if weight.ndim == 2:
                weight.normal_(0, 0.4)
        model.model.multi_modal_projector.linear_2.weight.normal_(0, 1)
    model.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


def made(model, processor, **given):
    return pipeline(TASK, model=model, processor=processor, device="cpu", **given)


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return [{kind: list(getattr(module, kind)) for kind in kinds} for module in model.modules()]


def by_hand(model, processor, messages, method, keep, **given):
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with vistok.apply(model, method, keep=keep, **given) as session:
        return model.generate(**inputs, max_new_tokens=6)[0], session.pictures


def test_keep_all_is_the_plain_pipeline(folder):
    plain = pipeline("image-text-to-text", model=folder, device="cpu")
    ours = pipeline(TASK, model=folder, device="cpu", method="fastervlm", keep=1.0)
    assert ours(CHATS[0], **NEW) == plain(CHATS[0], **NEW)
    assert ours(CHATS, **NEW) == plain(CHATS, **NEW)
    words = [answer["generated_text"] for (answer,) in plain(CHATS, **NEW)]
    assert words[0] != words[1]
    assert ours(CHATS[0], keep=3, **NEW)[0]["generated_text"] != words[0]
    assert ours(CHATS[0], max_new_tokens=3) == plain(CHATS[0], max_new_tokens=3)  # the whole conversation
    one = {"images": picture(3), "text": "<s><image><user> what ?<assistant>"}
    assert ours(**one, **NEW) == plain(**one, **NEW)
    several = {"images": [[picture(3)], [picture(4)]], "text": [one["text"], "<s><image><user> how many ?<assistant>"]}
    assert ours(**several, **NEW) == plain(**several, **NEW)


@pytest.mark.parametrize("position", ["keep", "recompact"])
def test_the_text_is_that_of_apply_and_kept_is_what_it_kept(model, processor, position):
    ours = made(model, processor, method="fastervlm", keep=49, hyper={"layer": -1}, position=position)
    for messages in CHATS:
        tokens, pictures = by_hand(model, processor, messages, "fastervlm", 49, layer=-1, position=position)
        (answer,) = ours(messages, return_kept=True, return_tensors=True, max_new_tokens=6)
        assert torch.equal(answer["generated_token_ids"], tokens)
        assert [kept["keep"] for kept in answer["kept"]] == [seen.keep.tolist() for seen in pictures]
        assert [(kept["index"], kept["tokens_in"], kept["tokens_kept"]) for kept in answer["kept"]] == [
            (index, 196, 49) for index in range(len(pictures))
        ]
        json.dumps(answer["kept"])
        (answer,) = ours(messages, **NEW)
        assert set(answer) == {"input_text", "generated_text"}


def test_each_row_of_a_batch_gets_its_own_pictures(model, processor):
    ours = made(model, processor, method="fastervlm", keep=0.25)
    chats = [chat("how many ?", picture(1)), chat("what is left of the red circle ?", picture(0)), chat("why ?")]
    alone = [ours(messages, return_kept=True, **NEW) for messages in chats]
    assert [len(answer["kept"]) for (answer,) in alone] == [1, 1, 0]
    assert ours(chats, return_kept=True, **NEW) == alone
    together = ours(chats[:2], batch_size=2, return_kept=True, **NEW)
    assert [a["kept"] for (a,) in together] == [a["kept"] for (a,) in alone[:2]]
    assert alone[0][0]["kept"] != alone[1][0]["kept"]
    texts = ["<s><image><user> what ?<assistant>", "<s><image><user> how many ?<assistant>"]
    given = {"images": [[picture(0)], [picture(1)]], "text": texts}
    rows = ours(**given, return_kept=True, generate_kwargs={"num_beams": 2, "num_return_sequences": 2}, **NEW)
    assert len(rows) == 4
    assert [row["kept"] for row in rows] == [alone[1][0]["kept"]] * 2 + [alone[0][0]["kept"]] * 2
    tensors = ours(**given, return_kept=True, return_tensors=True, max_new_tokens=2)
    assert [row["kept"] for row in tensors] == [alone[1][0]["kept"], alone[0][0]["kept"]]


class First(Reducer):
    def select(self, evidence, keep):
        return torch.arange(keep).expand(len(evidence.features), keep)


def test_a_call_goes_before_the_pipeline(model, processor):
    ours = made(model, processor, method="fastervlm", keep=49, hyper={"layer": -1}, return_kept=True, **NEW)
    count = lambda **given: ours(CHATS[0], **given)[0]["kept"][0]["tokens_kept"]  # noqa: E731
    assert count() == 49
    assert count(keep=10) == 10
    assert count(method="uniform") == 49  # without the first method's hyper-parameters
    assert count() == 49
    (answer,) = ours(CHATS[0], method=First(), keep=5)
    assert answer["kept"][0]["keep"] == list(range(5))
    (answer,) = ours(CHATS[0], method=["fastervlm", "uniform"], keep=[50, 20])
    assert answer["kept"][0]["tokens_kept"] == 20


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"method": "fastervml"}, UnknownSystem, "fastervml"),
        ({"method": 3}, ValueError, "method: got 3"),
        ({"method": "fastervlm", "keep": 0}, ValueError, "keep: got 0"),
        ({"method": "fastervlm", "keep": 1.5}, ValueError, "keep: got 1.5"),
        ({"method": "fastervlm", "keep": [4, 2]}, ValueError, "2 values for 1 methods"),
        ({"method": "fastervlm", "position": "left"}, ValueError, "position: got 'left'"),
        ({"method": "fastervlm", "hyper": "layer"}, ValueError, "hyper: got 'layer'"),
        ({"method": "fastervlm", "hyper": {"leyer": 1}}, ValueError, "leyer"),
    ],
)
def test_wrong_parameters_are_named_at_once(model, processor, given, error, message):
    before = hooks(model)
    with pytest.raises(error, match=message):
        made(model, processor, **given)
    bare = made(model, processor)
    with pytest.raises(error, match=message):
        bare(CHATS[0], **given)
    assert hooks(model) == before


def test_a_call_needs_a_method(model, processor):
    with pytest.raises(ValueError, match="method: not given"):
        made(model, processor)(CHATS[0])
    with pytest.raises(ValueError, match="method: not given"):
        made(model, processor, keep=3)(CHATS[0])


def test_nothing_stays_in_the_model(model, processor):
    plain, _ = by_hand(model, processor, CHATS[0], "uniform", 1.0)
    before, ours = hooks(model), made(model, processor, method="uniform", keep=9)
    ours(CHATS[0], **NEW)
    assert hooks(model) == before
    with pytest.raises(ValueError, match="keep: got 500, but the picture has only 196"):
        ours(CHATS[0], keep=500)
    assert hooks(model) == before
    again = pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
    (answer,) = again(CHATS[0], return_tensors=True, max_new_tokens=6)
    assert torch.equal(answer["generated_token_ids"], plain)


def test_a_saved_pipeline_is_the_model_and_no_code(model, processor, tmp_path):
    made(model, processor, method="uniform").save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert "custom_pipelines" not in json.loads((tmp_path / "config.json").read_text())


def test_registering_twice_is_once(recwarn):
    register_pipeline()
    first = PIPELINE_REGISTRY.supported_tasks[TASK]
    register_pipeline()
    assert PIPELINE_REGISTRY.supported_tasks[TASK] is first
    assert first["impl"] is ReducedImageTextToTextPipeline
