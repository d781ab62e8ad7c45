"""The vLLM plugin without vLLM: which models and methods, how many placeholders, which rows; and its glue on stand-ins.

The stand-ins have the attributes and calls of vLLM 0.33's classes that the plugin uses, and the weights of a model of
transformers, so that what they give can be held against ``vistok.apply``.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

import vistok
from tests.small import save_small_model
from vistok import catalogue
from vistok.catalogue.registry import UnknownSystem
from vistok.host import Reducer, Reduction, UnsupportedModel, vllm_plugin
from vistok.host.layout import plain
from vistok.host.vllm_plugin import ARCHITECTURE, Plan, Watch, plan_of, reduce_pictures, register


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return LlavaForConditionalGeneration.from_pretrained(save_small_model(tmp_path_factory.mktemp("small"))).eval()


def config(model_type="llava", **given):
    vision = SimpleNamespace(
        model_type=given.pop("tower", "clip_vision_model"),
        image_size=given.pop("image_size", 336),
        patch_size=14,
        num_hidden_layers=24,
    )
    default = {"vistok_method": "fastervlm", "vistok_keep": 64, "vision_feature_layer": -2}
    strategy = "default" if vision.model_type.startswith("clip") else "full"
    return SimpleNamespace(
        model_type=model_type,
        vision_config=vision,
        text_config=SimpleNamespace(num_hidden_layers=32),
        **{**default, "vision_feature_select_strategy": strategy, **given},
    )


# Models, methods, counts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "image_size", "placeholders"),
    [(64, 336, 64), (0.25, 336, 144), (1.0, 336, 576), (0.0001, 336, 1), (0.5, 14 * 15, 113), (1, 14, 1)],
)
def test_placeholders_are_exact(keep, image_size, placeholders):
    plan = plan_of(config(vistok_keep=keep, image_size=image_size))
    assert plan.keep == placeholders
    assert plan.layout.grid == (image_size // 14, image_size // 14)


def test_what_is_not_said_has_apply_s_default():
    asked = config()
    del asked.vistok_keep
    assert plan_of(asked).keep == 144
    assert plan_of(config(vistok_hyper={"layer": 3})).needs == {"cls_attention": 3}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"model_type": "llava_next"}, UnsupportedModel, "llava_next with a clip_vision_model encoder"),
        ({"tower": "pixtral"}, UnsupportedModel, "pixtral"),
        ({"vision_feature_select_strategy": "full"}, UnsupportedModel, "'full': must be one layer and 'default'"),
        ({"vision_feature_layer": [-2, -1]}, UnsupportedModel, "must be one layer"),
        ({"vistok_method": None}, ValueError, "vistok_method: got None"),
        ({"vistok_method": "fastervml"}, UnknownSystem, "fastervml"),
        ({"vistok_hyper": {"leyer": 1}}, ValueError, "leyer"),
        ({"vistok_keep": 0}, ValueError, "keep: got 0"),
        ({"vistok_keep": 577}, ValueError, "keep: got 577, but the picture has only 576"),
        ({"vistok_method": "cdpruner"}, ValueError, "cdpruner needs text"),
        ({"vistok_method": "fastv"}, ValueError, "fastv must keep a fixed count"),
        ({"vistok_method": "visiondrop"}, ValueError, "visiondrop must keep a fixed count"),
        ({"vistok_hyper": {"layer": -1}}, ValueError, r"cls_attention of layer 23; vLLM makes layers 0\.\.22"),
        ({"vistok_hyper": {"layer": 7}, "vision_feature_layer": 7}, ValueError, r"makes layers 0\.\.6"),
        ({"vistok_method": "globalcom2", "tower": "siglip_vision_model", "vistok_hyper": {"score": "logits"}},
         ValueError, "cls_logits"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        plan_of(config(**given))


class Odd(Reducer):
    def compress(self, evidence, keep):
        return Reduction.select(evidence.features, torch.arange(keep - 1).expand(len(evidence.features), -1))


class EveryThird(Reducer):
    def select(self, evidence, keep):
        return 3 * torch.arange(keep).expand(len(evidence.features), -1)


def test_rows_are_gathered_and_counted():
    encoded = torch.randn(2, 16, 5)
    plan = Plan(EveryThird(), 4, plain(4, 4), {}, 2, True)
    assert torch.equal(reduce_pictures(plan, encoded, {}, lambda x: 2 * x), 2 * encoded[:, ::3][:, :4])
    whole = Plan(EveryThird(), 16, plain(4, 4), {}, 2, True)
    assert torch.equal(reduce_pictures(whole, encoded, {}, lambda x: 2 * x), 2 * encoded)
    with pytest.raises(ValueError, match=r"Odd: made \(2, 3\) tokens for 2 pictures with 4 placeholders each"):
        reduce_pictures(Plan(Odd(), 4, plain(4, 4), {}, 2, True), encoded, {}, lambda x: x)


# The glue, on stand-ins -----------------------------------------------------------------------------------------------


class Stacked(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.parts = nn.ModuleList([attention.q_proj, attention.k_proj, attention.v_proj])

    def forward(self, x):
        return torch.cat([part(x) for part in self.parts], -1), None


class Attention(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.qkv_proj, self.out_proj = Stacked(attention), attention.out_proj
        self.num_heads_per_partition, self.scale, self.tp_size = attention.num_heads, attention.scale, 1

    def forward(self, x):
        heads = (
            t.unflatten(-1, (self.num_heads_per_partition, -1)).transpose(1, 2)
            for t in self.qkv_proj(x)[0].chunk(3, -1)
        )
        return self.out_proj(nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)), None


class Layer(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.self_attn, self.inner = Attention(layer.self_attn), layer

    def forward(self, x):
        x = x + self.self_attn(self.inner.layer_norm1(x))[0]
        return x + self.inner.mlp(self.inner.layer_norm2(x))


class Tower(nn.Module):
    """The layers up to the one that feeds the projector, as vLLM makes them."""

    def __init__(self, tower, made):
        super().__init__()
        self.inner = tower
        layers = nn.ModuleList([Layer(layer) for layer in tower.encoder.layers[:made]])
        self.vision_model = nn.Module()
        self.vision_model.encoder = nn.Module()
        self.vision_model.encoder.layers = layers

    def forward(self, pixel_values, feature_select_strategy):
        assert feature_select_strategy == "default"
        x = self.inner.pre_layrnorm(self.inner.embeddings(pixel_values))
        for layer in self.vision_model.encoder.layers:
            x = layer(x)
        return x[:, 1:]


class StandInLlava(nn.Module):
    supports_tower_connector_lora = True

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        depth, feeds = self.config.vision_config.num_hidden_layers, self.config.vision_feature_layer
        self.vision_tower = Tower(vllm_config.weights.model.vision_tower, depth + feeds + 1)
        self.multi_modal_projector = vllm_config.weights.model.multi_modal_projector

    def _process_image_pixels(self, inputs):
        return self.vision_tower(inputs["pixel_values"], feature_select_strategy="default")

    def _process_image_input(self, image_input):
        if isinstance(image_input, Embeddings):
            return image_input["data"]
        return self.multi_modal_projector(self._process_image_pixels(image_input))

    def embed_multimodal(self, **given):
        return self._process_image_input(given if "pixel_values" in given else Embeddings(data=given["image_embeds"]))


class Embeddings(dict):
    pass


class StandInInfo:
    def __init__(self, hf_config):
        self.hf_config = hf_config

    def get_hf_config(self):
        return self.hf_config

    def get_num_image_tokens(self, *, image_width, image_height):
        return (self.hf_config.vision_config.image_size // self.hf_config.vision_config.patch_size) ** 2

    def get_max_image_tokens(self):
        return self.get_num_image_tokens(image_width=112, image_height=112)


@pytest.fixture
def vllm(monkeypatch):
    """A package ``vllm`` of stand-ins."""
    registered = {}

    def register_processor(processor, *, info, dummy_inputs):
        def wrapper(cls):
            cls.factories = SimpleNamespace(processor=processor, info=info, dummy_inputs=dummy_inputs)
            return cls

        return wrapper

    llava = {
        "LlavaForConditionalGeneration": StandInLlava,
        "LlavaProcessingInfo": StandInInfo,
        "LlavaImageEmbeddingInputs": Embeddings,
        "LlavaMultiModalProcessor": "processor",
        "LlavaDummyInputsBuilder": "dummies",
    }
    contents = {
        "vllm": {"__version__": "0.33.1", "ModelRegistry": SimpleNamespace(register_model=registered.__setitem__)},
        "vllm.multimodal": {"MULTIMODAL_REGISTRY": SimpleNamespace(register_processor=register_processor)},
        "vllm.model_executor": {},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.llava": llava,
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
    monkeypatch.delattr(vllm_plugin, ARCHITECTURE, raising=False)
    yield SimpleNamespace(registered=registered, package=sys.modules["vllm"])
    vars(vllm_plugin).pop(ARCHITECTURE, None)


def served(model, **fields):
    """The plugin's class with ``model``'s weights."""
    hf_config = model.config.__class__.from_dict(model.config.to_dict())
    hf_config.update(fields)
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(hf_config=hf_config), weights=model)
    return getattr(vllm_plugin, ARCHITECTURE)(vllm_config=vllm_config), hf_config


@torch.no_grad()
def given_to_language_model(model, pixels, method, keep):
    """(B, keep, D): what ``vistok.apply`` puts in the pictures' places, gaps closed."""
    seen = {}
    ids = torch.full((len(pixels), 198), model.config.image_token_id)
    ids[:, [0, -1]] = 7
    with vistok.apply(model, method, keep=keep, position="recompact"):
        handle = model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
        )
        model(input_ids=ids, pixel_values=pixels)
        handle.remove()
    return seen["inputs_embeds"][:, 1:-1]


def servable(model):
    names = []
    for card in catalogue.methods("reduce"):
        hf_config = model.config.__class__.from_dict(model.config.to_dict())
        hf_config.update({"vistok_method": card.slug})
        try:
            plan_of(hf_config)
        except ValueError:
            continue
        names.append(card.slug)
    return names


def test_every_method_it_serves_gives_what_apply_gives(vllm, model):
    register()
    assert vllm.registered == {ARCHITECTURE: f"vistok.host.vllm_plugin:{ARCHITECTURE}"}
    names = servable(model)
    assert {"fastervlm", "visionzip", "tome-merge", "holov", "uniform", "divprune"} <= set(names)
    assert not {"fastv", "sparsevlm", "cdpruner", "pyramiddrop"} & set(names)
    pixels = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    for name in names:
        ours, hf_config = served(model, vistok_method=name, vistok_keep=49)
        info = type(ours).factories.info(hf_config)
        for size in ((640, 480), (3, 900)):
            assert info.get_num_image_tokens(image_width=size[0], image_height=size[1]) == 49, name
        assert info.get_max_image_tokens() == 49, name
        with torch.inference_mode():
            made = ours.embed_multimodal(pixel_values=pixels)
        wanted = given_to_language_model(model, pixels, name, 49)
        assert made.shape == wanted.shape == (2, 49, 32), name
        torch.testing.assert_close(made.clone(), wanted, msg=lambda text, name=name: f"{name}: {text}")


def test_keep_all_and_the_user_s_own_embeddings_are_untouched(vllm, model):
    ours, _ = served(model, vistok_method="fastervlm", vistok_keep=1.0)
    pixels = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        dense = StandInLlava._process_image_input(ours, {"pixel_values": pixels})
        assert torch.equal(ours.embed_multimodal(pixel_values=pixels), dense)
    own = torch.randn(1, 33, 32)
    assert ours.embed_multimodal(image_embeds=own) is own
    assert type(ours).__name__ == ARCHITECTURE
    assert not type(ours).supports_tower_connector_lora


def test_another_vllm_is_refused_when_a_model_asks(vllm):
    vllm.package.__version__ = "0.34.0"
    register()  # must not stop a vLLM that serves something else
    with pytest.raises(RuntimeError, match=r"vllm: got 0\.34\.0, .* was written for 0\.33"):
        getattr(vllm_plugin, ARCHITECTURE)
    with pytest.raises(AttributeError, match="nonsense"):
        vllm_plugin.nonsense  # noqa: B018


def test_a_part_of_the_heads_is_refused(model):
    tower = Tower(model.model.vision_tower, 1)
    tower.vision_model.encoder.layers[0].self_attn.tp_size = 2
    hf_config = model.config.__class__.from_dict(model.config.to_dict())
    hf_config.update({"vistok_method": "fastervlm"})
    with pytest.raises(ValueError, match="--mm-encoder-tp-mode data"):
        Watch(plan_of(hf_config), tower)
    hf_config.update({"vistok_method": "uniform"})
    Watch(plan_of(hf_config), tower)


def test_the_entry_point_is_declared():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    declared = project.get("entry-points", {}).get("vllm.general_plugins")
    assert declared == {"vistok": f"{vllm_plugin.__name__}:{register.__name__}"}
