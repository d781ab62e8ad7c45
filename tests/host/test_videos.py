"""Videos: one picture of many frames to the methods, with all that holds for pictures."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch
from PIL import Image
from transformers import DynamicCache

from tests.host.families import FAMILIES, VIDEO, VIDEOS, Family, _llava_next, _onevision, prompt
from tests.host.reducers import Asks, EncoderSpread, Spread, Staged, spread
from tests.host.reference import generation_inputs, greedy, one_row, run
from tests.host.test_evidence import ENCODER, Maps, of_picture
from tests.host.test_families import STAGES, places_in, quarter, same_rows, staged_left
from vistok.host import Evidence, Reducer, apply
from vistok.host.hosts import host_of

MIXED = [[2, 0], [1, 3, 2], []]
CASES = {"one": ([[2]], "left"), "mixed-left": (MIXED, "left"), "mixed-right": ([[0, 2], [2]], "right")}
NEXT = VIDEOS["llava-next-video"]
both = pytest.mark.parametrize("family", VIDEOS.values(), ids=VIDEOS)


@dataclass(frozen=True)
class Looks(Reducer):
    """Takes each part of a picture by itself; the first of its tokens stay."""

    seen: list = field(default_factory=list, compare=False)

    def select(self, evidence: Evidence, keep: int) -> torch.Tensor:
        self.seen.append((evidence, keep))
        return torch.arange(keep).expand(len(evidence.features), -1)


@pytest.mark.parametrize("rows, side", CASES.values(), ids=CASES)
@both
@torch.no_grad()
def test_keep_all_is_bit_equal_and_a_quarter_is_the_run_by_hand(family, rows, side):
    model, batch = family.model, prompt(family, rows, side)
    plain = model(**batch.inputs).logits
    with apply(model, Spread(), keep=1.0) as session:
        assert torch.equal(model(**batch.inputs).logits, plain)
    assert [[p.row, p.index] for p in session.pictures] == [
        [r, i] for r, row in enumerate(rows) for i in range(len(row))
    ]
    left = batch.left(lambda n: spread(n, quarter(n)))
    for method in (Spread(), *([EncoderSpread()] if family.name != "onevision" else [])):  # it pools what was projected
        with apply(model, method, keep=0.25) as session:
            got = model(**batch.inputs).logits
        assert got.shape[1] == max(len(columns) for columns in left)
        assert session.tokens_kept == sum(quarter(len(t)) for row in batch.columns for t in row)
        same_rows(model, batch, got, left, atol=family.atol)


@both
@torch.no_grad()
def test_stages_are_the_run_by_hand(family):
    model, batch = family.model, prompt(family, MIXED)
    left, stages = staged_left(batch, 0.75, STAGES)
    with apply(model, Staged(0.75, STAGES), keep=0.5):
        got = model(**batch.inputs).logits
    same_rows(model, batch, got, left, stages, atol=family.atol)


@pytest.mark.parametrize("staged", [False, True], ids=["input", "staged"])
@both
def test_generate_is_the_loop_by_hand(family, staged):
    model, batch = family.model, prompt(family, MIXED)
    left, stages = batch.left(lambda n: spread(n, quarter(n))), {}
    if staged:
        left, stages = staged_left(batch, 0.75, STAGES)
    given = generation_inputs(model, **batch.inputs)
    with apply(model, Staged(0.75, STAGES) if staged else Spread(), keep=0.25):
        got = model.generate(**batch.inputs, max_new_tokens=4, do_sample=False)
    width = batch.inputs["input_ids"].shape[1]
    for row in range(len(MIXED)):
        by_hand = one_row(given, row, batch.inputs["attention_mask"])
        to_places = places_in(by_hand)
        own = {layer: to_places(s[row]) for layer, s in stages.items()}
        assert got[row, width:].tolist() == greedy(model, by_hand, to_places(left[row]), 4, own), f"row {row}"


def beams(model, row, left, width=2, steps=3):
    """The best of ``width`` continuations kept at each step, everything computed anew."""
    open_ = [([], 0.0)]
    for _ in range(steps):
        found = []
        for tokens, score in open_:
            more = model.get_input_embeddings()(torch.tensor([tokens], dtype=torch.int64))
            after = torch.arange(1, len(tokens) + 1).expand(*row["positions"].shape[:-1], -1)
            longer = row | {"embeds": torch.cat([row["embeds"], more], 1)}
            longer["positions"] = torch.cat([row["positions"], row["positions"][..., -1:] + after], -1)
            if "visual" in row:
                longer["visual"] = torch.cat([row["visual"], torch.zeros(len(tokens), dtype=torch.bool)])
            places = torch.cat([left, torch.arange(len(tokens)) + row["embeds"].shape[1]])
            best = run(model, longer, places)[-1].log_softmax(-1).topk(width)
            found += [([*tokens, int(t)], score + float(v)) for t, v in zip(best.indices, best.values, strict=True)]
        open_ = sorted(found, key=lambda one: -one[1])[:width]
    return open_[0][0]


@pytest.mark.parametrize("name", ["qwen3-vl", "llava-next-video"])
def test_beams(name):
    family = VIDEOS[name]
    rows = [[0, 2], [2]]
    batch = prompt(family, rows)
    with apply(family.model, Spread(), keep=0.25) as session:
        got = family.model.generate(**batch.inputs, max_new_tokens=3, num_beams=2, do_sample=False)
    assert [(p.row, p.index, p.frames) for p in session.pictures] == [(0, 0, None), (0, 1, 3), (1, 0, 3)]
    given, width = generation_inputs(family.model, **batch.inputs), batch.inputs["input_ids"].shape[1]
    for row in range(2):  # the same beams over the row that is left
        by_hand = one_row(given, row, batch.inputs["attention_mask"])
        left = places_in(by_hand)(batch.left(lambda n: spread(n, quarter(n)))[row])
        want = beams(family.model, by_hand, left)
        assert got[row, width:].tolist() == want


def test_a_second_turn_with_a_video():
    """A video, a question; a picture, a video and another question, on the same cache."""
    model, whole = NEXT.model, prompt(NEXT, [[2, 0, 2]])
    ids, pixels = whole.inputs["input_ids"], whole.inputs["pixel_values_videos"]
    cut = whole.columns[0][0][-1] + 2
    first = {"input_ids": ids[:, :cut], "pixel_values_videos": pixels[:1]}
    cache = DynamicCache()
    with apply(model, Spread(), keep=0.25):
        turn = model.generate(**first, past_key_values=cache, max_new_tokens=3, do_sample=False)
        line = torch.cat([turn, ids[:, cut:]], 1)
        more = {name: whole.inputs[name] for name in ("pixel_values", "image_sizes")}
        got = model.generate(
            input_ids=line,
            pixel_values_videos=pixels[1:],
            past_key_values=cache,
            max_new_tokens=4,
            do_sample=False,
            **more,
        )
    mask = torch.ones_like(line)
    columns = [[[c + 3 * (number > 0) for c in t] for number, t in enumerate(whole.columns[0])]]
    batch = type(whole)({"input_ids": line, "attention_mask": mask, "pixel_values_videos": pixels, **more}, columns)
    by_hand = one_row(generation_inputs(model, **batch.inputs), 0, mask)
    left = batch.left(lambda n: spread(n, quarter(n)))[0]
    assert got[0, line.shape[1] :].tolist() == greedy(model, by_hand, left, 4)


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen3-vl"])  # Qwen2.5-VL itself counts on from the video's last second
def test_a_second_turn_of_text(name):
    model, batch = VIDEOS[name].model, prompt(VIDEOS[name], [[2]])
    answers = []
    for reselect in (False, True):  # which chooses again, and gets the same tokens
        cache = DynamicCache()
        with apply(model, Spread(), keep=0.25, reselect=reselect):
            first = model.generate(**batch.inputs, past_key_values=cache, max_new_tokens=3, do_sample=False)
            line = torch.cat([first, torch.tensor([[30, 31, 32]])], 1)
            inputs = batch.inputs | {"input_ids": line, "attention_mask": torch.ones_like(line)}
            inputs["mm_token_type_ids"] = 2 * (line == VIDEO).int()
            more = {key: value for key, value in inputs.items() if key != "pixel_values_videos"}  # positions need them
            got = model.generate(**more, past_key_values=cache, max_new_tokens=4, do_sample=False)
        answers.append(got[0, line.shape[1] :].tolist())
    by_hand = one_row(generation_inputs(model, **inputs), 0, inputs["attention_mask"])
    left = type(batch)(inputs, batch.columns).left(lambda n: spread(n, quarter(n)))[0]
    assert answers == [greedy(model, by_hand, left, 4)] * 2


# What methods see ---------------------------------------------------------------------------------------------------


@both
@torch.no_grad()
def test_encoder_evidence(family):
    batch = prompt(family, [[2], [2, 3]])
    names, layer = (*ENCODER, "encoder_keys"), 1
    method = Asks(dict.fromkeys(names, layer))
    with apply(family.model, method, keep=0.5):
        family.model(**batch.inputs)
    maps, grid = Maps(family, layer, batch.inputs), (2, 3) if "qwen" in family.name else (2, 2)
    evidence = method.seen[0]
    frames, grid = (2, (4, 4)) if family.name == "video-llava" else (3, grid)
    assert (evidence.frames, evidence.crops, evidence.grid) == (frames, (grid,) * frames, None)
    assert evidence.boxes == ((0.0, 0.0, 1.0, 1.0),) * frames
    assert torch.equal(evidence.index[0], torch.arange(frames * grid[0] * grid[1]))
    for number in (0, 1):
        first = number * family.spent[2]
        for name in names:
            want = of_picture(getattr(maps, name), name, first, family.patches(2))
            if name == "encoder_keys" and len(family.patches(2)[0]) == 4 and family.units:  # joined by pooling
                want = want.unflatten(1, (4, -1)).mean(1)
            torch.testing.assert_close(getattr(evidence, name)[number], want, atol=1e-5, rtol=1e-4, msg=name)
    if "qwen" in family.name:
        (single,) = method.seen[1:]
        assert (single.frames, single.crops, single.grid) == (1, (), (2, 2))


@pytest.mark.parametrize("name", ["qwen3-vl", "llava-next-video"])
@torch.no_grad()
def test_frames_are_parts(name):
    family = VIDEOS[name]
    batch, method = prompt(family, [[2], [0, 2]]), Looks()
    with apply(family.model, method, keep=7) as session:
        family.model(**batch.inputs)
    h, w = (2, 3) if name == "qwen3-vl" else (2, 2)
    video = [(e, keep) for e, keep in method.seen if len(e.features) == 2]
    assert [keep for _, keep in video] == [3, 2, 2]
    assert all((e.grid, e.crops, e.frames) == ((h, w), (), None) for e, _ in video)
    clip = session.pictures[0]
    assert (clip.frames, clip.crops, clip.tokens_in, clip.tokens_kept) == (3, ((h, w),) * 3, 3 * h * w, 7)
    assert clip.keep.tolist() == [0, 1, 2, h * w, h * w + 1, 2 * h * w, 2 * h * w + 1]
    assert clip.report()["frames"] == 3 and session.pictures[1].report()["frames"] is None
    assert session.pictures[1].index == 0 and session.pictures[1].tokens_kept == 7


@torch.no_grad()
def test_video_llava_has_two_encoders():
    family = VIDEOS["video-llava"]
    batch, method, seen = prompt(family, [[0, 2]]), Asks({"encoder_states": 2, "encoder_features": None}), {}
    towers = {"image": family.model.model.image_tower, "video": family.model.model.video_tower}
    hooks = [
        tower.encoder.layers[2].register_forward_hook(lambda m, a, output, kind=kind: seen.update({kind: output}))
        for kind, tower in towers.items()
    ]
    with apply(family.model, method, keep=0.5):
        family.model(**batch.inputs)
    for hook in hooks:
        hook.remove()
    for evidence, kind in zip(method.seen, ("image", "video"), strict=True):
        states = seen[kind][:, 1:].flatten(0, 1)  # what feeds the projector is what the third of four layers gives
        assert torch.equal(evidence.encoder_states[0], states)
        assert torch.equal(evidence.encoder_features[0], states)


@pytest.mark.parametrize("name", ["hired", "globalcom2"])
@torch.no_grad()
def test_no_frame_is_a_thumbnail(name):
    """Methods that take the first of the crops for a thumbnail give each frame its share."""
    with apply(NEXT.model, name, keep=6) as session:
        NEXT.model(**prompt(NEXT, [[2]]).inputs)
    assert (session.pictures[0].keep // 4).bincount().tolist() == [2, 2, 2]


@torch.no_grad()
def test_time_stamps_are_no_part_of_the_question():
    method = Asks({"text_ids": None})
    with apply(VIDEOS["qwen3-vl"].model, method, keep=0.5):
        VIDEOS["qwen3-vl"].model(**prompt(VIDEOS["qwen3-vl"], [[2]]).inputs)
    (evidence,) = method.seen
    assert evidence.text_ids[0, evidence.text_mask[0]].tolist() == [20, 5, 6, 7, 8]


@torch.no_grad()
def test_encoder_features_and_pixels_of_pooled_frames():
    batch, method = prompt(NEXT, [[2, 2]]), Asks({"encoder_features": None, "patch_pixels": None})
    seen = {}
    pooler = NEXT.model.model.vision_resampler
    hook = pooler.register_forward_hook(lambda m, a, output: seen.update(pooled=output))
    with apply(NEXT.model, method, keep=0.5):
        NEXT.model(**batch.inputs)
    hook.remove()
    (evidence,) = method.seen
    torch.testing.assert_close(evidence.encoder_features, seen["pooled"].unflatten(0, (2, 3)).flatten(1, 2))
    grey = batch.inputs["pixel_values_videos"].mean(2)  # (2, 3, 28, 28): patches of 7, tokens of 2 x 2 of them
    corner = grey[1, 2, 14:, :14].unflatten(0, (2, 7)).unflatten(2, (2, 7)).mean((0, 2))
    torch.testing.assert_close(evidence.patch_pixels[1, 10], corner.flatten())


@pytest.mark.parametrize("mode", ["max", "conv"])
@torch.no_grad()
def test_other_ways_of_pooling(mode):
    def build():
        model = _llava_next("LlavaNextVideo")
        config = copy.deepcopy(model.config)
        config.spatial_pool_mode = mode
        return type(model)(config)

    family = Family(mode, build, NEXT.pictures, 4, class_token=True)
    batch = prompt(family, [[2]])
    with apply(family.model, EncoderSpread(), keep=0.25) as session:
        got = family.model(**batch.inputs).logits
    same_rows(family.model, batch, got, batch.left(lambda n: spread(n, 3)))
    extra = 3 * 4 * 2 * 32 * 4 * 32 if mode == "conv" else 0
    with apply(NEXT.model, EncoderSpread(), keep=0.25) as pooled:
        NEXT.model(**batch.inputs)
    assert session.flops - pooled.flops == extra


@torch.no_grad()
def test_odd_frames_are_interpolated():
    """OneVision: 5 x 5 patches to 3 x 3 tokens."""
    model = _onevision()
    config = copy.deepcopy(model.config)
    config.vision_config.image_size = 35
    model = type(model)(config).eval()
    layout, values = host_of(model).frame, torch.randn(1, 25, 8)
    assert layout.parts[0].grid == (3, 3) and layout.num_patches == 25
    want = model.model.apply_pooling(values)[0]
    torch.testing.assert_close((values[0, layout.patches] * layout.weights[..., None]).sum(1), want)


# What a session says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2.5-vl", "llava-next-video"])
@torch.no_grad()
def test_flops_and_time_are_those_of_both_runs_of_the_encoder(name):
    family, counts = VIDEOS[name], {}
    for label, row in {"picture": [0], "video": [2], "both": [0, 2]}.items():
        with apply(family.model, Spread(), keep=0.5) as session:
            for _ in range(2):  # counted anew for every prompt
                family.model.generate(**prompt(family, [row]).inputs, max_new_tokens=1, do_sample=False)
        counts[label] = session.report()["flops_by_stage"]["vision"]
        assert session.milliseconds["vision"] > 0
    assert counts["both"] == counts["picture"] + counts["video"] > counts["picture"] > 0


@torch.no_grad()
def test_a_prompt_that_failed_is_no_part_of_the_next():
    model, video, picture = NEXT.model, prompt(NEXT, [[2]]).inputs, prompt(NEXT, [[0]]).inputs
    with apply(model, Spread(), keep=0.5) as session:
        model(**picture)
        want = session.report()["flops_by_stage"]
        with pytest.raises(ValueError, match="Video features and video tokens do not match"):
            model(**video | {"input_ids": video["input_ids"][:, 3:], "attention_mask": None})
        model(**video)
        model(**picture)
        assert session.report()["flops_by_stage"] == want


@torch.no_grad()
def test_an_overlay_shows_one_frame():
    with apply(NEXT.model, Looks(), keep=4) as session:
        NEXT.model(**prompt(NEXT, [[2, 0]]).inputs)
    image = Image.new("RGB", (40, 40), "white")
    shown = [session.overlay(image, frame=frame).getpixel((5, 5))[0] for frame in range(3)]
    dark = session.overlay(image, frame=1).getpixel((25, 5))[0]
    assert shown == [255] * 3 and dark < 80
    for frame in (None, 3, -1):
        with pytest.raises(ValueError, match=r"frame: got .*, must be 0\.\.2"):
            session.overlay(image, frame=frame)
    with pytest.raises(ValueError, match="frame: got 0, but it is a picture"):
        session.overlay(image, 1, frame=0)


@torch.no_grad()
def test_families_without_videos_say_so():
    model = FAMILIES["glm-4v"].model
    ids = torch.tensor([[1, *[98] * 4, 5]])
    inputs = {"pixel_values_videos": torch.randn(16, 294), "video_grid_thw": torch.tensor([[1, 4, 4]])}
    inputs |= {"mm_token_type_ids": 2 * (ids == 98).int()}
    with apply(model, Spread(), keep=0.25):
        with pytest.raises(ValueError, match="pixel_values_videos: video is not supported yet by Glm4v"):
            model(input_ids=ids, **inputs)
        with pytest.raises(ValueError, match="pixel_values_videos: video is not supported yet by Glm4v"):
            model.generate(input_ids=ids, max_new_tokens=2, **inputs)
