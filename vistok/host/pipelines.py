"""The ``transformers`` pipeline task "vistok-image-text-to-text": "image-text-to-text" with a method in the model.

from transformers import pipeline
from vistok.host.pipelines import register_pipeline

register_pipeline()
answer = pipeline("vistok-image-text-to-text", model="llava-hf/llava-1.5-7b-hf", method="fastervlm", keep=64)
answer(messages, max_new_tokens=20, return_kept=True)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoModelForImageTextToText, ImageTextToTextPipeline
from transformers.pipelines import PIPELINE_REGISTRY

from vistok.host.engine import Position
from vistok.host.keep import Keep
from vistok.host.session import Method, Session, apply

TASK = "vistok-image-text-to-text"
_SESSION = ("method", "keep", "position", "hyper")


class ReducedImageTextToTextPipeline(ImageTextToTextPipeline):
    """``ImageTextToTextPipeline`` that answers with fewer visual tokens; it takes the same inputs and parameters.

    Five parameters more, to the pipeline or to a call (a call's go before the pipeline's): ``method``, ``keep``,
    ``position`` and ``hyper`` (a dict of hyper-parameters of a method given by name; a call with a ``method`` and no
    ``hyper`` takes that method's defaults) as in ``vistok.apply``; ``return_kept``: each output then also holds "kept",
    a list with a dict for each picture of its prompt: index, tokens_in, tokens_kept, grid, crops, layers, keep, source
    (as in ``Session.report``).

    The method is in the model while a batch is answered and gone after it. Wrong parameters raise what ``vistok.apply``
    raises, on making the pipeline or at the call that brings them; ValueError at a call when no method was ever given.
    """

    def _sanitize_parameters(
        self,
        method: Method | Sequence[Method] | None = None,
        keep: Keep | Sequence[Keep] | None = None,
        position: Position | None = None,
        hyper: Mapping[str, Any] | None = None,
        return_kept: bool | None = None,
        **others: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if hyper is not None and not isinstance(hyper, Mapping):
            raise ValueError(f"hyper: got {hyper!r}, must be a dict of the method's hyper-parameters")
        asked = {"method": method, "keep": keep, "position": position, "hyper": hyper}
        asked = {name: value for name, value in asked.items() if value is not None}
        if method is not None:
            asked.setdefault("hyper", {})
        made = getattr(self, "_forward_params", None)  # None while the pipeline is being made
        given = {**{name: value for name, value in (made or {}).items() if name in _SESSION}, **asked}
        if "method" in given:
            self._session(**given)  # only checks: nothing is in the model before it is entered
        elif made is not None:
            raise ValueError(f"method: not given, must be the name of a reducer or a Reducer; {TASK} has no default")
        if return_kept is not None:
            asked["return_kept"] = return_kept
        preprocess, forward, postprocess = super()._sanitize_parameters(**others)
        return preprocess, {**forward, **asked}, postprocess

    def _session(
        self,
        method: Method | Sequence[Method],
        keep: Keep | Sequence[Keep] | None = None,
        position: Position | None = None,
        hyper: Mapping[str, Any] | None = None,
    ) -> Session:
        return apply(self.model, method, keep, position=position, **(hyper or {}))

    def _forward(
        self,
        model_inputs: dict[str, Any],
        generate_kwargs: dict[str, Any] | None = None,
        return_kept: bool = False,
        **given: Any,
    ) -> dict[str, Any]:
        rows = len(model_inputs["input_ids"])
        with self._session(**given) as session:
            outputs = super()._forward(model_inputs, generate_kwargs)
        if return_kept:
            # One a prompt: the base class hands a batch on row by row.
            kept: list[dict[str, Any]] = [{"pictures": []} for _ in range(rows)]
            for picture in session.pictures:
                report = picture.report()
                kept[report.pop("row")]["pictures"].append(report)
            outputs["kept"] = kept
        return outputs

    def postprocess(self, model_outputs: dict[str, Any], *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        kept = model_outputs.pop("kept", None)
        records = super().postprocess(model_outputs, *args, **kwargs)
        if kept is not None:
            prompts = [kept] if isinstance(kept, dict) else kept
            answers = len(records) // len(prompts)  # beams or samples of one prompt
            for number, record in enumerate(records):
                record["kept"] = prompts[number // answers]["pictures"]
        return records


def register_pipeline() -> None:
    """Make ``transformers.pipeline("vistok-image-text-to-text", ...)`` known. Safe to call more than once."""
    known = PIPELINE_REGISTRY.supported_tasks.get(TASK)
    if known is not None and known["impl"] is ReducedImageTextToTextPipeline:
        return
    PIPELINE_REGISTRY.register_pipeline(
        TASK,
        pipeline_class=ReducedImageTextToTextPipeline,
        pt_model=AutoModelForImageTextToText,
        type="multimodal",
    )
    # Without it save_pretrained() writes the model alone; with it, also a copy of this file and a configuration that
    # asks for trust_remote_code.
    del ReducedImageTextToTextPipeline._registered_impl
