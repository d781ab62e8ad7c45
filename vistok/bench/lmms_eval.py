"""A model of lmms-eval (entry point group "lmms_eval.models"): any model that vistok knows, with a method in it.

    lmms-eval --model vistok --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=fastervlm,keep=64,layer=-2
        --tasks mme --batch_size 8 --device cuda:0

Image and video tasks that are answered in words. Each logged sample says, as input_tokens, how many tokens the language
model was given. Nothing of lmms-eval is imported before it asks for the model.

Of a video ``num_frames`` frames are shown, evenly spaced from the first to the last. A model that reads videos (its
host in vistok and its processor do, and its chat template has a place for one) gets them as its processor's video
input, which a method counts as one picture: ``keep`` is of the whole video. Any other gets them as so many pictures of
one prompt, and ``keep`` is of each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from PIL import Image

from vistok.bench.measure import DENSE, is_dense
from vistok.bench.video import clip_of
from vistok.host import Session, apply
from vistok.host.hosts import UnsupportedModel, host_of
from vistok.zoo import DEFAULT, load, load_processor

NAME, CLASS = "vistok", "VistokModel"
LONGEST = 1024
"""New tokens of an answer where the task sets no limit."""
FRAMES = 8
Way = Literal["video", "pictures"]


def manifest() -> Any:
    """What lmms-eval's registry wants to know of the model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=NAME, chat_class_path=f"{__name__}.{CLASS}")


def __getattr__(name: str) -> Any:
    if name != CLASS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmms_eval.api.model import lmms

    made = type(CLASS, (Answers, lmms), {"__module__": __name__, "__doc__": Answers.__doc__})
    return globals().setdefault(name, made)


class Answers:
    """What lmms-eval asks of a model; its base class comes on top.

    ``pretrained``: as ``vistok.load``. ``method``: a name, a file that ``vistok auto`` wrote, or "dense". ``keep`` and
    ``position`` as in ``vistok.apply`` (``keep=1`` is one token, ``keep=1.0`` all), ``hyper``: the method's
    hyper-parameters, by name. ``batch_size``: questions at a time. ``device``: "cpu", "cuda:0", ...; None: a GPU if
    there is one. ``dtype``: as ``vistok.load``. ``num_frames``: shown of a video.

    Raises ValueError for wrong arguments and what ``vistok.load`` and ``vistok.apply`` raise, before any task is read.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = DEFAULT,
        method: str = DENSE,
        keep: float | int | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        position: Any = None,
        max_batch_size: int | None = None,
        num_frames: int | str = FRAMES,
        **hyper: Any,
    ) -> None:
        super().__init__()
        self.task_dict: dict[str, Any] = getattr(self, "task_dict", {})
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(f"WORLD_SIZE: got {os.environ['WORLD_SIZE']}, {NAME} runs in one process")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size: got {batch_size!r}, must be a number of questions >= 1")
        self.batch_size = int(batch_size)
        if not str(num_frames).isdecimal() or int(num_frames) < 1:
            raise ValueError(f"num_frames: got {num_frames!r}, must be a number of frames >= 1")
        self.num_frames = int(num_frames)
        if is_dense(method) and (hyper or keep is not None or position is not None):
            raise ValueError(f"method: {', '.join(hyper) or 'keep or position'} is given, but the method is {DENSE!r}")
        self.pretrained = pretrained
        self.model, self.processor = load(pretrained, dtype=dtype, device=device), load_processor(pretrained)
        self.processor.tokenizer.padding_side = "left"
        self._given = {"method": method, "keep": keep, "position": position, **hyper}
        self._session()  # only checks the arguments

    @property
    def device(self) -> torch.device:
        return self.model.device

    def _session(self) -> Session | None:
        return None if is_dense(self._given["method"]) else apply(self.model, **self._given)

    @cached_property
    def way(self) -> Way:
        """How this model is shown a video. ValueError if it can be shown none."""
        found = way_of(self.model, self.processor)
        if found is None:
            raise ValueError(
                f"pretrained: {self.pretrained} can be shown no video: its chat template has no place for several "
                "pictures, nor for a video that vistok can reduce; must be another model"
            )
        return found

    def _watch(self, shown: Any) -> list[dict[str, Any]]:
        """Parts of a message that show a video."""
        way = self.way
        clip = clip_of(shown, self.num_frames)
        if way == "video":
            return [{"type": "video", "video": clip.pixels(), "clip": clip}]
        return [{"type": "image", "image": frame} for frame in clip.frames]

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """One GenerationResult a request, in their order. A request's ``args`` end in doc_to_messages, gen_kwargs,
        doc_id, task, split."""
        from lmms_eval.api.instance import GenerationResult, TokenCounts

        asked = [tuple(request.args[-5:]) for request in requests]
        results: list[Any] = [None] * len(asked)
        for rows in batches([how for _, how, *_ in asked], self.batch_size):
            how = asked[rows[0]][1]
            chats = []
            for row in rows:
                to_messages, _, doc, task, split = asked[row]
                chats.append(messages(to_messages(self.task_dict[task][split][doc]), task, self._watch))
            for row, (answer, given, made) in zip(rows, self._answer(chats, how), strict=True):
                results[row] = GenerationResult(answer, TokenCounts(input_tokens=given, output_tokens=made))
        return results

    @torch.inference_mode()
    def _answer(self, chats: list[list[dict[str, Any]]], how: Mapping[str, Any]) -> list[tuple[str, int, int]]:
        """(answer, tokens that the language model was given, tokens of the answer) of each chat."""
        how_read: dict[str, Any] = {"padding": True}
        parts = [part for chat in chats for message in chat for part in message["content"]]
        if clips := [part.pop("clip") for part in parts if part["type"] == "video"]:
            how_read |= {"do_sample_frames": False, "video_metadata": [clip.metadata() for clip in clips]}
        inputs = self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=how_read,
        ).to(self.model.device)
        # Only pixels: the times of a video's frames would be rounded.
        inputs.update({name: given.to(self.model.dtype) for name, given in inputs.items() if "pixel_values" in name})
        with self._session() or nullcontext() as session:
            made = self.model.generate(**inputs, **generation(how))[:, inputs["input_ids"].shape[1] :]
        given = inputs["attention_mask"].sum(1).tolist()
        for picture in session.pictures if session else ():
            given[picture.row] -= picture.tokens_in - picture.tokens_kept
        answers = self.processor.batch_decode(made, skip_special_tokens=True)
        ends = how.get("until") or []
        ends = [ends] if isinstance(ends, str) else ends
        lengths = (made != self.processor.tokenizer.pad_token_id).sum(1).tolist()
        return [(cut(answer, ends), *counts) for answer, *counts in zip(answers, given, lengths, strict=True)]

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        raise NotImplementedError(f"{NAME}: answers in words only; take a task whose output_type is generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        raise NotImplementedError(f"{NAME}: answers one round only; take a task whose output_type is generate_until")


def batches(hows: Sequence[Mapping[str, Any]], size: int) -> Iterator[list[int]]:
    """Indices of ``hows``, at most ``size`` equal ones at a time, in their order."""
    alike: dict[str, list[int]] = {}
    for index, how in enumerate(hows):
        alike.setdefault(repr(sorted(how.items())), []).append(index)
    for rows in alike.values():
        yield from (rows[start : start + size] for start in range(0, len(rows), size))


def messages(
    chat: Sequence[Mapping[str, Any]], task: str, watch: Callable[[Any], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """lmms-eval's messages as a chat template takes them; ``watch`` makes the parts that show a video. ValueError for
    anything but words, pictures and videos."""

    def parts(content: Mapping[str, Any]) -> list[dict[str, Any]]:
        if content["type"] == "text":
            return [{"type": "text", "text": content["text"]}]
        if content["type"] not in ("image", "video"):
            raise ValueError(f"tasks: {task} has a message of type {content['type']!r}, must be text, image or video")
        shown = content["url"]
        if content["type"] == "video":
            return watch(shown)
        return [{"type": "image", "image": shown.convert("RGB") if isinstance(shown, Image.Image) else shown}]

    return [
        {"role": message["role"], "content": [part for content in message["content"] for part in parts(content)]}
        for message in chat
    ]


def way_of(model: Any, processor: Any) -> Way | None:
    """How a model can be shown a video: as one, as several pictures of one prompt, or (None) in neither way."""

    def written(kind: str, count: int) -> str | None:
        """The prompt with so many of a kind; None if the template refuses."""
        content = [*({"type": kind} for _ in range(count)), {"type": "text", "text": "?"}]
        try:
            return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        except (TemplateError, ValueError, TypeError):
            return None

    try:
        reads = host_of(model).videos and getattr(processor, "video_processor", None) is not None
    except UnsupportedModel:
        reads = False
    if reads and (getattr(processor, "video_token", None) or "<video>") in (written("video", 1) or ""):
        return "video"
    two = written("image", 2)
    return None if two is None or two == written("image", 1) else "pictures"


def generation(how: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``generate`` from a task's generation_kwargs; greedy unless a temperature is set."""
    heat = float(how.get("temperature") or 0)
    sample = heat > 0 and how.get("do_sample") is not False
    out = {"do_sample": sample, "max_new_tokens": int(how.get("max_new_tokens") or LONGEST)}
    out |= {"num_beams": int(how.get("num_beams") or 1)}
    return out | ({"temperature": heat, "top_p": how.get("top_p") or 1.0} if sample else {})


def cut(answer: str, ends: Sequence[str]) -> str:
    """``answer`` up to the first of ``ends`` that is in it, without outer white space."""
    answer = answer.strip()
    for end in filter(None, ends):
        answer = answer.split(end)[0]
    return answer.strip()
