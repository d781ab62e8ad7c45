"""Carries reductions out in a running model: before the language model, and before its layers.

Two pre-hooks do the work. The outer model's says which columns of the prompt are visual; the language model's reduces
them and hands on the shorter sequence with its positions, masks and cache (vistok.host.cache). A pre-hook on each
decoder layer carries out the stages inside the language model and gives the layers after one the tensors of its length.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from vistok.host.cache import ReducedLayer, adopt, reduced_layers
from vistok.host.deepstack import DeepStack
from vistok.host.dialogue import Dialogue
from vistok.host.effort import Effort, Spending
from vistok.host.encoder import EncoderSide, Standing
from vistok.host.hooks import Hooks
from vistok.host.hosts import Host
from vistok.host.keep import Budget, Keep
from vistok.host.layout import KINDS
from vistok.host.llm import LayerView
from vistok.host.log import Log
from vistok.host.pictures import Group, Place, group, locate, ordered
from vistok.host.prompt import Prompt, check_call, read_prompt
from vistok.host.reducer import Reducer
from vistok.host.rows import pack, places, take
from vistok.host.steps import Steps, needs_of
from vistok.host.stream import Stream
from vistok.host.text import outside, question_tokens, special_ids
from vistok.host.vision import Probe
from vistok.host.vit.reducer import ViTReducer

Position = Literal["keep", "recompact"]


class Engine:
    """The hooks of one session."""

    def __init__(
        self,
        host: Host,
        methods: Sequence[Reducer],
        keep: Keep | Sequence[Keep],
        position: Position,
        budget: Budget,
        reselect: bool,
        encoder: Sequence[ViTReducer] = (),
    ) -> None:
        methods = [Standing(), *methods] if encoder else methods
        self.host, self.methods, self.position, self.reselect = host, methods, position, reselect
        if reselect and host.own_masks:
            raise ValueError(
                f"reselect: got True, but {host.name} is not supported: its masks depend on the kinds of the tokens of "
                "earlier turns"
            )
        for method in methods:
            host.check_needs(method)
        self.needs = [needs_of(method) for method in methods]
        self.probe = Probe(self.needs, len(host.blocks))
        self.side = EncoderSide(host, encoder, self.probe) if encoder else None
        self.log = Log(host, self.probe)
        self.steps = Steps(host, methods, self.needs, keep, budget, self.probe)
        self.special = special_ids(host.model)
        self.prompt: Prompt | None = None
        self.ids: Tensor | None = None
        self.dialogue: Dialogue | None = None
        self.words: Tensor | None = None
        self.groups: list[Group] = []
        self.stages: set[int] = set()
        self.stream: Stream | None = None
        self.deepstack: DeepStack | None = None
        self.armed: list[ReducedLayer] = []
        efforts = [method for method in methods if isinstance(method, Effort)]
        if len(efforts) > 1:
            raise ValueError(f"method: got {efforts}, must be at most one that spends less on each token")
        self.spending = Spending(host, efforts[0]) if efforts else None

    def install(self, hooks: Hooks) -> None:
        host = self.host
        hooks.before(host.model, check_call)
        hooks.before(host.base, self._see_prompt)
        self.log.watch(hooks)
        host.watch(hooks, self.probe)
        if self.side is not None:
            self.side.install(hooks)
        self.probe.install(hooks, host)
        hooks.before(host.language_model, self._before)
        for index, layer in enumerate(host.layers):
            hooks.before(layer, partial(self._before_layer, index))
            hooks.after(layer, partial(self._after_layer, index))
        hooks.after(host.language_model, self._after, always=True)
        if self.spending is not None:
            self.spending.install(hooks)

    # The outer model -----------------------------------------------------------------------------------------------

    def _see_prompt(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.prompt = read_prompt(self.host, args, kwargs)
        self.ids = args[0] if args else kwargs.get("input_ids")

    # The language model --------------------------------------------------------------------------------------------

    def _before(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        prompt, self.prompt = self.prompt, None
        self.forget()
        self.log.leaves_encoder()
        since = 0
        if prompt is not None and not bool(prompt.visual.any()):
            prompt = None
        if self.reselect:
            prompt, kwargs, since = self._converse(prompt, kwargs)
        width = _embeds(kwargs).shape[1]
        if prompt is not None:
            with self.log.time("select"):
                kwargs = self._reduce(prompt, kwargs, since)
            if self.dialogue is not None:
                self.dialogue.cache = kwargs.get("past_key_values")
            self.log.starts("prefill")
        else:
            kwargs = self._go_on(kwargs)
            self.log.starts("decode")
        self.armed = reduced_layers(kwargs.get("past_key_values"))
        for layer in self.armed:
            layer.armed = True
        if self.spending is not None:
            self.spending.begins(self.groups, width)
        return args, kwargs

    def _converse(self, prompt: Prompt | None, kwargs: dict[str, Any]) -> tuple[Prompt | None, dict[str, Any], int]:
        """With ``reselect``: the prompt to choose from at this forward, None for none; the language model's arguments
        for it; and the column at which its question begins."""
        if prompt is not None:
            cache: Cache | None = kwargs.get("past_key_values")
            if cache is not None and cache.get_seq_length():
                raise ValueError(
                    "pixel_values: with reselect=True all pictures must come with the first prompt of a cache; got "
                    "pictures in a later turn"
                )
            self.dialogue = Dialogue(prompt, self.probe.run, kwargs)
            return prompt, kwargs, 0
        dialogue = self.dialogue
        if dialogue is None or not dialogue.goes_on(kwargs):
            return None, kwargs, 0
        since = dialogue.embeds.shape[1]
        dialogue.add(kwargs, self.ids)
        if dialogue.embeds.shape[1] - since == 1:  # the next token of an answer
            return None, kwargs, 0
        self.probe.run = dialogue.run
        return dialogue.prompt, dialogue.again(kwargs), since

    def _go_on(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A forward without pictures: say its mask and positions of the keys that the cache holds."""
        cache: Cache | None = kwargs.get("past_key_values")
        if not reduced_layers(cache):
            return kwargs
        stream = self._stream(kwargs, cache)
        if any(layer.stage != stream.layers[0].stage for layer in stream.layers):
            self.stream = stream
        return kwargs | stream.inputs()

    def _stream(self, kwargs: dict[str, Any], cache: Cache | None) -> Stream:
        embeds = _embeds(kwargs)
        stream = self.host.stream(
            self.host.language_model,
            cache,
            reduced_layers(cache),
            (embeds.shape[0], embeds.shape[1]),
            kwargs.get("position_ids"),
            self.host.padding(kwargs),
            self.position == "recompact",
            embeds.device,
        )
        stream.stages = self.stages
        return stream

    def _places(self, prompt: Prompt) -> list[Place]:
        runs = {} if self.probe.run is None else {run.kind: run for run in self.probe.run.all}
        found = []
        for kind in KINDS if prompt.videos is not None else KINDS[:1]:
            visual = prompt.of(kind)
            if prompt.videos is None or bool(visual.any()):
                found.append(locate(visual, self.host.layouts(runs[kind], visual) if kind in runs else []))
        return ordered(found)

    def _reduce(self, prompt: Prompt, kwargs: dict[str, Any], since: int) -> dict[str, Any]:
        """The prefill of a prompt with pictures, whose question begins after column ``since``."""
        embeds: Tensor = kwargs["inputs_embeds"]
        places_ = self._places(prompt)
        alone = any(method.one_at_a_time for method in self.methods)
        standing = [] if self.side is None else [self.side.standing(place) for place in places_]
        groups = group(places_, self.steps.keeps(places_), embeds, alone, standing)
        for one in groups:
            self.steps.plan(one)
        self.groups, self.stages = groups, self.steps.stages(groups)
        mask = self.host.padding(kwargs)
        self.words = None
        if self.steps.wants_text:
            valid = mask[:, -embeds.shape[1] :].bool() if mask is not None and mask.ndim == 2 else None
            self.words = outside(question_tokens(valid, prompt.visual, prompt.ids, self.special), places_)
            self.words[:, :since] = False

        alive = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        reduced: list[tuple[Tensor, Tensor, Tensor]] = []
        for one in groups:
            before, rows = one.columns, one.rows[:, None]
            values = self.steps.at_input(one, embeds, self.words, prompt.ids)
            if values is not None:
                alive[rows, before] = False
                alive[rows, one.columns] = True
                reduced.append((rows, one.columns, values))
        self.log.sees(picture for one in groups for picture in self.steps.records(one))
        if not reduced and not self.stages and not self.reselect:
            return self._go_on(kwargs)

        kwargs = dict(kwargs)
        cache: Cache | None = kwargs.get("past_key_values")
        if cache is None and _uses_cache(kwargs, self.host.language_model):
            cache = kwargs["past_key_values"] = DynamicCache(config=self.host.language_model.config)
        if cache is not None:
            adopt(cache, len(self.host.layers), self.host.sources)
        stream = self.stream = self._stream(kwargs, cache)
        if reduced:
            index = pack(alive, stream.valid)
            where = places(index, stream.width)
            embeds = take(embeds, index)
            for rows, columns, values in reduced:
                embeds[rows, where[rows, columns]] = values
            stream.narrow(index)
            kwargs["inputs_embeds"] = embeds
        kwargs.update(stream.inputs())
        if kwargs.get("deepstack_visual_embeds") is not None:
            self.deepstack = DeepStack(
                self.host.language_model, kwargs["visual_pos_masks"], kwargs["deepstack_visual_embeds"]
            )
            kwargs.update(self.deepstack.inputs(stream.index, later=bool(self.stages)))
        return kwargs

    # Its layers ----------------------------------------------------------------------------------------------------

    def _before_layer(
        self, number: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        hidden: Tensor = args[0]
        stream = self.stream
        if stream is None:
            self._enters(number, module, hidden, kwargs)
            return None
        given = kwargs
        kwargs = stream.feed(number, hidden, given)
        if number in self.stages:
            with self.log.time("inside"):
                wider = self._bring_back(number, stream, hidden)
                if wider is not None:
                    hidden = wider
                    kwargs = stream.feed(number, hidden, given)
                narrowed = self._reduce_at(number, module, stream, hidden, kwargs)
                if narrowed is not None:
                    hidden = narrowed
                    kwargs = stream.feed(number, hidden, given)
        last = stream.tail(number, hidden)
        if last is not None:
            hidden = last
            kwargs = stream.feed(number, hidden, given)
        self._enters(number, module, hidden, kwargs)
        return (hidden, *args[1:]), kwargs

    def _enters(self, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        spent = None if self.spending is None else self.spending.enters(number, hidden, kwargs, self.stream)
        self.log.enters(layer, number, hidden, kwargs, spent)

    def _bring_back(self, number: int, stream: Stream, hidden: Tensor) -> Tensor | None:
        """The hidden states that enter decoder layer ``number`` where tokens come back before it, None elsewhere."""
        back = [one for one in self.groups if one.aside is not None and number in one.schedules[0].returns]
        if not back:
            return None
        now_at = places(stream.index, stream.width)
        alive, whole = now_at >= 0, take(hidden, now_at)
        for one in back:
            values = self.steps.bring_back(one, hidden, stream.index, stream.width)
            alive[one.rows[:, None], one.columns] = True
            whole[one.rows[:, None], one.columns] = values
        index = pack(alive, stream.valid)
        stream.widen(index, number)
        return take(whole, index)

    def _reduce_at(
        self, number: int, layer: Any, stream: Stream, hidden: Tensor, kwargs: dict[str, Any]
    ) -> Tensor | None:
        """Carry out the stage before decoder layer ``number``: the narrower hidden states, or None if nothing goes."""
        alive = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        now_at = places(stream.index, stream.width)
        changed = False
        for turn, method in enumerate(self.methods):
            real = alive if stream.real is None else stream.real & alive
            past = stream.past_keys(number)
            view = LayerView(layer, hidden, real, kwargs, past, self.host.own_masks) if method.layer_needs else None
            for one in self.groups:
                if number not in one.schedules[turn].layers or not one.count:
                    continue
                fields = {} if view is None else view.fields(method.layer_needs, one, now_at, self.words)
                result = self.steps.at_layer(turn, number, one, hidden, stream.index, stream.width, fields)
                if result is None:
                    continue
                before, after, values = result
                rows = one.rows[:, None]
                alive[rows, before] = False
                alive[rows, after] = True
                hidden = hidden if changed else hidden.clone()
                hidden[rows, after] = values
                changed = True
        self.log.left_at(number, self.groups)
        if not changed:
            return None
        index = pack(alive, stream.real)
        stream.narrow(index, number)
        return take(hidden, index)

    def _after_layer(self, number: int, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        if self.deepstack is None or self.stream is None:
            return None
        return self.deepstack.add(number, output, self.stream.index)

    def _after(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        for layer in self.armed:
            layer.armed = False
        if self.stream is not None and self.stages:
            self._cut(self.stream)
        self.log.ends(getattr(output, "past_key_values", None))
        self.forget()

    def _cut(self, stream: Stream) -> None:
        """Let go of the keys that methods with ``cache`` "survivors" dropped in later layers."""
        firsts = [
            layer
            for turn, method in enumerate(self.methods)
            for one in self.groups
            for layer in one.schedules[turn].layers
            if method.cache == "survivors" and layer in self.stages
        ]
        if firsts and stream.layers:
            stream.cut(min(firsts))

    def forget(self) -> None:
        """Let go of what one forward needed."""
        self.groups, self.stages, self.stream, self.deepstack, self.armed = [], set(), None, None, []

    def close(self) -> None:
        """Let go of everything but the log."""
        self.forget()
        if self.side is not None:
            self.side.close()
        self.probe.run = self.prompt = self.ids = self.words = self.dialogue = None


def _embeds(kwargs: dict[str, Any]) -> Tensor:
    """What the language model was given, embeddings or ids."""
    return kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]


def _uses_cache(kwargs: dict[str, Any], language_model: Any) -> bool:
    use_cache = kwargs.get("use_cache")
    return bool(language_model.config.use_cache if use_cache is None else use_cache)
