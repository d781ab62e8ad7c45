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

import pytest
import torch
from PIL import Image

import vistok
from vistok.bench import lmms_eval as plugin
from vistok.bench.lmms_eval import batches, cut, generation, messages
from vistok.bench.measure import answer_all, cases_of
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
            messages(to_messages(docs(cases)[index]), "world"),
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
    with pytest.raises(ValueError, match="mvbench has a message of type 'video'"):
        messages([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], "mvbench")
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
    (message,) = messages(to_messages({"image": Image.new("L", (4, 4)), "question": "what ?"}), "world")
    assert message["content"][0]["image"].mode == "RGB"
    assert message["content"][1] == {"type": "text", "text": "what ?"}


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
