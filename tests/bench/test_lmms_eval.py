"""The lmms-eval model: its contract on lmms-eval's base class, or on a stand-in where lmms-eval is not installed; and a
run of lmms-eval's own command on a task made from the world, where it is."""

from __future__ import annotations

import abc
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import vistok
from vistok.bench import lmms_eval as plugin
from vistok.bench.lmms_eval import batches, cut, generation, messages, way_of
from vistok.bench.measure import answer_all, cases_of
from vistok.bench.video import clip_of, evenly
from vistok.catalogue.registry import UnknownSystem
from vistok.world import sample
from vistok.zoo import ModelNotFound, load, load_processor

ROOT = Path(__file__).parents[2]
ENTRY = {"vistok": "vistok.bench.lmms_eval:manifest"}
INSTALLED = importlib.util.find_spec("lmms_eval") is not None


class Base(abc.ABC):
    """The contract of ``lmms_eval.api.model.lmms`` 0.7."""

    is_simple = True

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...


@dataclass
class Counts:
    input_tokens: int
    output_tokens: int


@dataclass
class Result:
    text: str
    token_counts: Counts


@dataclass
class Manifest:
    model_id: str
    chat_class_path: str


@pytest.fixture
def model_class(monkeypatch):
    if not INSTALLED:
        contents = {
            "lmms_eval": {},
            "lmms_eval.api": {},
            "lmms_eval.api.model": {"lmms": Base},
            "lmms_eval.api.instance": {"GenerationResult": Result, "TokenCounts": Counts},
            "lmms_eval.models": {},
            "lmms_eval.models.registry_v2": {"ModelManifest": Manifest},
        }
        for name, values in contents.items():
            module = ModuleType(name)
            vars(module).update(values)
            monkeypatch.setitem(sys.modules, name, module)
    vars(plugin).pop(plugin.CLASS, None)
    yield getattr(plugin, plugin.CLASS)
    vars(plugin).pop(plugin.CLASS, None)


@pytest.fixture(scope="module")
def cases():
    return cases_of(list(sample("all", 4, split="test", questions=2)))


def docs(cases):
    return [{"image": case.picture, "question": case.question} for case in cases]


def to_messages(doc):
    return [
        {
            "role": "user",
            "content": [{"type": "image", "url": doc["image"]}, {"type": "text", "text": doc["question"]}],
        }
    ]


def requests(cases, **how):
    """As lmms-eval 0.7 makes them: the first of ``args`` is the context, which a chat model does not use."""
    how = {"max_new_tokens": 6, "until": ["\n\n"], **how}
    return [SimpleNamespace(args=("context", to_messages, dict(how), i, "world", "test")) for i in range(len(cases))]


def test_the_manifest_names_a_chat_model(model_class):
    found = plugin.manifest()
    module, _, name = found.chat_class_path.rpartition(".")
    assert (found.model_id, module) == ("vistok", plugin.__name__)
    assert getattr(plugin, name) is model_class
    assert not model_class.is_simple
    assert not model_class.__abstractmethods__
    with pytest.raises(AttributeError, match="nonsense"):
        plugin.nonsense  # noqa: B018


@pytest.mark.parametrize(("method", "keep"), [("dense", None), ("fastervlm", 0.25), ("uniform", 1.0)])
def test_answers_are_those_of_vistok_in_the_order_of_the_requests(
    model_class, folder, model, processor, cases, method, keep
):
    given = {} if method == "dense" else {"method": method, "keep": keep}
    lm = model_class(pretrained=str(folder), batch_size="3", device="cpu", **given)
    assert lm.device == torch.device("cpu")
    lm.task_dict = {"world": {"test": docs(cases)}}
    asked = requests(cases)
    for request in asked[1::2]:
        request.args[2]["max_new_tokens"] = 2
    results = lm.generate_until(asked)
    six, two = (
        answer_all(model, processor, method, keep or 1.0, cases, batch_size=3, max_new_tokens=n) for n in (6, 2)
    )
    for index, result in enumerate(results):
        wanted = (two if index % 2 else six)[index]
        assert result.text == wanted.answer
        inputs = processor.apply_chat_template(
            messages(to_messages(docs(cases)[index]), "world", clip_of),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )
        kept = {"dense": 196, "fastervlm": 49, "uniform": 196}[method]
        assert result.token_counts.input_tokens == len(inputs["input_ids"][0]) - 196 + kept
        assert 0 <= result.token_counts.output_tokens <= (2 if index % 2 else 6)


def test_hyper_parameters_are_model_args(model_class, folder, model, cases):
    lm = model_class(pretrained=str(folder), device="cpu", method="fastervlm", keep=9, layer=-1, max_batch_size=8)
    lm.task_dict = {"world": {"test": docs(cases)}}
    lm.generate_until(requests(cases[:1]))
    with lm._session() as session:
        assert session.methods == (vistok.create("fastervlm", layer=-1),)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"method": "fastervml"}, UnknownSystem, "fastervml"),
        ({"method": "fastervlm", "keep": 2.5}, ValueError, "keep: got 2.5"),
        ({"method": "fastervlm", "leyer": 2}, ValueError, "leyer"),
        ({"keep": 4}, ValueError, "the method is 'dense'"),
        ({"leyer": 4}, ValueError, "leyer is given, but the method is 'dense'"),
        ({"batch_size": "auto"}, ValueError, "batch_size: got 'auto'"),
        ({"batch_size": 0}, ValueError, "batch_size: got 0"),
        ({"num_frames": 0}, ValueError, "num_frames: got 0"),
        ({"num_frames": "all"}, ValueError, "num_frames: got 'all'"),
        ({"pretrained": "vistok-tiney"}, ModelNotFound, "vistok-tiney"),
    ],
)
def test_wrong_arguments_are_named(model_class, folder, given, error, message):
    with pytest.raises(error, match=message):
        model_class(**{"pretrained": str(folder), "device": "cpu", **given})


def test_several_processes_and_other_tasks_are_refused(model_class, folder, cases, monkeypatch):
    lm = model_class(pretrained=str(folder), device="cpu")
    with pytest.raises(NotImplementedError, match="generate_until"):
        lm.loglikelihood([])
    with pytest.raises(NotImplementedError, match="generate_until"):
        lm.generate_until_multi_round([])
    with pytest.raises(ValueError, match="clotho has a message of type 'audio'"):
        messages([{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}], "clotho", clip_of)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE: got 2"):
        model_class(pretrained=str(folder), device="cpu")


def test_batches_hold_equal_settings_and_lose_nothing():
    hows = [{"a": 1}, {"a": 2}, {"a": 1}, {"a": 1}, {"a": 2}]
    assert list(batches(hows, 2)) == [[0, 2], [3], [1, 4]]
    assert list(batches([], 2)) == []


def test_settings_of_a_task():
    assert generation({}) == {"do_sample": False, "max_new_tokens": 1024, "num_beams": 1}
    greedy = {"do_sample": False, "max_new_tokens": 16, "num_beams": 3}
    assert generation({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 3, "other": 1}) == greedy
    warm = {"do_sample": True, "max_new_tokens": 1024, "num_beams": 1, "temperature": 0.5, "top_p": 0.9}
    assert generation({"temperature": 0.5, "top_p": 0.9}) == warm
    assert not generation({"temperature": 0.5, "do_sample": False})["do_sample"]
    assert cut(" a b\n\nc ; d", ["\n\n", ";", ""]) == "a b"
    assert cut("a", []) == "a"


def test_pictures_are_rgb():
    (message,) = messages(to_messages({"image": Image.new("L", (4, 4)), "question": "what ?"}), "world", clip_of)
    assert message["content"][0]["image"].mode == "RGB"
    assert message["content"][1] == {"type": "text", "text": "what ?"}


# Videos ---------------------------------------------------------------------------------------------------------------

LENGTH = 30


def write_video(path, length=LENGTH, codec="mpeg4", size=(48, 32), gop=7, between=0):
    """Ten frames a second, each of one grey: the first black, the last white. ``between``: B frames."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, "yuv420p", gop
        stream.max_b_frames = between
        for number in range(length):
            frame = np.full((size[1], size[0], 3), grey(number, length), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    return path


def grey(number, length=LENGTH):
    return 255 * number // max(1, length - 1)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "film.mp4")


def video_messages(doc):
    return [{"role": "user", "content": [{"type": "video", "url": doc}, {"type": "text", "text": "what is it ?"}]}]


def video_requests(count):
    how = {"max_new_tokens": 3, "until": ["\n\n"]}
    return [SimpleNamespace(args=("context", video_messages, dict(how), i, "film", "test")) for i in range(count)]


@pytest.mark.parametrize(
    ("name", "codec", "between"),
    [
        ("a.mp4", "mpeg4", 0),
        ("a.mkv", "mpeg4", 2),  # frames are not stored in the order in which they are shown
        ("a.avi", "mpeg4", 2),  # nor are the times at which they are shown
        ("a.ts", "mpeg2video", 2),  # no index of the key frames
    ],
)
@pytest.mark.parametrize("length", [LENGTH, 4])
def test_frames_are_evenly_spaced_from_the_first_to_the_last(tmp_path, name, codec, between, length):
    clip = clip_of(write_video(tmp_path / name, length, codec, between=between), 5)
    assert (clip.total, clip.indices) == (length, evenly(length, 5))
    assert clip.indices[0] == 0 and clip.indices[-1] == length - 1
    assert len(set(np.diff(clip.indices))) <= 2
    assert clip.fps == pytest.approx(10)
    found, wanted = clip.pixels().mean((1, 2, 3)), [grey(i, length) for i in clip.indices]
    np.testing.assert_allclose(found, wanted, atol=255 / (length - 1) / 2 + 4)


def test_no_more_frames_than_asked_for_are_held(tmp_path, monkeypatch):
    av = pytest.importorskip("av")
    path, made = write_video(tmp_path / "long.mp4", 60, gop=60), []
    whole = av.VideoFrame.to_image
    monkeypatch.setattr("vistok.bench.video._upright", lambda frame: made.append(1) or whole(frame))
    assert len(clip_of(path, 4).frames) == 4
    assert len(made) == 4
    assert len(clip_of(path, 1).frames) == 1
    assert clip_of(path, 1).indices == (0,)


def test_a_stretch_of_a_video(film):
    clip = clip_of({"url": str(film), "video_start": 1.0, "video_end": 2.0}, 3)
    assert (clip.total, clip.indices) == (11, (0, 5, 10))
    np.testing.assert_allclose(clip.pixels().mean((1, 2, 3)), [grey(10), grey(15), grey(20)], atol=8)
    assert clip.metadata()["frames_indices"] == [0, 5, 10]
    assert clip.metadata()["duration"] == pytest.approx(1.1)
    with pytest.raises(ValueError, match=r"film\.mp4 holds no frame from second 8 to 9"):
        clip_of({"path": film, "video_start": 8, "video_end": 9}, 3)


def test_frames_may_be_given_as_they_are(tmp_path):
    arrays = np.stack([np.full((6, 8, 3), grey(i, 4), np.uint8) for i in range(4)])
    pictures = [Image.fromarray(a) for a in arrays]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    for shown in (arrays, list(arrays), pictures, [str(tmp_path / f"{i}.png") for i in range(4)]):
        clip = clip_of(shown, 3)
        assert (clip.indices, clip.total, clip.fps) == ((0, 1, 3), 4, None)
        np.testing.assert_array_equal(clip.pixels(), arrays[[0, 1, 3]])
    assert clip_of([pictures[0], Image.new("L", (4, 4))], 2).pixels().shape == (2, 6, 8, 3)


def test_what_is_no_video_is_named(tmp_path, film):
    whole = film.read_bytes()
    for name, content in (("cut.mp4", whole[: len(whole) // 2]), ("noise.mp4", bytes(range(256)) * 8), ("no.mp4", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} cannot be read, it is corrupt"):
            clip_of(str(tmp_path / name), 2)
    with pytest.raises(ValueError, match=r"absent\.mp4 is no file"):
        clip_of(str(tmp_path / "absent.mp4"), 2)
    for wrong in (None, 5, [], {"fps": 2}):
        with pytest.raises(ValueError, match="must be a path or a sequence"):
            clip_of(wrong, 2)
    with pytest.raises(ValueError, match="got a frame float32"):
        clip_of(np.zeros((2, 4, 4, 3), np.float32), 2)
    with pytest.raises(ValueError, match="must come with a path"):
        clip_of({"video": np.zeros((2, 4, 4, 3), np.uint8), "video_start": 1}, 2)


def test_damaged_frames_are_named(tmp_path, film):
    broken = bytearray(film.read_bytes())
    start = broken.index(b"mdat")
    broken[start + 8 : start + 800] = bytes(792)
    path = tmp_path / "broken.mp4"
    path.write_bytes(broken)
    with pytest.raises(ValueError, match=r"broken\.mp4"):
        clip_of(path, 8)


def test_without_pyav_the_message_says_what_to_install(film, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"vistok\[video\]"):
        clip_of(film, 2)


@pytest.mark.parametrize(("method", "kept"), [("dense", 196), ("fastervlm", 49)])
def test_a_model_of_pictures_is_shown_the_frames(model_class, folder, film, method, kept):
    given = {} if method == "dense" else {"method": method, "keep": kept}
    lm = model_class(pretrained=str(folder), device="cpu", batch_size=2, num_frames="3", **given)
    assert lm.way == "pictures"
    lm.task_dict = {"film": {"test": [str(film), {"url": str(film), "video_start": 1.0}, str(film)]}}
    first, second, third = lm.generate_until(video_requests(3))
    assert first.text == third.text
    counts = [result.token_counts.input_tokens for result in (first, second, third)]
    words = counts[0] - 3 * kept
    assert counts == [words + 3 * kept] * 3
    chat = messages(video_messages(str(film)), "film", lm._watch)
    assert [part["type"] for part in chat[0]["content"]] == ["image"] * 3 + ["text"]
    wanted = lm._answer([chat], {"max_new_tokens": 3})
    assert wanted[0][0] == first.text
    # The budget is of each frame.
    with lm._session() or vistok.apply(lm.model, "uniform", keep=1.0) as session:
        lm.model.generate(
            **lm.processor.apply_chat_template(
                [chat], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            ),
            max_new_tokens=1,
        )
        assert [picture.tokens_kept for picture in session.pictures] == [kept] * 3


def watching(model_class, **given):
    """The model vistok-tiny-qwen with a chat template that has a place for videos."""
    lm = model_class(pretrained="vistok-tiny-qwen", device="cpu", **given)
    place = "{% if part.type == 'image' %}"
    video = "{% if part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% endif %}"
    assert place in lm.processor.chat_template
    lm.processor.chat_template = lm.processor.chat_template.replace(place, video + place, 1)
    return lm


@pytest.mark.parametrize("method", ["dense", "uniform"])
def test_a_model_of_videos_is_shown_a_video(model_class, film, method, monkeypatch):
    given = {} if method == "dense" else {"method": method, "keep": 10}
    lm = watching(model_class, batch_size=2, num_frames=4, **given)
    assert lm.way == "video"
    seen, run = [], type(lm.model).generate
    monkeypatch.setattr(type(lm.model), "generate", lambda self, **inputs: seen.append(inputs) or run(self, **inputs))
    lm.task_dict = {"film": {"test": [str(film), str(film)]}}
    results = lm.generate_until(video_requests(2))
    (inputs,) = seen
    t, h, w = inputs["video_grid_thw"][0].tolist()
    assert t == 2  # two frames of a film are one of the encoder's
    assert inputs["video_grid_thw"].shape == (2, 3) and "image_grid_thw" not in inputs
    patches = inputs["pixel_values_videos"].view(2, -1, inputs["pixel_values_videos"].shape[-1])
    assert torch.equal(*patches)
    assert patches[0, : h * w].mean() < patches[0, h * w :].mean()  # it grows lighter
    # Four of 30 frames at ten a second are 4/3 frames a second, two of which are one of the encoder's.
    assert inputs["second_per_grid_ts"].tolist() == pytest.approx([1.5] * 2)
    visual = t * h * w // 4
    words = inputs["input_ids"].shape[1] - visual
    kept = visual if method == "dense" else 10
    assert [result.token_counts.input_tokens for result in results] == [words + kept] * 2


def test_a_video_and_a_picture_in_one_batch(model_class, film):
    lm = watching(model_class, num_frames=2)
    picture = to_messages({"image": Image.new("RGB", (112, 112)), "question": "what is it ?"})
    chats = [messages(chat, "film", lm._watch) for chat in (picture, video_messages(str(film)))]
    both = lm._answer([[*chats[0]], [*chats[1]]], {"max_new_tokens": 3})
    assert len(both) == 2 and all(given > 0 for _, given, _ in both)


def test_how_a_model_is_shown_a_video(model_class, folder, model, processor, film):
    assert way_of(model, processor) == "pictures"
    qwen, its = load("vistok-tiny-qwen", device="cpu"), load_processor("vistok-tiny-qwen")
    assert way_of(qwen, its) == "pictures"  # its template has no place for a video
    single = model_class(pretrained=str(folder), device="cpu")
    single.processor.chat_template = "<image>{{ messages[0].content[-1].text }}"  # one picture, whatever is shown
    assert way_of(single.model, single.processor) is None
    single.task_dict = {"film": {"test": [str(film)]}}
    with pytest.raises(ValueError, match="can be shown no video"):
        single.generate_until(video_requests(1))
    single.processor.chat_template = "{{ raise_exception('one picture only') }}"
    assert way_of(single.model, single.processor) is None


def test_the_entry_point_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project.get("entry-points", {}).get("lmms_eval.models") == ENTRY


TASK = """\
task: vistok_world
dataset_path: imagefolder
dataset_kwargs:
  data_dir: {data}
test_split: test
output_type: generate_until
doc_to_visual: image
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 16
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
metadata:
  - version: 0.0
"""


def write_task(folder, cases):
    """A task of lmms-eval in ``folder``, and its pictures and questions as a data set of files."""
    data = folder / "data" / "test"
    data.mkdir(parents=True)
    with (data / "metadata.jsonl").open("w") as lines:
        for index, case in enumerate(cases):
            case.picture.save(data / f"{index:03d}.png")
            row = {"file_name": f"{index:03d}.png", "question": case.question, "answer": case.truth.answer}
            lines.write(json.dumps(row) + "\n")
    (folder / "vistok_world.yaml").write_text(TASK.format(data=folder / "data"))


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs lmms-eval (pip install lmms-eval)")
def test_lmms_eval_runs_a_task_of_the_world(tmp_path, cases):
    task, found, out = (tmp_path / name for name in ("task", "found", "out"))
    task.mkdir()
    write_task(task, cases)
    (metadata := found / "vistok_entry-0.dist-info").mkdir(parents=True)  # as if vistok were installed from pyproject
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vistok-entry\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[lmms_eval.models]\nvistok = {ENTRY['vistok']}\n")
    path = os.pathsep.join([str(found), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", "--model", "vistok", "--tasks", "vistok_world", "--include_path", str(task),
         "--model_args", "pretrained=vistok-tiny,method=fastervlm,keep=49", "--batch_size", "4", "--device", "cpu",
         "--log_samples", "--output_path", str(out), "--verbosity", "DEBUG"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (results,), (samples,) = list(out.rglob("*_results.json")), list(out.rglob("*_samples_vistok_world.jsonl"))
    rows = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    model, processor = load("vistok-tiny", device="cpu"), load_processor("vistok-tiny")
    wanted = answer_all(model, processor, "fastervlm", 49, cases, batch_size=4)
    assert [row["filtered_resps"] for row in rows] == [answered.answer for answered in wanted]
    score = json.loads(results.read_text())["results"]["vistok_world"]["exact_match,none"]
    assert score == pytest.approx(sum(bool(answered.correct) for answered in wanted) / len(cases))
