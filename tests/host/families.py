"""Small random models of each family, and prompts for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers as tf

IMAGE, VIDEO = 98, 97
TEXT = dict(
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=99,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
    initializer_range=0.3,
)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, initializer_range=0.3)


@dataclass(frozen=True)
class Family:
    name: str
    build: Callable[[], Any]
    pictures: Callable[[list[int]], tuple[dict[str, Any], list[int] | list[list[int]], list[list[int]]]]
    """Sizes (0: small, 1: other) to: model inputs; for each picture how many placeholders it has, or all its ids where
    there is text between them; and the place of each of its tokens among these, in the order of the evidence."""
    sizes: int = 1
    """How many sizes of picture it takes."""
    patches: Callable[[int], list[list[int]]] = lambda size: [[i] for i in range(16)]
    """Size to the encoder's patches (counted from the picture's first) of each token, in the order of the evidence."""
    spent: tuple[int, ...] = (16,)
    """Patches that the encoder spends on a picture of each size."""
    units: bool = True
    """Whether the encoder works on equal units; else on one sequence of pictures of any size."""
    class_token: bool = False
    types: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Ids of a batch to its token_type_ids, where the model wants them."""
    cases: tuple[str, ...] | None = None
    """Those of the contract tests that it runs; None for all that it can."""
    atol: float = 1e-4
    """How far its logits may be from those of the run by hand, by rounding alone."""
    effort: bool = True
    """Whether it takes methods that spend less on visual tokens without dropping them."""

    @property
    def model(self) -> Any:
        return _model(self)


def language_model(model: Any) -> Any:
    """The decoder in a model."""
    return getattr(model.model, "language_model", None) or model.model.text_model


def tower(model: Any) -> Any:
    """The vision encoder in a model; that for videos where they have their own."""
    names = "visual", "vision_tower", "vision_model", "video_tower"
    return next(getattr(model.model, n) for n in names if hasattr(model.model, n))


def blocks(model: Any) -> Any:
    """Its layers."""
    encoder = tower(model)
    encoder = getattr(encoder, "encoder", None) or getattr(encoder, "transformer", encoder)
    return next(getattr(encoder, name) for name in ("layers", "layer", "blocks") if hasattr(encoder, name))


@cache
def _model(family: Family) -> Any:
    torch.manual_seed(0)
    model = family.build().eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def _pixels(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _llava(vision) -> Any:
    config = tf.LlavaConfig(
        vision_config=vision,
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if vision.model_type == "clip_vision_model" else "full",
    )
    return tf.LlavaForConditionalGeneration(config)


def _llava_pictures(sizes):
    return {"pixel_values": _pixels(len(sizes), 3, 28, 28)}, [16] * len(sizes), [list(range(16))] * len(sizes)


PINPOINTS = [[28, 56], [56, 28], [56, 56]]
ANYRES = dict(image_token_id=IMAGE, video_token_id=VIDEO, image_grid_pinpoints=PINPOINTS)


def _llava_next(kind: str = "LlavaNext") -> Any:
    config = getattr(tf, f"{kind}Config")(
        vision_config=tf.CLIPVisionConfig(**VISION, image_size=28, patch_size=7),
        text_config=tf.LlamaConfig(**TEXT),
        vision_feature_layer=-2,
        **ANYRES,
    )
    return getattr(tf, f"{kind}ForConditionalGeneration")(config)


def _onevision(aspect: str = "anyres_max_9") -> Any:
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, image_size=28, patch_size=7, vision_use_head=False),
        text_config=tf.Qwen2Config(**TEXT),
        vision_feature_layer=-1,
        vision_aspect_ratio=aspect,
        **ANYRES,
    )
    return tf.LlavaOnevisionForConditionalGeneration(config)


def _anyres_pictures(sizes):
    """28 x 56 pixels: thumbnail and 1 x 2 crops, 4 x 8 patches. 40 x 56: 2 x 2 crops, of whose 8 x 8 patches the
    first and last row are padding. A newline ends each row of the crops."""
    thumbnail = list(range(16))
    crop = lambda rows, columns: [16 + 9 * r + c for r in rows for c in columns]  # noqa: E731
    left, right = range(4), range(4, 8)
    wide = thumbnail + crop(range(4), left) + crop(range(4), right)
    square = thumbnail + [t for rows in (range(3), range(3, 6)) for cs in (left, right) for t in crop(rows, cs)]
    inputs = {
        "pixel_values": _pixels(len(sizes), 5, 3, 28, 28),
        "image_sizes": torch.tensor([[(28, 56), (40, 56)][size] for size in sizes]),
    }
    return inputs if sizes else {}, [16 + 9 * (4, 6)[s] for s in sizes], [(wide, square)[s] for s in sizes]


def _anyres_patches(size):
    parts = [range(16), range(16, 48), [*range(20, 32), *range(36, 48), *range(48, 60), *range(64, 76)]]
    return [[i] for i in (*parts[0], *parts[1 + size])]


MROPE = dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]})
QWEN_VISION = dict(patch_size=7, spatial_merge_size=2, temporal_patch_size=2, depth=4, num_heads=4)
QWEN_IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=96, vision_end_token_id=95)


def _qwen2() -> Any:
    config = tf.Qwen2VLConfig(
        vision_config=dict(**QWEN_VISION, embed_dim=32, hidden_size=48, mlp_ratio=2, initializer_range=0.3),
        text_config=dict(**TEXT, **MROPE),
        **QWEN_IDS,
    )
    return tf.Qwen2VLForConditionalGeneration(config)


def _qwen2_5() -> Any:
    vision = dict(
        **QWEN_VISION,
        hidden_size=32,
        intermediate_size=48,
        out_hidden_size=48,
        window_size=28,
        fullatt_block_indexes=[1, 3],
        initializer_range=0.3,
    )
    config = tf.Qwen2_5_VLConfig(vision_config=vision, text_config=dict(**TEXT, **MROPE), **QWEN_IDS)
    return tf.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3() -> Any:
    vision = dict(
        **QWEN_VISION,
        hidden_size=32,
        intermediate_size=48,
        out_hidden_size=48,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 2],
        initializer_range=0.3,
    )
    config = tf.Qwen3VLConfig(vision_config=vision, text_config=dict(**TEXT, **MROPE, head_dim=12), **QWEN_IDS)
    return tf.Qwen3VLForConditionalGeneration(config)


def _qwen3_5() -> Any:
    vision = dict(
        **QWEN_VISION,
        hidden_size=32,
        intermediate_size=48,
        out_hidden_size=48,
        num_position_embeddings=64,
        initializer_range=0.3,
    )
    rope = dict(MROPE["rope_parameters"], partial_rotary_factor=1.0, mrope_interleaved=True)
    text = dict(
        **TEXT,
        rope_parameters=rope,
        head_dim=12,
        layer_types=["linear_attention", "linear_attention", "full_attention", "linear_attention"],
        linear_key_head_dim=8,
        linear_value_head_dim=12,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    )
    config = tf.Qwen3_5Config(vision_config=vision, text_config=text, **QWEN_IDS)
    return tf.Qwen3_5ForConditionalGeneration(config)


def _qwen_pictures(sizes):
    grids = [[(1, 8, 8), (1, 4, 6)][size] for size in sizes]
    tokens = [h * w // 4 for _, h, w in grids]
    inputs = {
        "pixel_values": _pixels(sum(4 * n for n in tokens), 3 * 2 * 7 * 7),
        "image_grid_thw": torch.tensor(grids),
    }
    return inputs if sizes else {}, tokens, [list(range(n)) for n in tokens]


def _qwen_patches(size):
    return [[4 * i + j for j in range(4)] for i in range((16, 6)[size])]


def _internvl_patches(size):
    def tile(number):
        corners = [(y, x) for y in range(0, 8, 2) for x in range(0, 8, 2)]
        return [[64 * number + 8 * (y + dy) + x + dx for dy in (0, 1) for dx in (0, 1)] for y, x in corners]

    return [token for number in ((0,), (2, 0, 1))[size] for token in tile(number)]


def _internvl() -> Any:
    vision = tf.InternVLVisionConfig(**VISION, image_size=[56, 56], patch_size=[7, 7], layer_scale_init_value=1.0)
    config = tf.InternVLConfig(vision_config=vision, text_config=tf.Qwen2Config(**TEXT), image_token_id=IMAGE)
    return tf.InternVLForConditionalGeneration(config)


def _internvl_pictures(sizes):
    """One tile, or two and the thumbnail behind them."""
    tiles = [(1, 3)[size] for size in sizes]
    orders = [list(range(16)), [*range(32, 48), *range(32)]]
    return {"pixel_values": _pixels(sum(tiles), 3, 56, 56)}, [16 * t for t in tiles], [orders[s] for s in sizes]


FAKE, GLOBAL, TILE, LINE = 90, 91, 70, 92  # around tiles: before each, then which it is; a line ends


def _idefics(kind: str) -> Any:
    vision = getattr(tf, f"{kind}VisionConfig")(**VISION, image_size=56, patch_size=7)
    config = getattr(tf, f"{kind}Config")(
        vision_config=vision, text_config=tf.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2, pad_token_id=0
    )
    return getattr(tf, f"{kind}ForConditionalGeneration")(config)


def tiles(rows: int, columns: int) -> tuple[list[int], list[int]]:
    """Ids of a picture in tiles as the processors of Idefics3 and SmolVLM write it, and the place of each token."""
    ids, starts = [], []
    for row in range(rows):
        for column in range(columns):
            ids += [FAKE, TILE + columns * row + column]
            starts.append(len(ids))
            ids += [IMAGE] * 16
        ids.append(LINE)
    ids += [LINE] * bool(rows) + [FAKE, GLOBAL]
    starts = [len(ids), *starts]
    return [*ids, *[IMAGE] * 16, FAKE], [start + i for start in starts for i in range(16)]


def _idefics_pictures(sizes):
    """A thumbnail alone, or two tiles and the thumbnail behind them; what is missing to three is black."""
    pixels = _pixels(len(sizes), 3, 3, 56, 56)
    for picture, size in zip(pixels, sizes, strict=True):
        picture[(1, 3)[size] :] = 0
    made = [tiles(0, 0) if size == 0 else tiles(1, 2) for size in sizes]
    return {"pixel_values": pixels} if sizes else {}, [ids for ids, _ in made], [places for _, places in made]


def _mistral3() -> Any:
    config = tf.Mistral3Config(
        vision_config=tf.PixtralVisionConfig(**VISION, image_size=56, patch_size=7),
        text_config=tf.MistralConfig(**TEXT, sliding_window=None),
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )
    return tf.Mistral3ForConditionalGeneration(config)


def _mistral3_pictures(sizes):
    """8 x 8 patches, or 4 x 6, side by side in a batch of padded pixels; tokens end each row and the picture."""
    shapes = [(56, 56), (28, 42)]
    lines, places = [], []
    for size in sizes:
        h, w = (n // 14 for n in shapes[size])
        lines.append([*([*[IMAGE] * w, 93] * h)[:-1], 94])
        places.append([(w + 1) * y + x for y in range(h) for x in range(w)])
    inputs = {
        "pixel_values": _pixels(len(sizes), 3, 56, 56),
        "image_sizes": torch.tensor([shapes[size] for size in sizes]),
    }
    return inputs if sizes else {}, lines, places


def _mistral3_patches(size):
    h, w = ((8, 8), (4, 6))[size]
    return [[w * (y + dy) + x + dx for dy in (0, 1) for dx in (0, 1)] for y in range(0, h, 2) for x in range(0, w, 2)]


GLM_TEXT = dict(rope_parameters=dict(MROPE["rope_parameters"], partial_rotary_factor=0.5, mrope_section=[1, 1, 1]))


def _glm(kind: str = "Glm4v") -> Any:
    vision = dict(
        **QWEN_VISION, hidden_size=32, intermediate_size=64, out_hidden_size=48, image_size=28, initializer_range=0.3
    )
    config = getattr(tf, f"{kind}Config")(
        vision_config=dict(vision, model_type="glm4v_vision"),
        text_config=dict(**TEXT, **GLM_TEXT, model_type="glm4v_text"),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return getattr(tf, f"{kind}ForConditionalGeneration")(config)


def _gemma3() -> Any:
    vision = tf.SiglipVisionConfig(**VISION, image_size=56, patch_size=7, vision_use_head=False)
    text = tf.Gemma3TextConfig(
        **TEXT,
        head_dim=12,
        query_pre_attn_scalar=12,
        sliding_window=10,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
    )
    config = tf.Gemma3Config(vision_config=vision, text_config=text, mm_tokens_per_image=16, image_token_id=IMAGE)
    model = tf.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # 0 in an untrained model
    return model


def _paligemma() -> Any:
    config = tf.PaliGemmaConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, image_size=28, patch_size=7, vision_use_head=False),
        text_config=tf.GemmaConfig(**TEXT, head_dim=12),
        image_token_id=IMAGE,
        projection_dim=48,
        hidden_size=48,
        vocab_size=99,
    )
    return tf.PaliGemmaForConditionalGeneration(config)


GEMMA4_VISION = dict(
    **VISION, num_key_value_heads=4, head_dim=8, patch_size=7, pooling_kernel_size=2, position_embedding_size=64
)
GEMMA4_LAYERS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
LARGE = dict(
    use_bidirectional_attention="vision",
    hidden_size_per_layer_input=0,
    attention_k_eq_v=True,
    num_global_key_value_heads=1,
)
"""As in the larger models of the family: both ways within pictures, keys that are values."""
SMALL = dict(
    hidden_size_per_layer_input=8, vocab_size_per_layer_input=99, num_kv_shared_layers=2, use_double_wide_mlp=True
)
"""As in the smaller ones: inputs of the layers' own, and keys that two layers read of the two before them."""


def gemma4(vision: dict[str, Any] | None = None, **text: Any) -> Any:
    text = dict(layer_types=list(GEMMA4_LAYERS), head_dim=12, global_head_dim=16, sliding_window=10) | text
    config = tf.Gemma4Config(
        vision_config=tf.Gemma4VisionConfig(**GEMMA4_VISION, **(vision or {})),
        text_config=tf.Gemma4TextConfig(**(TEXT | text)),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=89,
        **dict.fromkeys(("boi_token_id", "eoi_token_id", "boa_token_id", "eoa_token_index")),
    )
    model = tf.Gemma4ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.vision_tower.patch_embedder.position_embedding_table, std=0.3)  # 1 untrained
    return model


def _gemma4_pictures(sizes):
    """8 x 8 patches, or 4 high and 6 wide, in rows padded to 72; 2 x 2 of them make a token."""
    shapes = [(8, 8), (4, 6)]
    places = torch.full((len(sizes), 72, 2), -1)
    for row, size in zip(places, sizes, strict=True):
        h, w = shapes[size]
        row[: h * w] = torch.tensor([(x, y) for y in range(h) for x in range(w)])
    pixels = _pixels(len(sizes), 72, 3 * 49).sigmoid().masked_fill((places < 0).all(-1)[..., None], 0)
    tokens = [(16, 6)[size] for size in sizes]
    inputs = {"pixel_values": pixels, "image_position_ids": places}
    return inputs if sizes else {}, tokens, [list(range(n)) for n in tokens]


PACKED = dict(sizes=2, patches=_qwen_patches, spent=(64, 24), units=False)
PADDED = dict(sizes=2, patches=_mistral3_patches, spent=(64, 24), units=False, effort=False)

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "llava-clip",
            lambda: _llava(tf.CLIPVisionConfig(**VISION, image_size=28, patch_size=7)),
            _llava_pictures,
            class_token=True,
        ),
        Family(
            "llava-siglip",
            lambda: _llava(tf.SiglipVisionConfig(**VISION, image_size=28, patch_size=7)),
            _llava_pictures,
        ),
        Family("llava-next", _llava_next, _anyres_pictures, 2, _anyres_patches, (48, 80), class_token=True),
        Family("onevision", _onevision, _anyres_pictures, 2, _anyres_patches, (48, 80)),
        Family("qwen2-vl", _qwen2, _qwen_pictures, **PACKED),
        Family("qwen2.5-vl", _qwen2_5, _qwen_pictures, **PACKED),
        Family("qwen3-vl", _qwen3, _qwen_pictures, **PACKED),
        Family(
            "qwen3.5",
            _qwen3_5,
            _qwen_pictures,
            **PACKED,
            cases=("one", "mixed-left", "sizes-left", "sizes-right"),
            atol=1e-3,  # by padding alone: the plain model's logits then differ by 3e-4, those of an unpadded row by 0
            effort=False,
        ),
        Family("internvl", _internvl, _internvl_pictures, 2, _internvl_patches, (64, 192), class_token=True),
        Family("idefics3", lambda: _idefics("Idefics3"), _idefics_pictures, 2, _internvl_patches, (64, 192)),
        Family("smolvlm", lambda: _idefics("SmolVLM"), _idefics_pictures, 2, _internvl_patches, (64, 192)),
        Family("mistral3", _mistral3, _mistral3_pictures, 2, _mistral3_patches, (64, 24), units=False),
        Family("glm-4v", _glm, _qwen_pictures, **PACKED, effort=False),
        Family(
            "gemma3",
            _gemma3,
            lambda sizes: ({"pixel_values": _pixels(len(sizes), 3, 56, 56)}, *_llava_pictures(sizes)[1:]),
            patches=_internvl_patches,
            spent=(64,),
            types=lambda ids: (ids == IMAGE).int(),
            effort=False,
        ),
        Family("paligemma", _paligemma, _llava_pictures, types=torch.zeros_like, effort=False),
        Family("gemma4", lambda: gemma4(**LARGE), _gemma4_pictures, **PADDED),
        Family("gemma4-shared", lambda: gemma4(**SMALL), _gemma4_pictures, **PADDED),
    )
}


def _with_videos(pictures, videos):
    """Sizes 0 and 1 are ``pictures``; 2 and 3 are ``videos`` 0 and 1."""

    def both(sizes):
        shown, clips = pictures([s for s in sizes if s < 2]), videos([s - 2 for s in sizes if s > 1])
        pick = [zip(*made[1:], strict=True) for made in (shown, clips)]
        made = [next(pick[size > 1]) for size in sizes]
        return {**shown[0], **clips[0]}, [ids for ids, _ in made], [places for _, places in made]

    return both


def _qwen_videos(sizes, stamps=False):
    """Three frames of 2 x 3 tokens, or one of 2 x 2. ``stamps``: a time stamp and two marks around each frame."""
    grids = [[(3, 4, 6), (1, 4, 4)][size] for size in sizes]
    lines, places = [], []
    for t, h, w in grids:
        frame = [VIDEO] * (h * w // 4)
        ids, mine = [], []
        for number in range(t):
            ids += [50 + number, 96] if stamps else []
            mine += range(len(ids), len(ids) + len(frame))
            ids += [*frame, 95] if stamps else frame
        lines.append(ids)
        places.append(mine)
    inputs = {
        "pixel_values_videos": _pixels(sum(t * h * w for t, h, w in grids), 3 * 2 * 7 * 7),
        "video_grid_thw": torch.tensor(grids),
    }
    return inputs if sizes else {}, lines, places


def _pooled_videos(sizes, ends=0):
    """Three frames of 4 x 4 patches, pooled to 2 x 2 tokens; ``ends``: a newline behind them."""
    inputs = {"pixel_values_videos": _pixels(len(sizes), 3, 3, 28, 28)}
    return inputs if sizes else {}, [[VIDEO] * (12 + ends)] * len(sizes), [list(range(12))] * len(sizes)


def _video_llava() -> Any:
    config = tf.VideoLlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION, image_size=28, patch_size=7),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )
    return tf.VideoLlavaForConditionalGeneration(config)


def _framed_videos(sizes):
    """Two frames of a class token and 4 x 4 others."""
    inputs = {"pixel_values_videos": _pixels(len(sizes), 2, 3, 28, 28)}
    places = [17 * t + 1 + i for t in range(2) for i in range(16)]
    return inputs if sizes else {}, [[VIDEO] * 34] * len(sizes), [places] * len(sizes)


def _few_pictures(sizes):
    return _llava_pictures(sizes) if sizes else ({}, [], [])


def _qwen_video_patches(size):
    return [[4 * i + j for j in range(4)] for i in range((16, 6, 18, 4)[size])]


def _pooled_patches(size):
    corners = [16 * t + 4 * y + x for t in range(3) for y in (0, 2) for x in (0, 2)]
    return [[corner + 4 * dy + dx for dy in (0, 1) for dx in (0, 1)] for corner in corners]


QWEN_VIDEO = dict(sizes=4, patches=_qwen_video_patches, spent=(64, 24, 72, 16), units=False)
STAMPED = lambda sizes: _qwen_videos(sizes, stamps=True)  # noqa: E731
VIDEOS = {
    family.name: family
    for family in (
        Family("qwen2-vl", _qwen2, _with_videos(_qwen_pictures, _qwen_videos), **QWEN_VIDEO),
        Family("qwen2.5-vl", _qwen2_5, _with_videos(_qwen_pictures, _qwen_videos), **QWEN_VIDEO),
        Family("qwen3-vl", _qwen3, _with_videos(_qwen_pictures, STAMPED), **QWEN_VIDEO),
        Family("qwen3.5", _qwen3_5, _with_videos(_qwen_pictures, STAMPED), **QWEN_VIDEO, atol=5e-3),
        Family(
            "llava-next-video",
            lambda: _llava_next("LlavaNextVideo"),
            _with_videos(_anyres_pictures, _pooled_videos),
            4,
            _pooled_patches,
            (48, 80, 48, 48),
            class_token=True,
        ),
        Family(
            "onevision",
            _onevision,
            _with_videos(_anyres_pictures, lambda sizes: _pooled_videos(sizes, ends=1)),
            4,
            _pooled_patches,
            (48, 80, 48, 48),
        ),
        Family(
            "video-llava",
            _video_llava,
            _with_videos(_few_pictures, _framed_videos),
            4,
            lambda size: [[i] for i in range(16 if size < 2 else 32)],
            (16, 16, 32, 32),
            class_token=True,
        ),
    )
}
"""Families that take videos: sizes 2 and 3."""
SHRUNK = Family("onevision-shrunk", lambda: _onevision("anyres_max_1"), _anyres_pictures, sizes=2)


@dataclass(frozen=True)
class Prompt:
    """A batch: its model inputs, and where the tokens of each picture are, in the order of the evidence."""

    inputs: dict[str, Any]
    columns: list[list[list[int]]]
    """[row][picture][token] -> column"""

    def left(self, keep: Callable[[int], list[int]]) -> list[torch.Tensor]:
        """The columns of each row that are left when ``keep(N)`` of each picture stay; padding is not among them."""
        rows = []
        for row, mask in enumerate(self.inputs["attention_mask"]):
            gone = set()
            for tokens in self.columns[row]:
                gone |= set(tokens) - {tokens[i] for i in keep(len(tokens))}
            rows.append(torch.tensor([c for c in mask.nonzero()[:, 0].tolist() if c not in gone]))
        return rows


def prompt(family: Family, rows: list[list[int]], side: str = "left", text: tuple[int, ...] = (5, 6, 7, 8)) -> Prompt:
    """One row for each list of picture sizes; rows differ in length, and are padded on ``side``."""
    extra, lengths, tokens = family.pictures([size for row in rows for size in row])
    number, lines, spans = 0, [], []
    for index, row in enumerate(rows):
        line, span = [1, 10 + index], []
        for _ in row:
            span.append([len(line) + t for t in tokens[number]])
            shown = lengths[number]
            line += ([IMAGE] * shown if isinstance(shown, int) else shown) + [20 + number]
            number += 1
        lines.append(line + list(text[: len(text) - index % 3]))
        spans.append(span)
    width = max(map(len, lines))
    pads = [width - len(line) for line in lines]
    before = [pad if side == "left" else 0 for pad in pads]
    ids = [[0] * b + line + [0] * (pad - b) for b, pad, line in zip(before, pads, lines, strict=True)]
    mask = [[0] * b + [1] * len(line) + [0] * (pad - b) for b, pad, line in zip(before, pads, lines, strict=True)]
    ids = torch.tensor(ids)
    inputs = {"input_ids": ids, "attention_mask": torch.tensor(mask), **extra}
    if family.types is not None:
        inputs["token_type_ids"] = family.types(ids)
    if not {"image_grid_thw", "video_grid_thw", "image_position_ids"}.isdisjoint(extra):
        inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    columns = [[[c + b for c in t] for t in span] for b, span in zip(before, spans, strict=True)]
    return Prompt(inputs, columns)
