"""CLCA: summaries of the blocks between reductions come back after them, and several layers are classified together.

What: around any method that reduces tokens. After each block the mean of the slots (GAP) and the state of some learned
tokens (carriers, in the sequence from the first block on) are put into a cache; after each reduction, and once more
before the last block, what the cache holds is appended as tokens, and it is emptied. The head (cross-layer
aggregation) reads the class token after each reduction and after the last block. Source: Rios et al., arXiv
2501.00243, arkel23/CLCA. Where: after the blocks of a ViT, and its classifier.

Departures: carriers are withheld from the reducer. In the released code they compete with the patches and may be
dropped, and "the carrier" is then whatever stands last: the fused token after a reduction of EViT, a recovered token
after a recovery. There the mean also covers carriers from the first reduction on (``parity="authors"``: all that).
Recovered tokens are ranked with the patches at the next reduction, in both. A carrier and its position code are one
parameter, begun at the class token with the code's noise. With a reducer that acts at the first block nothing is
recovered there, where the released code fails. The tokens that come back are counted by the session's ``flops``.

    model = CLCA(inner=EViT(keep=0.1)).build(vit, classes=18)   # trained as any classifier: model(pixels) is logits
    with vistok.apply(vit, CLCA(inner="topk", keep=0.1).method(vit)) as session: ...   # the cache alone
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vistok.catalogue import card, create
from vistok.catalogue.card import Card, Outcome, ViTTrial
from vistok.host import apply
from vistok.host.keep import Keep
from vistok.host.vit import Stage, TokenState, ViTReducer
from vistok.host.vit.models import vit_of
from vistok.host.vit.reducer import AddTokens, TokenStep

CARD = Card(
    title="Cross-Layer Cache Aggregation for Token Reduction in Ultra-Fine-Grained Image Recognition (CLCA)",
    kind="trained",
    site="after the blocks of an encoder with a token reducer in it, and its classification head",
    paper="Rios et al., 2024, arXiv 2501.00243",
    repository="arkel23/CLCA",
    mechanism=("attention",),
    needs=("a token reducer", "a class token, for the head"),
    select="that of the method it is around",
    merge="the mean of all slots after each block, given back as a token after the next reduction",
    claim="Pushes the kept tokens down to 10% while maintaining a competitive accuracy.",
    departures=("carriers are not ranked, and are found by their place and not as the last tokens",),
)

Parity = Literal["paper", "authors"]


class CrossLayerHead(nn.Module):
    """Logits (B, classes) of the class token at several layers, (B, dim, layers): each channel's layers are mixed by
    ``mult`` filters of its own, then all channels by a linear layer."""

    def __init__(self, dim: int, n_layers: int, classes: int, mult: int = 2) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm1d(dim),
            nn.Conv1d(dim, dim * mult, n_layers, groups=dim),
            nn.BatchNorm1d(dim * mult),
            nn.GELU(),
            nn.Conv1d(dim * mult, classes, 1),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        if self.training and len(tokens) < 2:
            raise ValueError("pictures: got 1 in training, must be 2 or more: the head norms over the batch")
        logits: Tensor = self.layers(tokens)
        return logits[:, :, 0]


@dataclass(frozen=True, eq=False)
class _Cache(TokenStep):
    """Puts summaries aside after each block, and gives them back after those of ``recoveries``; keeps class tokens."""

    reductions: tuple[int, ...]
    recoveries: tuple[int, ...]
    """() for no cache."""
    gap: bool
    carriers: int
    parity: Parity

    def stages(self, depth: int) -> Sequence[int]:
        return range(depth)

    def adds(self, stage: Stage) -> int:
        earlier = [layer for layer in self.recoveries if layer < stage.layer]
        since = stage.layer - (earlier[-1] if earlier else 0)
        return since * (self.gap + self.carriers) if stage.layer in self.recoveries else 0

    def act(self, state: TokenState, stage: Stage) -> TokenState:
        aside = dict(state.aside)
        if state.prefix and (stage.layer in self.reductions or stage.layer == stage.depth - 1):
            seen = state.x[:, :1]
            aside["class"] = torch.cat([aside["class"], seen], 1) if "class" in aside else seen
        if not self.recoveries or stage.layer > self.recoveries[-1]:
            return replace(state, aside=aside)
        mean = _mean(state, self._averaged(state, stage))
        if stage.layer in self.recoveries and "cache" in aside:
            state = state.add(aside.pop("cache"))
        if stage.layer < self.recoveries[-1]:
            summary = [mean] if self.gap else []
            if self.carriers:
                summary.append(self._carriers(state, stage))
            aside["cache"] = torch.cat([aside["cache"], *summary] if "cache" in aside else summary, 1)
        return replace(state, aside=aside)

    def _carriers(self, state: TokenState, stage: Stage) -> Tensor:
        """(B, carriers, C)"""
        if self.parity == "authors":
            return state.slots[:, -self.carriers :]
        if stage.layer == 0 and state.held != self.carriers:
            raise ValueError(
                f"method: clca found {state.held} added tokens at the first block and has {self.carriers}; other "
                "methods must add theirs at later blocks"
            )
        first = state.num_slots - state.held  # what other methods add comes behind
        return state.slots[:, first : first + self.carriers]

    def _averaged(self, state: TokenState, stage: Stage) -> int:
        """How many slots the mean is of: all but carriers and what came back since the last reduction."""
        free = state.num_slots - state.held
        if stage.layer in self.recoveries:
            return free
        earlier = [layer for layer in self.recoveries if layer < stage.layer]
        if earlier:
            return free - self.adds(replace(stage, layer=earlier[-1]))
        return free - (self.carriers if self.parity == "authors" else 0)


def _mean(state: TokenState, count: int) -> Tensor:
    """(B, 1, C): mean of the first ``count`` slots, of those that are not hidden."""
    slots = state.slots[:, :count]
    if state.visible is None:
        return slots.mean(1, keepdim=True)
    share = state.visible[:, :count, None].to(slots.dtype)
    return (slots * share).sum(1, keepdim=True) / share.sum(1, keepdim=True)


class CrossLayerCache(ViTReducer, nn.Module):
    """``inner`` with a cache around it: a method for ``vistok.apply``, whose parameters are the carriers ``clr``.

    ``reductions``, ``recoveries``: blocks at which tokens go, and after which the cache comes back. After a forward
    pass ``session.states[-1].aside["class"]`` is the class token after each reduction and the last block, (B, L, dim).
    Gradient checkpointing must be of the kind that is not reentrant.
    """

    def __init__(
        self,
        inner: ViTReducer,
        dim: int,
        depth: int,
        gap: bool = True,
        num_clr: int = 1,
        recover_last: bool = True,
        parity: Parity = "paper",
    ) -> None:
        super().__init__()
        self.inner = inner
        reducers = [step for step in inner.steps if isinstance(step, ViTReducer)]
        self.reductions = tuple(sorted({layer for step in reducers for layer in step.stages(depth)}))
        last = (depth - 2,) if recover_last and depth > 1 else ()
        recoveries = tuple(sorted({*self.reductions, *last})) if gap or num_clr else ()
        self.clr = nn.Parameter(0.02 * torch.randn(1, num_clr, dim))
        self.cache = _Cache(self.reductions, recoveries, gap, num_clr, parity)

    @property
    def proportional(self) -> bool:
        return self.inner.proportional

    @property
    def steps(self) -> Sequence[ViTReducer | TokenStep]:
        held = self.cache.parity == "paper"
        carriers = [AddTokens(self.clr, hold=held)] if self.cache.carriers else []
        return [*carriers, *self.inner.steps, self.cache]


class CrossLayerViT(nn.Module):
    """A copy of ``vit`` with ``method`` in it; ``head`` classifies, and where it is None the model's own.

    The method is in the model during ``forward`` only: with gradient checkpointing, put it in by hand and keep the
    backward pass inside that ``with``.
    """

    def __init__(self, vit: nn.Module, method: CrossLayerCache, head: CrossLayerHead | None) -> None:
        super().__init__()
        self.vit, self.method, self.head = copy.deepcopy(vit), method, head

    def forward(self, pixels: Tensor) -> Any:
        """Logits (B, classes); without ``head``, what the model returns."""
        session: Any
        with apply(self.vit, self.method) as session:
            if self.head is None:
                return self.vit(pixels)
            getattr(self.vit, "forward_features", self.vit)(pixels)
        return self.head(session.states[-1].aside["class"].transpose(1, 2))


@dataclass(frozen=True)
class CLCA:
    """A token reducer with the cache around it, and the head."""

    inner: str | ViTReducer = "evit"
    """The reducer: a system's name, or one that is made already."""
    keep: Keep | None = None
    """Of a reducer given by name: its own ``keep``; None is 0.1, the paper's lowest."""
    layers: tuple[int, ...] | None = None
    """Of a reducer given by name that acts at a few blocks: which; None for its own (3, 6, 9 of 12)."""
    gap: bool = True
    """Whether the mean of the slots is put into the cache."""
    num_clr: int = 1
    """Carriers, 0 or more."""
    recover_last: bool = True
    """Whether the cache comes back before the last block too."""
    head: bool = True
    """Whether the head of several layers classifies, instead of the model's own."""
    mult: int = 2
    """Filters a channel of that head."""
    parity: Literal["paper", "authors"] = "paper"
    """"authors": carriers are ranked with the patches, and are taken to be the last tokens, whatever stands there."""

    def __post_init__(self) -> None:
        if self.num_clr < 0 or self.mult < 1:
            raise ValueError(
                f"num_clr, mult: got {self.num_clr} and {self.mult}, must be 0 or more, and 1 or more filters"
            )
        if self.parity not in ("paper", "authors"):
            raise ValueError(f"parity: got {self.parity!r}, must be 'paper' or 'authors'")
        if not isinstance(self.inner, str) and not (self.keep is None and self.layers is None):
            raise ValueError(f"keep, layers: are for a reducer given by name; {self.inner!r} was made with its own")

    def reducer(self) -> ViTReducer:
        """The reducer that the cache is around. Raises ValueError where ``inner`` names none."""
        if not isinstance(self.inner, str):
            return self.inner
        given = {"keep": 0.1 if self.keep is None else self.keep, "layers": self.layers}
        known = card(self.inner).hyper
        made = create(self.inner, **{name: value for name, value in given.items() if name in known})
        if not isinstance(made, ViTReducer):
            raise ValueError(f"inner: got {self.inner!r}, must be a system that vistok.apply takes, such as 'evit'")
        return made

    def method(self, vit: nn.Module) -> CrossLayerCache:
        """The reducer with the cache around it, for ``vit``. Carriers begin at the class token, if there is one."""
        blocks = vit_of(vit).blocks
        dim = blocks[0].norm.weight.shape[0]
        made = CrossLayerCache(self.reducer(), dim, len(blocks), self.gap, self.num_clr, self.recover_last, self.parity)
        names = ("cls_token", "class_embedding")
        found = [p for name, p in vit.named_parameters() if name.rpartition(".")[2] in names]
        if found:
            with torch.no_grad():
                made.clr.add_(found[0].reshape(1, 1, dim))
        return made

    def build(self, vit: nn.Module, classes: int | None = None) -> CrossLayerViT:
        """A copy of ``vit`` to be trained. ``classes``: outputs of a new head, by default as many as timm's ``vit``
        has. Raises ValueError for a head without a class token."""
        method, host = self.method(vit), vit_of(vit)
        if not self.head:
            return CrossLayerViT(vit, method, None)
        if not host.class_token:
            raise ValueError(f"head: got True, but {type(vit).__name__} has no class token for it to read")
        layers = len({*method.reductions, len(host.blocks) - 1})
        outputs = getattr(vit, "num_classes", 0) if classes is None else classes
        if not outputs:
            raise ValueError(f"classes: got {classes}, must be the number of outputs of the head")
        return CrossLayerViT(vit, method, CrossLayerHead(method.clr.shape[2], layers, outputs, self.mult))


def claim(trial: ViTTrial, steps: int = 60) -> Outcome:
    """The abstract: competitive at a keep rate of 10%. Here EViT at that rate, alone and with cache and head around it.

    Both are fine-tuned for ``steps`` steps, with new classification heads, as the paper's are.
    """
    found, flops = [], []
    for system in (CLCA(gap=False, num_clr=0, head=False), CLCA()):
        torch.manual_seed(trial.seed)
        vit = trial.fresh()
        vit.reset_classifier(vit.num_classes)
        model = system.build(vit)
        trial.fit(model, steps, peak_lr=1e-3)
        found.append(trial.accuracy(model=model))
        flops.append(operations(model, trial.size))
    alone, cached = found
    note = f"{steps} steps each, {flops[1] / flops[0]:.2f} times the operations; not reduced: {trial.accuracy():.3f}"
    return Outcome("accuracy at keep rate 0.1, of EViT and with CLCA", alone, cached, cached > alone, note)


@torch.no_grad()
def operations(model: CrossLayerViT, size: int) -> int:
    """Floating-point operations of patches and blocks for one square picture of ``size`` pixels a side."""
    weight = next(model.vit.parameters())
    with apply(model.vit, model.method) as session:
        model.vit(weight.new_zeros(1, 3, size, size))
        flops: int = session.flops
    return flops
