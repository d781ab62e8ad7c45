"""A made-up trial for claims that train: a tiny classifier, pictures of noise, as many steps as asked for."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn.functional import cross_entropy


def tiny_vit(**given):
    """24 px pictures, 36 patches of 4 px and a class token, 4 blocks of width 16."""
    shape = dict(img_size=24, patch_size=4, embed_dim=16, depth=4, num_heads=2, num_classes=5) | given
    torch.manual_seed(0)
    return VisionTransformer(**shape).eval()


class MadeTrial:
    """Each model's accuracy is the next of ``figures``; the zoo's own classifier has ``plain``."""

    seed = 0

    def __init__(self, *figures, plain=0.9, size=24):
        self.classifier = tiny_vit(img_size=size, patch_size=size // 6)
        self.figures, self.plain, self.size = list(figures), plain, size
        self.trained = []

    def fit(self, model, steps, *, loss=None, peak_lr=3e-4, batch_size=32, dense=False, task="objects"):
        rng = torch.Generator().manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), peak_lr)
        model.train()
        losses = []
        for _ in range(steps):
            images = torch.randint(0, 256, (4, self.size, self.size, 3), generator=rng, dtype=torch.uint8)
            pixels = images.permute(0, 3, 1, 2) / 127.5 - 1
            batch = SimpleNamespace(images=images, pixels=pixels, label=torch.randint(5, (4,), generator=rng))
            if loss is None:
                value = cross_entropy(model(pixels), batch.label)
            else:
                value, right = loss(model, batch)
                assert 0 <= right <= 1
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.item())
        model.eval()
        self.trained.append((model, losses))
        return losses

    def accuracy(self, *, model=None):
        if model is None:
            return self.plain
        with torch.no_grad():
            assert len(model(torch.zeros(2, 3, self.size, self.size))) == 2
        return self.figures.pop(0)

    def score(self, task, model):
        return {"accuracy": self.accuracy(model=model)}
