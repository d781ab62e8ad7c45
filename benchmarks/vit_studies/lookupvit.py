"""One LookupViT trained with three numbers of compressed tokens, against three trained with one number each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vistok.bench.vit_trial import ViTTrial
from vistok.vit.lookupvit import Lookup, LookupViT, _Fixed, warm_start
from vistok.zoo.vit import to_pixels
from vistok.zoo.vit_tasks import ViTBatch
from vistok.zoo.vit_training import Loss

TITLE = "LookupViT: one network for many numbers of compressed tokens"


def study(trial: ViTTrial, quick: bool = False) -> Iterator[dict[str, Any]]:
    """Accuracy of each network at each number; all start from the zoo's classifier and see the same pictures."""
    steps, batch = (1, 4) if quick else (80, 32)
    vit = trial.classifier
    sizes = (2, 3, vit.patch_embed.grid_size[0] // 2)
    for trained in (sizes, *((size,) for size in sizes)):
        torch.manual_seed(trial.seed)
        model = network(vit, trained)
        trial.fit(model, steps, loss=drawn(trial.seed), peak_lr=1e-3, batch_size=batch)
        for size in sizes:
            yield {
                "trained with": " ".join(str(one * one) for one in trained),
                "asked with": size * size,
                "of": vit.patch_embed.num_patches,
                "steps": steps,
                "accuracy": trial.accuracy(model=_Fixed(model, (size, size))),
                "classifier": trial.accuracy(),
            }


def network(vit: Any, sizes: tuple[int, ...]) -> LookupViT:
    """A LookupViT of the shape of the timm ViT ``vit``, started from it."""
    side, patch = vit.patch_embed.grid_size[0], vit.patch_embed.patch_size[0]
    made = Lookup(side * patch, patch, vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads, sizes)
    model = made.build(vit.num_classes)
    warm_start(model, vit)
    return model


def drawn(seed: int) -> Loss:
    """Cross-entropy with a number drawn anew for each step from those of the network."""
    rng = torch.Generator().manual_seed(seed)

    def loss(model: LookupViT, batch: ViTBatch) -> tuple[Tensor, Tensor]:
        logits = model(to_pixels(batch.images), model.draw(rng)).float()
        return cross_entropy(logits, batch.label), (logits.argmax(1) == batch.label).float().mean()

    return loss
