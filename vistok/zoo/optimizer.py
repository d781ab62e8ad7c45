"""The optimizer of the small models, and checkpoints of a run: plain tensors in safetensors, no pickle."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Optimizer:
    """Muon for the matrices of the blocks, AdamW for the rest (embeddings, norms, heads, patch embedding)."""

    def __init__(self, modules: nn.Module, weight_decay: float) -> None:
        named = [(n, p) for n, p in modules.named_parameters() if p.requires_grad]
        matrices = {n for n, p in named if (p.ndim == 2 and ".layers." in n) or (p.ndim == 2 and ".blocks." in n)}
        inner, outer = ([p for n, p in named if (n in matrices) == where] for where in (True, False))
        self.parts: dict[str, torch.optim.Optimizer] = {}
        if inner:  # none where the blocks are frozen
            self.parts["muon"] = torch.optim.Muon(inner, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        if outer:
            self.parts["adamw"] = torch.optim.AdamW(outer, weight_decay=0.0, betas=(0.9, 0.98), fused=True)

    def step(self, lr: float) -> None:
        for part in self.parts.values():
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
            part.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"optimizer.{name}.{index}.{key}": torch.as_tensor(value)
            for name, part in self.parts.items()
            for index, state in part.state_dict()["state"].items()
            for key, value in state.items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        for name, part in self.parts.items():
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(f"optimizer.{name}."):
                    index, field = key.split(".")[2:]
                    state.setdefault(int(index), {})[field] = value
            part.load_state_dict({**part.state_dict(), "state": state})


def save_checkpoint(path: Path, modules: nn.Module, optimizer: Optimizer, step: int) -> None:
    """Write weights and optimizer state after ``step`` steps; the old checkpoint stays until the new one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.clone() for k, v in modules.state_dict().items()} | optimizer.tensors()
    temporary = path.with_suffix(".tmp")
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={"step": str(step)})
    os.replace(temporary, path)


def load_checkpoint(path: Path, modules: nn.Module, optimizer: Optimizer) -> int:
    """Put the state back and return the number of steps that were done."""
    tensors = load_file(path)
    modules.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("optimizer.")})
    optimizer.load(tensors)
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])
