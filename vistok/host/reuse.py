"""Pictures that the vision encoder has seen before are not encoded again.

    with reuse(model, digests, input_ids, store):
        model.generate(**inputs)

Pictures are encoded by ``get_image_features`` of the outer model, also within ``generate``. In the ``with`` it is asked
only for those that ``store`` does not know, or of which it does not know all that the method in the model asks for. Of
the others the language model and the method are given what the encoder made of them then: their tokens, and the
evidence (``vistok.host.vision``). Answers are the same bit for bit where the same pictures were encoded together, and
to rounding elsewhere.

This holds for pictures in all families (``vistok.host.hosts``). Videos are encoded every time; and a method inside the
encoder ("pitome@encoder") changes what the encoder makes, so with one nothing is reused or stored.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, wraps
from itertools import accumulate, pairwise
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vistok.host.hooks import Hooks
from vistok.host.hosts import Host, host_of
from vistok.host.session import engine_in
from vistok.host.vision import Probe, VisionRun

Field: TypeAlias = tuple[str, int]
"""A field of evidence and its encoder layer, as in ``VisionRun.fields``."""
FEATURES: Field = ("encoder_features", -1)
"""``VisionRun.features``, which are of no layer."""


@dataclass(frozen=True)
class Encoded:
    """What the vision encoder made of one picture, in tensors of its own."""

    features: Tensor
    """(N, D) its tokens; (U, N, D) where the model holds them by crop or tile."""
    deepstack: tuple[Tensor, ...] = ()
    """(N, D) each: the planes that Qwen3-VL adds to the tokens after its first decoder layers."""
    rows: int = 0
    """Rows that the projector was given."""
    fields: Mapping[Field, Any] = field(default_factory=dict)
    """The evidence that was asked for, flat over the picture's patches."""

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        blocks = [part for value in self.fields.values() for part in (value if isinstance(value, list) else [(value,)])]
        return sum(tensor.nbytes for block in ((self.features, *self.deepstack), *blocks) for tensor in block)


class Store(Protocol):
    """Keeps what was made of pictures, by a key that says what they show."""

    def get(self, key: Hashable, fields: Collection[Field]) -> Encoded | None:
        """What was made of a picture; None where that is not known, or not all of ``fields``."""

    def put(self, key: Hashable, encoded: Encoded) -> None:
        """Keep ``encoded`` for later."""


@contextmanager
def reuse(model: nn.Module, digests: Sequence[Sequence[str]], ids: Tensor, store: Store) -> Iterator[None]:
    """Encode no picture that ``store`` knows, while the ``with`` lasts; a session's ``with`` lies around it.

    ``digests``: hashes of the pictures of each row, in the order of the prompt ``ids`` (B, T) int64. One prompt a
    ``with``. A store is for one model with one processor. Raises ValueError for a row without a picture.
    """
    if not all(digests):
        raise ValueError(
            f"digests: got none for row {[bool(row) for row in digests].index(False)}, must be some for each"
        )
    engine = engine_in(model)
    if engine is not None and engine.side is not None:
        yield
        return
    hooks = Hooks()
    try:
        host, probe = (host_of(model), None) if engine is None else (engine.host, engine.probe)
        _Pictures(host, probe, digests, ids, store).install(hooks)
        yield
    finally:
        hooks.remove()


@dataclass
class _Features(BaseModelOutputWithPooling):
    """What the outer model reads of ``get_image_features``."""

    deepstack_features: list[list[Tensor]] | None = None


class _Begun(Exception):
    """The encoder was about to run."""


class _Pictures:
    """The pictures of a prompt, on their way through the encoder or past it; ``probe``: of the session, if any."""

    def __init__(
        self, host: Host, probe: Probe | None, digests: Sequence[Sequence[str]], ids: Tensor, store: Store
    ) -> None:
        self.host, self.probe, self.ids, self.store = host, probe, ids, store
        self.digests = [digest for row in digests for digest in row]
        self.row_of = [number for number, row in enumerate(digests) for _ in row]
        self.encode: Callable[..., Any] = host.base.get_image_features
        self.rows = 0
        self.asked: set[Field] = set()
        if probe is not None:
            self.asked = {(name, layer) for layer, names in probe.wanted.items() for name in names}
            self.asked |= {FEATURES} if FEATURES[0] in probe.asked else set()

    def install(self, hooks: Hooks) -> None:
        signature = inspect.signature(self.encode)

        @wraps(self.encode)  # generate() reads its signature
        def features(*args: Any, **kwargs: Any) -> Any:
            arguments = signature.bind(*args, **kwargs).arguments
            return self.features({**arguments.pop("kwargs", {}), **arguments})

        def projects(module: Any, args: Any, kwargs: Any) -> None:
            self.rows = args[0].shape[:-1].numel() if args else 0

        hooks.shadow(self.host.base, "get_image_features", features)
        hooks.before(self.host.projector, projects)

    def features(self, given: dict[str, Any]) -> Any:
        """In place of ``get_image_features(**given)``."""
        spent = self.host.spent(given, self.ids)
        if len(spent) != len(self.digests):  # not the pictures that were announced
            return self.encode(**given)
        # One that is cut, or not, for how many others come with it (LLaVA-OneVision) is not the same picture.
        keys = list(zip(self.digests, spent, strict=True))
        known = {key: found for key in dict.fromkeys(keys) if (found := self.store.get(key, self.asked)) is not None}
        missing = [number for number, key in enumerate(keys) if key not in known and key not in keys[:number]]
        part, numbers = self._some(given, spent, missing)
        if len(numbers) == len(keys):
            output = self.encode(**given)
            self._keep(output, keys)
            return output
        whole = None if self.probe is None else self._begin(self.probe, given)
        if numbers:
            known |= self._keep(self.encode(**part), [keys[number] for number in numbers])
        encoded = [known[key] for key in keys]
        if self.probe is not None and whole is not None:
            now = self.probe.run if numbers else None
            whole.rows = sum(one.rows for one in encoded)
            whole.saved = self.host.vision_flops(whole) - (0 if now is None else self.host.vision_flops(now))
            joined = {name: _join(name[0], [one.fields[name] for one in encoded]) for name in self.asked}
            whole.features = joined.pop(FEATURES, None)
            whole.fields = joined
            self.probe.run = whole
        return _output(encoded)

    def _some(self, given: dict[str, Any], spent: list[int], missing: list[int]) -> tuple[dict[str, Any], list[int]]:
        """The arguments for the pictures ``missing``, and those that cannot be encoded apart from them; their numbers.

        Tensors have an entry for each picture; or for each crop, tile or patch; or (LLaVA-OneVision, Idefics) for each
        row of the prompt, whose pictures then stay together.
        """
        pictures, units, rows = len(spent), sum(spent), self.row_of[-1] + 1
        lengths = {len(value) for value in given.values() if isinstance(value, Tensor)}
        if not missing:
            return {}, []
        if not lengths <= {pictures, units, rows}:
            return given, list(range(pictures))
        if not lengths <= {pictures, units}:
            mine = {self.row_of[number] for number in missing}
            missing = [number for number, row in enumerate(self.row_of) if row in mine]
        ranges = [range(*pair) for pair in pairwise([0, *accumulate(spent)])]
        places = {
            rows: sorted({self.row_of[number] for number in missing}),
            units: [unit for number in missing for unit in ranges[number]],
            pictures: missing,
        }
        part = {
            name: value[torch.tensor(places[len(value)], device=value.device)] if isinstance(value, Tensor) else value
            for name, value in given.items()
        }
        return part, missing

    def _begin(self, probe: Probe, given: dict[str, Any]) -> VisionRun | None:
        """A run of the encoder on all pictures, as far as ``probe`` knows of it before the encoder begins."""

        def begun(*args: Any, **kwargs: Any) -> None:
            raise _Begun

        hooks = Hooks()
        hooks.shadow(self.host.tower, "forward", begun)
        try:
            self.encode(**given)
        except _Begun:
            return probe.run
        finally:
            hooks.remove()
        raise RuntimeError(f"vistok: get_image_features of {self.host.name} did not run its vision encoder")

    def _keep(self, output: Any, keys: Sequence[tuple[str, int]]) -> dict[tuple[str, int], Encoded]:
        """Store what the encoder has just made of the pictures ``keys``, which are all that it was given."""
        spent = [units for _, units in keys]
        rows = self.rows or sum(spent)  # Gemma 4's are the patches
        tokens = _parts(output.pooler_output, spent)
        planes = [_parts(plane, spent) for plane in getattr(output, "deepstack_features", None) or ()]
        fields: dict[Field, list[Any]] = {}
        if self.probe is not None and (run := self.probe.run) is not None:
            seen = run.fields | ({FEATURES: run.features} if FEATURES in self.asked else {})
            fields = {name: _split(name[0], value, spent) for name, value in seen.items()}
        made = {}
        for number, key in enumerate(keys):
            made[key] = Encoded(
                tokens[number].clone(),
                tuple(plane[number].clone() for plane in planes),
                rows * key[1] // sum(spent),
                {name: values[number] for name, values in fields.items()},
            )
            self.store.put(key, made[key])
        return made


def _output(encoded: Sequence[Encoded]) -> _Features:
    """What ``get_image_features`` gives for these pictures."""
    tokens = [one.features for one in encoded]
    planes = [list(plane) for plane in zip(*(one.deepstack for one in encoded), strict=True)]
    return _Features(
        pooler_output=torch.cat(tokens) if tokens[0].ndim == 3 else tokens,  # type: ignore[arg-type]
        deepstack_features=planes or None,
    )


def _parts(value: Any, spent: Sequence[int]) -> Sequence[Tensor]:
    """The tokens of each picture, of one tensor or several; pictures have shares of them as of ``spent``."""
    if not isinstance(value, Tensor) and len(value) == len(spent):
        return value
    rows = value if isinstance(value, Tensor) else torch.cat(list(value))
    return rows.split(_shares(len(rows), spent))


def _shares(total: int, spent: Sequence[int]) -> list[int]:
    each = total // sum(spent)
    return [each * units for units in spent]


def _axis(name: str) -> int:
    """Which axis of a field is the patches'."""
    return int(name in ("cls_attention", "cls_logits"))


def _split(name: str, value: Any, spent: Sequence[int]) -> list[Any]:
    """A field of a run, picture by picture, in tensors of their own."""
    if name != "encoder_attention":
        parts = value.split(_shares(value.shape[_axis(name)], spent), _axis(name))
        return [part.clone() for part in parts]
    ends = list(accumulate(_shares(sum(len(place) for place, _ in value), spent)))
    return [
        [(place - first, block.clone()) for place, block in value if first <= int(place[0]) < last]
        for first, last in pairwise([0, *ends])
    ]


def _join(name: str, values: Sequence[Any]) -> Any:
    """A field of a run on these pictures, of those of each."""
    if name != "encoder_attention":
        return torch.cat(list(values), _axis(name))
    starts = accumulate((sum(len(place) for place, _ in blocks) for blocks in values), initial=0)
    return [(place + start, block) for blocks, start in zip(values, starts) for place, block in blocks]  # noqa: B905
