"""What a reducer is given and what it returns.

A reducer is a pure function ``Evidence -> Reduction``: it can be held against brute force and against the authors' own
outputs without any model. The host (``vistok.host``) gathers the evidence that a reducer ``needs`` from a running
model and carries out the reduction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

LayerSpec = int | float | slice | tuple[int | float, ...] | None
"""Which encoder layer(s) a field is wanted from, counted as in Hugging Face's ``attentions``: an int is an index
(-2: the layer that made ``hidden_states[-2]``), a float in (0, 1) a share of the depth (9/24 of four layers: the 2nd),
a slice or tuple several layers (the field is then a tuple of tensors). None for fields that have no layer."""
LayerNeed = Literal["last", "text", "visual"] | tuple[float, int] | None
"""What a field is wanted for inside the language model: the queries of "llm_attention", (temperature, iterations) of
"llm_importance", None for the others."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of the N visual tokens of B pictures of one layout (batch first).

    Only the fields that the reducer ``needs`` are set; the others are None. Where the model merges patches before its
    language model (Qwen-VL, InternVL), every field is given for the merged tokens: attention is averaged over the
    patches of a token, encoder features and keys are concatenated.
    """

    features: Tensor
    """(B, N, D) visual tokens as the language model gets them; at a decoder layer, their hidden states there."""
    grid: tuple[int, int] | None = None
    """(h, w) with h * w == N, raster order; None where the tokens form no grid (after a reduction, several crops)."""
    encoder_features: Any = None
    """(B, N, Dv) the vision encoder's patch outputs that feed the projector."""
    encoder_keys: Any = None
    """(B, N, Dk) keys of the encoder layer asked for, heads concatenated."""
    encoder_mean_keys: Any = None
    """(B, N, dk) the same keys, mean over the heads."""
    cls_attention: Any = None
    """(B, H, N) class-token row of the encoder's attention, softmax over class token + patches, class column left out.
    Where the encoder has no class token: the attention that each token receives, (B, H, N), mean over queries."""
    wide_cls_attention: Any = None
    """(B, N) the class-token row when all heads are taken as one (queries and keys unsplit, scale by full width)."""
    received_attention: Any = None
    """(B, N) attention received by each token: mean over heads and over all queries (class token included)."""
    given_attention: Any = None
    """(B, N) share of each patch's attention that goes to patches (not to the class token), mean over heads, / N."""
    encoder_attention: Any = None
    """(B, H, N, N) patch-to-patch attention (softmax as in the model). Costly: only for methods defined on it."""
    cls_logits: Any = None
    """(B, H, N) as ``cls_attention``, before the softmax: scaled products of the class token's query and the patches'
    keys. Only from encoders with a class token."""
    encoder_states: Any = None
    """(B, N, Dv) the patches' hidden states after the encoder layer asked for."""
    patch_pixels: Any = None
    """(B, N, P) float32, grey values (mean of the channels) of each token's pixels, as the model was given them:
    normalised, so on an unknown linear scale."""
    project: Callable[[Tensor], Tensor] | None = None
    """The host's projector: (B, n, Dv) rows of ``encoder_features`` to (B, n, D) rows of ``features``, token by token,
    in their precision; Dv as of ``encoder_features`` (the patches of a merged token joined)."""
    text: Any = None
    """(B, T, D) embeddings of the question's tokens at the language model's input; padded, see ``text_mask``."""
    text_mask: Tensor | None = None
    """(B, T) bool, False at padding."""
    text_ids: Any = None
    """(B, T) int64 token ids of the question."""
    llm_attention: Any = None
    """(B, H, Q, N) at a decoder layer: rows of attention over the whole causal sequence, restricted to visual keys.
    Q are the queries the reducer asked for: "last", "text" (see ``text_mask``) or "visual"."""
    llm_received: Any = None
    """(B, N) at a decoder layer: ``llm_attention`` of the visual queries averaged over heads and queries, in blocks."""
    llm_keys: Any = None
    """(B, N, d) at a decoder layer: visual keys after rotary embedding, mean over key heads."""
    llm_importance: Any = None
    """(B, H, N) at a decoder layer: PageRank of the whole causal sequence by head (``vistok.core.score.pagerank``; the
    reducer's ``layer_needs`` gives temperature and iterations), read off at the visual tokens. Padding and earlier
    turns (of which no queries are kept) are left out."""
    index: Any = None
    """(B, N) int64: which of the picture's tokens these are, counted before any reduction. None: all, in order."""
    anchor: Any = None
    """(B, N) int64: which of the picture's tokens stands for each after a method inside the encoder, -1: none."""
    carry: Any = None
    """What the method's last stage left of each token (``Reduction.carry``): (B, N) or (B, N, C)."""
    crops: tuple[tuple[int, int], ...] = ()
    """Where the picture was cut: the grid of each part, thumbnail first; () for a picture in one piece. The tokens lie
    part after part, each part in raster order, whatever their order in the prompt (the host maps them back)."""
    boxes: tuple[tuple[float, float, float, float] | None, ...] = ()
    """What each of ``crops`` shows of the picture: (x0, y0, x1, y1) in 0..1, or None where the model does not tell."""
    frames: int | None = None
    """Of a video, None for a picture. Each frame is one of ``crops``, none of which is a thumbnail; of a single frame
    there is the ``grid``."""

    @property
    def num_tokens(self) -> int:
        return self.features.shape[1]

    def crop(self, index: int) -> Evidence:
        """The evidence of one part of a cut picture; its ``grid`` is that part's."""
        sizes = [h * w for h, w in self.crops]
        start = sum(sizes[:index])
        part = slice(start, start + sizes[index])

        def cut(name: str, value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(cut(name, v) for v in value)
            axis = _TOKEN_AXES[name]
            value = value[(slice(None),) * axis + (part,)]
            return value[:, :, part] if name == "encoder_attention" else value

        given = {n: cut(n, v) for n in _TOKEN_AXES if (v := getattr(self, n)) is not None}
        return replace(self, **given, grid=self.crops[index], crops=(), boxes=(), frames=None)

    def take(self, keep: Tensor) -> Evidence:
        """The evidence of the tokens ``keep`` (B, K) int64 of each picture; they no longer form a grid."""

        def rows(name: str, value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(rows(name, v) for v in value)
            axis = _TOKEN_AXES[name]
            value = _gather(value, keep, axis)
            return _gather(value, keep, 2) if name == "encoder_attention" else value

        given = {n: rows(n, v) for n in _TOKEN_AXES if (v := getattr(self, n)) is not None}
        return replace(self, **given, grid=None, crops=(), boxes=())


def _gather(value: Tensor, keep: Tensor, axis: int) -> Tensor:
    """``value`` (B, ...) with ``keep`` (B, K) of the positions of ``axis``."""
    shape = [len(keep), *value.shape[1:axis], keep.shape[1], *value.shape[axis + 1 :]]
    index = keep.reshape(len(keep), *[1] * (axis - 1), -1, *[1] * (value.ndim - axis - 1)).expand(shape)
    return value.gather(axis, index)


_TOKEN_AXES = {
    "features": 1,
    "encoder_features": 1,
    "encoder_keys": 1,
    "encoder_mean_keys": 1,
    "cls_attention": 2,
    "wide_cls_attention": 1,
    "received_attention": 1,
    "given_attention": 1,
    "encoder_attention": 3,
    "llm_attention": 3,
    "llm_received": 1,
    "llm_keys": 1,
    "cls_logits": 2,
    "encoder_states": 1,
    "patch_pixels": 1,
    "llm_importance": 2,
    "index": 1,
    "carry": 1,
}


@dataclass(frozen=True)
class Reduction:
    """Which tokens stay, with which values, and where every input token went."""

    keep: Tensor
    """(B, K) int64, ascending positions in 0..N-1; a merged slot stands at its anchor's position."""
    tokens: Tensor
    """(B, K, D) values, row for row with ``keep``; D as in ``encoder_features`` if the reducer's ``space`` is
    "encoder" (the host then projects them), else as in ``features``."""
    source: Tensor
    """(B, N) int64: the slot (0..K-1) that each input token ended in, -1 where it was dropped."""
    carry: Tensor | None = None
    """(B, K) or (B, K, C), row for row with ``keep``: what the method's later stages are to know of these tokens
    (``Evidence.carry``), such as a score that cannot be computed from a part of the picture. None where there was
    nothing to reduce. A method that carries sees a cut picture whole (``whole_picture``)."""

    @classmethod
    def select(cls, tokens: Tensor, keep: Tensor) -> Reduction:
        """Keep the rows ``keep`` (B, K; any order) of ``tokens`` (B, N, D) as they are, in raster order."""
        keep = keep.sort(dim=1).values
        source = torch.full(tokens.shape[:2], -1, dtype=torch.int64, device=tokens.device)
        slots = torch.arange(keep.shape[1], device=tokens.device).expand_as(keep)
        source.scatter_(1, keep, slots)
        values = tokens.gather(1, keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        return cls(keep, values, source)


@dataclass(frozen=True)
class Schedule:
    """How many tokens stay where: ``input`` before the language model, then ``layers[r]`` from decoder layer r on.

    A count above the one before it brings all tokens back that were set aside inside the language model; it must be
    ``input``, which must be all tokens (see ``Reducer.come_back``)."""

    input: int
    layers: Mapping[int, int] = field(default_factory=dict)

    @property
    def returns(self) -> tuple[int, ...]:
        """The layers before which tokens come back."""
        now, found = self.input, []
        for layer, count in sorted(self.layers.items()):
            if count > now:
                found.append(layer)
            now = count
        return tuple(found)

    def mean(self, num_layers: int) -> float:
        """Tokens averaged over the decoder's layers: the count by which staged methods are compared."""
        counts, now = [], self.input
        for layer in range(num_layers):
            now = self.layers.get(layer, now)
            counts.append(now)
        return sum(counts) / num_layers


class Reducer:
    """Base of all reducers. A system is a dataclass of its hyper-parameters that writes ``select`` or ``compress``.

    * ``needs``: evidence fields it reads besides ``features``, each with the encoder layer it wants them from.
    * ``space``: "projected" if its tokens are rows of ``features``, "encoder" if they are rows of ``encoder_features``.
    * ``whole_picture``: True if it wants a picture that was cut into crops in one piece (``evidence.crops``); otherwise
      each crop is reduced by itself with its share of ``keep``. The frames of a video are its crops.
    * ``thumbnail``: True if it takes the first crop for a thumbnail; it then gets a video frame by frame in any case.
    * ``one_at_a_time``: True if how many tokens it keeps depends on the picture. The host then shows it one picture at
      a time (B = 1) and takes whatever K it returns.
    * ``position``: "recompact" if the tokens that stay are to close the gaps in their positions, as the method's paper
      has it; ``vistok.apply(position=...)`` overrules it.
    * ``cache``: "survivors" if, once the prompt is read, the layers from its first stage inside the language model on
      are to keep the keys of those tokens only that its last stage left; "seen": each layer keeps what it saw.

    A method with stages inside the language model also overrides ``schedule`` and ``at_layer``, and names what it needs
    there in ``layer_needs`` ({"llm_attention": "text"}, {"llm_received": None}, ...).
    """

    space: ClassVar[Literal["projected", "encoder"]] = "projected"
    whole_picture: ClassVar[bool] = False
    thumbnail: ClassVar[bool] = False
    one_at_a_time: ClassVar[bool] = False
    position: ClassVar[Literal["keep", "recompact"]] = "keep"
    cache: ClassVar[Literal["seen", "survivors"]] = "seen"

    @property
    def needs(self) -> Mapping[str, LayerSpec]:
        return {}

    @property
    def layer_needs(self) -> Mapping[str, LayerNeed]:
        return {}

    # What a system writes -----------------------------------------------------------------------------------------

    def select(self, evidence: Evidence, keep: int) -> Tensor:
        """(B, keep) positions of the tokens that stay, in any order. For methods that only drop."""
        raise TypeError(f"{type(self).__name__} must define select() or compress()")

    def compress(self, evidence: Evidence, keep: int) -> Reduction:
        """The reduction to ``keep`` tokens, 0 < keep < N. For methods that merge."""
        values = evidence.encoder_features if self.space == "encoder" else evidence.features
        return Reduction.select(values, self.select(evidence, keep))

    def schedule(self, num_tokens: int, keep: int, num_layers: int) -> Schedule:
        """Token counts by stage whose mean over the decoder's layers is ``keep``. One stage unless overridden."""
        return Schedule(keep)

    def at_layer(self, evidence: Evidence, keep: int, layer: int) -> Reduction:
        """The reduction before decoder layer ``layer``, to 0 <= ``keep`` <= N tokens.

        ``evidence.features`` are the hidden states there; the fields of ``needs`` and ``text`` are those of the input
        stage, for the tokens that are left.
        """
        raise TypeError(f"{type(self).__name__} has no stage inside the language model")

    def come_back(self, aside: Tensor, keep: Tensor, states: Tensor) -> Tensor:
        """(B, N, D) hidden states with which all tokens go on where ``schedule`` brings some back.

        ``aside`` (B, N, D): those with which they were set aside; ``keep`` (B, K): the tokens that went on meanwhile,
        which are now ``states`` (B, K, D). Unless overridden the others are as they were.
        """
        return aside.scatter(1, keep[..., None].expand_as(states), states)

    def token_scores(self, evidence: Evidence, layer: int | None = None) -> Tensor | None:
        """(B, N) what it ranks tokens by, larger is better, before the language model or before decoder layer
        ``layer``; None where it gives its tokens no score there. For people to look at: ``vistok.host.watch``."""
        return None

    # What callers use ---------------------------------------------------------------------------------------------

    def reduce(self, evidence: Evidence, keep: int) -> Reduction:
        """Reduce the tokens of each picture to ``keep``.

        Raises ValueError if ``keep`` is not in 1..N or a field of ``needs`` is missing. keep == N is the identity.
        """
        n = evidence.num_tokens
        if not 1 <= keep <= n:
            raise ValueError(f"keep: got {keep}, must be between 1 and the picture's {n} visual tokens")
        missing = [name for name in self.needs if getattr(evidence, name) is None]
        if missing:
            raise ValueError(f"evidence: {type(self).__name__} needs {', '.join(missing)}, which is not given")
        if keep == n:
            values = evidence.encoder_features if self.space == "encoder" else evidence.features
            return Reduction.select(values, torch.arange(n, device=values.device).expand(len(values), n))
        if evidence.crops and (not self.whole_picture or (self.thumbnail and evidence.frames is not None)):
            return self._by_crop(evidence, keep)
        return self.compress(evidence, keep)

    def _by_crop(self, evidence: Evidence, keep: int) -> Reduction:
        from vistok.core.allocate import split_budget

        sizes = torch.tensor([h * w for h, w in evidence.crops])
        shares = split_budget(sizes.double()[None], keep, capacity=sizes[None])[0].tolist()
        parts, first_token, first_slot = [], 0, 0
        for index, share in enumerate(shares):
            crop = evidence.crop(index)
            if share:
                part = self.reduce(crop, share)
                source = torch.where(part.source < 0, -1, part.source + first_slot)
                parts.append(Reduction(part.keep + first_token, part.tokens, source))
            else:
                empty = crop.features.new_empty(len(crop.features), 0, dtype=torch.int64)
                values = crop.encoder_features if self.space == "encoder" else crop.features
                gone = torch.full(crop.features.shape[:2], -1, device=empty.device)
                parts.append(Reduction(empty, values[:, :0], gone))
            first_token += crop.num_tokens
            first_slot += parts[-1].keep.shape[1]
        return Reduction(*(torch.cat([getattr(p, n) for p in parts], 1) for n in ("keep", "tokens", "source")))
