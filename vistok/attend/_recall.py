"""What claims of methods of attention are measured on: a small Llama that recalls values by their keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from vistok.catalogue.card import AttendTrial
from vistok.host import apply

KEYS = VALUES = FILLERS = 16


@dataclass(frozen=True)
class Recall:
    """Prompts of ``length`` tokens, 16 of which, anywhere, each say a key and its value, among fillers; and then a
    question for each key, in random order, which its value answers."""

    length: int = 64
    seed: int = 0

    def draw(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Prompts with their questions, (count, length + 16) int64, and the answers, (count, 16)."""
        values = torch.randint(VALUES, (count, KEYS), generator=rng)
        fillers = torch.randint(FILLERS, (count, self.length - KEYS), generator=rng) + KEYS * VALUES
        tokens = torch.cat([torch.arange(KEYS) * VALUES + values, fillers], 1)
        order = torch.rand(count, self.length, generator=rng).argsort(1)
        asked = torch.rand(count, KEYS, generator=rng).argsort(1)
        questions = asked + KEYS * VALUES + FILLERS
        return torch.cat([tokens.gather(1, order), questions], 1), values.gather(1, asked)

    def loss(self, model: Any, rng: torch.Generator) -> Tensor:
        """Of the answers, in 32 prompts."""
        ids, answers = self.draw(32, rng)
        return cross_entropy(model(ids).logits[:, self.length :].flatten(0, 1), answers.flatten())

    @torch.inference_mode()
    def accuracy(self, model: Any, method: Any = None, count: int = 128) -> float:
        """Share of the answers that are right, on prompts of its own; ``method``: with it in the model."""
        ids, answers = self.draw(count, torch.Generator().manual_seed(self.seed + 1_000_003))
        if method is None:
            logits = model(ids).logits
        else:
            with apply(model, method):
                logits = model(ids).logits
        return (logits[:, self.length :].argmax(2) == answers).float().mean().item()


def recall_model(trial: AttendTrial, steps: int, task: Recall) -> LlamaForCausalLM:
    """A Llama of two layers that was trained on ``task`` for ``steps`` steps."""
    torch.manual_seed(trial.seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=KEYS * VALUES + FILLERS + KEYS,
    )
    model = LlamaForCausalLM(config)
    trial.fit(model, steps, loss=task.loss, peak_lr=4e-3)
    return model
